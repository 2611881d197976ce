"""Is every kind of bad input an error that says what was given, what is possible, and what to do?"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn

from compile_attn.cache import CachedSequence, Chunk, PagedKVCache
from compile_attn.lm import PagedLM
from compile_attn.passes.report import RefusedError
from compile_attn.requests import Request
from compile_attn.sampling import Sampling
from tests.tiny import POSITIONS, VOCAB, TinyDecoder, alone, by_hand, layer_kv, prompts_of, tiny

SMALL: dict[str, Any] = {"kv_tokens": 48, "page_size": 4, "max_seqs": 2, "inner": "eager"}


@pytest.fixture(scope="module")
def lm() -> Iterator[PagedLM]:
    with PagedLM(tiny(), **SMALL) as made:
        yield made
        assert made.cache.pages_in_use == 0 and not made.has_work


# Requests


@pytest.mark.parametrize(
    ("prompts", "why"),
    [
        ([[]], r"no token ids: a prompt or chunk is empty; give at least one token"),
        ([[1], []], r"no token ids"),
        (
            [[1, VOCAB]],
            r"token id 31 is outside the model's vocabulary of 31 \(0 to 30\); use the model's own tokenizer",
        ),
        ([[1, -2]], r"token id -2 is negative"),
        ([[1.5]], r"they must be whole numbers"),
        ([1, 2, 3], r"prompts is one flat list; give a list of prompts"),
        (torch.tensor([1, 2, 3]), r"shape \(\); a sequence takes a flat list"),
        (
            [[1] * 49],
            r"a prompt of 49 tokens; the cache holds at most 48 a sequence: shorten the prompt, or make kv_",
        ),
    ],
)
def test_prompts(lm: PagedLM, prompts: Any, why: str) -> None:
    for ask in (lm.generate, lm.stream):
        with pytest.raises(ValueError, match=why):
            ask(prompts)
    assert not lm.has_work  # nothing of the others was queued


def test_a_prompt_longer_than_the_position_table() -> None:
    with PagedLM(tiny(), **{**SMALL, "kv_tokens": 256}) as lm:
        why = rf"a prompt of {POSITIONS + 1} tokens; the model's position table holds at most {POSITIONS} a sequence"
        with pytest.raises(ValueError, match=why):
            lm.submit([1] * (POSITIONS + 1))


def test_more_sequences_than_max_seqs_are_queued(lm: PagedLM) -> None:
    prompts = prompts_of([3, 4, 5, 6, 7])
    assert lm.generate(prompts, max_new_tokens=4) == [alone(tiny(), p, Sampling(max_new_tokens=4)) for p in prompts]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"temperature": -0.5}, r"temperature=-0.5; it must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, r"temperature=nan"),
        ({"temperature": float("inf")}, r"temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1.5"),
        ({"top_k": 0}, r"top_k=0; it must be a whole number of at least 1 \(None: off\)"),
        ({"top_k": 2.5}, r"top_k=2.5"),
        ({"seed": -1}, r"seed=-1; it must be a whole number of at least 0"),
        ({"max_new_tokens": 0}, r"max_new_tokens=0; it must be a whole number of at least 1"),
        ({"stop_ids": (3, -1)}, r"stop_ids=-1"),
        ({"n": 2}, r"n=2 answers at temperature=0 are all alike; choose a temperature above 0, or n=1"),
        ({"n": 0, "temperature": 1.0}, r"n=0; it must be a whole number of at least 1"),
    ],
)
def test_sampling(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Sampling(**changes)


def test_samplings_and_prompts_must_match(lm: PagedLM) -> None:
    with pytest.raises(ValueError, match="1 samplings for 2 prompts; give one for all, or one for each"):
        lm.generate([[1], [2]], [Sampling()])


# Construction


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kv_tokens": 50}, r"kv_tokens=50 is not a multiple of page_size=4; the nearest is 48"),
        ({"kv_tokens": 0}, r"kv_tokens=0; it must be a whole number of at least 1"),
        ({"kv_tokens": None}, r"kv_tokens=None sizes the cache from a GPU's memory, and the model is on cpu; give a number"),
        ({"page_size": -4}, r"page_size=-4; it must be a whole number of at least 1"),
        ({"max_seqs": 0}, r"max_seqs=0; it must be a whole number of at least 1"),
        ({"max_seqs": True}, r"max_seqs=True"),
        ({"max_batch_tokens": 0}, r"max_batch_tokens=0; it must be a whole number of at least 1"),
        ({"kernel": "fast"}, r"kernel='fast' is not known; choose one of 'auto', .*'reference'"),
        ({"inner": "jit"}, r"inner='jit' is not known; choose one of 'inductor', 'eager'"),
        ({"cuda_graphs": "always"}, r"cuda_graphs='always'; choose 'auto', True or False"),
        ({"kv_dtype": "int4"}, r"kv_dtype='int4' is not supported; choose 'auto' or one of float32, bfloat16, float16"),
        (
            {"kv_dtype": torch.float16},
            r"kv_dtype=torch.float16, but the model's parameters are torch.float32; use kv_dtype='auto'",
        ),
    ],
)
def test_settings(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        PagedLM(tiny(), **{**SMALL, **changes})


def test_only_modules() -> None:
    with pytest.raises(ValueError, match=r"model is a function; PagedLM takes a torch\.nn\.Module"):
        PagedLM(lambda ids: ids, **SMALL)  # type: ignore[arg-type]


def test_training_mode_with_dropout() -> None:
    model = nn.Sequential(tiny(), nn.Dropout(0.1)).train()
    with pytest.raises(ValueError, match=r"training mode and 1 \(Dropout\) has dropout 0.1; .* call model.eval\(\) first"):
        PagedLM(model, **SMALL)
    with PagedLM(model.eval(), **SMALL) as lm:
        model.train()
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            lm.generate([[1]])


def test_training_mode_without_dropout() -> None:
    with PagedLM(tiny().train(), **SMALL) as lm:
        assert lm.generate([[1, 2]], max_new_tokens=3) == [alone(tiny(), [1, 2], Sampling(max_new_tokens=3))]


class Answering(nn.Module):
    """The tiny model, returning something else."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.inner = tiny()
        self.answer = answer

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.answer(self.inner(input_ids))


@pytest.mark.parametrize(
    ("answer", "what"),
    [(lambda x: {"hidden": x}, "dict with hidden"), (lambda x: None, "NoneType"), (lambda x: (None, x), "tuple")],
)
def test_a_model_without_logits(answer: Any, what: str) -> None:
    said = rf"the model returned {what}, in which there are no logits|no output has a row per token, so there are no logits"
    with pytest.raises((ValueError, RefusedError), match=said):
        PagedLM(Answering(answer), **SMALL)


class Bag(nn.Module):
    """No attention at all."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.tok(input_ids))
        return logits


def test_a_model_without_attention() -> None:
    with pytest.raises((ValueError, RuntimeError), match="no attention"):
        PagedLM(Bag(), **SMALL)


def test_tensors_on_two_devices() -> None:
    model = tiny()
    model.head.to("meta")
    with pytest.raises(ValueError, match=r"the model's tensors are on cpu, meta; one device is supported: model.to\(device\)"):
        PagedLM(model, **SMALL)


# After the end


def test_use_after_close() -> None:
    with PagedLM(tiny(), **SMALL) as lm:
        request = lm.submit([1, 2])
        lm.step()
        stream = lm.stream([[1, 2]])
        next(stream)
        half_read = lm.stream([[1, 2]])
    uses = [
        lambda: lm.generate([[1]]),
        lambda: lm.stream([[1]]),
        lambda: lm.submit([1]),
        lambda: lm.cancel(request),
        lambda: next(stream),
        lambda: next(half_read),
        lm.step,
        lm.__enter__,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="this PagedLM is closed; make a new one"):
            use()
    lm.close()


def public(owner: type, kind: type) -> list[str]:
    """Methods or properties that a class shows."""
    return sorted(name for name, what in vars(owner).items() if isinstance(what, kind) and not name.startswith("_"))


ARITHMETIC = {"pages_for"}  # says nothing about the cache


@pytest.fixture(scope="module")
def closed_caches() -> list[tuple[PagedKVCache, CachedSequence]]:
    """One that has sequences and a batch which was run, and an empty one. What is refused changes neither."""
    found = []
    for kept in (True, False):
        with PagedLM(tiny(), **SMALL) as lm:
            seq = lm.cache.add() if kept else CachedSequence()
            if kept:
                lm._runner.logits([Chunk(seq, [1])])
        found.append((lm.cache, seq))
    return found


@pytest.mark.parametrize("name", sorted({*public(PagedKVCache, FunctionType)} - {"close", *ARITHMETIC}))
def test_every_method_of_a_closed_cache_is_refused(name: str, closed_caches: list[tuple[PagedKVCache, CachedSequence]]) -> None:
    for cache, seq in closed_caches:
        fitting = {
            "resize": [64], "find": [[1]], "kept": [seq], "pages_wanted": [seq, 1], "keep": [seq, [1]], "fork": [seq],
            "truncate": [seq, 0], "free": [seq], "batch": [[Chunk(seq, [1])]], "width_of": [[Chunk(seq, [1])]],
            "dead_batch": [(2, 2), 4], "check_inputs": [None, None], "bind": [[], None],
        }  # fmt: skip
        with pytest.raises(ValueError, match="this PagedKVCache is closed; make a new one"):
            getattr(cache, name)(*fitting.get(name, []))
        cache.close()


def test_what_can_be_read_of_a_closed_one() -> None:
    """Its report and what was counted; there are no pages any more."""
    pages = ("k_pages", "v_pages")
    with PagedLM(tiny(), **SMALL) as lm:
        lm.generate([[1, 2]], max_new_tokens=2)
        told = [(name, getattr(lm, name)) for name in public(PagedLM, property)]
        counted = [(name, getattr(lm.cache, name)) for name in public(PagedKVCache, property) if name not in pages]
    assert [(name, getattr(lm, name)) for name, _ in told] == told
    assert [(name, getattr(lm.cache, name)) for name, _ in counted] == counted
    for name in pages:
        with pytest.raises(ValueError, match="this PagedKVCache is closed"):
            getattr(lm.cache, name)


@pytest.fixture(scope="module")
def closed_server() -> tuple[PagedLM, Request]:
    """With a request that was not answered."""
    with PagedLM(tiny(), **SMALL) as lm:
        return lm, lm.submit([1, 2])


@pytest.mark.parametrize("name", sorted({*public(PagedLM, FunctionType)} - {"close"}))
def test_every_method_of_a_closed_server_is_refused(name: str, closed_server: tuple[PagedLM, Request]) -> None:
    lm, request = closed_server
    fitting = {"generate": [[[1]]], "stream": [[[1]]], "submit": [[1]], "cancel": [request], "fork": [request]}
    with pytest.raises(ValueError, match="this PagedLM is closed; make a new one"):
        getattr(lm, name)(*fitting.get(name, []))


# The cache by itself


def small_cache(**changes: Any) -> PagedKVCache:
    return PagedKVCache(**{"kv_tokens": 32, "page_size": 4, "max_seqs": 2, **changes})


def test_batches() -> None:
    cache, other = small_cache(max_seq_len=12), small_cache()
    a, b, c = cache.add(), cache.add(), cache.add()
    freed = cache.add()
    cache.free(freed)
    for chunks, why in (
        ([], r"a batch of 0 chunks; from 1 to max_seqs=2 fit in one step"),
        ([Chunk(a, [1]), Chunk(b, [1]), Chunk(c, [1])], r"a batch of 3 chunks"),
        ([Chunk(a, [1]), Chunk(a, [2])], r"a sequence occurs twice in one batch"),
        ([Chunk(other.add(), [1])], r"belongs to another cache"),
        ([Chunk(freed, [1])], r"CachedSequence\(length=0, pages=0, freed\) was freed"),
        ([Chunk(a, [])], r"no token ids"),
        (
            [Chunk(a, [1] * 13)],
            r"with 13 new tokens exceeds the limit of 12 tokens \(max_seq_len 12, position table unlimited\)",
        ),
    ):
        with pytest.raises(ValueError, match=why):
            cache.batch(chunks)
    with pytest.raises(ValueError, match="was freed"):
        cache.free(freed)
    assert cache.pages_in_use == a.length == 0
    cache.max_tokens = 3
    with pytest.raises(ValueError, match="a batch of 4 new tokens; this model takes at most 3 a step: split"):
        cache.batch([Chunk(a, [1] * 4)])


def test_a_batch_must_be_run_before_the_next() -> None:
    cache = small_cache()
    seq, other = cache.add(), cache.add()
    with pytest.raises(ValueError, match=r"called before any batch was made; call cache.batch\(\[\.\.\.\]\) first"):
        cache.step_inputs()
    cache.batch([Chunk(seq, [1, 2])])
    with pytest.raises(ValueError, match=r"was in a batch that was never run, so its newest keys and values are missing"):
        cache.batch([Chunk(other, [1]), Chunk(seq, [3])])
    cache.free(seq)
    cache.batch([Chunk(other, [1])])


def test_only_the_batchs_own_tensors() -> None:
    model, cache = tiny(), small_cache()
    step = by_hand(model, cache)
    with pytest.raises(ValueError, match="before any batch"):
        step(torch.tensor([[1, 2]]))
    batch = cache.batch([Chunk(cache.add(), [1, 2])])
    with pytest.raises(ValueError, match=r"input_ids of shape \(1, 2\) on cpu is not the current batch's own tensor"):
        step(batch.input_ids.clone())
    cache.batch([Chunk(cache.add(), [1, 2, 3])])
    with pytest.raises(ValueError, match=r"pass batch.input_ids of the last cache.batch\(\) unchanged"):
        step(batch.input_ids)


def test_binding() -> None:
    from dataclasses import replace

    cache = small_cache()
    cache.bind([layer_kv()], owner="first")
    with pytest.raises(
        ValueError, match="already serves a model with 1 attention sites, and a cache serves one model; make another"
    ):
        cache.bind([layer_kv()], owner="second")
    with pytest.raises(ValueError, match="was compiled with 1 attention sites and now has 2"):
        cache.bind([layer_kv()] * 2, owner="first")
    with pytest.raises(
        ValueError,
        match=r"site 1 of the model is on meta, the cache on cpu; make it with PagedKVCache\(device='meta'\)",
    ):
        small_cache().bind([layer_kv(), replace(layer_kv(), device=torch.device("meta"))], owner=0)
    with pytest.raises(
        ValueError,
        match=r"site 0 of the model has keys of torch.float32, the cache holds torch.float16; .* kv_dtype='auto'",
    ):
        small_cache(kv_dtype="float16").bind([layer_kv()], owner=0)


def compiled(model: nn.Module, cache: PagedKVCache, **options: Any) -> Any:
    return torch.compile(model, backend="paged_attn", options={"cache": cache, "inner": "eager", **options})


def test_a_second_model_on_a_bound_cache() -> None:
    cache = small_cache()
    first, second = tiny(), TinyDecoder(seed=1).eval().requires_grad_(False)
    seq = cache.add()
    compiled(first, cache)(cache.batch([Chunk(seq, [1, 2, 3])]).input_ids)
    batch = cache.batch([Chunk(seq, [4])])
    with pytest.raises(ValueError, match="a cache serves one model"):
        compiled(second, cache)(batch.input_ids)


def test_options_of_the_backend() -> None:
    cache = small_cache()
    batch = cache.batch([Chunk(cache.add(), [1, 2, 3])])
    with pytest.raises(ValueError, match="unknown option 'kernle'; known options are kernel, on_rejected, cache, inner"):
        compiled(tiny(), cache, kernle="auto")(batch.input_ids)
    with pytest.raises(ValueError, match="kernel='fast' is not known; choose one of 'auto'"):
        compiled(tiny(), cache, kernel="fast")(batch.input_ids)


def test_other_inputs_than_the_batchs() -> None:
    cache = small_cache()
    step = compiled(tiny(), cache)
    batch = cache.batch([Chunk(cache.add(), [1, 2, 3])])
    step(batch.input_ids)
    with pytest.raises(ValueError, match="not the current batch's own tensor"):
        step(batch.input_ids.clone())

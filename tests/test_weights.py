"""Are merged weights one memory, made once, and does a compiled model run on them whatever happens to its parameters?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef

import compile_attn as ca
from bench.naive_llama import NaiveLlama, Shape
from compile_attn.passes import weights as room
from tests.models.families import enliven
from tests.models.handwritten_more import VOCAB, decoder
from tests.models.harness import assert_same_logits, assert_same_tokens, paged, recomputed
from tests.tiny import as_on_a_gpu

PROMPTS = [[5, 3, 8, 1], [7], list(range(20))]
GROUPS = 4  # of the model below: q, k, v and gate, up of two layers


def llama(seed: int = 0) -> NaiveLlama:
    torch.manual_seed(seed)
    model = NaiveLlama(Shape(32, 48, 2, 4, 2, 61, theta=100.0))
    enliven(model)
    return model.eval()


def lm_of(model: nn.Module, **changes: Any) -> ca.PagedLM:
    return ca.PagedLM(model, **{"kv_tokens": 128, "page_size": 4, "max_seqs": 4, "inner": "eager", **changes})


def storages(model: nn.Module) -> dict[int, int]:
    """Bytes by address of every memory that parameters lie in."""
    found = (parameter.untyped_storage() for parameter in model.parameters())
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def expected(model: nn.Module, count: int = 6) -> list[list[int]]:
    return [recomputed(model, prompt, count) for prompt in PROMPTS]


@pytest.mark.parametrize("bias", [False, True])
def test_merged_or_not_the_same_tokens(bias: bool) -> None:
    model = llama()
    if bias:  # of q, k and v, as Qwen2 has them
        for block in model.blocks:
            for linear in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj):
                linear.bias = nn.Parameter(torch.randn(linear.out_features))
    want, before = expected(model), model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    with lm_of(model, merge_linears=False) as apart, lm_of(model) as merged, lm_of(model) as again:
        for lm in (apart, merged, again, apart):
            assert lm.generate(PROMPTS, max_new_tokens=6) == want
        reports = [lm.report for lm in (apart, merged, again)]
    kinds = [[one.kind for one in report.linears] for report in reports if report is not None]
    assert kinds == [[], ["merged"] * GROUPS, ["merged"] * GROUPS]
    assert expected(model) == want
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["bmm_parallel", "looped_moe", "complex_rope"])
def test_decoders_of_all_kinds_apart(name: str) -> None:
    """Merged is the default, so every other test of families and decoders is one of merging; here is the other way."""
    model = decoder(name)
    enliven(model)
    case = paged(model.eval().requires_grad_(False), VOCAB)
    apart = lm_of(model, kv_tokens=256, merge_linears=False)
    answers = assert_same_tokens(case)
    assert_same_logits(case, answers)
    assert apart.generate(list(case.prompts), max_new_tokens=len(answers[0])) == answers
    assert apart.report is not None and not apart.report.linears


def test_memory_is_not_doubled() -> None:
    model = llama()
    before, names = storages(model), list(model.state_dict())
    with lm_of(model):
        after = storages(model)
    assert sum(after.values()) == sum(before.values()) and list(model.state_dict()) == names
    q, k, v = (getattr(model.blocks[0].attention, f"{name}_proj").weight for name in "qkv")
    assert k.data_ptr() == q.data_ptr() + q.nbytes and v.data_ptr() == k.data_ptr() + k.nbytes
    assert len(after) == len(before) - 2 * (2 + 1)


def test_one_group_more_is_the_most_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old memory of each group is gone before the next is joined."""
    model = llama()
    old = {p.data_ptr(): (StorageWeakRef(p.untyped_storage()), p.nbytes) for p in model.parameters()}
    seen: list[int] = []

    def watched(weights: list[Tensor], joined: Any) -> Tensor:
        mine = [old[weight.data_ptr()][0] for weight in weights]
        made = join(weights, joined)
        assert all(one.expired() for one in mine)
        seen.append(made.nbytes)
        return made

    join = room.join
    monkeypatch.setattr(room, "join", watched)
    with lm_of(model):
        left = sum(size for ref, size in old.values() if not ref.expired())
    assert len(seen) == GROUPS and left + sum(seen) == sum(size for _, size in old.values())


def test_nothing_is_moved_twice() -> None:
    model = llama()
    with lm_of(model):
        first = addresses(model)
        with lm_of(model):
            assert addresses(model) == first


def test_one_compilation_and_no_guard_that_fails() -> None:
    model = llama()
    plain = torch.compile(model, backend="eager", dynamic=True)
    ids = torch.tensor([PROMPTS[2]])
    want = plain(ids)
    counters.clear()
    with lm_of(model, max_batch_tokens=9) as lm:
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:2] * 4):
            lm.generate(prompts, max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(plain(ids), want, atol=0, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1, "what was compiled before still holds"


def test_loading_and_replacing_weights_is_seen() -> None:
    model, other = llama(), llama(seed=1)
    for block in other.blocks:
        block.gate_proj.weight.data.mul_(-1)
    want = expected(other)
    with lm_of(model) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=6) != want
        model.load_state_dict(other.state_dict())
        assert lm.generate(PROMPTS, max_new_tokens=6) == want
        model.blocks[0].up_proj.weight.data = -model.blocks[0].up_proj.weight.data
        assert lm.generate(PROMPTS, max_new_tokens=6) == expected(model) != want


def test_recorded_steps_follow_weights_that_move() -> None:
    """A step recorded with addresses that another compilation has freed would read whatever is there now."""
    model = llama()
    with as_on_a_gpu(lm_of(model, merge_linears=False)) as lm:
        want = expected(model)
        assert lm.generate(PROMPTS, max_new_tokens=6) == want
        recorded = lm.cuda_graphs
        assert lm.generate(PROMPTS, max_new_tokens=6) == want and lm.cuda_graphs == recorded != ()
        with lm_of(model):
            pass
        assert lm.generate(PROMPTS, max_new_tokens=6) == want and not set(lm.cuda_graphs) & set(recorded)


def test_a_cache_still_knows_its_model() -> None:
    model, other = llama(), llama(seed=1)
    cache = ca.PagedKVCache(kv_tokens=64, page_size=4, max_seqs=2)
    options = {"cache": cache, "inner": "eager"}
    for _ in range(2):  # compiled twice against one cache: the parameters have moved between, and are the same
        step = torch.compile(model, backend="paged_attn", options=options)
        with torch.no_grad():
            step(cache.batch([ca.Chunk(cache.add(), [1, 2, 3])]).input_ids)
            torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(ValueError, match="this cache already serves a model"):
        torch.compile(other, backend="paged_attn", options=options)(cache.batch([ca.Chunk(cache.add(), [1, 2])]).input_ids)


@pytest.mark.parametrize("as_served", [lambda lm: lm, as_on_a_gpu], ids=["as on a CPU", "as on a GPU"])
def test_replaced_data_and_a_compilation_anew(as_served: Callable[[ca.PagedLM], ca.PagedLM]) -> None:
    """Two graphs of one model, one with merged linears and one with the replaced one apart, to and fro."""
    model = llama()
    key = model.blocks[0].attention.k_proj.weight
    with as_served(lm_of(model)) as lm, torch.no_grad():
        assert lm.generate(PROMPTS, max_new_tokens=6) == expected(model)
        for theta in (10.0, 100.0, 10.0):
            key.data = key.data.flip(0)
            model.shape = replace(model.shape, theta=theta)
            assert lm.generate(PROMPTS, max_new_tokens=6) == expected(model)
        assert lm.cache.compilations == 2


def test_stateless_only_when_asked() -> None:
    model, ids = llama(), torch.tensor([PROMPTS[2], PROMPTS[2]])
    with torch.no_grad():
        want, before = model(ids), addresses(model)
        torch.testing.assert_close(torch.compile(model, backend="paged_attn", options={"inner": "eager"})(ids), want)
        assert addresses(model) == before
        torch._dynamo.reset()
        for inner in ("eager", "inductor"):
            fast = torch.compile(model, backend="paged_attn", options={"inner": inner, "merge_linears": True})
            torch.testing.assert_close(fast(ids), want, atol=1e-5, rtol=0)
            torch._dynamo.reset()
        assert addresses(model) != before


def test_gradients_keep_linears_apart() -> None:
    model, ids = llama(), torch.tensor([PROMPTS[2]])
    before = addresses(model)
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager", "merge_linears": True, "kernel": "sdpa"})
    want = torch.autograd.grad(model(ids).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(fast(ids).square().sum(), list(model.parameters()))
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    assert addresses(model) == before


def test_the_report_tells() -> None:
    model = llama()
    model.blocks[0].attention.v_proj.weight.register_hook(lambda grad: grad)
    with lm_of(model) as lm:
        report = lm.report
    assert report is not None
    assert report.summary().endswith("2 token rewrites, 4 groups of linears merged")
    text = str(report)
    assert "v_proj.weight has hooks, which may count on where it lies" in " ".join(text.replace("│", " ").split())
    assert "gate_proj.weight, up_proj.weight: one product of 48 + 48" in text and "blocks.0 ... blocks.1 (2)" in text
    assert "+input joined_weight_0: float32[48, 32]" in report.diff() and ">Linears</h2>" in report.to_html()

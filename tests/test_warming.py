"""Is nothing left to record or compile after a warm-up, and does it leave no trace?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from compile_attn.cache import Chunk
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from compile_attn.step import StepBuffers
from compile_attn.warming import full_step
from tests.test_fuzz import GEOMETRIES
from tests.tiny import alone, as_on_a_gpu, prompts_of, tiny

PROMPTS = prompts_of([5, 1, 9, 14, 2, 7], seed=3)
SETTINGS: dict[str, Any] = {"kv_tokens": 256, "page_size": 4, "max_seqs": 8, "inner": "eager", "poison": True}


def kinds(lm: PagedLM) -> list[tuple[int, int, int, bool]]:
    return [(one.rows, one.new_tokens, one.tokens, one.random) for one in lm.cuda_graphs]


PROMPT_SIZES = [(8, 63), (2, 63), (8, 32), (2, 32), (8, 16), (2, 16)]  # a step of this model has at most 63 tokens


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block tables of 24, 48, ... tokens, of which a sequence of this model has at most 64."""
    monkeypatch.setattr(StepBuffers, "width", lambda self, pages, page_size: -(-pages // 6) * 6)


@pytest.mark.usefixtures("narrow")
def test_after_a_warm_up_nothing_is_recorded() -> None:
    greedy, drawn = Sampling(max_new_tokens=40), Sampling(max_new_tokens=40, temperature=0.9, seed=4)
    with as_on_a_gpu(PagedLM(tiny(), **SETTINGS)) as lm:
        lm.warm_up()
        sizes = [*PROMPT_SIZES, *((rows, rows) for rows in (8, 4, 2))]
        assert kinds(lm) == [(*size, tokens, False) for size in sizes for tokens in (72, 48, 24)]
        lm.warm_up(random=True)
        assert kinds(lm)[27:] == [(*size, tokens, True) for size in sizes for tokens in (72, 48, 24)]
        assert all(one.seconds > 0 for one in lm.cuda_graphs)
        for how in (greedy, drawn):
            assert lm.generate(PROMPTS, how) == [alone(tiny(), prompt, how) for prompt in PROMPTS]
        lm.warm_up(random=True)
        assert len(lm.cuda_graphs) == 54 and lm.cache.pages_in_use == 0


@pytest.mark.usefixtures("narrow")
def test_only_what_is_asked_for() -> None:
    with as_on_a_gpu(PagedLM(tiny(), **SETTINGS)) as lm:
        lm.warm_up(rows=3, tokens=25, random=True)
        sizes = [*PROMPT_SIZES, (4, 4), (2, 2)]
        assert kinds(lm) == [(*size, tokens, drawn) for size in sizes for tokens in (48, 24) for drawn in (True, False)]
        for wrong in ({"rows": 9}, {"tokens": 65}, {"rows": 0}, {"tokens": True}):
            with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*; (at most (8|64) can be served|it must be)"):
                lm.warm_up(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["one by one", "as on a GPU"])
@pytest.mark.parametrize(
    "geometry", [*GEOMETRIES, {"kv_tokens": 4, "page_size": 4, "max_seqs": 1}, {"kv_tokens": 1, "page_size": 1}]
)
def test_the_steps_fit_whatever_the_cache(geometry: dict[str, Any], way: str) -> None:
    with PagedLM(tiny(), inner="eager", poison=True, **geometry) as lm:
        if way == "as on a GPU":
            as_on_a_gpu(lm)
        before = lm.cache.steps_run
        lm.warm_up(random=True)
        assert lm.cache.steps_run > before and lm.cache.pages_in_use == 0
        assert bool(lm.cuda_graphs) == (way == "as on a GPU")
        prompt, how = PROMPTS[1], Sampling(max_new_tokens=3)
        want = alone(tiny(), prompt, how, limit=lm.cache.length_limit)
        assert lm.generate([prompt], how) == [want]


def test_it_has_its_time_before_the_first_request() -> None:
    with as_on_a_gpu(PagedLM(tiny(), **SETTINGS)) as lm:
        request = lm.submit([1, 2, 3])
        with pytest.raises(ValueError, match="while requests are unfinished; call it before the first"):
            lm.warm_up()
        lm.cancel(request)
        lm.warm_up(rows=2)
        seq = lm.cache.add()
        lm.cache.batch([Chunk(seq, [1, 2, 3, 4, 5])])
        with pytest.raises(ValueError, match="while 2 pages of the cache are in use; free their sequences first"):
            lm.warm_up()
        lm.cache.free(seq)
        lm.warm_up(rows=2)
    with pytest.raises(ValueError, match="closed"):
        lm.warm_up()


@pytest.mark.parametrize(
    ("budget", "max_seqs", "each"),
    [(10, 4, [3, 3, 2, 2]), (8, 4, [2, 2, 2, 2]), (3, 4, [1, 1, 1]), (7, 1, [7]), (5, 3, [2, 2, 1]), (63, 2, [32, 31])],
)
def test_a_full_step_shares_all_its_tokens(budget: int, max_seqs: int, each: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not divide evenly goes to the first sequences: left out, the peak would be measured too small."""
    ran: list[list[int]] = []
    with PagedLM(tiny(), kv_tokens=256, page_size=4, max_seqs=max_seqs, inner="eager") as lm:
        logits = lm._runner.logits

        def watched(chunks: Sequence[Chunk], width: int = 0) -> torch.Tensor:
            ran.append([len(chunk.tokens) for chunk in chunks])
            return logits(chunks, width)

        monkeypatch.setattr(lm._runner, "logits", watched)
        full_step(lm._runner, lm.cache, budget)
        assert lm.cache.pages_in_use == 0
    assert ran == [each]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("budget", [1, 5, 100])
def test_prompts_of_every_width(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels may differ by the width of the block table, and a prompt is no decode."""
    ran: list[tuple[int, int, int]] = []
    with PagedLM(tiny(), max_batch_tokens=budget, **SETTINGS) as lm:
        logits = lm._runner.logits

        def watched(chunks: Sequence[Chunk], width: int = 0) -> torch.Tensor:
            out = logits(chunks, width)
            assert lm.cache.current is not None
            ran.append((len(chunks), lm.cache.current.num_tokens, lm.cache.current.width * 4))
            return out

        monkeypatch.setattr(lm._runner, "logits", watched)
        lm.warm_up()
        assert lm.cache.pages_in_use == 0
    if budget == 1:
        assert ran == [(1, 1, 24), (1, 1, 48), (1, 1, 72)]
    elif budget == 5:
        assert ran == [(2, 2, 24), (3, 5, 24), (2, 2, 24), (3, 5, 48), (2, 2, 24), (3, 5, 72)]
    else:
        mixed = [each for each in ran if each[1] > each[0]]
        assert mixed == [(8, 7 + 24, 24), (8, 7 + 48, 48), (8, 63, 72)]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch's advice, which would change the tokens
def test_a_warm_gpu_records_and_compiles_nothing() -> None:
    how = Sampling(max_new_tokens=30)
    with PagedLM(tiny().cuda(), cuda_graphs=True, **{**SETTINGS, "inner": "inductor"}) as lm:
        lm.warm_up(random=True)
        recorded, compiled = lm.cuda_graphs, torch._dynamo.utils.counters["inductor"].copy()
        assert {one.random for one in recorded} == {True, False} and {one.rows for one in recorded} == {8, 4, 2}
        assert lm.generate(PROMPTS, how) == [alone(tiny(), prompt, how) for prompt in PROMPTS]
        assert lm.cuda_graphs == recorded and torch._dynamo.utils.counters["inductor"] == compiled


@pytest.mark.gpu
def test_a_changed_model_is_recorded_into_memory_of_its_own() -> None:
    model = tiny().cuda()
    with PagedLM(model, cuda_graphs=True, **SETTINGS) as lm:
        lm.warm_up()
        model.pos.weight.data = model.pos.weight.data.flip(0).contiguous()
        lm.warm_up()
        how = Sampling(max_new_tokens=9)
        want = [alone(model.cpu(), prompt, how) for prompt in PROMPTS]
        model.cuda()
        assert lm.generate(PROMPTS, how) == want

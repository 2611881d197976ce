"""Do kernels that plan on the host hear of every step what it will be, and is a repeated step planned once?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from compile_attn import host_plans
from compile_attn.cache import Chunk, PagedKVCache
from compile_attn.kernels.backend import Backend, HostStep, PlannedSite
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.lm import PagedLM
from compile_attn.pages import OutOfPages
from compile_attn.sampling import Sampling
from tests.tiny import POSITIONS, alone, as_on_a_gpu, by_hand, prompts_of, tiny

PROMPTS = prompts_of([5, 1, 9, 14, 2, 7], seed=3)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[HostStep, list[int], list[int]]]:
    """Steps that a kernel is told of, and the lengths as they were then."""
    steps: list[tuple[HostStep, list[int], list[int]]] = []

    class Planner(Backend):
        def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
            assert len(sites) == 1, "equal sites share a plan"
            steps.append((step, step.seq_lens.tolist(), step.query_lens.tolist()))

    planner = Planner()
    monkeypatch.setattr(host_plans, "backend", lambda name: planner)
    return steps


def planned(cache: PagedKVCache) -> None:
    spec = AttentionSpec(2, 2, 8, 8)
    cache._host_plans.bind([("planner", spec)] * 2, [(torch.float32, torch.float32)] * 2)


def test_an_advanced_step_is_told_as_if_it_were_new(heard: list[Any]) -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", kv_tokens=256, page_size=4, max_seqs=8)) as lm:
        planned(lm.cache)
        advance, advanced = lm.cache.advance, list[int]()

        def checked() -> Any:
            before = len(heard)
            batch = advance()
            [(step, lengths, new)] = heard[before:]
            seqs = lm.cache._in_batch
            pads = [0] * (batch.shape[0] - len(seqs))
            assert lengths == [*(seq.length for seq in seqs), *pads] and new == [*[1] * len(seqs), *pads]
            assert step.captured and step.block_table.data_ptr() == lm.cache.buffers.views(batch)[0].data_ptr()
            assert lm.cache.buffers.views(batch)[1].tolist() == lengths, "as the device has counted"
            advanced.append(len(seqs))
            return batch

        lm.cache.advance = checked  # type: ignore[method-assign]
        for at, prompt in enumerate(PROMPTS):
            lm.submit(prompt, Sampling(max_new_tokens=9 + 4 * at))
        while lm.has_work:
            lm.step()
        assert len(advanced) > 5 and len(set(advanced)) > 1
        assert all(step.seq_lens.tolist() == lengths for step, lengths, _ in heard), "a plan may be made again, later"


def test_a_steady_step_is_planned_once() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", kv_tokens=512, page_size=4, max_seqs=8)) as lm:
        plans: list[Any] = []
        send = lm._runner.send
        lm._runner.send = lambda plan: plans.append(plan) or send(plan)  # type: ignore[method-assign, func-returns-value]
        how = Sampling(max_new_tokens=30)
        requests = [lm.submit(prompt, how) for prompt in PROMPTS]
        for _ in range(20):
            lm.step()
        assert len({id(plan) for plan in plans[3:]}) == 1
        lm.cancel(requests[2])
        requests.append(lm.submit(PROMPTS[2], how))
        while lm.has_work:
            lm.step()
        for request, prompt in zip(requests, [*PROMPTS, PROMPTS[2]], strict=True):
            want = alone(tiny(), prompt, how)
            assert request.new_tokens == (want[: len(request.new_tokens)] if request.reason == "cancelled" else want)
            assert request.reason == ("cancelled" if request is requests[2] else "length")


@pytest.mark.parametrize(("kv_tokens", "max_seqs"), [(66, 8), (512, 3)], ids=["pages", "rows"])
def test_who_waits_costs_no_plan(kv_tokens: int, max_seqs: int) -> None:
    """Pages or rows are all given out; as soon as some come free, the next request has them."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", page_size=1, kv_tokens=kv_tokens, max_seqs=max_seqs)) as lm:
        plans: list[Any] = []
        send = lm._runner.send
        lm._runner.send = lambda plan: plans.append(plan) or send(plan)  # type: ignore[method-assign, func-returns-value]
        how = Sampling(max_new_tokens=6)
        requests = [lm.submit(prompt, how) for prompt in prompts_of([16] * 6)]
        for _ in range(5):
            lm.step()
        assert len(plans[-1].sampled) == 3 and len({id(plan) for plan in plans[2:]}) == 1
        lm.cancel(requests[1])
        lm.step()
        assert requests[3].seq is not None
        while lm.has_work:
            lm.step()
        for at, (request, prompt) in enumerate(zip(requests, prompts_of([16] * 6), strict=True)):
            assert at == 1 or request.new_tokens == alone(tiny(), prompt, how)


def test_a_steady_step_takes_one_call_a_row() -> None:
    """The host's time for a step, in a number that is the same on every machine: calls of Python functions."""
    rows = 40
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", kv_tokens=64 * rows, page_size=16, max_seqs=rows)) as lm:
        for at in range(rows):
            lm.submit([at % 31], Sampling(max_new_tokens=60))
        for _ in range(8):
            lm.step()
        graphs = lm._runner.graphs
        assert graphs is not None
        graphs._steps = dict.fromkeys(graphs._steps, lambda: None)  # a device that takes no time
        calls: list[str] = []
        sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
        try:
            for _ in range(10):
                lm.step()
        finally:
            sys.setprofile(None)
        assert 10 * rows < len(calls) < 10 * (rows + 60)  # an Output a row, whatever the number of rows


def test_when_a_batch_can_be_advanced() -> None:
    cache = PagedKVCache(kv_tokens=24, page_size=4, max_seqs=4)
    step = by_hand(tiny(), cache)
    a, b, c = cache.add(), cache.add(), cache.add()

    def run(*chunks: Chunk) -> None:
        step(cache.batch(chunks).input_ids)

    run(Chunk(a, [1, 2, 3]), Chunk(b, [4]))
    assert cache.advanced_width() is None, "not a step of decodes"
    cache.batch([Chunk(a, [1]), Chunk(b, [4])])
    assert cache.advanced_width() is None, "not run yet"
    step(cache.current.input_ids)  # type: ignore[union-attr]
    assert cache.advanced_width() == 6 and (a.length, len(a.pages)) == (4, 1)
    cache.advance()
    assert (a.length, b.length, len(a.pages), len(b.pages)) == (5, 3, 2, 1) and a.unrun and b.unrun
    assert cache.buffers.views(cache.current)[0][:2, :2].tolist() == [[*a.pages], [*b.pages, 0]]  # type: ignore[arg-type]
    assert cache.advanced_width() is None
    cache.replayed()
    assert cache.advanced_width() == 6 and not a.unrun
    cache.free(c)
    assert cache.advanced_width() is None, "it could have been one of the batch"
    run(Chunk(a, [1]), Chunk(b, [4]))
    cache.dead_batch((2, 2, 2), 6)
    cache.replayed()
    assert cache.advanced_width() is None
    cache.max_positions = a.length + 1
    run(Chunk(a, [1]), Chunk(b, [4]))
    assert cache.advanced_width() is None, f"as long as it may be; the model itself has {POSITIONS}"


def test_advancing_without_a_page_changes_nothing() -> None:
    cache = PagedKVCache(kv_tokens=8, page_size=4, max_seqs=2)
    step = by_hand(tiny(), cache)
    a, b = cache.add(), cache.add()
    step(cache.batch([Chunk(a, [1, 2, 3]), Chunk(b, [1, 2, 3])]).input_ids)
    step(cache.batch([Chunk(a, [4]), Chunk(b, [4])]).input_ids)
    with pytest.raises(OutOfPages, match="2 pages are needed, 0 of 2 are free"):
        cache.advance()
    assert (a.length, b.length, len(a.pages), len(b.pages)) == (4, 4, 1, 1) and cache.advanced_width() == 2

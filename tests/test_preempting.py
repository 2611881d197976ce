"""Does a request that makes room for others go on from host memory as if nothing had been, and is that memory given back?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from compile_attn.swap_cost import SwapCost
from tests.test_shared_requests import masked, tokens_run
from tests.tiny import alone, as_on_a_gpu, prompts_of, tiny

PROMPTS = prompts_of([9, 9, 6], seed=3)
HOW = Sampling(max_new_tokens=20)
SMALL: dict[str, Any] = {"kv_tokens": 48, "page_size": 4, "max_seqs": 4, "inner": "eager", "prefix_cache": False, "poison": True}


@pytest.fixture(autouse=True)
def moving_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SwapCost, "prefers_swap", lambda self, held, missing: held == missing > 0)


@pytest.fixture
def lm() -> Iterator[PagedLM]:
    with PagedLM(tiny(), swap_tokens=48, **SMALL) as made:
        yield made


def host_tokens(lm: PagedLM) -> int:
    preempting = lm._scheduler.preempting
    assert preempting is not None
    return preempting.space.free_tokens


def until_one_is_out(lm: PagedLM) -> None:
    while not any(request.swapped for request in lm._scheduler._waiting):
        lm.step()


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("name", ["all keys", "window", "block sparse"])
def test_nothing_is_computed_twice(name: str, ahead: bool) -> None:
    model = tiny() if name == "all keys" else masked(name)
    for how in (HOW, Sampling(temperature=0.9, seed=4, max_new_tokens=20)):
        with PagedLM(model, swap_tokens=48, **SMALL) as lm:
            counts = tokens_run(as_on_a_gpu(lm) if ahead else lm)
            assert lm.generate(PROMPTS, how) == [alone(model, prompt, how) for prompt in PROMPTS]
            assert lm.swaps == lm.preemptions > 0
            spare = 2 * len(PROMPTS) if ahead else 0  # a step is sent before the end of a request is read
            assert 0 <= sum(counts) - sum(len(prompt) + 19 for prompt in PROMPTS) <= spare
            assert host_tokens(lm) == 48 and lm.cache.pages_in_use == 0


def test_pages_of_fp8_are_moved() -> None:
    settings: dict[str, Any] = {"kv_dtype": "fp8_e4m3", "kv_scales": [(0.1, 0.1)] * 2}
    with (
        PagedLM(tiny(), swap_tokens=48, **SMALL, **settings) as lm,
        PagedLM(tiny(), **{**SMALL, "kv_tokens": 256}, **settings) as roomy,
    ):
        assert lm.generate(PROMPTS, HOW) == roomy.generate(PROMPTS, HOW)
        assert lm.swaps and not roomy.preemptions


def test_without_room_it_is_computed_again() -> None:
    with PagedLM(tiny(), swap_tokens=8, **SMALL) as lm:
        assert lm.generate(PROMPTS, HOW) == [alone(tiny(), prompt, HOW) for prompt in PROMPTS]
        assert lm.preemptions and not lm.swaps and host_tokens(lm) == 8


def test_where_computing_is_faster_nothing_moves(monkeypatch: pytest.MonkeyPatch, lm: PagedLM) -> None:
    monkeypatch.setattr(SwapCost, "prefers_swap", lambda *_: False)
    assert lm.generate(PROMPTS, HOW) == [alone(tiny(), prompt, HOW) for prompt in PROMPTS]
    assert lm.preemptions and not lm.swaps


def test_a_cancelled_request_leaves_host_memory(lm: PagedLM) -> None:
    requests = [lm.submit(prompt, HOW) for prompt in PROMPTS]
    until_one_is_out(lm)
    assert host_tokens(lm) < 48
    for request in requests:
        lm.cancel(request)
    assert host_tokens(lm) == 48 and lm.cache.pages_in_use == 0 and not lm.has_work


def test_after_a_step_that_failed_nothing_that_is_out_is_trusted(lm: PagedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [lm.submit(prompt, HOW) for prompt in PROMPTS]
    until_one_is_out(lm)
    with monkeypatch.context() as broken:
        broken.setattr(lm._runner, "send", lambda plan: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.step()
    assert host_tokens(lm) == 48 and lm.cache.pages_in_use == 0
    while lm.has_work:
        lm.step()
    assert [one.new_tokens for one in requests] == [alone(tiny(), prompt, HOW) for prompt in PROMPTS]


def test_samples_that_share_pages_are_moved_one_by_one() -> None:
    how = Sampling(temperature=0.9, seed=1, n=3, max_new_tokens=20)
    with PagedLM(tiny(), swap_tokens=96, **SMALL) as lm:
        found = lm.generate([PROMPTS[0]], how)
        wanted = [alone(tiny(), PROMPTS[0], Sampling(temperature=0.9, seed=1 + k, max_new_tokens=20)) for k in range(3)]
        assert found == wanted and lm.swaps and host_tokens(lm) == 96


@pytest.mark.parametrize("tokens", [-4, 1.5, True, "8", 6])
def test_wrong_sizes_are_named(tokens: Any) -> None:
    with pytest.raises(ValueError, match=r"swap_tokens="):
        PagedLM(tiny(), swap_tokens=tokens, **SMALL)


def test_without_it_nothing_is_kept_on_the_host() -> None:
    with PagedLM(tiny(), **SMALL) as lm:
        lm.generate(PROMPTS, HOW)
        assert lm.preemptions and lm.swaps == 0 and lm._scheduler.preempting is None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["general", "auto"])
def test_swaps_on_a_gpu(kernel: str) -> None:
    """With graphs, steps ahead and pinned memory, in the order of one stream."""
    model = tiny().cuda()
    settings = {**SMALL, "inner": "inductor", "kernel": kernel}
    with PagedLM(model, swap_tokens=48, **settings) as lm, PagedLM(model, **{**settings, "kv_tokens": 256}) as roomy:
        for _ in range(3):
            assert lm.generate(PROMPTS, HOW) == roomy.generate(PROMPTS, HOW)
        assert lm.swaps and host_tokens(lm) == 48

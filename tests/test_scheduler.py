"""Does the scheduler keep its budget, its order and its pages, whatever comes?"""

from __future__ import annotations

import random

import pytest

from compile_attn.cache import OutOfPages, PagedKVCache
from compile_attn.requests import Plan, Request
from compile_attn.sampling import Sampling
from compile_attn.scheduler import Scheduler


def scheduler_of(max_batch_tokens: int = 8, prefix_cache: bool = True, **changes: int) -> Scheduler:
    cache = PagedKVCache(**{"kv_tokens": 64, "page_size": 4, "max_seqs": 4, **changes})
    return Scheduler(cache, max_batch_tokens, prefix_cache)


def run(scheduler: Scheduler, token: int = 7) -> Plan | None:
    """One step in which every sampled request gets the same token."""
    plan = scheduler.plan()
    if plan is not None:
        scheduler.cache.batch(plan.chunks)
        scheduler.cache.step_inputs()
        scheduler.sent(plan)
        scheduler.commit(plan, [token] * len(plan.sampled))
    return plan


def sizes(plan: Plan | None) -> list[int]:
    return [] if plan is None else [len(chunk.tokens) for chunk in plan.chunks]


def drain(scheduler: Scheduler) -> int:
    steps = 0
    while scheduler.has_work:
        run(scheduler)
        steps += 1
        assert steps < 1000
    assert scheduler.cache.pages_in_use == 0
    return steps


def test_long_prompts_are_cut_and_decodes_go_on() -> None:
    scheduler = scheduler_of()
    a = scheduler.submit([1, 2, 3], Sampling(max_new_tokens=9))
    assert sizes(run(scheduler)) == [3] and a.new_tokens == [7]
    b = scheduler.submit([1] * 17, Sampling(max_new_tokens=9))
    plans = [run(scheduler) for _ in range(4)]
    assert [sizes(plan) for plan in plans] == [[7, 1], [7, 1], [3, 1], [1, 1]]
    assert [chunk.logits for chunk in plans[0].chunks] == ["none", "last"]  # type: ignore[union-attr]
    assert len(a.new_tokens) == 5 and len(b.new_tokens) == 2
    drain(scheduler)


def test_more_requests_than_max_seqs_wait_in_order() -> None:
    scheduler = scheduler_of(max_seqs=2)
    requests = [scheduler.submit([1, 2], Sampling(max_new_tokens=n)) for n in (3, 1, 2, 2)]
    run(scheduler)
    assert [len(one.new_tokens) for one in requests] == [1, 1, 0, 0] and requests[1].reason == "length"
    run(scheduler)
    assert [len(one.new_tokens) for one in requests] == [2, 1, 1, 0]
    drain(scheduler)
    assert all(one.reason == "length" for one in requests)


def test_never_more_requests_than_tokens_in_a_step() -> None:
    scheduler = scheduler_of(max_batch_tokens=2)
    for _ in range(4):
        scheduler.submit([1, 2, 3], Sampling(max_new_tokens=4))
    while scheduler.has_work:
        plan = run(scheduler)
        assert plan is not None and sum(sizes(plan)) <= 2


def test_the_youngest_gives_its_pages_back() -> None:
    scheduler = scheduler_of(kv_tokens=16)
    old = scheduler.submit([1] * 4, Sampling(max_new_tokens=12))
    young = scheduler.submit([2] * 4, Sampling(max_new_tokens=12))
    while not scheduler.preemptions:
        run(scheduler)
    assert old.seq is not None and young.seq is None and young.new_tokens and not old.finished
    made = list(young.new_tokens)
    while young.seq is None:
        assert scheduler.has_work
        run(scheduler)
    assert old.finished and young.new_tokens[: len(made)] == made
    drain(scheduler)
    assert len(old.new_tokens) == len(young.new_tokens) == 12


def test_preempted_requests_reload_what_they_made() -> None:
    scheduler = scheduler_of(kv_tokens=16, max_batch_tokens=32, prefix_cache=False)
    scheduler.submit([1] * 4, Sampling(max_new_tokens=8))
    young = scheduler.submit([2] * 4, Sampling(max_new_tokens=12))
    reloaded: list[list[int]] = []
    while scheduler.has_work:
        plan = scheduler.plan()
        assert plan is not None
        reloaded += [list(c.tokens) for c in plan.chunks if c.seq is young.seq and c.seq.length == 0]
        scheduler.cache.batch(plan.chunks)
        scheduler.cache.step_inputs()
        scheduler.sent(plan)
        scheduler.commit(plan, [9] * len(plan.sampled))
    assert reloaded[0] == [2] * 4 and all(one == [2] * 4 + [9] * (len(one) - 4) for one in reloaded)
    assert len(reloaded) == 2 and len(reloaded[1]) > 4


def test_requests_end_for_a_reason() -> None:
    scheduler = scheduler_of(kv_tokens=16)
    stopped = scheduler.submit([1], Sampling(max_new_tokens=9, stop_ids=(7,)))
    full = scheduler.submit([1] * 14, Sampling(max_new_tokens=9))
    drain(scheduler)
    assert (stopped.reason, stopped.new_tokens) == ("stop", [7])
    assert full.reason == "length" and len(full.new_tokens) == 3  # the third follows 16 tokens, all that fit


def test_the_position_table_ends_a_request() -> None:
    scheduler = scheduler_of()
    scheduler.cache.max_positions = 6
    request = scheduler.submit([1] * 6, Sampling(max_new_tokens=9))
    with pytest.raises(ValueError, match=r"a prompt of 7 tokens; the model's position table holds at most 6"):
        scheduler.submit([1] * 7, Sampling())
    drain(scheduler)
    assert request.reason == "length" and len(request.new_tokens) == 1


def test_the_models_own_step_limit_counts() -> None:
    scheduler = scheduler_of(max_batch_tokens=32)
    scheduler.cache.max_tokens = 5
    scheduler.submit([1] * 12, Sampling(max_new_tokens=1))
    assert [sizes(run(scheduler)) for _ in range(3)] == [[5], [5], [2]]


def test_cancelling_gives_pages_back_at_once() -> None:
    scheduler = scheduler_of(max_seqs=1)
    running, waiting = (scheduler.submit([1] * 5, Sampling()) for _ in range(2))
    run(scheduler)
    assert scheduler.cache.pages_in_use == 2
    for request in (running, waiting, running):
        scheduler.cancel(request)
    assert scheduler.cache.pages_in_use == 0 and not scheduler.has_work
    assert running.reason == waiting.reason == "cancelled" and running.new_tokens == [7]


def test_after_a_failed_step_everything_starts_over() -> None:
    scheduler = scheduler_of()
    requests = [scheduler.submit([i] * 3, Sampling(max_new_tokens=3)) for i in range(3)]
    run(scheduler)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.cache.batch(plan.chunks)
    scheduler.abandon()
    assert scheduler.cache.pages_in_use == 0 and scheduler.has_work
    drain(scheduler)
    assert [len(one.new_tokens) for one in requests] == [3, 3, 3]


def test_pages_held_outside_are_named() -> None:
    scheduler = scheduler_of(kv_tokens=16)
    from compile_attn.cache import Chunk

    outside = scheduler.cache.add()
    scheduler.cache.batch([Chunk(outside, [1] * 9)])
    scheduler.submit([1] * 6, Sampling())
    with pytest.raises(OutOfPages, match=r"the oldest request \(6 tokens\) does not fit in 1 free pages"):
        scheduler.plan()
    scheduler.cache.free(outside)
    assert sizes(run(scheduler)) == [6]


@pytest.mark.parametrize("seed", range(20))
def test_random_loads_keep_every_promise(seed: int) -> None:
    draw = random.Random(seed)
    budget = draw.choice([1, 3, 8, 40])
    scheduler = scheduler_of(budget, kv_tokens=draw.choice([16, 24, 64]), max_seqs=draw.randint(1, 5))
    requests: list[Request] = []
    for _ in range(120):
        if draw.random() < 0.3:
            how = Sampling(max_new_tokens=draw.randint(1, 12))
            requests.append(scheduler.submit([1] * draw.randint(1, 16), how))
        if requests and draw.random() < 0.05:
            scheduler.cancel(draw.choice(requests))
        plan = run(scheduler)
        assert sum(sizes(plan)) <= budget and len(sizes(plan)) <= scheduler.cache.max_seqs
        assert sorted(sizes(plan), key=lambda size: size == 1) == sizes(plan)
        alive = [one for one in requests if not one.finished]
        ran = [one.seq is not None for one in alive]
        assert ran == sorted(ran, reverse=True)  # older requests run before younger ones
        assert scheduler.cache.pages_in_use == len({page for one in alive if one.seq is not None for page in one.seq.pages})
    drain(scheduler)
    for one in requests:
        limit = min(one.sampling.max_new_tokens, scheduler.cache.length_limit + 1 - len(one.prompt))
        assert one.reason == "cancelled" or len(one.new_tokens) == limit


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("length", range(1, 10))
def test_what_admitting_a_sample_takes(length: int, prefix_cache: bool) -> None:
    """Its share of the prompt's pages costs nothing, the copy of one that it goes on writing does."""
    scheduler = scheduler_of(prefix_cache=prefix_cache, max_batch_tokens=32)
    first = scheduler.submit(list(range(length)), Sampling(temperature=1.0, n=2))
    run(scheduler)
    second, cache = first.samples[1], scheduler.cache
    pages, make = scheduler._sharing.beginning(second)
    before, second.seq = cache.free_pages, make()
    assert second.missing == 1
    cache.batch([second.chunk(1)])
    assert pages == before - cache.free_pages == 1

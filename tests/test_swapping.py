"""Does a sequence that waited in host memory go on bit for bit, and is no page lost or shared by mistake, whatever fails?"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from compile_attn import swapping
from compile_attn.cache import CachedSequence, Chunk, OutOfPages, PagedKVCache, StalePrefix
from compile_attn.lm import PagedLM
from compile_attn.swap_cost import SwapCost
from compile_attn.swapping import Swapped, SwapSpace
from tests.test_sharing import SEED, Play, Sharing, Told, one_of_a_day
from tests.tiny import VOCAB, layer_kv, prompts_of, tiny

TEXT = prompts_of([40], seed=5)[0]


def spaced(tokens: int = 64, **changes: Any) -> tuple[PagedKVCache, SwapSpace]:
    cache = PagedKVCache(**{"kv_tokens": 64, "page_size": 4, "max_seqs": 4, "poison": True, **changes})
    cache.bind([layer_kv(), layer_kv()], owner=0)
    return cache, SwapSpace(cache, tokens)


def filled(cache: PagedKVCache, tokens: list[int], seq: CachedSequence | None = None) -> CachedSequence:
    """A sequence whose pages hold noise."""
    seq = seq or cache.add()
    cache.batch([Chunk(seq, tokens)])
    cache.step_inputs()
    for pool in (*cache.k_pages, *cache.v_pages):
        pool[list(seq.pages)] = torch.randn(len(seq.pages), *pool.shape[1:])
    return seq


def content(cache: PagedKVCache, seq: CachedSequence) -> list[torch.Tensor]:
    return [pool[list(seq.pages)].view(torch.int32) for pool in (*cache.k_pages, *cache.v_pages)]


def alike(old: list[torch.Tensor], new: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, old, new))


def test_pages_go_and_come_back() -> None:
    cache, space = spaced()
    first, seq = filled(cache, [1] * 5), filled(cache, [2] * 10)
    before, pages = content(cache, seq), seq.pages
    waiting = space.out(seq)
    assert waiting is not None and repr(waiting) == "Swapped(length=10)"
    assert seq.freed and cache.pages_in_use == 2 and space.free_tokens == 64 - 12
    assert cache.k_pages[1][list(pages)].isnan().all(), "what nobody holds is poisoned"
    filled(cache, [3] * 9)
    again = space.back(waiting)
    assert again.length == 10 and again.pages != pages and alike(before, content(cache, again)) and not again.unrun
    assert space.free_tokens == 64 and repr(waiting) == "Swapped(length=10, used)"
    cache.batch([Chunk(again, [4] * 3), Chunk(first, [1])])
    cache.step_inputs()
    assert again.length == 13 and space.bytes_a_token == 2 * 2 * 2 * 8 * 4


def test_without_room_nothing_is_changed() -> None:
    cache, space = spaced(8)
    seq = filled(cache, [1] * 9)
    before, pages = content(cache, seq), seq.pages
    assert space.out(seq) is None and seq.pages == pages and alike(before, content(cache, seq))
    small = filled(cache, [1] * 8)
    before = content(cache, small)
    waiting = space.out(small)
    assert waiting is not None and space.free_tokens == 0
    others = filled(cache, [1] * 48)
    with pytest.raises(OutOfPages, match="2 pages are needed, 1 of 16 are free"):
        space.back(waiting)
    assert cache.free_pages == 1 and space.free_tokens == 0
    cache.free(others)
    assert alike(before, content(cache, space.back(waiting))) and space.free_tokens == 8
    empty = space.out(cache.add())
    assert empty is not None and space.back(empty).length == 0


def test_shared_pages_are_copied_and_left_alone() -> None:
    cache, space = spaced()
    seq = filled(cache, [1] * 10)
    cache.keep(seq, [1] * 10)
    fork, hit = cache.fork(seq), cache.add([1] * 10)
    before = content(cache, seq)
    waiting = space.out(seq)
    assert waiting is not None and cache.pages_in_use == 3 and alike(before, content(cache, fork))
    again = space.back(waiting)
    assert alike(before, content(cache, again)) and not {*again.pages} & {*fork.pages}
    filled(cache, [5], again)
    assert alike(before, content(cache, fork)) and hit.pages == fork.pages[:2]
    cache.keep(again, [1] * 10)
    assert cache.add([1] * 10).pages == hit.pages, "of two pages for one prefix the first one stays"


def test_what_is_known_of_it_still_holds_or_does_not() -> None:
    cache, space = spaced()
    weight = torch.zeros(1)
    cache.proof.check("graph", [weight])
    for changed in (False, True):
        seq = filled(cache, [1] * 8, cache.add(salt="a"))
        waiting = space.out(seq)
        assert waiting is not None
        if changed:
            weight.add_(1)
        assert cache.add([1] * 9, salt="a").length == 0
        again = space.back(waiting)
        cache.keep(again, [1] * 8)
        assert cache.add([1] * 9, salt="a").length == (0 if changed else 8) and cache.add([1] * 9).length == 0
        cache.forget_prefixes()


def test_a_hit_that_waited_is_proven_when_it_runs() -> None:
    cache, space = spaced()
    cache.proof.check("graph", [])
    seq = filled(cache, [1] * 8)
    cache.keep(seq, [1] * 8)
    waiting = [space.out(cache.add([1] * 9)) for _ in range(2)]
    assert None not in waiting
    cache.batch([Chunk(space.back(waiting[0]), [1])])  # type: ignore[arg-type]
    cache.proof.check("graph", [])
    cache.step_inputs()
    stale = space.back(waiting[1])  # type: ignore[arg-type]
    cache.batch([Chunk(stale, [1])])
    with pytest.raises(StalePrefix):
        cache.proof.check("another graph", [])


def test_what_is_refused() -> None:
    cache, space = spaced()
    _, elsewhere = spaced()
    seq = filled(cache, [1] * 6)
    unrun = cache.add()
    cache.batch([Chunk(unrun, [1])])
    with pytest.raises(ValueError, match="never run"):
        space.out(unrun)
    with pytest.raises(ValueError, match="belongs to another cache"):
        elsewhere.out(seq)
    waiting = space.out(seq)
    assert waiting is not None
    with pytest.raises(ValueError, match="was freed"):
        space.out(seq)
    for use in (elsewhere.back, elsewhere.drop):
        with pytest.raises(ValueError, match=r"Swapped\(length=6\) is kept in another SwapSpace"):
            use(waiting)
    space.drop(waiting)
    for use in (space.back, space.drop):
        with pytest.raises(ValueError, match=r"came back or was dropped already"):
            use(waiting)
    assert space.free_tokens == 64
    with pytest.raises(ValueError, match=r"tokens=6 is not a multiple of page_size=4"):
        SwapSpace(cache, 6)
    with pytest.raises(ValueError, match="run the model on it once"):
        SwapSpace(PagedKVCache(kv_tokens=8, page_size=4), 8)
    cache.free(unrun)
    kept = space.out(filled(cache, [4] * 5))
    assert kept is not None
    space.close()
    for use in (space.back, space.drop, lambda _: space.out(cache.add())):
        with pytest.raises(ValueError, match="this SwapSpace is closed"):
            use(kept)
    cache.close()
    for refused in (lambda: space.out(unrun), lambda: space.back(waiting)):
        with pytest.raises(ValueError, match="this PagedKVCache is closed"):
            refused()


def test_a_cache_that_is_resized_between() -> None:
    cache, space = spaced()
    seq = filled(cache, [1] * 10)
    before = content(cache, seq)
    waiting = space.out(seq)
    assert waiting is not None
    cache.resize(8)
    with pytest.raises(
        ValueError, match=r"Swapped\(length=10\); the cache was resized and holds at most 8 tokens a sequence now: drop it"
    ):
        space.back(waiting)
    cache.resize(32)
    assert alike(before, content(cache, space.back(waiting)))


@pytest.mark.parametrize("way", ["out", "back"])
def test_a_copy_that_fails_loses_nothing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, space = spaced()
    swap, calls = swapping.swap_blocks, list[int]()

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no link")
        swap(*args)

    seq = filled(cache, [1] * 10)
    before = content(cache, seq)
    waiting = space.out(seq) if way == "back" else None
    monkeypatch.setattr(swapping, "swap_blocks", fail)
    with pytest.raises(RuntimeError, match="no link"):
        space.out(seq) if waiting is None else space.back(waiting)
    if waiting is None:
        assert space.free_tokens == 64 and alike(before, content(cache, seq))
        waiting = space.out(seq)
        assert waiting is not None
    assert cache.free_pages == 16 and space.free_tokens == 52
    assert alike(before, content(cache, space.back(waiting))) and space.free_tokens == 64


def test_long_sequences_are_moved_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, space = spaced()
    monkeypatch.setattr(swapping, "_STAGED", 2 * cache.k_pages[0][0].nbytes)
    seq = filled(cache, [1] * 17)
    before, waiting = content(cache, seq), space.out(seq)
    assert waiting is not None and alike(before, content(cache, space.back(waiting)))


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8_e4m3"])
def test_the_same_logits_to_the_last_bit(kv_dtype: str) -> None:
    """One play with swaps and one without, over the same batches."""
    logits: list[list[torch.Tensor]] = []
    for swaps in (True, False):
        scales = [(0.1, 0.1)] * 2 if kv_dtype != "auto" else None
        with PagedLM(tiny(), 256, 4, 4, inner="eager", kv_dtype=kv_dtype, kv_scales=scales, poison=True) as lm, torch.no_grad():
            space, draw, told = SwapSpace(lm.cache, 64), random.Random(3), list[CachedSequence]()
            logits.append([])
            for at in range(30):
                if len(told) < 3:
                    told.append(lm.cache.add())
                counts = [draw.randint(1, 3) for _ in told]
                parts = [(seq, [draw.randrange(VOCAB) for _ in range(count)]) for seq, count in zip(told, counts, strict=True)]
                logits[-1].append(lm._runner.logits([Chunk(seq, new, "all") for seq, new in parts]))
                out = draw.randrange(3) % len(told)
                if swaps:
                    waiting = space.out(told[out])
                    assert waiting is not None
                    filled_by_others = lm.cache.add()
                    lm._runner.logits([Chunk(filled_by_others, [1] * draw.randint(1, 9))])
                    told[out] = space.back(waiting)
                    lm.cache.free(filled_by_others)
                else:
                    draw.randint(1, 9)
                if at % 7 == 6:
                    lm.cache.free(told.pop(0))
            assert space.free_tokens == 64
    assert all(map(torch.equal, *logits)) and len(logits[0]) == 30


# Any order of operations, beside those of sharing


class SwapPlay(Play):
    """And sequences that wait."""

    def __init__(self, kv_tokens: int, page_size: int, max_seqs: int = 4) -> None:
        super().__init__(kv_tokens, page_size, max_seqs)
        self.space = SwapSpace(self.cache, 10 * page_size)
        self.waiting: list[tuple[Told, Swapped]] = []

    def out(self, one: Told) -> None:
        room = self.space.free_tokens >= len(one.seq.pages) * self.cache.page_size
        waiting = self.space.out(one.seq)
        assert (waiting is not None) == room
        if waiting is not None:
            self.told.remove(one)
            self.waiting.append((one, waiting))

    def back(self, at: int) -> None:
        one, waiting = self.waiting[at]
        free, wanted = self.cache.free_pages, self.cache.pages_for(waiting.length)
        try:
            one.seq = self.space.back(waiting)
        except OutOfPages:
            assert wanted > free == self.cache.free_pages
            return
        assert free - self.cache.free_pages == wanted
        del self.waiting[at]
        self.told.append(one)
        self.counted["swaps"] += wanted > 0

    def fails(self, at: int | None, after: int) -> None:
        """A copy that fails: out, or of this one back."""
        swap, calls = swapping.swap_blocks, list[int]()

        def fail(*args: Any) -> None:
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("no link")
            swap(*args)

        swapping.swap_blocks = fail
        try:
            if at is None:
                self.out(self.told[-1])
            else:
                self.back(at)
        except RuntimeError:
            self.counted["failures"] += 1
        finally:
            swapping.swap_blocks = swap

    def drop(self, at: int) -> None:
        self.space.drop(self.waiting.pop(at)[1])

    def check(self) -> None:
        super().check()
        held = [page for _, waiting in self.waiting for page in waiting._pages or ()]
        assert sorted([*held, *self.space._free]) == list(range(10)), "each page once, none lost"


class Swapping(Sharing):
    def make(self, kv_tokens: int, page_size: int) -> Play:
        return SwapPlay(kv_tokens, page_size)

    @precondition(lambda self: self.some)
    @rule(seed=SEED)
    def out(self, seed: int) -> None:
        self.play.out(self.one(seed))  # type: ignore[attr-defined]

    @precondition(lambda self: self.play.waiting)
    @rule(seed=SEED, drop=st.booleans())
    def back(self, seed: int, drop: bool) -> None:
        at = seed % len(self.play.waiting)  # type: ignore[attr-defined]
        self.play.drop(at) if drop else self.play.back(at)  # type: ignore[attr-defined]

    @precondition(lambda self: self.some or self.play.waiting)
    @rule(seed=SEED, after=st.integers(0, 3))
    def fails(self, seed: int, after: int) -> None:
        waiting = self.play.waiting  # type: ignore[attr-defined]
        self.play.fails(seed % len(waiting) if waiting and (seed % 2 or not self.some) else None, after)  # type: ignore[attr-defined]

    @invariant()
    def sound_too(self) -> None:
        if hasattr(self, "play"):
            self.play.check()


def test_any_order_of_operations() -> None:
    run_state_machine_as_test(Swapping, settings=settings(max_examples=150, stateful_step_count=40, deadline=None))


def test_long_plays() -> None:
    counted = Counter[str]()
    for seed in range(12):
        draw = random.Random(seed)
        play = SwapPlay(2 * draw.choice((8, 16)), 2)
        for _ in range(200):
            failed = play.counted["out of pages"]
            what = draw.random()
            if what < 0.15 and play.told:
                play.out(draw.choice(play.told))
            elif what < 0.3 and play.waiting:
                play.back(draw.randrange(len(play.waiting)))
            elif what < 0.33 and play.waiting:
                play.drop(draw.randrange(len(play.waiting)))
            elif what < 0.36 and play.told:
                play.fails(draw.randrange(len(play.waiting)) if play.waiting and draw.random() < 0.5 else None, draw.randint(0, 3))
            else:
                one_of_a_day(play, draw)
            play.check()
            if play.counted["out of pages"] > failed:
                play.free(draw.choice(play.told))
        counted += play.counted
    assert counted["swaps"] > 100 and counted["failures"] > 10 and counted["hits"] > 30 and counted["refused"] > 0


# What it costs


def test_the_cost_decides() -> None:
    """A model of 8e9 parameters: 40 us a token, of 128 KiB, which take 5.2 us both ways."""
    large = SwapCost.estimated(128 * 1024, 8_000_000_000, "cuda")
    assert large.prefers_swap(1000, 1000) and large.prefers_swap(1000, 132) and not large.prefers_swap(1000, 131)
    small = SwapCost.estimated(128 * 1024, 500_000_000, "cuda")
    assert not small.prefers_swap(1000, 1000), "keys as large as those of the other, and tokens that are soon computed"
    assert SwapCost.estimated(128 * 1024, 500_000_000, "cuda", tokens_a_second=1e5).prefers_swap(1000, 1000)
    assert not SwapCost.estimated(128 * 1024, 8_000_000_000, "cuda", bytes_a_second=5e9).prefers_swap(1000, 1000)
    assert not large.prefers_swap(1000, 0), "a prefix that is known need not be computed"
    assert SwapCost.estimated(1024, 1_000_000, "cpu") == SwapCost(1024, 2e-5, 5e9)


@pytest.mark.gpu
def test_swapping_on_a_gpu_does_not_wait() -> None:
    """Pinned memory, nothing synchronous, all in the order of the stream: pages are written again right after they were sent."""
    with PagedLM(tiny().cuda(), 256, 4, 4, inner="eager", cuda_graphs=False) as lm, torch.no_grad():
        space, cache = SwapSpace(lm.cache, 64), lm.cache
        assert all(pool.is_pinned() for pool in space._pools)
        seq, plain = cache.add(), cache.add()
        lm._runner.logits([Chunk(seq, TEXT[:20]), Chunk(plain, TEXT[:20])])
        pools = [*cache.k_pages, *cache.v_pages]
        for at in range(20, 38):
            before, held = content(cache, seq), seq.pages
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                waiting = space.out(seq)
                assert waiting is not None
                for pool in pools:
                    pool[held[0] : held[0] + 1].fill_(7.0)  # as a step does that takes the page
                seq = space.back(waiting)
                other = space.out(cache.fork(seq))  # into host pages that are on their way still
                assert other is not None
                space.drop(other)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert alike(before, content(cache, seq)) and space.free_tokens == 64
            found = lm._runner.logits([Chunk(seq, TEXT[at : at + 1]), Chunk(plain, TEXT[at : at + 1])])
            torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)

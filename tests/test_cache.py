"""Does the cache hand out pages soundly, and is what it writes for a step exactly what was asked?"""

from __future__ import annotations

import random

import pytest
import torch

from compile_attn.cache import Chunk, OutOfPages, PageAllocator, PagedKVCache
from tests.tiny import VOCAB, by_hand, layer_kv, prompts_of, tiny


def cache_of(**changes: object) -> PagedKVCache:
    return PagedKVCache(**{"kv_tokens": 64, "page_size": 4, "max_seqs": 4, **changes})  # type: ignore[arg-type]


def run(cache: PagedKVCache, *chunks: Chunk) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """One step without a model: what it would read."""
    batch = cache.batch(chunks)
    return [view.clone() for view in cache.step_inputs()], batch.input_ids.clone(), batch.position_ids.clone()


def test_allocator_gives_each_page_once() -> None:
    pages = PageAllocator(5)
    first = pages.take(3)
    assert sorted(first + pages.take(2)) == [1, 2, 3, 4, 5] and pages.free_pages == 0
    with pytest.raises(OutOfPages, match="1 pages are needed, 0 of 5 are free"):
        pages.take(1)
    pages.give_back(first[:2])
    assert sorted(pages.take(2)) == sorted(first[:2])


def test_a_mixed_batch_is_written_exactly() -> None:
    cache = cache_of()
    a, b = cache.add(), cache.add()
    run(cache, Chunk(a, [1, 2, 3, 4, 5, 6]))
    (table, seq_lens, query_lens, rows), ids, positions = run(cache, Chunk(b, [9, 8, 7]), Chunk(a, [6]))
    assert table.dtype == seq_lens.dtype == query_lens.dtype == torch.int32 and rows.dtype == ids.dtype == torch.int64
    assert table.shape == (2, cache.max_pages_per_seq)
    assert table[0].tolist() == [*b.pages, *[0] * (cache.max_pages_per_seq - 1)]
    assert table[1].tolist() == [*a.pages, *[0] * (cache.max_pages_per_seq - 2)]
    assert (seq_lens.tolist(), query_lens.tolist(), rows.tolist()) == ([3, 7], [3, 1], [2, 3])
    assert ids.tolist() == [[9, 8, 7, 6]] and positions.tolist() == [[0, 1, 2, 6]]


def test_one_token_of_one_sequence_is_padded() -> None:
    cache = cache_of()
    for _ in range(3):  # leaves content in every row, to be cleared
        run(cache, *[Chunk(cache.add(), [5, 6, 7, 8, 9]) for _ in range(2)])
    (table, seq_lens, query_lens, rows), ids, positions = run(cache, Chunk(cache.add(), [3]))
    assert (ids.tolist(), positions.tolist()) == ([[3, 0]], [[0, 0]])
    assert (seq_lens.tolist(), query_lens.tolist(), rows.tolist()) == ([1, 0], [1, 0], [0, 0])
    assert not table[1].any() and not table[0, 1:].any()


def test_rows_asked_for() -> None:
    cache = cache_of()
    a, b, c = cache.add(), cache.add(), cache.add()
    batch = cache.batch([Chunk(a, [1, 2, 3], "all"), Chunk(b, [4, 5], "none"), Chunk(c, [6, 7])])
    assert cache.step_inputs()[3].tolist() == [0, 1, 2, 6] and batch.num_rows == 4
    batch = cache.batch([Chunk(a, [1], "none")])
    assert cache.step_inputs()[3].tolist() == [0, 0] and batch.num_rows == 0
    assert batch.rows(torch.zeros(1, 2, 7)).shape == (0, 7)
    with pytest.raises(ValueError, match=r"logits of shape \(1, 5, 7\); expected \[1, 2, vocabulary\]"):
        batch.rows(torch.zeros(1, 5, 7))


def test_rows_of_a_batch_that_was_not_run() -> None:
    """Each time anew: a batch that the device advances has its tokens to run again."""
    cache, logits = cache_of(), torch.zeros(1, 2, 7)
    batch = cache.batch([Chunk(cache.add(), [1])])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not as its paged graph"):
            batch.rows(logits)
        cache.step_inputs()
        assert batch.rows(logits).shape == (1, 7)
        batch = cache.advance()


def test_addresses_never_change() -> None:
    cache = cache_of()
    seen = set()
    for size in (1, 5, 2, 9):
        batch = cache.batch([Chunk(cache.add(), [1] * size)])
        seen.add(tuple(t.data_ptr() for t in (batch.input_ids, batch.position_ids, *cache.step_inputs())))
        assert batch.input_ids.is_contiguous() and batch.input_ids.stride() == (max(size, 2), 1)
    assert len(seen) == 1


def test_running_out_changes_nothing() -> None:
    cache = cache_of(kv_tokens=16)
    a, b = cache.add(), cache.add()
    run(cache, Chunk(a, [1] * 9))
    before = (a.pages, a.length, b.length, cache.free_pages)
    with pytest.raises(OutOfPages, match=r"2 chunks and 6 new tokens needs 2 more pages; 1 of 4 are free"):
        cache.batch([Chunk(b, [1] * 2), Chunk(a, [1] * 4)])
    assert (a.pages, a.length, b.length, cache.free_pages) == before
    run(cache, Chunk(b, [1] * 4), Chunk(a, [1] * 3))
    assert cache.free_pages == 0
    cache.free(a)
    assert cache.free_pages == 3 and cache.pages_in_use == 1


def test_random_growth_never_shares_a_page() -> None:
    draw = random.Random(0)
    cache = cache_of(kv_tokens=128, max_seqs=8)
    alive = [cache.add() for _ in range(6)]
    for _ in range(300):
        if draw.random() < 0.2:
            cache.free(alive.pop(draw.randrange(len(alive))))
            alive.append(cache.add())
        chosen = draw.sample(alive, draw.randint(1, 6))
        try:
            run(cache, *[Chunk(seq, [1] * draw.randint(1, 9)) for seq in chosen])
        except OutOfPages:
            cache.free(alive.pop(0))
            alive.append(cache.add())
        held = [page for seq in alive for page in seq.pages]
        assert len(held) == len(set(held)) == cache.pages_in_use
        assert all(len(seq.pages) == cache.pages_for(seq.length) for seq in alive)


def test_freed_pages_are_poisoned() -> None:
    cache = cache_of(poison=True)
    cache.bind([layer_kv()], owner=0)
    assert cache.k_pages[0].isnan().all() and cache.k_pages[0].shape == (1 + 16, 4, 2, 8)
    a, b = cache.add(), cache.add()
    run(cache, Chunk(a, [1] * 5), Chunk(b, [1] * 5))
    cache.k_pages[0].zero_()
    freed = list(a.pages)
    cache.free(a)
    assert cache.k_pages[0][freed].isnan().all() and not cache.k_pages[0][list(b.pages)].isnan().any()


def test_unpoisoned_pages_start_as_zeros() -> None:
    cache = cache_of()
    cache.bind([layer_kv(), layer_kv()], owner=0, max_positions=9, max_tokens=5)
    cache.bind([layer_kv(), layer_kv()], owner=0, max_positions=12)
    assert len(cache.k_pages) == len(cache.v_pages) == 2 and not any(pool.any() for pool in cache.k_pages)
    assert (cache.max_positions, cache.max_tokens, cache.length_limit) == (9, 5, 9)


def test_pages_by_hand_equal_recomputation() -> None:
    """Chunks of several sequences, poisoned pages: the logits of every token are those of the whole prompt."""
    model, cache = tiny(), cache_of(poison=True)
    step = by_hand(model, cache)
    prompts = prompts_of([13, 5, 20])
    seqs = [cache.add() for _ in prompts]
    for begin, end in ((0, 4), (4, 5), (5, 13), (13, 20)):
        parts = [(i, p[begin:end]) for i, p in enumerate(prompts) if p[begin:end]]
        batch = cache.batch([Chunk(seqs[i], part, "all") for i, part in parts])
        got = batch.rows(step(batch.input_ids))
        want = [model(torch.tensor([prompts[i]]))[0, begin : begin + len(part)] for i, part in parts]
        torch.testing.assert_close(got, torch.cat(want), atol=1e-4, rtol=0)  # the gains amplify float32 rounding
    assert got.shape[-1] == VOCAB

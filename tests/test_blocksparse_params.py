"""Do the parameters of block-sparse attention mean, on every rank and in every phase, the keys that a loop in Python finds?"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch

from compile_attn import BlocksparseParams
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import H, I, J
from compile_attn.kernels.mask import BlockSparse, Causal
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.visible import most_keys, spans
from compile_attn.passes.masks import classify

ROWS = 18  # blocks of queries: past the largest stride below

RIGHT = {"max_seqlen": 64, "num_heads": 4, "num_kv_heads": 2, "block_size": 16, "local_blocks": 1, "vert_stride": 4}
# Query heads and KV heads of a rank, ranks.
LAYOUTS = [(1, 1, 1), (4, 4, 1), (4, 2, 1), (2, 1, 2), (3, 1, 4)]


def params(heads: int, kv_heads: int, stride: int, local: int = 1, block: int = 1, **more: Any) -> BlocksparseParams:
    return BlocksparseParams(256, heads, kv_heads, block, local, stride, **more)


def every_rank(heads: int, kv_heads: int, ranks: int, *rest: int, **more: Any) -> list[BlocksparseParams]:
    return [params(heads, kv_heads, *rest, tp_size=ranks, tp_rank=rank, **more) for rank in range(ranks)]


def slide(one: BlocksparseParams, head: int) -> int:
    """By how much a rank's head slides, as the seeds' words have it."""
    if one.homo_head:
        return 0
    if not one.homo_head_group:
        return (one.tp_rank * one.num_heads + head) * max(1, one.vert_stride // (one.tp_size * one.num_heads))
    kv_head = one.tp_rank * one.num_kv_heads + head // (one.num_heads // one.num_kv_heads)
    return kv_head * max(1, one.vert_stride // (one.tp_size * one.num_kv_heads))


def row_of(one: BlocksparseParams, head: int, a: int) -> list[int]:
    """The blocks of keys that block a of queries sees."""
    near = one.local_blocks
    return [b for b in range(a + 1) if a - b < near or (b + slide(one, head) + 1) % one.vert_stride == 0]


def decode_row(one: BlocksparseParams, head: int, length: int, page_size: int) -> list[int]:
    """What a decode at that length visits, page by page: the rule that the seeds' paged kernel had for itself."""
    a, offset = (length - 1) // one.block_size, slide(one, head) + 1
    blocks = [page * page_size // one.block_size for page in range(-(-length // page_size))]
    return sorted({b for b in blocks if (b + offset) % one.vert_stride == 0 or b > a - one.local_blocks})


def rows(one: BlocksparseParams, count: int = ROWS) -> list[list[list[int]]]:
    return [[row.nonzero().flatten().tolist() for row in head] for head in one.block_mask(count)]


# What the numbers are


@pytest.mark.parametrize(
    ("given", "step", "active"),
    [
        (params(32, 8, 8), 1, (0, 32)),
        (params(4, 2, 16), 4, (0, 4)),
        (params(2, 1, 16, tp_size=2, tp_rank=1), 4, (2, 4)),
        (params(2, 1, 16, tp_size=2, tp_rank=1, homo_head_group=True), -8, (2, 4)),
        (params(4, 2, 16, homo_head=True), 0, (0, 4)),
        (params(4, 2, 16, homo_head=True, homo_head_group=True), 0, (0, 4)),
        (params(64, 8, 16, homo_head_group=True), -2, (0, 64)),
    ],
)
def test_sliding_steps_and_active_heads(given: BlocksparseParams, step: int, active: tuple[int, int]) -> None:
    assert given.head_sliding_step == step
    assert given.active_head_range == active


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"block_size": 0}, "block_size=0; it must be a whole number of at least 1"),
        ({"local_blocks": 0}, "local_blocks=0; it must be a whole number of at least 1"),
        ({"local_blocks": -1}, "local_blocks=-1"),
        ({"vert_stride": 0}, "vert_stride=0"),
        ({"max_seqlen": 0}, "max_seqlen=0"),
        ({"num_heads": 3}, "num_heads=3 is no multiple of num_kv_heads=2"),
        ({"num_kv_heads": 0}, "num_kv_heads=0"),
        ({"block_size": 16.0}, "block_size=16.0; it must be a whole number"),
        ({"vert_stride": True}, "vert_stride=True; it must be a whole number"),
        ({"homo_head": 1}, "homo_head=1; it is True or False"),
        ({"homo_head_group": None}, "homo_head_group=None; it is True or False"),
        ({"tp_size": 0}, "tp_size=0"),
        ({"tp_rank": -1}, "tp_rank=-1; it must be a whole number of at least 0"),
        ({"tp_rank": 1}, "tp_rank=1; ranks count from 0 to tp_size - 1 = 0"),
        ({"total_num_kv_heads": 3}, "total_num_kv_heads=3, but 1 ranks hold 2 each; it is 2"),
        ({"tp_size": 4, "total_num_kv_heads": 4}, "total_num_kv_heads=4, but 4 ranks hold 2 each; it is 8"),
        ({"num_kv_heads": 1, "tp_size": 4, "total_num_kv_heads": 3}, "a number that divides 4"),
        ({"layers": ()}, r"layers=\(\); give numbers of attention sites"),
        ({"layers": 1}, "layers=1; give numbers of attention sites"),
        ({"layers": (0, -1)}, r"layers=\(0, -1\)"),
    ],
    ids=repr,
)
def test_wrong_ones_are_named(wrong: dict[str, Any], why: str) -> None:
    BlocksparseParams(**RIGHT)
    with pytest.raises(ValueError, match=why):
        BlocksparseParams(**(RIGHT | wrong))


def test_what_is_given_stays_what_it_was() -> None:
    """The seeds' backend wrote two entries into its caller's dictionary."""
    given = {**RIGHT, "layers": [1]}
    before = dict(given)
    made = BlocksparseParams(**given)  # type: ignore[arg-type]
    made.mask(), made.block_mask(3)
    assert given == before and made.layers == (1,)
    assert made == BlocksparseParams(**given) and hash(made) == hash(BlocksparseParams(**given))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.num_heads = 8  # type: ignore[misc]


# What they mean


def test_row_seven() -> None:
    assert [head[7] for head in rows(params(4, 4, 4, local=2))] == [[3, 6, 7], [2, 6, 7], [1, 5, 6, 7], [0, 4, 6, 7]]


CONFIGURATIONS = list(itertools.product(LAYOUTS, (1, 2, 3, 4, 8, 16), (1, 2, 4), (1, 3), (False, True)))


def test_every_configuration_equals_a_loop() -> None:
    """360 of them, of all ranks: blocks, and the tokens of blocks."""
    assert len(CONFIGURATIONS) == 360
    for layout, stride, local, block, alike in CONFIGURATIONS:
        for one in every_rank(*layout, stride, local, block, homo_head=alike):
            assert rows(one) == [[row_of(one, head, a) for a in range(ROWS)] for head in range(one.num_heads)], one
            tokens = torch.arange(ROWS * block)
            axes = {"h": torch.arange(one.num_heads)[:, None, None], "i": tokens[:, None], "j": tokens}
            seen = torch.as_tensor(evaluator(one.mask().predicate())(axes)).expand(one.num_heads, -1, -1)
            blocks = one.block_mask(ROWS).repeat_interleave(block, 1).repeat_interleave(block, 2)
            assert torch.equal(seen, blocks & (tokens <= tokens[:, None])), one


def phases() -> Iterator[tuple[BlocksparseParams, int]]:
    """216 configurations without the group's rule or with heads alike, and 72 with it; a page size each."""
    layouts = [(2, 2, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2)]
    for layout, stride, local, (block, page) in itertools.product(layouts, (2, 4, 16), (1, 3), [(4, 4), (8, 4), (16, 4)]):
        for more in ({}, {"homo_head": True}, {"homo_head": True, "homo_head_group": True}, {"homo_head_group": True}):
            for one in every_rank(*layout, stride, local, block, **more)[-1:]:
                yield one, page


def test_a_decode_sees_what_the_last_row_of_a_prefill_does() -> None:
    """In 216 configurations, as in the seeds, and in 72 of the group's rule, of which theirs were another mask in 34."""
    grouped = 0
    found = list(phases())
    assert len(found) == 288
    for one, page in found:
        grouped += one.head_sliding_step < 0
        for length in (1, 3 * one.block_size, 9 * one.block_size - 2, 17 * one.block_size + 1):
            a = (length - 1) // one.block_size
            prefill = [head[a] for head in rows(one, a + 1)]
            assert prefill == [decode_row(one, head, length, page) for head in range(one.num_heads)], (one, length)
    assert grouped == 72


def test_heads_of_a_kv_head_slide_together_in_every_phase() -> None:
    """Where the seeds' prefill had {3, 7, 8}, {2, 6, 8}, {1, 5, 8}, {0, 4, 8}."""
    one = params(4, 2, 4, homo_head_group=True)
    assert [head[8] for head in rows(one, 9)] == [[3, 7, 8], [3, 7, 8], [1, 5, 8], [1, 5, 8]]


def test_a_copied_kv_head_counts_once() -> None:
    """Two KV heads on four ranks: of ranks 0 and 1 the first, of 2 and 3 the second. The seeds counted four."""
    ranks = every_rank(2, 1, 4, 8, homo_head_group=True, total_num_kv_heads=2)
    assert [one.head_sliding_step for one in ranks] == [-4] * 4
    assert [one.block_mask(9).tolist() for one in ranks[:2]] == [ranks[0].block_mask(9).tolist()] * 2
    whole = params(8, 2, 8, homo_head_group=True)
    assert torch.equal(torch.cat([one.block_mask(20) for one in ranks]), whole.block_mask(20))
    assert [head[7] for head in rows(whole, 8)] == [[7]] * 4 + [[3, 7]] * 4


@pytest.mark.parametrize("more", [{}, {"homo_head": True}, {"homo_head_group": True}], ids=repr)
@pytest.mark.parametrize(("heads", "kv_heads", "stride"), [(8, 4, 3), (8, 4, 16), (12, 4, 64), (4, 4, 5)])
def test_all_ranks_together_are_one_with_all_heads(heads: int, kv_heads: int, stride: int, more: dict[str, bool]) -> None:
    whole = params(heads, kv_heads, stride, **more).block_mask(70)
    for ranks in (1, 2, 4):
        parts = [one.block_mask(70) for one in every_rank(heads // ranks, kv_heads // ranks, ranks, stride, **more)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_stride_of_one_is_causal_attention() -> None:
    for more in ({}, {"homo_head": True}, {"homo_head_group": True}):
        one = params(4, 2, 1, local=1, block=16, **more)
        assert classify(one.mask().predicate(), 4) == Causal()
        assert one.block_mask(6).tolist() == torch.ones(6, 6).tril().bool().expand(4, 6, 6).tolist()


def test_block_0_is_no_sink() -> None:
    """The first vertical block of head g is (stride - 1 - g * step) mod stride."""
    one = params(4, 4, 16, homo_head=False)
    first = [next(b for b, seen in enumerate(head[-1].tolist()) if seen) for head in one.block_mask(40)]
    assert first == [(16 - 1 - head * one.head_sliding_step) % 16 for head in range(4)] == [15, 11, 7, 3]


# What it costs, and how it travels


@pytest.mark.parametrize("more", [{}, {"homo_head": True}, {"homo_head_group": True}], ids=repr)
def test_half_a_million_tokens_cost_what_few_do(more: dict[str, bool]) -> None:
    """The seeds listed every block of every head in Python. Here spans are solved once, and name no block."""
    masks = [BlocksparseParams(length, 32, 8, 64, 16, 8, **more).mask() for length in (1 << 10, 1 << 19)]
    assert masks[0] == masks[1]
    spans.cache_clear(), most_keys.cache_clear()
    begin = time.perf_counter()
    found = spans(masks[1], 4)
    assert most_keys(masks[1], 4, 16, 1 << 19) < (1 << 19) * 0.6
    assert time.perf_counter() - begin < 1
    assert len(found) <= 2


def test_the_mask_travels_as_text() -> None:
    for one in (*every_rank(4, 1, 2, 8, homo_head_group=True), params(4, 2, 8), params(4, 2, 8, homo_head=True)):
        spec = AttentionSpec(4, 2, 16, 16, one.mask())
        assert AttentionSpec.decode(spec.encode()) == spec
    old = AttentionSpec.decode(
        "AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, head_dim_v=16, "
        "mask=BlockSparse(block_size=64, local_blocks=2, vert_stride=8, head_step=1), scale=1.0)"
    )
    assert old.mask == BlockSparse(64, 2, 8, 1)
    tail = sympy.Mod(sympy.floor(J / 64) + H + 1, 8)
    assert old.mask.predicate() == sympy.Le(J, I) & ((sympy.floor(I / 64) - sympy.floor(J / 64) < 2) | sympy.Eq(tail, 0))


def test_its_words() -> None:
    def words(**more: Any) -> str:
        return BlocksparseParams(256, 4, 2, 16, 1, 8, tp_size=2, tp_rank=1, **more).mask().words()

    assert words() == "causal, blocks of 16: 1 local, every 8th vertical, sliding by 1 per head, counted from head 4"
    assert words(homo_head=True) == "causal, blocks of 16: 1 local, every 8th vertical"
    assert words(homo_head_group=True).endswith("sliding by 2 per 2 heads, counted from head 4")

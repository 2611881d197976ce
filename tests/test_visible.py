"""Are exactly those blocks of keys enumerated in which some query of a tile sees a key?"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_attn.kernels import mask as m
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.visible import HEAD, _of_tile, block_of, bounded, by_head, spans, unit_of
from compile_attn.kernels.visible_print import print_sight

SINKS = m.All(m.Causal(), m.General((J < 5) | (I - J < 40)))
DILATED = m.All(m.Causal(), m.General(sympy.Eq(sympy.Mod(sympy.floor(I / 32) - sympy.floor(J / 32), 3), 0)))
FAR_AND_NEAR = m.All(m.Causal(), m.General(((J >= 50) & (J <= I - 60)) | ((J >= 5) & (I - J <= 130))))


def walked(mask: m.Mask, heads: int, block_n: int, *tile: int) -> tuple[list[int], list[int]]:
    """Clear and other blocks, by the printed functions as Python."""
    names = types.SimpleNamespace(maximum=max, minimum=min, where=lambda condition, a, b: a if condition else b)
    space: dict[str, Callable[..., int]] = {}
    source = print_sight(mask, heads, block_n).split("\n", 2)[2]
    exec(source.replace("@triton.jit", ""), {"tl": names}, space)
    clears, edges, state = space["count"](*tile)  # type: ignore[misc]
    return [space["clear"](k, state) for k in range(clears)], [space["edge"](k, state) for k in range(edges)]


def seen(mask: m.Mask, heads: int, block_n: int, first: int, last: int, head: int, length: int) -> tuple[set[int], set[int]]:
    """Blocks in which every row sees every key, and those in which some row sees one, pair by pair."""
    axes = {"h": torch.arange(head, head + heads)[:, None, None], "i": torch.arange(first, last + 1)[:, None]}
    keys = torch.arange(-(-max(length, 1) // block_n) * block_n)
    sight = torch.as_tensor(evaluator(mask.predicate())({**axes, "j": keys})) & (keys < length)
    blocks = sight.expand(heads, last + 1 - first, -1).reshape(-1, keys.numel() // block_n, block_n)
    every, some = blocks.all(2).all(0), blocks.any(2).any(0)
    return set(every.nonzero().flatten().tolist()), set(some.nonzero().flatten().tolist())


UNITS = st.sampled_from([16, 32, 64])
SPARSE = st.builds(m.BlockSparse, UNITS, st.integers(1, 5), st.integers(2, 9), st.integers(0, 4), st.integers(0, 40))
MASKS = st.one_of(
    SPARSE,
    st.sampled_from([m.Causal(), SINKS, DILATED]),
    st.builds(m.Window, st.integers(0, 200)),
    st.builds(m.Chunked, st.integers(1, 200)),
    st.builds(m.Prefix, st.integers(0, 200)),
    st.builds(lambda left, mask: m.All(m.Window(left), mask), st.integers(0, 200), SPARSE),
    st.builds(lambda left, size: m.All(m.Window(left), m.Chunked(size)), st.integers(0, 200), st.integers(1, 200)),
    st.builds(lambda left, size: m.Any(m.Window(left), m.Chunked(size)), st.integers(0, 200), st.integers(1, 200)),
)
TILES = st.tuples(st.integers(0, 400), st.integers(0, 140), st.integers(0, 7), st.integers(0, 60))


def tile_of(heads: int, first: int, more: int, before: int, beyond: int) -> tuple[int, int, int, int]:
    """The last query of a tile is a key, and there may be more; so many tiles of heads come before."""
    return first, first + more, heads * before, first + more + 1 + beyond


@settings(max_examples=150, deadline=None)
@given(mask=MASKS, tile=TILES, heads=st.sampled_from([1, 1, 2, 4, 8]), size=st.sampled_from([16, 32, 64]))
def test_exactly_the_blocks_with_a_visible_pair(mask: m.Mask, tile: tuple[int, int, int, int], heads: int, size: int) -> None:
    first, last, head, length = tile_of(heads, *tile)
    unit = unit_of(mask)
    size = size if unit is None else min(size, unit)
    clear, edge = walked(mask, heads, size, first, last, head, length)
    every, some = seen(mask, heads, size, first, last, head, length)
    assert sorted(clear + edge) == sorted(some)
    assert set(clear) <= every


ANY = st.deferred(
    lambda: (
        MASKS
        | st.builds(
            m.BlockSparse, st.integers(1, 40), st.integers(0, 3), st.integers(1, 6), *[st.integers(0, 3)] * 2, st.integers(1, 6)
        )
        | st.builds(m.Any, ANY, ANY)
        | st.builds(m.All, ANY, ANY)
        | st.sampled_from(
            [
                m.Bidirectional(),
                m.General(sympy.Abs(I - J) < 40),
                m.General(sympy.Ge(J, 2 * I - 60) & sympy.Lt(3 * J, I + 5)),
                m.General(sympy.Eq(sympy.Mod(J, 100), 3) | sympy.Ne(I, J)),
                m.General(I - J <= 9 * H),
                FAR_AND_NEAR,
                m.General(sympy.Lt(sympy.Mod(I, 50) + J - I, 3) & (sympy.Mod(J, 70) < 50)),
                m.General(sympy.Eq(sympy.Mod(sympy.floor(J / 16) + 2 * H, 4), sympy.Mod(I, 4))),
                m.General(sympy.Eq(sympy.Mod(sympy.floor(J / 16) + sympy.floor((H - 3) / 2) + sympy.floor(I / 9), 4), 1)),
                m.General(sympy.Eq(sympy.Mod(sympy.floor(J / 16) + I / 2, 4), 1)),  # half a cell is none
                m.General(sympy.Eq(sympy.Mod(sympy.floor(J / 16), 4), 1) | sympy.Eq(sympy.Mod(sympy.floor(J / 32), 3), 1)),
            ]
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(mask=ANY, tile=TILES, heads=st.sampled_from([1, 2, 4, 7]), size=st.sampled_from([16, 32, 64]))
def test_no_visible_pair_is_missed_whatever_the_mask(mask: m.Mask, tile: tuple[int, int, int, int], heads: int, size: int) -> None:
    first, last, head, length = tile_of(heads, *tile)
    clear, edge = walked(mask, heads, size, first, last, head, length)
    every, some = seen(mask, heads, size, first, last, head, length)
    assert len(set(clear + edge)) == len(clear + edge)
    assert some <= set(clear + edge)
    assert set(clear) <= every


@settings(max_examples=60, deadline=None)
@given(
    tile=TILES,
    heads=st.sampled_from([1, 2, 3, 8]),
    shape=st.tuples(UNITS, st.integers(1, 5), st.integers(2, 9), st.integers(0, 4)),
    offset=st.integers(0, 5),
    group=st.integers(1, 3),
)
def test_exactly_those_of_heads_that_slide_together(
    tile: tuple[int, int, int, int], heads: int, shape: tuple[int, int, int, int], offset: int, group: int
) -> None:
    """Groups of heads, and the first head of a device, are whole tiles: as many blocks as for one head are visited."""
    mask = m.BlockSparse(*shape, offset * heads, group * heads)
    first, last, head, length = tile_of(heads, *tile)
    clear, edge = walked(mask, heads, 16, first, last, head, length)
    every, some = seen(mask, heads, 16, first, last, head, length)
    assert sorted(clear + edge) == sorted(some)
    assert set(clear) <= every
    cells = [span.cells for span in spans(mask, heads) if span.cells is not None]
    assert [each.deltas for each in cells] == [(0,)] or (group * heads == 1 and len(cells) == 1)


def test_a_floor_of_heads_is_one_in_a_tile_or_left() -> None:
    """Every small case: it is replaced where, and only where, no tile crosses a multiple; then by what it is in every head."""
    for group, offset, heads in itertools.product(range(2, 9), range(-9, 10), range(1, 7)):
        found = _of_tile(sympy.floor((H + offset) / group), heads)
        tiles = [[(head + offset) // group for head in range(tile * heads, (tile + 1) * heads)] for tile in range(group)]
        assert found.has(H) == any(len(set(tile)) > 1 for tile in tiles), (group, offset, heads)
        if not found.has(H):
            assert [int(found.subs(HEAD, tile * heads)) for tile in range(group)] == [tile[0] for tile in tiles]


def test_small_masks_of_every_kind() -> None:
    """Steps, offsets, groups, tiles of heads: no visible pair is missed; where the heads of a tile slide together, none more."""
    exact = 0
    for step, offset, group, heads in itertools.product((1, 2), range(4), (1, 2, 3, 4), (1, 2, 4)):
        mask = m.BlockSparse(16, 1, 3, step, offset, group)
        for tile in range(3):
            for first in (0, 70, 100):
                place = first, first + 5, tile * heads, first + 6
                clear, edge = walked(mask, heads, 16, *place)
                every, some = seen(mask, heads, 16, *place)
                assert some <= {*clear, *edge} and set(clear) <= every and len({*clear, *edge}) == len(clear) + len(edge)
                if group == 1 or (group % heads == 0 and offset % heads == 0):
                    assert some == {*clear, *edge}
                    exact += 1
    assert exact > 400


def test_spans_of_a_block_sparse_mask() -> None:
    """Block 5 of 64 tokens, the second head: two local blocks, and of four the one whose number is 2 modulo 4."""
    mask = m.BlockSparse(64, 2, 4, head_step=1)
    assert walked(mask, 1, 64, 320, 383, 1, 384) == ([4, 2], [5])
    assert walked(mask, 2, 64, 320, 383, 0, 384) == ([4], [5, 2, 3])  # block 2 is the second head's, 3 the first's
    assert walked(m.BlockSparse(64, 2, 4), 4, 64, 320, 320, 0, 321) == ([4, 3], [5])
    assert walked(mask, 1, 32, 320, 383, 1, 384)[0] == [8, 9, 4, 5]


def test_a_part_of_a_mask_that_is_empty_for_a_tile() -> None:
    """Keys 50 to i - 60 are none for i < 110: what they would cut out of the window is still there, once."""
    clear, edge = walked(FAR_AND_NEAR, 1, 16, 64, 79, 0, 80)
    assert sorted(clear + edge) == [0, 1, 2, 3, 4]


def test_what_is_known_of_a_mask() -> None:
    assert unit_of(m.BlockSparse(48, 1, 4)) == 48
    assert unit_of(m.All(m.Window(100), m.BlockSparse(64, 1, 4))) == 64
    assert unit_of(m.Window(100)) is block_of(m.Window(100)) is block_of(m.BlockSparse(40, 1, 4)) is None
    assert block_of(m.BlockSparse(48, 1, 4)) == 16 and block_of(m.BlockSparse(64, 1, 4)) == 64
    assert bounded(SINKS) and bounded(m.Prefix(9)) and bounded(m.All(m.Causal(), m.SameDocument(0)))
    assert not bounded(m.Bidirectional()) and not bounded(m.SameDocument(0)) and not bounded(m.General(sympy.Ne(Load(0, B, J), 0)))
    assert not bounded(m.Any(m.Window(3), m.SameDocument(0)))


def test_heads_of_a_tile_that_see_the_same() -> None:
    """Those of a KV head, where KV heads slide: a tile of a prefill may hold them all."""
    assert not by_head(m.BlockSparse(64, 2, 8, 2, 8, 4), 4) and not by_head(m.BlockSparse(64, 2, 8, 2, 8, 4), 2)
    assert by_head(m.BlockSparse(64, 2, 8, 2, 8, 4), 8) and by_head(m.BlockSparse(64, 2, 8, 2, 6, 4), 4)
    assert by_head(m.BlockSparse(64, 2, 8, 1), 4) and not by_head(m.BlockSparse(64, 2, 8), 4)


@pytest.mark.parametrize("mask", [m.BlockSparse(64, 16, 8, 1), m.Prefix(9), SINKS, m.All(m.Window(99), m.Chunked(64))], ids=repr)
def test_spans_are_few(mask: m.Mask) -> None:
    assert len(spans(mask, 4)) <= 2

"""Are exactly those blocks of keys enumerated in which some query of a tile sees a key?"""

from __future__ import annotations

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
from compile_attn.kernels.visible import block_of, bounded, spans, unit_of
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


SPARSE = st.builds(m.BlockSparse, st.sampled_from([16, 32, 64]), st.integers(1, 5), st.integers(2, 9), st.integers(0, 4))
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
TILES = st.tuples(st.integers(0, 400), st.integers(0, 140), st.integers(0, 12), st.integers(0, 60))


def tile_of(first: int, more: int, head: int, beyond: int) -> tuple[int, int, int, int]:
    """The last query of a tile is a key, and there may be more."""
    return first, first + more, head, first + more + 1 + beyond


@settings(max_examples=150, deadline=None)
@given(mask=MASKS, tile=TILES, heads=st.sampled_from([1, 1, 2, 4, 8]), size=st.sampled_from([16, 32, 64]))
def test_exactly_the_blocks_with_a_visible_pair(mask: m.Mask, tile: tuple[int, int, int, int], heads: int, size: int) -> None:
    first, last, head, length = tile_of(*tile)
    unit = unit_of(mask)
    size = size if unit is None else min(size, unit)
    clear, edge = walked(mask, heads, size, first, last, head, length)
    every, some = seen(mask, heads, size, first, last, head, length)
    assert sorted(clear + edge) == sorted(some)
    assert set(clear) <= every


ANY = st.deferred(
    lambda: (
        MASKS
        | st.builds(m.BlockSparse, st.integers(1, 40), st.integers(0, 3), st.integers(1, 6), st.integers(0, 3))
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
                m.General(sympy.Eq(sympy.Mod(sympy.floor(J / 16), 4), 1) | sympy.Eq(sympy.Mod(sympy.floor(J / 32), 3), 1)),
            ]
        )
    )
)


@settings(max_examples=150, deadline=None)
@given(mask=ANY, tile=TILES, heads=st.sampled_from([1, 2, 4, 7]), size=st.sampled_from([16, 32, 64]))
def test_no_visible_pair_is_missed_whatever_the_mask(mask: m.Mask, tile: tuple[int, int, int, int], heads: int, size: int) -> None:
    first, last, head, length = tile_of(*tile)
    clear, edge = walked(mask, heads, size, first, last, head, length)
    every, some = seen(mask, heads, size, first, last, head, length)
    assert len(set(clear + edge)) == len(clear + edge)
    assert some <= set(clear + edge)
    assert set(clear) <= every


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


@pytest.mark.parametrize("mask", [m.BlockSparse(64, 16, 8, 1), m.Prefix(9), SINKS, m.All(m.Window(99), m.Chunked(64))], ids=repr)
def test_spans_are_few(mask: m.Mask) -> None:
    assert len(spans(mask, 4)) <= 2

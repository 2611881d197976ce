"""Do masks as values say what they mean?"""

from __future__ import annotations

import dataclasses

import pytest
import sympy

from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.mask import (
    All,
    Any,
    Bidirectional,
    BlockSparse,
    Causal,
    Chunked,
    General,
    Mask,
    Prefix,
    SameDocument,
    Window,
)

MASKS = [
    Causal(),
    Bidirectional(),
    Window(3),
    Chunked(4),
    Prefix(2),
    BlockSparse(2, 1, 3, 1),
    General(sympy.Eq(sympy.Mod(I - J, 2), 0)),
    All(Window(5), Chunked(4)),
    Any(Window(1), Chunked(4)),
]


def seen(mask: Mask, i: int, j: int, h: int = 0) -> bool:
    return bool(mask.predicate().subs({I: i, J: j, H: h, B: 0}))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_window_and_causality_bound_the_predicate(mask: Mask) -> None:
    for i in range(12):
        for j in range(12):
            if seen(mask, i, j):
                assert not mask.causal() or j <= i
                assert mask.window() is None or i - j <= mask.window()


def test_block_sparse_example() -> None:
    """Four heads, blocks of one token, two local, stride four: the rows of the published kernel."""
    mask = BlockSparse(1, 2, 4, 1)
    rows = [[j for j in range(12) if seen(mask, 7, j, h)] for h in range(4)]
    assert rows == [[3, 6, 7], [2, 6, 7], [1, 5, 6, 7], [0, 4, 6, 7]]


def test_a_window_of_four_keys_counts_the_query() -> None:
    assert [j for j in range(12) if seen(Window(3), 7, j)] == [4, 5, 6, 7]
    assert Window(3).words() == "causal, window of 4 keys"


def test_masks_are_values() -> None:
    assert All(Causal(), Window(2)) == All(Causal(), Window(2)) != Any(Causal(), Window(2))
    assert len({All(Causal()), Any(Causal()), Causal(), Bidirectional(), Causal()}) == 4
    assert repr(All(Causal(), Window(left=2))) == "All(Causal(), Window(left=2))"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Window(3).left = 4  # type: ignore[misc]


def test_features() -> None:
    assert Causal().features() == frozenset()
    assert All(Causal(), SameDocument(0)).features() == {"DOCUMENTS", "CAPTURED"}
    assert "BIDIRECTIONAL" in SameDocument(0).features()
    assert General(sympy.Ne(Load(0, B, J), 0)).features() == {"GENERAL_MASK", "BIDIRECTIONAL", "CAPTURED"}
    assert Any(Window(1), Chunked(4)).window() == 3
    assert Any(Window(1), Causal()).window() is None

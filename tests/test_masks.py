"""Is a mask named by what it means, whatever its spelling, and never wrongly?"""

from __future__ import annotations

import time

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from sympy.logic.boolalg import Boolean

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
from compile_attn.passes.masks import classify, sees_itself
from tests.test_proof import BOX, HEADS, brute, predicates

CAUSAL = sympy.Le(J, I)
DOCUMENT = sympy.Eq(Load(0, B, J), Load(0, B, I))
PADDING = sympy.Ne(Load(1, B, J), 0)

NAMED = [
    Causal(),
    Bidirectional(),
    Window(0),
    Window(4095),
    Window(32767),
    Chunked(3),
    Chunked(8192),
    Prefix(5),
    BlockSparse(64, 16, 8, 1),
    BlockSparse(16, 1, 4, 3),
    BlockSparse(1, 2, 4),
    All(Window(100), Chunked(256)),
    All(Causal(), SameDocument(0)),
    All(Window(4), SameDocument(3)),
    SameDocument(2),
    Any(Causal(), SameDocument(1)),
]


@pytest.mark.parametrize("mask", NAMED, ids=repr)
def test_each_family_is_found_again(mask: Mask) -> None:
    assert classify(mask.predicate()) == mask
    assert classify(sympy.Not(sympy.to_nnf(sympy.Not(mask.predicate()), simplify=False))) == mask


SLIDES = [  # (mask, heads): as its own name, or as another of the same mask
    (BlockSparse(64, 2, 8, 1, 3), 4),
    (BlockSparse(64, 2, 4, 2, 0, 2), 4),
    (BlockSparse(16, 1, 16, 3, 6, 4), 12),
    (BlockSparse(64, 16, 8, 1, 24, 4), 32),
    (BlockSparse(8, 1, 5, 2, 3, 3), 2),
    (BlockSparse(64, 2, 8, 2, 8, 8), 4),
    (BlockSparse(64, 2, 8, 3, 8, 8), 1),
    (BlockSparse(64, 2, 6, 2, 3), 8),
    (BlockSparse(32, 2, 4, 2, 1, 1), 2),
]


@pytest.mark.parametrize(("mask", "heads"), SLIDES, ids=repr)
def test_slides_of_some_heads_are_found(mask: BlockSparse, heads: int) -> None:
    """Of groups of heads, and of heads that are not the model's first: a name for the same keys, in every head."""
    found = classify(mask.predicate(), heads)
    assert isinstance(found, BlockSparse)
    i, j, h = np.meshgrid(np.arange(0, 700, 5), np.arange(0, 700, 3), np.arange(heads), indexing="ij")
    ours, its = (sympy.lambdify((I, J, H), each.predicate(), "numpy")(i, j, h) for each in (found, mask))
    assert (ours == its).all()
    assert classify(found.predicate(), heads) == found


@pytest.mark.parametrize(
    "slide",
    [sympy.Mod(H * H, 3), sympy.floor(H / 2) + H, 2 * sympy.floor(H / 2) + sympy.floor(H / 3), 2 * H],
    ids=str,
)
def test_other_slides_of_heads_stay_general(slide: sympy.Expr) -> None:
    visible = CAUSAL & ((sympy.floor(I / 4) - sympy.floor(J / 4) < 1) | sympy.Eq(sympy.Mod(sympy.floor(J / 4) + slide, 6), 0))
    found = classify(visible, 8)
    assert "GENERAL_MASK" in found.features()
    assert brute(sympy.Equivalent(visible, found.predicate()))


@pytest.mark.parametrize(
    ("visible", "mask"),
    [
        (sympy.Gt(I + 1, J), Causal()),
        (sympy.Not(J > I), Causal()),
        (CAUSAL & (sympy.Abs(I - J) < 4), Window(3)),
        (CAUSAL & (J > I - 4), Window(3)),
        (sympy.Eq(I, J), Window(0)),
        (CAUSAL & (I - sympy.Mod(I, 8) <= J), Chunked(8)),
        (CAUSAL & (sympy.floor((I - J) / 4) < 1), Window(3)),
        (CAUSAL | (J < 4), Prefix(4)),
        (CAUSAL | (J < 1), Causal()),
        (((CAUSAL) & (sympy.Max(0, I - J) >= 8)) | (CAUSAL & (sympy.Max(0, I - J) < 8)), Causal()),
        (CAUSAL & DOCUMENT, All(Causal(), SameDocument(0))),
        (CAUSAL & DOCUMENT & PADDING, All(Causal(), SameDocument(0), General(PADDING))),
        (((J < 4) & CAUSAL & DOCUMENT) | ((J >= 4) & CAUSAL & DOCUMENT), All(Causal(), SameDocument(0))),
        (CAUSAL & ((J < 4) | (I - J < 8)), All(Causal(), General((J < 4) | (I - J < 8)))),
        (CAUSAL & sympy.Eq(sympy.Mod(I - J, 4), 0), All(Causal(), General(sympy.Eq(sympy.Mod(I - J, 4), 0)))),
    ],
)
def test_other_words(visible: Boolean, mask: Mask) -> None:
    assert classify(visible) == mask


@pytest.mark.parametrize(
    ("visible", "causal"),
    [
        (sympy.Lt(J, I), True),  # strict
        (sympy.Ge(J, I), False),  # the wrong way round
        (CAUSAL & (sympy.Eq(sympy.floor((I + 1) / 8), sympy.floor((J + 1) / 8))), True),  # chunks that start at 7
        (CAUSAL & (I < 10), True),  # causal on the first queries only
        (CAUSAL | (I >= 10), False),
        (CAUSAL & ((I - J <= 7) | sympy.Eq(I, 90_000)), True),  # a window but for one row
        (CAUSAL & (I + J < 9), True),
        (sympy.Abs(I - J) < 4, False),
        (CAUSAL & sympy.Ne(sympy.Mod(J, 100), 99), True),
        (CAUSAL & (I - J <= 4 * H), True),
    ],
)
def test_near_misses_stay_general(visible: Boolean, causal: bool) -> None:
    mask = classify(visible, 4)
    assert isinstance(mask.masks[-1] if isinstance(mask, All) else mask, General)
    assert mask.causal() == causal
    assert brute(sympy.Equivalent(visible, mask.predicate()))


@settings(max_examples=250, deadline=None)
@given(predicates)
def test_never_wrong(visible: Boolean) -> None:
    mask = classify(visible, HEADS)
    assert brute(sympy.Equivalent(visible, mask.predicate()))
    if mask.causal():
        assert brute(sympy.Implies(visible, CAUSAL))
    if (left := mask.window()) is not None:
        assert brute(sympy.Implies(visible, left >= I - J))


@settings(max_examples=150, deadline=None)
@given(predicates.filter(lambda p: not p.has(Load, H)))
def test_sees_itself_is_never_wrong(visible: Boolean) -> None:
    if sees_itself(visible):
        run = sympy.lambdify((I, J), visible, modules=[{"floor": lambda x: np.floor(x + 1e-9)}, "numpy"])
        i, j = np.meshgrid(np.arange(BOX), np.arange(BOX), indexing="ij")
        assert np.broadcast_to(run(i, j), (BOX, BOX)).any(axis=1).all()


@pytest.mark.parametrize(
    ("visible", "sees"),
    [
        (CAUSAL, True),
        (CAUSAL & ((J < 1) | (I - J <= 0)), True),
        (sympy.Lt(J, I), False),  # row 0 sees nothing
        (sympy.Eq(J, 0), True),
        (CAUSAL & PADDING, False),
        (CAUSAL & DOCUMENT, True),
        (BlockSparse(4, 0, 2).predicate(), False),
        (BlockSparse(4, 1, 2).predicate(), True),
    ],
)
def test_sees_itself(visible: Boolean, sees: bool) -> None:
    assert sees_itself(visible) == sees


@pytest.mark.parametrize("mask", NAMED, ids=repr)
def test_naming_is_cheap(mask: Mask) -> None:
    classify.cache_clear()
    started = time.perf_counter()
    classify(mask.predicate())
    assert time.perf_counter() - started < 2.0  # 5 to 250 ms alone; room for a busy machine

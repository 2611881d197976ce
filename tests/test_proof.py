"""Does the proof agree with brute force, on boxes much larger than the constants of the predicate?"""

from __future__ import annotations

import time

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.mask import BlockSparse, Causal, Chunked, Window
from compile_attn.passes.proof import first_false, implies, same, valid

BOX = 72  # constants below are at most 9, periods at most 60: repeats and thresholds both show
HEADS = 3
FREE = (sympy.Ne(Load(0, B, J), 0), sympy.Eq(Load(1, B, I), Load(1, B, J)))

small = st.integers(-9, 9)
modulus = st.integers(1, 5)
lines = st.sampled_from((I, J, I - J, J - I, I, J, I - J, J - I, I + J, 2 * I - J, I + 2 * H))  # the last: often no one form


@st.composite
def terms(draw: st.DrawFn) -> sympy.Expr:
    line, shift = draw(lines), draw(small)
    kind = draw(st.integers(0, 5))
    if kind == 0:
        return sympy.floor((line + shift) / draw(modulus))
    if kind == 1:
        return sympy.Mod(line + shift, draw(modulus))
    if kind == 2:
        return sympy.floor((I + shift) / draw(modulus)) - sympy.floor((J + draw(small)) / draw(modulus))
    if kind == 3:
        return sympy.Mod(sympy.floor((line + shift) / draw(modulus)) + draw(st.sampled_from((0, H))), draw(modulus))
    if kind == 4:
        return draw(st.sampled_from((sympy.Abs(line + shift), sympy.Max(line, shift), sympy.Min(line, J + shift))))
    return draw(st.sampled_from((1, 1, 2, -3))) * line + shift


@st.composite
def atoms(draw: st.DrawFn) -> Boolean:
    if draw(st.integers(0, 7)) == 0:
        return draw(st.sampled_from(FREE))
    relation = draw(st.sampled_from((sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt, sympy.Eq, sympy.Ne)))
    return relation(draw(terms()), draw(st.one_of(small.map(sympy.Integer), terms())))


predicates = st.recursive(
    atoms(),
    lambda inner: st.one_of(st.builds(sympy.And, inner, inner), st.builds(sympy.Or, inner, inner), st.builds(sympy.Not, inner)),
    max_leaves=4,
)


def brute(predicate: Boolean, box: int = BOX) -> bool:
    """True at every point of the box, for every value of the free atoms."""
    marks = sympy.symbols("f0 f1")
    plain = predicate.xreplace(dict(zip(FREE, marks, strict=True)))
    plain = plain.xreplace({sympy.Not(atom): sympy.Not(mark) for atom, mark in zip(FREE, marks, strict=True)})
    run = sympy.lambdify((I, J, H, *marks), plain, modules=[{"floor": lambda x: np.floor(x + 1e-9)}, "numpy"])
    i, j, h = np.meshgrid(np.arange(box), np.arange(box), np.arange(HEADS), indexing="ij")
    return all(np.all(run(i, j, h, np.full(i.shape, a), np.full(i.shape, b))) for a in (False, True) for b in (False, True))


@settings(max_examples=400, deadline=None)
@given(predicates)
def test_valid_is_never_wrong(predicate: Boolean) -> None:
    if valid(predicate, HEADS):
        assert brute(predicate)


@settings(max_examples=300, deadline=None)
@given(predicates, predicates)
def test_implication_is_never_wrong(first: Boolean, second: Boolean) -> None:
    if implies(first, second, HEADS):
        assert brute(sympy.Or(sympy.Not(first), second))


@settings(max_examples=200, deadline=None)
@given(predicates)
def test_equal_to_itself_in_other_words(predicate: Boolean) -> None:
    """Shifting each variable there and back, and turning the predicate inside out, is the same predicate."""
    other = sympy.Not(sympy.to_nnf(sympy.Not(predicate), simplify=False))
    if same(predicate, sympy.And(other, sympy.Ge(I, 0)), HEADS):
        assert brute(sympy.Equivalent(predicate, other))


@settings(max_examples=200, deadline=None)
@given(atoms().filter(lambda a: not a.has(Load)), atoms().filter(lambda a: not a.has(Load)))
def test_first_false(one: Boolean, other: Boolean) -> None:
    predicate = sympy.Or(one, other).subs({J: 0, H: 0})
    found = first_false(predicate, I)
    truth = [bool(predicate.subs(I, value)) for value in range(BOX)]
    if found is not None:
        assert found >= BOX or truth.index(False) == found
        assert found < BOX or all(truth)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (sympy.Le(J, I), sympy.Gt(I + 1, J)),
        (Window(3).predicate(), sympy.And(J <= I, sympy.Abs(I - J) < 4)),
        (Window(0).predicate(), sympy.Eq(I, J)),
        (Chunked(8).predicate(), sympy.And(J <= I, I - sympy.Mod(I, 8) <= J)),
        (Chunked(1).predicate(), sympy.Eq(I, J)),
        (BlockSparse(16, 3, 1).predicate(), Causal().predicate()),
        (sympy.Eq(sympy.Mod(I - J, 4), 0), sympy.Eq(sympy.Mod(I, 4), sympy.Mod(J, 4))),
        (sympy.floor((I - J) / 4) < 1, I - J < 4),
        (sympy.And(J <= I, FREE[0]), sympy.And(FREE[0], sympy.Not(J > I))),
        (sympy.Max(I - J, 0) >= 8, I - J >= 8),
    ],
)
def test_same(first: Boolean, second: Boolean) -> None:
    assert same(first, second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (sympy.Le(J, I), sympy.Lt(J, I)),
        (Window(4095).predicate(), Window(4096).predicate()),
        (Window(32767).predicate(), sympy.And(J <= I, sympy.Or(I - J <= 32767, sympy.Eq(I, 100_000) & sympy.Eq(J, 3)))),
        (Chunked(8192).predicate(), Window(8191).predicate()),
        (Chunked(8).predicate(), sympy.And(J <= I, sympy.Eq(sympy.floor((I + 1) / 8), sympy.floor((J + 1) / 8)))),
        (Chunked(12).predicate(), Chunked(24).predicate()),
        (BlockSparse(16, 2, 4).predicate(), BlockSparse(16, 2, 4, 1).predicate()),
        (sympy.And(J <= I, FREE[0]), sympy.And(J <= I, FREE[1])),
        (sympy.Or(J <= I, J < 5), sympy.Or(J <= I, J <= 5)),
    ],
)
def test_not_same(first: Boolean, second: Boolean) -> None:
    assert not same(first, second, 4)


@pytest.mark.parametrize(
    "predicate",
    [Window(4095).predicate(), Window(32767).predicate(), Chunked(8192).predicate(), BlockSparse(64, 16, 8, 1).predicate()],
    ids=str,
)
def test_large_constants_are_cheap(predicate: Boolean) -> None:
    started = time.perf_counter()
    assert implies(predicate, Causal().predicate(), 32)
    assert time.perf_counter() - started < 1.0  # about 10 ms; room for a busy machine

"""Which named mask is a predicate? Decided by proof.

A predicate is a Boolean combination of atoms. Atoms that compare i, j or i - j with a constant are *linear*; every other atom
(same chunk, same document, a remainder) is taken as a free truth value. Two predicates with the same free atoms are equal if they
agree for every assignment of those and all i, j >= 0; a candidate is only accepted on that ground.

Why a finite set of (i, j) decides it: for one assignment, truth is constant on the cells that the lines i = c, j = c, i - j = c cut
the quadrant into. Written with integers, each cell is {A x <= b} with A totally unimodular (rows e_i, e_j, e_i - e_j and their
negatives), so a cell that is not empty has an integral vertex: it lies in the quadrant, hence is pointed. A vertex is where two of
the bounding lines meet, and a strict bound moves a line by 1. So its coordinates are sums of at most two constants, each shifted by
at most 1, with 0 among the constants. Those sums are the points we test.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import I, J, Load
from compile_attn.kernels.mask import All, Bidirectional, Causal, Chunked, General, Mask, Prefix, SameDocument, Window

_FREE = 6  # 2**6 assignments; a mask with more free atoms stays General


def classify(visible: Boolean) -> Mask:
    """The named mask that equals the predicate for all i, j >= 0, or General. Never a wrong one."""
    return _classify(_without_extremes(visible))


def _without_extremes(predicate: Boolean) -> Boolean:
    """Max, Min and Abs inside comparisons written as cases, so that only affine forms are compared."""
    for atom in _atoms(predicate):
        found = next(iter(sorted(atom.atoms(sympy.Max, sympy.Min, sympy.Abs), key=sympy.count_ops)), None)
        if found is not None and isinstance(atom, Relational):
            a, b = (found.args[0], -found.args[0]) if isinstance(found, sympy.Abs) else found.as_two_terms()
            first = sympy.Le(a, b) if isinstance(found, sympy.Min) else sympy.Ge(a, b)
            cases = sympy.And(first, atom.xreplace({found: a})) | sympy.And(sympy.Not(first), atom.xreplace({found: b}))
            return _without_extremes(predicate.xreplace({atom: cases}))
    return predicate


@functools.lru_cache(maxsize=512)
def _classify(visible: Boolean) -> Mask:
    if visible is sympy.true:
        return Bidirectional()
    for candidate in _candidates(visible):
        if equal(visible, candidate.predicate()):
            return candidate
    parts = sympy.And.make_args(visible)
    linear = sympy.And(*(part for part in parts if not _free_atoms(part)))
    rest = sympy.And(*(part for part in parts if _free_atoms(part)))
    if linear is not sympy.true and rest is not sympy.true:
        family = _classify(linear)
        if not isinstance(family, General):
            return All(family, General(rest))
    return General(visible)


def _candidates(visible: Boolean) -> Iterator[Mask]:
    """Families that the constants of the predicate suggest."""
    constants = sorted({abs(int(c)) + d for c in visible.atoms(sympy.Integer) for d in (-1, 0, 1) if abs(int(c)) + d >= 0})
    yield Causal()
    families: list[Mask] = [Causal(), *(Window(c) for c in constants), *(Prefix(c) for c in constants if c > 0)]
    yield from families[1:]
    same: list[Mask] = []
    for atom in _free_atoms(visible):
        chunk = _chunk_size(atom)
        if chunk is not None:
            same.append(Chunked(chunk))
        document = _document(atom)
        if document is not None:
            same.append(SameDocument(document))
    for count in range(1, len(same) + 1):
        for chosen in itertools.combinations(same, count):
            if count == 1:
                yield chosen[0]
            for family in families:
                yield All(family, *chosen)


def _chunk_size(atom: Boolean) -> int | None:
    for size in sorted({int(c.q) for c in atom.atoms(sympy.Rational) if c.q > 1}):
        if isinstance(atom, sympy.Eq) and _canonical(atom) == _canonical(sympy.Eq(sympy.floor(I / size), sympy.floor(J / size))):
            return size
    return None


def _document(atom: Boolean) -> int | None:
    for load in atom.atoms(Load):
        number = int(load.args[0])
        if _canonical(atom) == _canonical(SameDocument(number).predicate()):
            return number
    return None


def equal(a: Boolean, b: Boolean) -> bool:
    """Whether two predicates agree for all i, j >= 0 and all values of their free atoms."""
    free = sorted({_canonical(atom) for part in (a, b) for atom in _free_atoms(part)}, key=str)
    if len(free) > _FREE:
        return False
    constants = {0} | {c for part in (a, b) for c in _thresholds(part)}
    i, j = _points(constants)
    return all(
        bool(
            np.array_equal(
                _evaluate(a, dict(zip(free, truth, strict=True)), i, j),
                _evaluate(b, dict(zip(free, truth, strict=True)), i, j),
            )
        )
        for truth in itertools.product((False, True), repeat=len(free))
    )


def _points(constants: set[int]) -> tuple[np.ndarray, np.ndarray]:
    shifted = sorted({c + d for c in constants for d in (-1, 0, 1)})
    sums = {a + sign * b for a in (*shifted, *(-c for c in shifted)) for b in shifted for sign in (1, -1)}
    axis = np.array(sorted(value for value in sums if value >= 0))
    grid = np.meshgrid(axis, axis, indexing="ij")
    return grid[0].ravel(), grid[1].ravel()


def _linear(atom: Boolean) -> tuple[int, int, int] | None:
    """(a, b, c) of a * i + b * j + c compared with 0, where that is a line of the proof; None for a free atom."""
    if not isinstance(atom, Relational):
        return None
    difference = sympy.expand(atom.lhs - atom.rhs)
    if not difference.free_symbols <= {I, J}:
        return None
    a, b = difference.coeff(I), difference.coeff(J)
    constant = sympy.expand(difference - a * I - b * J)
    if not (a.is_Integer and b.is_Integer and constant.is_Integer):
        return None
    return (int(a), int(b), int(constant)) if (abs(a), abs(b)) in ((1, 0), (0, 1)) or (abs(a) == 1 and a == -b) else None


def _free_atoms(predicate: Boolean) -> list[Boolean]:
    return [atom for atom in _atoms(predicate) if _linear(atom) is None]


def _atoms(predicate: Boolean) -> list[Boolean]:
    if isinstance(predicate, (sympy.And, sympy.Or, sympy.Not, sympy.Xor)):
        return [atom for part in predicate.args for atom in _atoms(part)]
    return [] if predicate in (sympy.true, sympy.false) else [predicate]


def _thresholds(predicate: Boolean) -> set[int]:
    return {abs(line[2]) for atom in _atoms(predicate) if (line := _linear(atom)) is not None}


def _canonical(atom: Boolean) -> Boolean:
    """One spelling for an atom and its mirror; a negated equality counts as its own atom and is turned in `_evaluate`."""
    if isinstance(atom, sympy.Ne):
        atom = sympy.Eq(atom.lhs, atom.rhs)
    return atom.canonical if isinstance(atom, Relational) else atom


def _evaluate(predicate: Boolean, free: dict[Boolean, bool], i: np.ndarray, j: np.ndarray) -> np.ndarray:
    if predicate is sympy.true or predicate is sympy.false:
        return np.full(i.shape, predicate is sympy.true)
    if isinstance(predicate, sympy.Not):
        return ~_evaluate(predicate.args[0], free, i, j)
    joins = {sympy.And: np.logical_and, sympy.Or: np.logical_or, sympy.Xor: np.logical_xor}
    if predicate.func in joins:
        return functools.reduce(joins[predicate.func], (_evaluate(part, free, i, j) for part in predicate.args))
    line = _linear(predicate)
    if line is None:
        value = free[_canonical(predicate)]
        return np.full(i.shape, not value if isinstance(predicate, sympy.Ne) else value)
    value = line[0] * i + line[1] * j + line[2]
    compare = {
        sympy.Lt: np.less,
        sympy.Le: np.less_equal,
        sympy.Gt: np.greater,
        sympy.Ge: np.greater_equal,
        sympy.Eq: np.equal,
        sympy.Ne: np.not_equal,
    }
    return compare[predicate.func](value, 0)  # type: ignore[no-any-return]


def sees_itself(visible: Boolean) -> bool:
    """Whether key j = i is visible to every query i: proven, for every value of the free atoms that j = i leaves open."""
    diagonal = _without_extremes(visible.subs(J, I))
    return diagonal is sympy.true or equal(diagonal, sympy.true)

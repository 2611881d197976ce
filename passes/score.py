"""What do scale, softcap, bias and mask of a score expression say?

The expression is split at its Piecewise branches: a branch with a large negative constant is hidden, the others are the score.
Terms that are constant in j are dropped: softmax ignores them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import I, J, Load, S

# A fill of -1e4 or less is a mask in a row that sees a key: exp underflows to 0 in float32 below -104, so scores would have to
# differ by more than 9,896 for a hidden key to weigh anything; a model that trained with such a fill relies on the same.
_HIDDEN = -1e4
_LEAST = -3.38e38  # no finite bfloat16 or float32 is below by more than rounding: their least are -3.3895e38 and -3.4028e38
_BRANCHES = 64  # more combinations of branches than this are no mask that anyone writes


class ScoreError(ValueError):
    """A score expression that cannot be read soundly."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason, self.cure = reason, cure


@dataclass(frozen=True)
class Score:
    """Where `visible`: bias + softcap * tanh(scale * s / softcap), or `score`, the whole expression of s, where it is set."""

    visible: Boolean
    scale: float = 1.0
    softcap: float | None = None
    bias: sympy.Expr | None = None
    score: sympy.Expr | None = None


def read_score(expr: sympy.Expr, length: sympy.Symbol | None, shift: bool = True) -> Score:
    """Read the input of a softmax over j. `length` is the number of keys: greater than i and j, and no part of the result.

    `shift`: the softmax ignores what a row adds to all its scores. With sinks it does not: they join the normaliser unshifted.
    """
    found: list[tuple[sympy.Expr, Boolean]] = []
    hidden = False
    for count, (leaf, when) in enumerate(_branches(_without_floor(expr), sympy.true)):
        if count >= _BRANCHES:
            raise ScoreError(f"the score has more than {_BRANCHES} combinations of cases", "write the mask as one where()")
        if _is_hidden(leaf):
            hidden = True
        else:
            found.append((leaf, when))
    if not found:
        raise ScoreError("every key is masked", "let every query see at least itself")
    seen: dict[sympy.Expr, list[Boolean]] = {}
    leaves = [leaf for leaf, _ in found]
    for leaf, (_, when) in zip(_without_row_terms(leaves) if shift else leaves, found, strict=True):
        seen.setdefault(leaf, []).append(when)
    visible = _in_range(sympy.Or(*(when for conditions in seen.values() for when in conditions)) if hidden else sympy.true, length)
    pieces = [(leaf, _in_range(sympy.Or(*conditions), length)) for leaf, conditions in seen.items()]
    for part in (visible, *(part for piece in pieces for part in piece)):
        if length is not None and part.has(length):
            raise ScoreError(f"the score depends on the sequence length {length}: {part}", "write it in positions alone")
    if visible.has(S):
        raise ScoreError(f"which keys are visible depends on their scores: {visible}", "mask by positions, not by scores")
    return _canonical(pieces, visible)


def _without_floor(expr: sympy.Expr) -> sympy.Expr:
    """max(x, finfo.min) is x for every finite x; minus infinity becomes a fill that hides as well."""

    def drop(*parts: sympy.Expr) -> sympy.Expr:
        kept = [part for part in parts if not (part.is_Float and part <= _LEAST)]
        return sympy.Max(*kept) if kept else sympy.Max(*parts)

    return expr.replace(sympy.Max, drop) if expr.has(sympy.Max) else expr


def _branches(expr: sympy.Expr, when: Boolean) -> Iterator[tuple[sympy.Expr, Boolean]]:
    """(value, condition) for every combination of branches."""
    choice = next(iter(sorted(expr.atoms(sympy.Piecewise), key=sympy.count_ops, reverse=True)), None)
    if choice is None:
        yield expr, when
        return
    before: Boolean = sympy.true
    for value, condition in choice.args:
        here = sympy.And(when, before, condition)
        before = sympy.And(before, sympy.Not(condition))
        if here is not sympy.false:
            yield from _branches(expr.xreplace({choice: value}), here)


def _is_hidden(leaf: sympy.Expr) -> bool:
    if leaf.has(sympy.nan, sympy.zoo, sympy.I):
        why = "the score is not a number in some branch (inf - inf, 1 / 0, or the root of a negative number)"
        raise ScoreError(why, "use masked_fill or where for the mask")
    if leaf in (-sympy.oo,):
        return True
    constant, rest = leaf.as_coeff_Add()
    if not (plain_number(constant) and float(constant) <= _HIDDEN):
        return False
    # A term as large as the fill may cancel it: (1 - mask) * -3e38 of a mask that is data is no constant fill.
    return not any(abs(float(_size(term))) >= -_HIDDEN for term in sympy.Add.make_args(rest) if not term.has(S))


def _size(term: sympy.Expr) -> sympy.Expr:
    return term.as_coeff_Mul()[0]


def plain_number(value: sympy.Expr) -> bool:
    """A constant, and not an element of a tensor (which sympy takes for one, having no symbols)."""
    return bool(value.is_number and value.is_real and not value.atoms(AppliedUndef, Load))


def _without_row_terms(leaves: list[sympy.Expr]) -> list[sympy.Expr]:
    """Drop what is constant in j; write a term that is linear in j, and free of i, as slope * (j - i).

    Softmax ignores what is added to ALL visible scores of a row alike: only terms that every leaf has may go. A number that only
    some leaves add is a bias (a recency bonus, a bucket), however constant it looks in its own leaf.
    """
    split = [set(sympy.Add.make_args(sympy.expand(leaf))) for leaf in leaves]
    shared = set.intersection(*split)
    if any(abs(float(_size(term))) >= -_HIDDEN for terms in split for term in terms if not term.has(S)):
        return [sympy.Add(*terms) for terms in split]  # a large term may be half of a difference: nothing is dropped then
    change = dict[sympy.Expr, sympy.Expr]()
    for term in shared:
        if not term.has(S, J):
            change[term] = sympy.Integer(0)
            continue
        slope = sympy.diff(term, J) if not term.has(S) and not term.atoms(sympy.Function) & _with_j(term) else None
        if slope is not None and not slope.has(J, I) and sympy.expand(term - slope * J) == 0:
            change[term] = slope * (J - I)
    return [sympy.Add(*(change.get(term, term) for term in terms)) for terms in split]


def _with_j(term: sympy.Expr) -> set[sympy.Basic]:
    return {part for part in term.atoms(sympy.Function) if part.has(J)}


def _in_range(condition: Boolean, length: sympy.Symbol | None) -> Boolean:
    """The condition for 0 <= i, j < length."""
    if length is None or not condition.has(length):
        return condition
    known: dict[sympy.Basic, Boolean] = {}
    for atom in condition.atoms(sympy.core.relational.Relational):
        if atom.has(length):
            for place in (I, J):
                margin = sympy.expand(atom.gts - atom.lts) if hasattr(atom, "gts") else None
                if margin is None:
                    continue
                rest = sympy.expand(margin - (length - place))  # length - place is at least 1
                if rest.is_Integer and (
                    rest >= 0 or (not atom.is_Relational) or (rest >= -1 and isinstance(atom, (sympy.Ge, sympy.Le)))
                ):
                    known[atom] = sympy.true
                rest = sympy.expand(-margin - (length - place))
                if rest.is_Integer and (rest >= 0 or (rest >= -1 and isinstance(atom, (sympy.Gt, sympy.Lt)))):
                    known[atom] = sympy.false
    return condition.xreplace(known)


def _canonical(pieces: list[tuple[sympy.Expr, Boolean]], visible: Boolean) -> Score:
    """scale, softcap and bias where the order is the canonical one; else the whole score."""
    products = {sympy.Add(*(term for term in sympy.Add.make_args(leaf) if term.has(S))) for leaf, _ in pieces}
    if len(products) > 1 or next(iter(products)).has(sympy.Piecewise):
        return Score(visible, score=_joined(pieces))
    scores = sympy.collect(products.pop(), S)
    bias = _joined([(sympy.Add(*(term for term in sympy.Add.make_args(leaf) if not term.has(S))), when) for leaf, when in pieces])
    rest = None if bias == 0 else bias
    factor = scores.coeff(S)
    if sympy.expand(scores - factor * S) == 0 and plain_number(factor):
        return Score(visible, float(factor), None, rest)
    cap, curve = scores.as_coeff_Mul()
    if isinstance(curve, sympy.tanh) and plain_number(cap) and cap.is_positive:
        inner = curve.args[0].coeff(S)
        if plain_number(inner) and sympy.expand(curve.args[0] - inner * S) == 0:
            return Score(visible, float(inner * cap), float(cap), rest)
    return Score(visible, score=_joined(pieces))


def _joined(pieces: list[tuple[sympy.Expr, Boolean]]) -> sympy.Expr:
    """One expression; what the last piece says where no condition holds is never looked at: no key is visible there."""
    if len(pieces) == 1:
        return pieces[0][0]
    return sympy.Piecewise(*pieces[:-1], (pieces[-1][0], True))

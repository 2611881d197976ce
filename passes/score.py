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
_BRANCHES = 64  # more combinations of branches than this are no mask that anyone writes


class ScoreError(ValueError):
    """A score expression that cannot be read soundly."""

    def __init__(self, reason: str, cure: str = "") -> None:
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


def read_score(expr: sympy.Expr, length: sympy.Symbol | None) -> Score:
    """Read the input of a softmax over j. `length` is the number of keys: greater than i and j, and no part of the result."""
    seen: list[tuple[sympy.Expr, list[Boolean]]] = []
    hidden = False
    for count, (leaf, when) in enumerate(_branches(expr, sympy.true)):
        if count >= _BRANCHES:
            raise ScoreError(f"the score has more than {_BRANCHES} combinations of cases", "write the mask as one where()")
        if _is_hidden(leaf):
            hidden = True
            continue
        leaf = _without_row_terms(leaf)
        same = next((conditions for value, conditions in seen if value == leaf), None)
        if same is None:
            seen.append((leaf, [when]))
        else:
            same.append(when)
    if not seen:
        raise ScoreError("every key is masked")
    visible = _in_range(sympy.Or(*(when for _, conditions in seen for when in conditions)) if hidden else sympy.true, length)
    pieces = [(leaf, _in_range(sympy.Or(*conditions), length)) for leaf, conditions in seen]
    core = pieces[0][0] if len(pieces) == 1 else sympy.Piecewise(*pieces[:-1], (pieces[-1][0], True))
    for part in (visible, core):
        if length is not None and part.has(length):
            raise ScoreError(f"the score depends on the sequence length {length}: {part}", "write it in positions alone")
    return _canonical(core, visible)


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
    if leaf is sympy.nan:
        raise ScoreError("the score is not a number in some branch (inf - inf)")
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


def _without_row_terms(leaf: sympy.Expr) -> sympy.Expr:
    """Drop what is constant in j; write a term that is linear in j, and free of i, as slope * (j - i)."""
    kept: sympy.Expr = sympy.Integer(0)
    terms = sympy.Add.make_args(sympy.expand(leaf))
    large = any(abs(float(_size(term))) >= -_HIDDEN for term in terms if not term.has(S))
    for term in terms:
        if not term.has(S, J) and not large:  # a large term may be half of a difference: nothing is dropped then
            continue
        slope = sympy.diff(term, J) if not term.has(S) and not term.atoms(sympy.Function) & _with_j(term) else None
        linear = slope is not None and not slope.has(J, I) and sympy.expand(term - slope * J) == 0
        kept += slope * (J - I) if linear else term
    return kept


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


def _canonical(core: sympy.Expr, visible: Boolean) -> Score:
    """scale, softcap and bias where the order is the canonical one; else the whole score."""
    product = [term for term in sympy.Add.make_args(core) if term.has(S)]
    bias = sympy.Add(*(term for term in sympy.Add.make_args(core) if not term.has(S)))
    if core.has(sympy.Piecewise) and any(term.has(sympy.Piecewise) for term in product):
        return Score(visible, score=core)
    rest = None if bias == 0 else bias
    scores = sympy.collect(sympy.Add(*product), S)
    factor = scores.coeff(S)
    if sympy.expand(scores - factor * S) == 0 and plain_number(factor):
        return Score(visible, float(factor), None, rest)
    cap, curve = scores.as_coeff_Mul()
    if isinstance(curve, sympy.tanh) and plain_number(cap) and cap.is_positive:
        inner = curve.args[0].coeff(S)
        if plain_number(inner) and sympy.expand(curve.args[0] - inner * S) == 0:
            return Score(visible, float(inner * cap), float(cap), rest)
    return Score(visible, score=core)

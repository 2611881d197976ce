"""Which keys may a tile of queries see? Solved from the mask's predicate, as a few progressions of positions.

A tile holds consecutive queries FIRST..LAST of one sequence and `heads` query heads from HEAD on, a multiple of `heads`: of
each KV head's query heads the tiles take equal parts. The predicate becomes a
disjunction of conjunctions of comparisons; each comparison that can be solved for the key bounds it from one side, or keeps
one cell of `unit` keys in every `period`. Bounds are taken over all rows of the tile: the outer ones hold every key that
some row sees, between the inner ones every row sees every key. What cannot be solved bounds nothing, so a span may hold
keys that no row sees, but never lacks one that a row does.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import H, I, J
from compile_attn.kernels.mask import Mask

FIRST = sympy.Symbol("first", integer=True, nonnegative=True)  # position of the first query of a tile
LAST = sympy.Symbol("last", integer=True, nonnegative=True)
HEAD = sympy.Symbol("head", integer=True, nonnegative=True)  # its first query head, a multiple of how many there are
LENGTH = sympy.Symbol("length", integer=True, nonnegative=True)  # keys of the sequence
_MOST_TERMS = 8  # of the disjunction; a predicate with more is bounded by its causality and window alone


@dataclass(frozen=True)
class Cells:
    """Key j is in cell j // unit; cells `residue` + 0..lag + one of `deltas`, modulo `period`, may be seen."""

    unit: int
    period: int
    residue: sympy.Expr
    lag: sympy.Expr
    deltas: tuple[int, ...]  # ascending, from 0: the heads of a tile may see different cells


@dataclass(frozen=True)
class Span:
    """Keys low <= j < stop, of them every `cells`; all of clear <= j < clear_stop that are in a cell are seen by every row."""

    low: sympy.Expr
    stop: sympy.Expr
    clear: sympy.Expr
    clear_stop: sympy.Expr | None  # None: nowhere is every key proven visible
    cells: Cells | None = None


@functools.lru_cache(maxsize=1024)
def spans(mask: Mask, heads: int) -> tuple[Span, ...]:
    """Where a tile with that many query heads has its visible keys. Spans may overlap; those without cells come first."""
    proven = [sympy.Le(J, I)] if mask.causal() else []
    window = mask.window()
    proven += [] if window is None else [sympy.Le(I - J, window)]
    predicate = sympy.to_nnf(mask.predicate(), simplify=False)
    terms = _terms(predicate) or [frozenset({predicate})]
    terms = [term.union(proven) for term in terms]
    terms = [term for term in terms if not any(other < term for other in terms)]
    found = [_span(term, heads) for term in dict.fromkeys(terms)]
    if sum(span.cells is not None for span in found) > 1:  # progressions may meet: one cannot tell where
        found = [span if span.cells is None else _without_cells(span) for span in found]
    return tuple(sorted(dict.fromkeys(found), key=lambda span: span.cells is not None))


def unit_of(mask: Mask) -> int | None:
    """The size of the cells by which a mask skips keys, if it does."""
    return next((span.cells.unit for span in spans(mask, 1) if span.cells is not None), None)


def block_of(mask: Mask) -> int | None:
    """The largest power of two that divides the cells by which a mask skips keys; None where that is no block for a kernel."""
    unit = unit_of(mask) or 0
    return unit & -unit if unit & -unit >= 16 else None


def by_head(mask: Mask, heads: int) -> bool:
    """May query heads of one tile, which holds so many, see different keys?"""
    return bool(_of_tile(mask.predicate(), heads).has(H))


def bounded(mask: Mask) -> bool:
    """Is any key outside some span, whatever the query?"""
    return all(span.cells is not None or span.stop != LENGTH or span.low != 0 for span in spans(mask, 1))


@functools.lru_cache(maxsize=1024)
def most_keys(mask: Mask, heads: int, rows: int, length: int) -> int:
    """About how many keys the tile of a long sequence's last queries sees. Never fewer than 1."""
    tile = {FIRST: max(0, length - rows), LAST: length - 1, HEAD: 0, LENGTH: length}
    count = 0.0
    for span in spans(mask, heads):
        part = 1.0 if span.cells is None else (int(span.cells.lag.subs(tile)) + 1) * len(span.cells.deltas) / span.cells.period
        count += part * max(0, int((span.stop - span.low).subs(tile)))
    return max(1, min(length, math.ceil(count)))


def _terms(predicate: Boolean) -> list[frozenset[Boolean]] | None:
    """The predicate as a disjunction of conjunctions; None: too many."""
    if not isinstance(predicate, (sympy.Or, sympy.And)):
        return [frozenset() if predicate is sympy.true else frozenset({predicate})]
    parts = [found for part in predicate.args if (found := _terms(part)) is not None]
    count = sum(map(len, parts)) if isinstance(predicate, sympy.Or) else math.prod(map(len, parts))
    if len(parts) < len(predicate.args) or count > _MOST_TERMS:
        return None
    if isinstance(predicate, sympy.Or):
        return list(itertools.chain(*parts))
    return [frozenset[Boolean]().union(*each) for each in itertools.product(*parts)]


def _span(term: Iterable[Boolean], heads: int) -> Span:
    low, stop, clear, clear_stop = [sympy.S.Zero], [LENGTH], [sympy.S.Zero], [LENGTH]
    cells, proven = None, True
    for literal in sorted(term, key=str):
        if cells is None and (cells := _cells(literal, heads)) is not None:
            proven &= len(cells.deltas) == 1
            continue
        solved = _solve(literal)
        proven &= solved is not None
        for lower, bound in solved or ():
            outer, inner = (_extreme(bound, lower != each, heads) for each in (True, False))
            proven &= inner is not None
            if outer is not None:
                (low if lower else stop).append(outer if lower else outer + 1)
            if inner is not None:
                (clear if lower else clear_stop).append(inner if lower else inner + 1)
    if cells is not None and cells.lag != 0:  # rows of different cells: clear only where they are the same
        clear_stop.append(LENGTH * (1 - sympy.Min(1, cells.lag)))
    end = sympy.Max(0, sympy.Min(*clear_stop)) if proven else None
    return Span(sympy.Max(*low), _positive(sympy.Min(*stop)), sympy.Max(*clear), end, cells)


def _positive(expr: sympy.Expr) -> sympy.Expr:
    return expr if expr.is_nonnegative else sympy.Max(0, expr)


def _without_cells(span: Span) -> Span:
    return replace(span, cells=None, clear_stop=None)


def _solve(literal: Boolean) -> list[tuple[bool, sympy.Expr]] | None:
    """Bounds (is it the lower one, the bound) that together say what the comparison says of the key; None: not solved."""
    if not isinstance(literal, Relational) or isinstance(literal, sympy.Ne):
        return None
    left, right = (_without_mod(side) for side in literal.args)
    strict = isinstance(literal, (sympy.Lt, sympy.Gt))
    if isinstance(literal, sympy.Eq):
        both = [_at_most(left - right, False), _at_most(right - left, False)]
        return None if None in both else both  # type: ignore[return-value]
    more = isinstance(literal, (sympy.Ge, sympy.Gt))
    found = _at_most(right - left if more else left - right, strict)
    return None if found is None else [found]


def _without_mod(expr: sympy.Expr) -> sympy.Expr:
    return expr.replace(
        lambda part: isinstance(part, sympy.Mod) and part.args[1].is_Integer and part.args[1] > 0,
        lambda part: part.args[0] - part.args[1] * sympy.floor(part.args[0] / part.args[1]),
    )


def _at_most(difference: sympy.Expr, strict: bool) -> tuple[bool, sympy.Expr] | None:
    """difference <= 0, or < 0, over whole numbers, solved for the key."""
    difference = sympy.expand(difference)
    coefficients = [part.as_coeff_Mul()[0] for part in sympy.Add.make_args(difference)]
    if not all(each.is_Rational for each in coefficients):
        return None
    difference = sympy.expand(difference * sympy.ilcm(1, *(each.q for each in coefficients))) + (1 if strict else 0)
    keys = [part for part in sympy.Add.make_args(difference) if part.has(J)]
    rest = sympy.Add(*(part for part in sympy.Add.make_args(difference) if not part.has(J)))
    if len(keys) != 1 or not rest.is_integer:
        return None
    factor, key = keys[0].as_coeff_Mul()
    bound = _floor(-rest, factor) if factor > 0 else _floor(rest - factor - 1, -factor)
    if key == J:
        return factor < 0, bound
    if not isinstance(key, sympy.floor):
        return None
    top, bottom = sympy.fraction(sympy.together(key.args[0]))
    if not (bottom.is_Integer and bottom > 0):
        return None
    # floor(top / bottom) <= bound, or >= bound
    return _at_most(top - bottom * bound - bottom + 1 if factor > 0 else bottom * bound - top, False)


def _floor(top: sympy.Expr, bottom: sympy.Integer) -> sympy.Expr:
    return top if bottom == 1 else sympy.floor(top / bottom)


def _extreme(expr: sympy.Expr, upper: bool, heads: int) -> sympy.Expr | None:
    """At least, or at most, the value of expr in any row of a tile; None: not known."""
    if not expr.has(I, H):
        return expr if expr.is_Integer else None
    if expr == I:
        return LAST if upper else FIRST
    if expr == H:
        return HEAD + (heads - 1 if upper else 0)
    if isinstance(expr, sympy.Mul):
        factor, inner = expr.as_coeff_Mul()
        value = _extreme(inner, upper == (factor > 0), heads) if factor.is_Rational and factor != 1 else None
        return None if value is None else factor * value
    if isinstance(expr, (sympy.Add, sympy.Max, sympy.Min, sympy.floor)):
        parts = [part if part.is_Rational else _extreme(part, upper, heads) for part in expr.args]
        return None if None in parts else expr.func(*parts)
    return None


def _cells(literal: Boolean, heads: int) -> Cells | None:
    """For `(floor(j / unit) + what the row says) mod period = a constant`."""
    if not isinstance(literal, sympy.Eq):
        return None
    sides = literal.args if isinstance(literal.args[0], sympy.Mod) else literal.args[::-1]
    if not isinstance(sides[0], sympy.Mod) or not sides[1].is_Integer or not sides[0].args[1].is_Integer:
        return None
    inner, period = sympy.expand(sides[0].args[0]), int(sides[0].args[1])
    keys = [part for part in sympy.Add.make_args(inner) if part.has(J)]
    factor, key = keys[0].as_coeff_Mul() if len(keys) == 1 else (sympy.S.Zero, J)
    top, unit = sympy.fraction(key.args[0] if isinstance(key, sympy.floor) else key)
    if top != J or abs(factor) != 1 or not (unit.is_Integer and unit > 0) or period < 2:
        return None
    wanted = _of_tile(sympy.expand(factor * (sides[1] - (inner - keys[0]))), heads)  # of the cell's number, modulo period
    step = wanted.coeff(H, 1)
    row = sympy.expand(wanted - step * H)
    by_query = sympy.Add(*(part for part in sympy.Add.make_args(row) if part.has(I)))
    fixed = row - by_query  # in all rows of a tile the same
    least, most = (fixed, fixed) if by_query == 0 else (_plus(fixed, _extreme(by_query, upper, heads)) for upper in (False, True))
    if not step.is_Integer or row.has(H) or not row.is_integer or least is None or most is None:
        return None
    if step != 0 and heads > 1 and least != most:
        return None
    deltas = tuple(sorted({int(step) * head % period for head in range(heads)}))
    return Cells(int(unit), period, least + step * HEAD, most - least, deltas)


def _plus(fixed: sympy.Expr, more: sympy.Expr | None) -> sympy.Expr | None:
    return None if more is None else fixed + more


def _of_tile(expr: sympy.Expr, heads: int) -> sympy.Expr:
    """With floors of the head by those of a tile's first head, where all its heads have the same.

    That is so for floor((h + c) / G) with G = heads * n and c = heads * m: HEAD = heads * k, so a head of the tile is
    h = heads * k + d with 0 <= d < heads, and (h + c) / G = (k + m + d / heads) / n. The floor of that is the floor of
    (k + m) / n, because floor(x / n) = floor(floor(x) / n) for whole n > 0, and floor(k + m + d / heads) = k + m.
    """

    def same(part: sympy.Expr) -> bool:
        if not isinstance(part, sympy.floor):
            return False
        top, bottom = sympy.fraction(sympy.together(part.args[0]))
        shift = sympy.expand(top - H)
        return bool(shift.is_Integer and bottom.is_Integer and bottom > 0 and shift % heads == 0 and bottom % heads == 0)

    return expr.replace(same, lambda part: part.xreplace({H: HEAD}))

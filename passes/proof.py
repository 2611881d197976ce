"""Is a predicate over positions true for ALL i, j >= 0?  `valid` answers True only with a proof; False means "not proven".

The argument
------------
Terms are built from i, j, h and rational constants by sums, rational multiples, floors, and remainders by constants, which
are floors too: mod(t, m) = t - m*floor(t/m). Atoms are t >= 0 and t = 0. Every other atom (a Load, a product i*j, a form like
i + j) counts as a free boolean at each point: what is valid for free booleans is valid for whatever they stand for.

(1) Periods. Each term is t(x) = L.x + periodic(x), L rational. For floor(t) with a shift p along an axis such that t's own
    floors repeat and p*L is an integer: floor(t(x + p)) = floor(t(x)) + p*L. So take p = lcm of the denominators of L over all
    floors, and write i = p*u + r, j = p*v + s with 0 <= r, s < p. Then every floor is F(i, j) = F(r, s) + p*L_F.(u, v).
(2) Cells. Each floor must be a function of i alone, of j alone or of i - j alone ("one form"). Then its steps over
    0 <= r < p, 0 <= s < p, -p < r - s < p are found by walking along one line; between steps it is constant. Where all are
    constant an atom reads  A(r, s) + k + p*L.(u, v) >= 0  (or = 0), A its part outside floors, k one of finitely many
    constants. A and L must each be zero or a multiple of one form: a*r, a*s or a*(r - s), and l*u, l*v or l*(u - v).
(3) Separation. A is bounded over the box, so p*L.(u, v) decides alone but for finitely many values w of its form; for each of
    those the atom is a bound on the form of A. Hence every atom is a boolean combination of bounds on u, v, u - v ("outer") and
    of bounds on r, s, r - s ("inner"), with finitely many known thresholds: difference logic, twice.
(4) Least points. Thresholds cut the (u, v) quadrant into cells lo <= u < hi, lo <= v < hi, lo <= u - v < hi. Such a set is
    closed under componentwise minimum, so if it is not empty it has a least point: (a, b), (b + d, b) or (a, a - d' + 1) with
    a, b, d the lower thresholds of u, v, u - v and d' the upper one of u - v. The same for (r, s). All pairs of an outer and an
    inner least point meet every cell that is not empty, and the predicate is constant in a cell: these points decide it.

So windows of any size cost nothing; large moduli cost as many points as they have steps. Beyond MAX_POINTS nothing is proven.
Heads: h is walked through all its values, or through its period when no atom grows with h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.logic.boolalg import Boolean, Equivalent, Implies

from compile_attn.kernels.expr import I
from compile_attn.passes.formula import Atom, Formula, Node, Term, form, nested

MAX_POINTS = 1 << 21  # about 0.1 s of numpy
MAX_PERIOD = 1 << 18  # one walk along a period is an array of this length

Array = NDArray[Any]
Bounds = dict[str, set[int]]  # form "i", "j" or "d" -> values at which a new interval starts


@dataclass
class Points:
    """The points of step (4) for a set of atoms."""

    i: Array
    j: Array
    h: Array


def check_points(atoms: Iterable[Atom], num_heads: int | None) -> Points | None:
    """Points that meet every cell of the atoms, or None when there are too many."""
    atoms = list(atoms)
    floors = set[Term]().union(*(nested(atom.term) for atom in atoms))
    period = math.lcm(*(slope.denominator for inner in floors for slope in inner.linear[:2]))
    h = _heads([atom.term for atom in atoms], floors, num_heads)
    if h is None or period > MAX_PERIOD or period * len(h) > MAX_POINTS:
        return None
    inner, outer = _steps(floors, period, h), Bounds(i={0}, j={0}, d=set())
    starts = {key: np.array(sorted(values), dtype=np.int64) for key, values in inner.items()}
    for atom in atoms:
        if not _thresholds(atom.term, period, h, starts, inner, outer):
            return None
    u, v = _least(outer, lambda value: value >= 0)
    r, s = _least(inner, lambda value: (value >= 0) & (value < period))
    if u.size * r.size * h.size > MAX_POINTS:
        return None
    i = (period * u[:, None] + r[None, :]).reshape(-1, 1)
    j = (period * v[:, None] + s[None, :]).reshape(-1, 1)
    return Points(i, j, h[None, :])


def _heads(terms: list[Term], floors: set[Term], num_heads: int | None) -> Array | None:
    if not any(term.h for term in (*terms, *floors)):
        return np.zeros(1, dtype=np.int64)
    period = math.lcm(*(inner.linear[2].denominator for inner in floors))
    periodic = not any(term.linear[2] for term in terms)
    count = min(period, num_heads or period) if periodic else num_heads
    return None if count is None or count > MAX_POINTS else np.arange(count, dtype=np.int64)


def _steps(floors: set[Term], period: int, h: Array) -> Bounds:
    """Step (2): where some floor changes along r, s and r - s."""
    found = Bounds(i={0}, j={0}, d={1 - period})
    for inner in floors:
        for key in inner.forms():
            line = np.arange(1 - period if key == "d" else 0, period, dtype=np.int64)[:, None]
            i, j = (0, line) if key == "j" else (line, 0)  # a function of i - j alone may be walked along j = 0
            value = inner.numerator(i, j, h[None, :]) // inner.scale
            found[key].update(line[1:, 0][(value[1:] != value[:-1]).any(axis=1)].tolist())
    return found


def _thresholds(term: Term, period: int, h: Array, starts: dict[str, Array], inner: Bounds, outer: Bounds) -> bool:
    """Step (3): add the thresholds of one atom to inner and outer. False: too many."""
    constants = _constants(term, h, starts)
    if constants is None:
        return False
    key, outer_key = form(term.i, term.j), form(*term.linear[:2])
    slope = int((term.j if key == "j" else term.i) * term.scale)
    outer_slope = int((term.linear[1] if outer_key == "j" else term.linear[0]) * term.scale * period)
    if not outer_key:
        if key:
            inner[key].update(_starts(constants, slope))
        return True
    if not key:
        outer[outer_key].update(_starts(constants, outer_slope))
        return True
    low, high = (1 - period if key == "d" else 0), period - 1
    for constant in constants.tolist():  # the values w of the outer form for which slope*x + constant + outer_slope*w can vanish
        ends = sorted(Fraction(-(constant + slope * x), outer_slope) for x in (low, high))
        first, last = math.floor(ends[0]), math.ceil(ends[1])
        if last - first > MAX_POINTS // max(1, len(constants)):
            return False
        outer[outer_key].update(range(first, last + 2))
        inner[key].update(_starts(constant + outer_slope * np.arange(first, last + 1, dtype=np.int64), slope))
    return True


def _constants(term: Term, h: Array, starts: dict[str, Array]) -> Array | None:
    """All values of k, times term.scale."""
    values: dict[str, Any] = {"i": 0, "j": 0, "d": 0, "": 0}
    for coefficient, inner in term.floors:
        key = next(iter(inner.forms()), "")
        at = starts.get(key, np.zeros(1, dtype=np.int64))[:, None]
        i, j = (0, at) if key == "j" else (at, 0)
        values[key] = values[key] + int(coefficient * term.scale) * (inner.numerator(i, j, h[None, :]) // inner.scale)
    size = h.size * math.prod(np.shape(value)[0] for value in values.values() if np.ndim(value))
    if size > MAX_POINTS:
        return None
    head = int(term.const * term.scale) + int(term.h * term.scale) * h
    total = values["i"] + np.expand_dims(values["j"], 1) if np.ndim(values["j"]) else np.asarray(values["i"])
    total = total.reshape(-1, total.shape[-1]) if total.ndim else total
    total = np.expand_dims(total, 0) + np.expand_dims(values["d"], 1) if np.ndim(values["d"]) else total
    return np.unique(total + values[""] + head)


def _starts(constants: Array, slope: int) -> set[int]:
    """slope*x + constant changes sign only on entering ceil(root) or floor(root) + 1."""
    constants = np.atleast_1d(constants)
    down, up = (-constants) // slope, -(constants // slope)
    return set(up.tolist()) | set((down + 1).tolist())


def _least(bounds: Bounds, inside: Callable[[Array], Array]) -> tuple[Array, Array]:
    """Step (4): the possible least points of the cells."""
    a, b, d = (np.array(sorted(bounds[key]), dtype=np.int64) for key in "ijd")
    first = [np.repeat(a, b.size), np.add.outer(b, d).ravel(), np.repeat(a, d.size)]
    second = [np.tile(b, a.size), np.repeat(b, d.size), (np.subtract.outer(a, d) + 1).ravel()]
    points = np.stack([np.concatenate(first), np.concatenate(second)])
    points = np.unique(points[:, inside(points[0]) & inside(points[1])], axis=1)
    return points[0], points[1]


def evaluate(formula: Formula, node: Node, points: Points) -> Array:
    """Truth at every point [point, head, assignment of the free booleans]."""
    values = list[Array]()
    for atom in formula.atoms:
        number = atom.term.numerator(points.i, points.j, points.h)
        values.append(np.atleast_3d(number == 0 if atom.equal else number >= 0))
    assignments = np.arange(1 << len(formula.free))

    def truth(node: Node) -> Array:
        kind, *parts = node
        if kind == "const":
            return np.full((1, 1, 1), parts[0])
        if kind == "atom":
            return values[parts[0]]
        if kind == "free":
            return np.asarray((assignments >> parts[0]) & 1, dtype=bool)[None, None, :]
        operands = [truth(part) for part in parts]
        if kind == "not":
            return ~operands[0]
        join = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[kind]
        result = operands[0]
        for operand in operands[1:]:
            result = join(result, operand)
        return result

    return truth(node)


@lru_cache(maxsize=4096)
def valid(predicate: Boolean, num_heads: int | None = None) -> bool:
    """Proven true for all i, j >= 0, every head, and whatever the tensors hold. False: not proven."""
    formula = Formula()
    node = formula.read(predicate)
    points = check_points(formula.atoms, num_heads)
    if points is None or points.i.size * points.h.size << len(formula.free) > MAX_POINTS:
        return False
    return bool(evaluate(formula, node, points).all())


def implies(first: Boolean, second: Boolean, num_heads: int | None = None) -> bool:
    return valid(Implies(first, second, evaluate=False), num_heads)


def same(first: Boolean, second: Boolean, num_heads: int | None = None) -> bool:
    return first == second or valid(Equivalent(first, second, evaluate=False), num_heads)


@lru_cache(maxsize=4096)
def first_false(predicate: Boolean, axis: sympy.Symbol) -> int | None:
    """The least value of `axis` (i or j) at which a predicate of that variable alone fails, None when it never does or is unknown.

    The least point of the cell that holds the first failure is componentwise not greater, and fails too: it is that point.
    """
    formula = Formula()
    node = formula.read(predicate)
    points = None if formula.free else check_points(formula.atoms, 1)
    if points is None:
        return None
    failing = np.broadcast_to(~evaluate(formula, node, points), (points.i.size, 1, 1))[:, 0, 0]
    at = (points.i if axis == I else points.j)[failing]
    return int(at.min()) if at.size else None


def truth(predicate: Boolean, i: Array, j: Array, heads: int = 1) -> Array | None:
    """The predicate at some points, for each of the first heads: [head, point]. None where it has free atoms."""
    formula = Formula()
    node = formula.read(predicate)
    if formula.free:
        return None
    points = Points(np.reshape(i, (-1, 1)), np.reshape(j, (-1, 1)), np.arange(heads)[None, :])
    return np.broadcast_to(evaluate(formula, node, points), (np.size(i), heads, 1))[:, :, 0].T

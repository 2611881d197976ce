"""Is a predicate over positions true for ALL i, j >= 0?  `valid` answers True only with a proof; False means "not proven".

The argument
------------
Terms are built from i, j, h and rational constants by sums, rational multiples, floors, and remainders by constants, which are
floors too: mod(t, m) = t - m*floor(t/m). Atoms are t >= 0 and t = 0. Every other atom (a Load, a product i*j, a form like i + j)
counts as a free boolean, independent at each point: what is valid for free booleans is valid for whatever they stand for.

(1) Periods. Each term is t(x) = L.x + periodic(x), L rational. For floor(t) with shift p along an axis such that t's own floors
    repeat and p*L is an integer: floor(t(x + p)) = floor(t(x)) + p*L. So take p = lcm of the denominators of L over all floors, and
    write i = p*u + r, j = p*v + s with 0 <= r, s < p. Then every floor is F(i, j) = F(r, s) + p*L_F.(u, v).
(2) Cells. Each floor must be a function of i alone, of j alone or of i - j alone ("one form"). Then its steps over 0 <= r < p,
    0 <= s < p, -p < r - s < p are found by walking along one line, and between steps it is constant. Where all are constant an atom
    reads  A(r, s) + k + p*L.(u, v) >= 0  (or = 0), A its part outside floors, k one of finitely many constants. A and L must each be
    zero or a multiple of one form: a*r, a*s or a*(r - s), and l*u, l*v or l*(u - v).
(3) Separation. A is bounded over the box, so p*L.(u, v) can decide alone but for finitely many values w of its form; for each of those
    the atom is a bound on the form of A. Hence every atom is a boolean combination of bounds on u, v, u - v ("outer") and of bounds
    on r, s, r - s ("inner"): difference logic twice, with finitely many known thresholds. No atom needs both at once.
(4) Least points. Thresholds cut the (u, v) quadrant into cells lo <= u < hi, lo <= v < hi, lo <= u - v < hi. Such a set is closed under
    componentwise minimum, so if it is not empty it has a least point: (a, b), (b + d, b) or (a, a - d' + 1) with a, b, d the lower
    thresholds of u, v, u - v and d' the upper one of u - v. The same for (r, s). All pairs of an outer and an inner least point meet
    every cell that is not empty, and the predicate is constant in a cell: checking these points decides it exactly.

So windows of any size cost nothing; large moduli cost as many points as they have steps. Beyond MAX_POINTS nothing is proven.
Heads: h is walked through all its values, or through its period when no atom grows with h.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray
from sympy.core.relational import Relational
from sympy.logic.boolalg import ITE, And, Boolean, BooleanFalse, BooleanTrue, Equivalent, Implies, Not, Or, Xor

from compile_attn.kernels.expr import H, I, J, Trunc

MAX_POINTS = 1 << 21  # about 0.1 s of numpy
MAX_PERIOD = 1 << 18  # one walk along a period is an array of this length
MAX_CONSTANT = 1 << 40  # products of two of the numbers met stay inside int64
MAX_CASES = 6  # Abs, Max, Min, Piecewise, Trunc opened in one atom: each doubles it

Array = NDArray[Any]
Bounds = dict[str, set[int]]  # form "i", "j" or "d" -> values at which a new interval starts


class Unfit(Exception):
    """The term is outside the grammar."""


@dataclass(frozen=True)
class Term:
    """i*I + j*J + h*H + const + sum of coefficient * floor(term)."""

    i: Fraction = Fraction(0)
    j: Fraction = Fraction(0)
    h: Fraction = Fraction(0)
    const: Fraction = Fraction(0)
    floors: tuple[tuple[Fraction, Term], ...] = ()

    def __add__(self, other: Term) -> Term:
        floors = dict[Term, Fraction]()
        for coefficient, inner in (*self.floors, *other.floors):
            floors[inner] = floors.get(inner, Fraction(0)) + coefficient
        kept = tuple((coefficient, inner) for inner, coefficient in floors.items() if coefficient)
        return Term(self.i + other.i, self.j + other.j, self.h + other.h, self.const + other.const, kept)

    def times(self, factor: Fraction) -> Term:
        if not factor:
            return Term()
        floors = tuple((coefficient * factor, inner) for coefficient, inner in self.floors)
        return Term(self.i * factor, self.j * factor, self.h * factor, self.const * factor, floors)

    def floor(self) -> Term:
        numbers = (self.i, self.j, self.h, self.const, *(coefficient for coefficient, _ in self.floors))
        if all(number.denominator == 1 for number in numbers):
            return self
        if not (self.i or self.j or self.h or self.floors):
            return Term(const=Fraction(math.floor(self.const)))
        return Term(floors=((Fraction(1), self),))

    @cached_property
    def linear(self) -> tuple[Fraction, Fraction, Fraction]:
        """L of the argument: the slope along i, j, h, floors included."""
        parts = [(coefficient, inner.linear) for coefficient, inner in self.floors]
        i, j, h = (sum((c * slope[axis] for c, slope in parts), Fraction(0)) for axis in range(3))
        return self.i + i, self.j + j, self.h + h

    @cached_property
    def scale(self) -> int:
        """Least integer that makes all coefficients integers."""
        numbers = (self.i, self.j, self.h, self.const, *(coefficient for coefficient, _ in self.floors))
        return math.lcm(*(number.denominator for number in numbers))

    def forms(self) -> set[str]:
        """The forms on which the value depends; raises Unfit for any other than i, j, i - j."""
        found = {form(self.i, self.j)} - {""}
        return found.union(*(inner.forms() for _, inner in self.floors))

    def numerator(self, i: Any, j: Any, h: Any) -> Any:
        """scale * value, in integers."""
        total = int(self.i * self.scale) * i + int(self.j * self.scale) * j + int(self.h * self.scale) * h
        total = total + int(self.const * self.scale)
        for coefficient, inner in self.floors:
            total = total + int(coefficient * self.scale) * (inner.numerator(i, j, h) // inner.scale)
        return total


def form(i: Fraction, j: Fraction) -> str:
    if not i and not j:
        return ""
    if not j:
        return "i"
    if not i:
        return "j"
    if i == -j:
        return "d"
    raise Unfit


def read_term(expr: sympy.Expr) -> Term:
    """A sympy expression as a Term. Raises Unfit."""
    if expr.is_Number and expr.is_finite:
        value = Fraction(str(sympy.Rational(expr)))
        if max(abs(value.numerator), value.denominator) > MAX_CONSTANT:
            raise Unfit
        return Term(const=value)
    if expr in (I, J, H):
        return Term(**{expr.name: Fraction(1)})
    if isinstance(expr, sympy.Add):
        total = Term()
        for part in expr.args:
            total = total + read_term(part)
        return total
    if isinstance(expr, sympy.Mul):
        factor, rest = expr.as_coeff_Mul()
        if factor != 1:
            return read_term(rest).times(read_term(factor).const)
    if isinstance(expr, sympy.floor):
        return read_term(expr.args[0]).floor()
    if isinstance(expr, sympy.ceiling):
        return read_term(-expr.args[0]).floor().times(Fraction(-1))
    if isinstance(expr, sympy.Mod) and expr.args[1].is_Number and expr.args[1] != 0:
        value, modulus = read_term(expr.args[0]), read_term(expr.args[1]).const
        return value + value.times(1 / modulus).floor().times(-modulus)
    raise Unfit


@dataclass(frozen=True)
class Atom:
    term: Term
    equal: bool  # term = 0, else term >= 0


Node = tuple[Any, ...]  # ("const", bool) ("atom", n) ("free", n) ("not", x) ("and" | "or" | "xor", x, ...)


@dataclass
class Formula:
    """A predicate taken apart: the boolean skeleton, the arithmetic atoms, the free booleans."""

    atoms: dict[Atom, int] = field(default_factory=dict)
    free: dict[sympy.Basic, int] = field(default_factory=dict)

    def read(self, expr: Boolean) -> Node:
        if isinstance(expr, (BooleanTrue, BooleanFalse)):
            return ("const", bool(expr))
        if isinstance(expr, Not):
            return ("not", self.read(expr.args[0]))
        for kind, name in ((And, "and"), (Or, "or"), (Xor, "xor")):
            if isinstance(expr, kind):
                return (name, *map(self.read, expr.args))
        if isinstance(expr, Implies):
            return ("or", ("not", self.read(expr.args[0])), self.read(expr.args[1]))
        if isinstance(expr, Equivalent) and len(expr.args) == 2:
            return ("not", ("xor", *map(self.read, expr.args)))
        if isinstance(expr, ITE):
            test, then, other = map(self.read, expr.args)
            return ("or", ("and", test, then), ("and", ("not", test), other))
        if isinstance(expr, Relational):
            return self.relation(expr)
        return self.opaque(expr)

    def opaque(self, key: sympy.Basic) -> Node:
        return ("free", self.free.setdefault(key, len(self.free)))

    def relation(self, expr: Relational) -> Node:
        left, right = expr.args
        if isinstance(expr, (sympy.StrictGreaterThan, sympy.LessThan)):
            node = self.atom(right - left, False)  # a <= b is b - a >= 0, and a > b its negation
        elif isinstance(expr, (sympy.StrictLessThan, sympy.GreaterThan)):
            node = self.atom(left - right, False)
        else:
            node = self.atom(left - right, True)
        negated = isinstance(expr, (sympy.StrictGreaterThan, sympy.StrictLessThan, sympy.Ne))
        return ("not", node) if negated else node

    def atom(self, expr: sympy.Expr, equal: bool, depth: int = 0) -> Node:
        expr = sympy.expand(expr)
        for test, then, other in open_case(expr) if depth < MAX_CASES else ():
            chosen, rest = self.atom(then, equal, depth + 1), self.atom(other, equal, depth + 1)
            condition = self.read(test)
            return ("or", ("and", condition, chosen), ("and", ("not", condition), rest))
        try:
            term = read_term(expr)
            form(term.i, term.j), form(*term.linear[:2])
            if any(len(inner.forms()) > 1 for inner in nested(term)):
                raise Unfit
        except Unfit:
            return self.opaque(sympy.Eq(expr, 0, evaluate=False) if equal else sympy.Ge(expr, 0, evaluate=False))
        return ("atom", self.atoms.setdefault(Atom(term, equal), len(self.atoms)))


def open_case(expr: sympy.Expr) -> Iterable[tuple[Boolean, sympy.Expr, sympy.Expr]]:
    """The first branching function in expr as (condition, expr if it holds, expr if not): at most one item."""
    for node in sympy.preorder_traversal(expr):
        if isinstance(node, sympy.Abs):
            test, then, other = node.args[0] >= 0, node.args[0], -node.args[0]
        elif isinstance(node, Trunc):
            test, then, other = node.args[0] >= 0, sympy.floor(node.args[0]), sympy.ceiling(node.args[0])
        elif isinstance(node, (sympy.Max, sympy.Min)):
            first, rest = node.args[0], node.func(*node.args[1:])
            test, then, other = (first >= rest if isinstance(node, sympy.Max) else first <= rest), first, rest
        elif isinstance(node, sympy.Piecewise) and len(node.args) > 1 and node.args[-1].args[1] == sympy.true:
            (then, test), rest = node.args[0].args, node.args[1:]
            other = rest[0].args[0] if len(rest) == 1 else sympy.Piecewise(*rest)
        else:
            continue
        yield test, expr.xreplace({node: then}), expr.xreplace({node: other})
        return


def nested(term: Term) -> set[Term]:
    """The arguments of all floors in term, at any depth."""
    return {inner for _, inner in term.floors}.union(*(nested(inner) for _, inner in term.floors))


@dataclass
class _Points:
    """The points of step (4) for a set of atoms."""

    i: Array
    j: Array
    h: Array


def check_points(atoms: Iterable[Atom], num_heads: int | None) -> _Points | None:
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
    return _Points(i, j, h[None, :])


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
    values = {"i": 0, "j": 0, "d": 0, "": 0}
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


def evaluate(formula: Formula, node: Node, points: _Points) -> Array:
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
            return ((assignments >> parts[0]) & 1).astype(bool)[None, None, :]
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

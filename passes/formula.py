"""How is a predicate over positions taken apart into arithmetic and booleans?

Arithmetic atoms are t >= 0 and t = 0 with t built from i, j, h and rational constants by sums, rational multiples, floors and
remainders by constants. Whatever else is compared is a free boolean. `proof` decides formulas; the argument stands there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import ITE, And, Boolean, BooleanFalse, BooleanTrue, Equivalent, Implies, Not, Or, Xor

from compile_attn.kernels.expr import H, I, J, Trunc

MAX_CONSTANT = 1 << 40  # products of two of the numbers met stay inside int64
MAX_CASES = 6  # Abs, Max, Min, Piecewise, Trunc opened in one atom: each doubles it


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
        return Term(i=Fraction(int(expr == I)), j=Fraction(int(expr == J)), h=Fraction(int(expr == H)))
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
        term, modulus = read_term(expr.args[0]), read_term(expr.args[1]).const
        return term + term.times(1 / modulus).floor().times(-modulus)
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
            if equal and expr.could_extract_minus_sign():
                expr = -expr  # one spelling for a = b and b = a
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

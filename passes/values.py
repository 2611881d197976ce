"""What is a value: a number, a truth value, or either under conditions, and what does a cast make of it?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanFunction

from compile_attn.kernels.expr import Round, Trunc
from compile_attn.passes.terms import Dot

MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}  # explicit mantissa bits


def constant(value: Any) -> sympy.Basic:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float):
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)
    return sympy.sympify(value)


def is_boolean(value: sympy.Basic) -> bool:
    """Whether this is a truth value. (`sympy.Symbol` is an instance of Boolean, so that alone does not tell.)"""
    return isinstance(value, (sympy.core.relational.Relational, BooleanFunction)) or value in (sympy.true, sympy.false)


def number(value: sympy.Basic) -> sympy.Expr:
    """A truth value as 0 or 1; a number as it is."""
    if value is sympy.true or value is sympy.false:
        return sympy.Integer(int(bool(value)))
    return sympy.Piecewise((1, value), (0, True)) if is_boolean(value) else value


def boolean(value: sympy.Basic) -> Boolean:
    """A number as a truth value."""
    if is_boolean(value):
        return value
    if isinstance(value, sympy.Piecewise):  # the truth values that arithmetic has made numbers
        return condition(value, lambda part: sympy.Ne(part, 0))
    return sympy.Ne(value, 0)


def condition(value: sympy.Piecewise, test: Callable[[sympy.Expr], Boolean]) -> Boolean:
    result: Boolean = sympy.false
    for part, when in reversed(value.args):
        result = sympy.Or(sympy.And(when, test(part)), sympy.And(sympy.Not(when), result))
    return result


def cast(value: sympy.Basic, old: torch.dtype, new: torch.dtype) -> sympy.Basic:
    """The value after a cast. Rounding of scores is read through: a fused kernel keeps them in float32."""
    if old == new:
        return value
    if new == torch.bool:
        return boolean(value)
    value = number(value)
    if not new.is_floating_point:
        return value if value.is_integer or not old.is_floating_point else Trunc(value)
    if old.is_floating_point and MANTISSA.get(new, 0) >= MANTISSA.get(old, 99):
        return value
    return value if value.has(Dot) else rounded(MANTISSA[new], value)


def rounded(bits: int, value: sympy.Expr) -> sympy.Expr:
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((rounded(bits, part), when) for part, when in value.args))
    if value.is_number:
        if value.is_Integer and abs(value) <= 2 ** (bits + 1):
            return value
        if value in (sympy.oo, -sympy.oo):
            return value
        dtype = {7: torch.bfloat16, 10: torch.float16, 23: torch.float32}[bits]
        return constant(torch.tensor(float(value)).to(dtype).item()) if bits != 23 else value
    # Positions stay below 2**24, so float32 holds them exactly; a product of floats it rounds, but so does the kernel.
    return value if bits >= 23 else Round(bits, value)


def choose(condition: Boolean, left: sympy.Basic, right: sympy.Basic) -> sympy.Basic:
    if is_boolean(left) and is_boolean(right):
        return sympy.Or(sympy.And(condition, left), sympy.And(sympy.Not(condition), right))
    return sympy.Piecewise((number(left), condition), (number(right), True))

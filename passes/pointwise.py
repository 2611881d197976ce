"""What does an op mean that computes each element from the elements at the same place?"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from compile_attn.kernels.expr import Load, Trunc
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Index, argument, op_name
from compile_attn.passes.terms import Dot, Opaque
from compile_attn.passes.values import MANTISSA, boolean, cast, choose, condition, constant, is_boolean, number, rounded

if TYPE_CHECKING:
    from compile_attn.passes.symbolic import Reader

Rule = Callable[["Reader", fx.Node, Index], sympy.Basic]
_INFINITE = (sympy.oo, -sympy.oo)
_SELU = (sympy.Float(1.6732632423543772), sympy.Float(1.0507009873554805))  # alpha and scale, the constants of the paper


def _elementwise(function: Callable[..., sympy.Basic], count: int) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        return function(*(reader.operand(node.args[n], index) for n in range(count)))

    return rule


def _numeric(function: Callable[..., sympy.Basic], count: int) -> Rule:
    return _elementwise(lambda *parts: function(*map(number, parts)), count)


def _sum(sign: int) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        left, right = (reader.operand(node.args[n], index) for n in range(2))
        if val(node).dtype == torch.bool:
            return sympy.Or(boolean(left), boolean(right))
        return number(left) + sign * _option(node, "alpha", 2) * number(right)

    return rule


def _rsub(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    left, right = (number(reader.operand(node.args[n], index)) for n in range(2))
    return right - _option(node, "alpha", 2) * left


def _option(node: fx.Node, name: str, place: int, default: float = 1) -> sympy.Expr:
    """A number among the arguments."""
    return number(constant(argument(node, place, name, default)))


def _addc(function: Callable[[sympy.Expr, sympy.Expr], sympy.Expr]) -> Rule:
    """x + value * f(a, b)."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        base, left, right = (number(reader.operand(node.args[n], index)) for n in range(3))
        return base + _option(node, "value", 3) * function(left, right)

    return rule


def _softplus(value: sympy.Expr) -> sympy.Expr:
    """log(1 + exp(x)) without overflow."""
    return sympy.Max(value, 0) + sympy.log(1 + sympy.exp(-sympy.Abs(value)))


def _softplus_op(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value, beta = number(reader.operand(node.args[0], index)), _option(node, "beta", 1)
    threshold = _option(node, "threshold", 2, 20)
    smooth = _softplus(beta * value) / beta
    # Above the threshold it is x itself: from 17 on that is the same number in float32.
    return smooth if threshold >= 17 else sympy.Piecewise((value, beta * value > threshold), (smooth, True))


def _gelu(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    if node.kwargs.get("approximate", "none") == "tanh":
        return value / 2 * (1 + sympy.tanh(sympy.Float(math.sqrt(2 / math.pi)) * (value + sympy.Float(0.044715) * value**3)))
    return value / 2 * (1 + sympy.erf(value * sympy.Float(math.sqrt(0.5))))


def _elu_of(value: sympy.Expr, alpha: sympy.Expr, scale: sympy.Expr, inner: sympy.Expr) -> sympy.Expr:
    return scale * sympy.Max(value, 0) + scale * alpha * (sympy.exp(inner * sympy.Min(value, 0)) - 1)


def _elu(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    return _elu_of(value, *(_option(node, name, n + 1) for n, name in enumerate(("alpha", "scale", "input_scale"))))


def _celu(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    alpha = _option(node, "alpha", 1)
    return _elu_of(number(reader.operand(node.args[0], index)), alpha, sympy.Integer(1), 1 / alpha)


def _leaky(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    return sympy.Max(value, 0) + _option(node, "negative_slope", 1, 0.01) * sympy.Min(value, 0)


def _hardtanh(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    return sympy.Min(sympy.Max(value, _option(node, "min_val", 1, -1)), _option(node, "max_val", 2))


def _threshold(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    return sympy.Piecewise((value, value > _option(node, "threshold", 1)), (_option(node, "value", 2), True))


def _log(value: sympy.Expr) -> sympy.Expr:
    """The logarithm; of 0, as masks of ones and zeros have it, minus infinity."""
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((_log(part), when) for part, when in value.args))
    return -sympy.oo if value == 0 else sympy.log(value)


def _sigmoid(value: sympy.Expr) -> sympy.Expr:
    return 1 / (1 + sympy.exp(-value))


def _hardsigmoid(value: sympy.Expr) -> sympy.Expr:
    return sympy.Min(sympy.Max(value + 3, 0), 6) / 6


def _of_two(function: Callable[..., sympy.Expr]) -> Rule:
    """The greater or the less of two tensors; torch.max of one tensor is a reduction."""

    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        if len(node.args) != 2 or not all(map(is_tensor, node.args)):
            raise NotImplementedError
        return function(*(number(reader.operand(part, index)) for part in node.args))

    return rule


def _is_infinite(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    """Of a mask made of numbers: whether an element of a tensor is infinite, or a score that may overflow, cannot be said."""
    value = number(reader.operand(node.args[0], index))
    cases = [part for part, _ in value.args] if isinstance(value, sympy.Piecewise) else [value]
    if not all(part.is_number and not part.has(sympy.core.function.AppliedUndef, Load, Dot, Opaque) for part in cases):
        raise NotImplementedError
    if not isinstance(value, sympy.Piecewise):
        return sympy.true if value in _INFINITE else sympy.false
    return condition(value, lambda part: sympy.true if part in _INFINITE else sympy.false)


def _mul(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    left, right = (reader.operand(node.args[n], index) for n in range(2))
    if is_boolean(left) and is_boolean(right):
        return sympy.And(left, right)
    return number(left) * number(right)


def _div(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    left, right = (number(reader.operand(node.args[n], index)) for n in range(2))
    mode = node.kwargs.get("rounding_mode")
    quotient = left / (right if not right.is_Integer or left.is_integer else sympy.Float(right))
    return {None: quotient, "floor": sympy.floor(quotient), "trunc": Trunc(quotient)}[mode]  # type: ignore[index]


def _logic(function: Callable[..., Boolean]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        if val(node).dtype != torch.bool:
            raise NotImplementedError
        return function(*(boolean(reader.operand(argument, index)) for argument in node.args))

    return rule


def _compare(function: Callable[..., Boolean]) -> Rule:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        left, right = (reader.operand(node.args[n], index) for n in range(2))
        if function in (sympy.Eq, sympy.Ne):
            for a, b in ((left, right), (right, left)):  # a truth value compared with a constant
                if (is_boolean(a) or isinstance(a, sympy.Piecewise)) and b in (0, 1, sympy.true, sympy.false):
                    when = boolean(a) if is_boolean(a) else condition(a, functools.partial(_equals, number(b)))
                    same = when if not is_boolean(a) or b in (1, sympy.true) else sympy.Not(when)
                    return same if function is sympy.Eq else sympy.Not(same)
        return function(number(left), number(right))

    return rule


def _equals(wanted: sympy.Expr, part: sympy.Expr) -> Boolean:
    return sympy.Eq(part, wanted)


def _where(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    condition, left, right = (reader.operand(argument, index) for argument in node.args)
    return choose(boolean(condition), left, right)


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value, mask, fill = (reader.operand(argument, index) for argument in node.args)
    return choose(boolean(mask), fill, value)


def _pow(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    base, exponent = (number(reader.operand(node.args[n], index)) for n in range(2))
    return base**exponent


def _clamp(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    value = value if low is None else sympy.Max(value, number(reader.operand(low, index)))
    return value if high is None else sympy.Min(value, number(reader.operand(high, index)))


def _one_bound(function: Callable[..., sympy.Expr]) -> Rule:
    return _numeric(function, 2)


def _logical_not(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    if op_name(node) == "bitwise_not" and val(node).dtype != torch.bool:
        raise NotImplementedError
    return sympy.Not(boolean(reader.operand(node.args[0], index)))


def _cast_op(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return cast(reader.at(source, index), val(source).dtype, val(node).dtype)


def _matching_type(
    rule: Rule,
) -> Rule:
    """Arithmetic whose result type is narrower than float32 rounds; scores excepted."""

    def typed(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        value = rule(reader, node, index)
        bits = MANTISSA.get(val(node).dtype, 99)
        if is_boolean(value) or bits >= 23 or value.has(Dot):
            return value
        return rounded(bits, value)

    return typed


_ARITHMETIC: dict[str, Rule] = {
    "add": _sum(1),
    "sub": _sum(-1),
    "rsub": _rsub,
    "mul": _mul,
    **dict.fromkeys(("div", "divide", "true_divide"), _div),
    **dict.fromkeys(("pow", "float_power"), _pow),
    **dict.fromkeys(("clamp", "clip"), _clamp),
    "clamp_min": _one_bound(sympy.Max),
    "clamp_max": _one_bound(sympy.Min),
    "minimum": _numeric(sympy.Min, 2),
    "maximum": _numeric(sympy.Max, 2),
    "floor_divide": _numeric(lambda a, b: sympy.floor(a / b), 2),
    "remainder": _numeric(sympy.Mod, 2),
    "neg": _numeric(operator.neg, 1),
    "abs": _numeric(sympy.Abs, 1),
    "exp": _numeric(sympy.exp, 1),
    "exp2": _numeric(lambda a: 2**a, 1),
    "log": _numeric(_log, 1),
    "log1p": _numeric(lambda a: _log(1 + a), 1),
    "expm1": _numeric(lambda a: sympy.exp(a) - 1, 1),
    "erf": _numeric(sympy.erf, 1),
    "log2": _numeric(lambda a: _log(a) / sympy.Float(math.log(2)), 1),
    "sqrt": _numeric(sympy.sqrt, 1),
    "rsqrt": _numeric(lambda a: 1 / sympy.sqrt(a), 1),
    "reciprocal": _numeric(lambda a: 1 / a, 1),
    "square": _numeric(lambda a: a**2, 1),
    "tanh": _numeric(sympy.tanh, 1),
    "sigmoid": _numeric(_sigmoid, 1),
    "relu": _numeric(lambda a: sympy.Max(a, 0), 1),
    "floor": _numeric(sympy.floor, 1),
    "ceil": _numeric(sympy.ceiling, 1),
    "sin": _numeric(sympy.sin, 1),
    "cos": _numeric(sympy.cos, 1),
    "sign": _numeric(sympy.sign, 1),
    "sgn": _numeric(sympy.sign, 1),
    "tan": _numeric(lambda a: sympy.sin(a) / sympy.cos(a), 1),
    "sinh": _numeric(lambda a: (sympy.exp(a) - sympy.exp(-a)) / 2, 1),
    "cosh": _numeric(lambda a: (sympy.exp(a) + sympy.exp(-a)) / 2, 1),
    "erfc": _numeric(lambda a: 1 - sympy.erf(a), 1),
    "log10": _numeric(lambda a: _log(a) / sympy.Float(math.log(10)), 1),
    "frac": _numeric(lambda a: a - Trunc(a), 1),
    "silu": _numeric(lambda a: a * _sigmoid(a), 1),
    "mish": _numeric(lambda a: a * sympy.tanh(_softplus(a)), 1),
    "log_sigmoid": _numeric(lambda a: -_softplus(-a), 1),
    "hardsigmoid": _numeric(_hardsigmoid, 1),
    "hardswish": _numeric(lambda a: a * _hardsigmoid(a), 1),
    "softplus": _softplus_op,
    "gelu": _gelu,
    "elu": _elu,
    "celu": _celu,
    "selu": _numeric(lambda a: _elu_of(a, *_SELU, sympy.Integer(1)), 1),
    "relu6": _numeric(lambda a: sympy.Min(sympy.Max(a, 0), 6), 1),
    "leaky_relu": _leaky,
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "addcmul": _addc(operator.mul),
    "addcdiv": _addc(operator.truediv),
    "lerp": _numeric(lambda a, b, weight: a + weight * (b - a), 3),
    "fmod": _numeric(lambda a, b: a - b * Trunc(a / b), 2),
    "hypot": _numeric(lambda a, b: sympy.sqrt(a**2 + b**2), 2),
    "logaddexp": _numeric(lambda a, b: sympy.Max(a, b) + sympy.log(1 + sympy.exp(-sympy.Abs(a - b))), 2),
    **dict.fromkeys(("fmax", "max"), _of_two(sympy.Max)),
    **dict.fromkeys(("fmin", "min"), _of_two(sympy.Min)),
    "deg2rad": _numeric(lambda a: a * sympy.Float(math.pi / 180), 1),
    "rad2deg": _numeric(lambda a: a * sympy.Float(180 / math.pi), 1),
    "where": _where,
    "masked_fill": _masked_fill,
}
RULES: dict[str, Rule] = {
    **{name: _matching_type(rule) for name, rule in _ARITHMETIC.items()},
    "trunc": _numeric(Trunc, 1),
    "fix": _numeric(Trunc, 1),
    "isinf": _is_infinite,
    "eq": _compare(sympy.Eq),
    "ne": _compare(sympy.Ne),
    "lt": _compare(sympy.Lt),
    "le": _compare(sympy.Le),
    "gt": _compare(sympy.Gt),
    "ge": _compare(sympy.Ge),
    **dict.fromkeys(("__and__", "bitwise_and", "logical_and"), _logic(sympy.And)),
    **dict.fromkeys(("__or__", "bitwise_or", "logical_or"), _logic(sympy.Or)),
    **dict.fromkeys(("__xor__", "bitwise_xor", "logical_xor"), _logic(sympy.Xor)),
    **dict.fromkeys(("bitwise_not", "logical_not"), _logical_not),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast_op),
}

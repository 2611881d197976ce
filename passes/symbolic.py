"""What is one element of a node, as a function of its index?

`Reader.at(node, index)` interprets an ATen graph as mathematics, on demand, down to leaves: `Load(k, ...)` of a captured
tensor, or `Dot(k, ...)`, an element of a contraction. No spelling is known here, only what each op computes.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanFunction
from torch import fx

from compile_attn.kernels.expr import Load, Round, Trunc
from compile_attn.passes.constants import is_affine, read_constant
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import (
    Bounds,
    Index,
    argument,
    as_expr,
    broadcast,
    dim_of,
    index_map,
    op_name,
    shape_of,
)
from compile_attn.passes.terms import Dot, Opaque, Unreadable, unreadable

_MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}  # explicit mantissa bits
_CONTRACTIONS = ("matmul", "bmm", "mm", "baddbmm")


class Reader:
    """Reads one graph. `positions` are inputs whose element at (.., t) is t by contract."""

    def __init__(self, constants: Mapping[fx.Node, torch.Tensor], positions: frozenset[fx.Node] = frozenset()) -> None:
        self.constants, self.positions = constants, positions
        self.bounds = Bounds()
        self.captured: list[fx.Node] = []
        self.contractions: list[fx.Node] = []
        self.opaque: list[fx.Node] = []
        self.read_constants: set[fx.Node] = set()
        self._memo: dict[tuple[fx.Node, Index], sympy.Basic] = {}

    def at(self, node: Any, index: Index) -> sympy.Basic:
        """The element at `index`; numbers are themselves."""
        if not isinstance(node, fx.Node):
            return _number(node)
        if not is_tensor(node):
            return as_expr(node)
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._read(node, index)
        return self._memo[key]

    def operand(self, node: Any, index: Index) -> sympy.Basic:
        """An operand that broadcasts to the output that `index` is of."""
        return self.at(node, broadcast(index, node) if is_tensor(node) else index)

    def load(self, node: fx.Node, index: Index) -> sympy.Basic:
        """An element of a tensor that stays a tensor."""
        if node not in self.captured:
            self.captured.append(node)
        value = Load(self.captured.index(node), *index)
        return sympy.Ne(value, 0) if val(node).dtype == torch.bool else value

    def _read(self, node: fx.Node, index: Index) -> sympy.Basic:
        if node in self.positions:
            return index[-1]
        if node in self.constants:
            value = read_constant(self.constants[node], index)
            if value is None and is_affine(self.constants[node]):
                first, second = (self.load(node, (*index[:-1], sympy.Integer(place))) for place in (0, 1))
                value = first + (second - first) * index[-1]
            if value is not None:
                self.read_constants.add(node)
                return value
            return self.load(node, index)
        mapped = index_map(node, index, self.bounds)
        if mapped is not None:
            source, place = mapped
            if _out_of(place, source):
                return self.load(node, index)
            return _cast(self.at(source, place), val(source).dtype, val(node).dtype)
        if op_name(node) in _CONTRACTIONS:
            return self._contraction(node, index)
        rule = RULES.get(op_name(node))
        if rule is not None:
            try:
                return rule(self, node, index)
            except NotImplementedError:
                pass
        return self.load(node, index)

    def _contraction(self, node: fx.Node, index: Index) -> sympy.Basic:
        if node not in self.contractions:
            self.contractions.append(node)
        product = Dot(self.contractions.index(node), *index)
        if op_name(node) == "baddbmm":
            beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
            return _number(alpha) * product + _number(beta) * number(self.operand(node.args[0], index))
        return product

    def opaque_at(self, node: fx.Node, index: Index) -> sympy.Basic:
        """A value that is only known not to depend on what the index lacks."""
        if node not in self.opaque:
            self.opaque.append(node)
        return Opaque(self.opaque.index(node), *index)


def _out_of(index: Index, node: fx.Node) -> bool:
    """Whether a constant index is outside a dim that is known: such a read is never interpreted."""
    return any(bool(place.is_negative) for place in index)


def _number(value: Any) -> sympy.Basic:
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
        return _condition(value, lambda part: sympy.Ne(part, 0))
    return sympy.Ne(value, 0)


def _condition(value: sympy.Piecewise, test: Callable[[sympy.Expr], Boolean]) -> Boolean:
    result: Boolean = sympy.false
    for part, when in reversed(value.args):
        result = sympy.Or(sympy.And(when, test(part)), sympy.And(sympy.Not(when), result))
    return result


def _cast(value: sympy.Basic, old: torch.dtype, new: torch.dtype) -> sympy.Basic:
    """The value after a cast. Rounding of scores is read through: a fused kernel keeps them in float32."""
    if old == new:
        return value
    if new == torch.bool:
        return boolean(value)
    value = number(value)
    if not new.is_floating_point:
        return value if value.is_integer or not old.is_floating_point else Trunc(value)
    if old.is_floating_point and _MANTISSA.get(new, 0) >= _MANTISSA.get(old, 99):
        return value
    return value if value.has(Dot) else _rounded(_MANTISSA[new], value)


def _rounded(bits: int, value: sympy.Expr) -> sympy.Expr:
    if isinstance(value, sympy.Piecewise):
        return sympy.Piecewise(*((_rounded(bits, part), when) for part, when in value.args))
    if value.is_number:
        if value.is_Integer and abs(value) <= 2 ** (bits + 1):
            return value
        if value in (sympy.oo, -sympy.oo):
            return value
        dtype = {7: torch.bfloat16, 10: torch.float16, 23: torch.float32}[bits]
        return _number(torch.tensor(float(value)).to(dtype).item()) if bits != 23 else value
    # Positions stay below 2**24, so float32 holds them exactly; a product of floats it rounds, but so does the kernel.
    return value if bits >= 23 else Round(bits, value)


def _elementwise(function: Callable[..., sympy.Basic], count: int) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        return function(*(reader.operand(node.args[n], index) for n in range(count)))

    return rule


def _numeric(function: Callable[..., sympy.Basic], count: int) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    return _elementwise(lambda *parts: function(*map(number, parts)), count)


def _sum(sign: int) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        left, right = (number(reader.operand(node.args[n], index)) for n in range(2))
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        return left + sign * number(_number(alpha)) * right

    return rule


def _rsub(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    left, right = (number(reader.operand(node.args[n], index)) for n in range(2))
    return right - left


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


def _logic(function: Callable[..., Boolean]) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        if val(node).dtype != torch.bool:
            raise NotImplementedError
        return function(*(boolean(reader.operand(argument, index)) for argument in node.args))

    return rule


def _compare(function: Callable[..., Boolean]) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    def rule(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        left, right = (reader.operand(node.args[n], index) for n in range(2))
        if function in (sympy.Eq, sympy.Ne):
            for a, b in ((left, right), (right, left)):  # a truth value compared with a constant
                if (is_boolean(a) or isinstance(a, sympy.Piecewise)) and b in (0, 1, sympy.true, sympy.false):
                    when = boolean(a) if is_boolean(a) else _condition(a, functools.partial(_equals, number(b)))
                    same = when if not is_boolean(a) or b in (1, sympy.true) else sympy.Not(when)
                    return same if function is sympy.Eq else sympy.Not(same)
        return function(number(left), number(right))

    return rule


def _equals(wanted: sympy.Expr, part: sympy.Expr) -> Boolean:
    return sympy.Eq(part, wanted)


def _where(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    condition, left, right = (reader.operand(argument, index) for argument in node.args)
    return _choose(boolean(condition), left, right)


def _choose(condition: Boolean, left: sympy.Basic, right: sympy.Basic) -> sympy.Basic:
    if is_boolean(left) and is_boolean(right):
        return sympy.Or(sympy.And(condition, left), sympy.And(sympy.Not(condition), right))
    return sympy.Piecewise((number(left), condition), (number(right), True))


def _masked_fill(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value, mask, fill = (reader.operand(argument, index) for argument in node.args)
    return _choose(boolean(mask), fill, value)


def _pow(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    base, exponent = (number(reader.operand(node.args[n], index)) for n in range(2))
    return base**exponent


def _clamp(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    value = number(reader.operand(node.args[0], index))
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    value = value if low is None else sympy.Max(value, number(reader.operand(low, index)))
    return value if high is None else sympy.Min(value, number(reader.operand(high, index)))


def _one_bound(function: Callable[..., sympy.Expr]) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    return _numeric(function, 2)


def _logical_not(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    if op_name(node) == "bitwise_not" and val(node).dtype != torch.bool:
        raise NotImplementedError
    return sympy.Not(boolean(reader.operand(node.args[0], index)))


def _cast_op(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    return _cast(reader.at(source, index), val(source).dtype, val(node).dtype)


def _matching_type(
    rule: Callable[[Reader, fx.Node, Index], sympy.Basic],
) -> Callable[[Reader, fx.Node, Index], sympy.Basic]:
    """Arithmetic whose result type is narrower than float32 rounds; scores excepted."""

    def typed(reader: Reader, node: fx.Node, index: Index) -> sympy.Basic:
        value = rule(reader, node, index)
        bits = _MANTISSA.get(val(node).dtype, 99)
        if is_boolean(value) or bits >= 23 or value.has(Dot):
            return value
        return _rounded(bits, value)

    return typed


_ARITHMETIC: dict[str, Callable[[Reader, fx.Node, Index], sympy.Basic]] = {
    "add": _sum(1),
    "sub": _sum(-1),
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "clamp": _clamp,
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
    "log": _numeric(sympy.log, 1),
    "log1p": _numeric(lambda a: sympy.log(1 + a), 1),
    "expm1": _numeric(lambda a: sympy.exp(a) - 1, 1),
    "erf": _numeric(sympy.erf, 1),
    "log2": _numeric(lambda a: sympy.log(a) / sympy.log(2).evalf(), 1),
    "sqrt": _numeric(sympy.sqrt, 1),
    "rsqrt": _numeric(lambda a: 1 / sympy.sqrt(a), 1),
    "reciprocal": _numeric(lambda a: 1 / a, 1),
    "square": _numeric(lambda a: a**2, 1),
    "tanh": _numeric(sympy.tanh, 1),
    "sigmoid": _numeric(lambda a: 1 / (1 + sympy.exp(-a)), 1),
    "relu": _numeric(lambda a: sympy.Max(a, 0), 1),
    "floor": _numeric(sympy.floor, 1),
    "ceil": _numeric(sympy.ceiling, 1),
    "sin": _numeric(sympy.sin, 1),
    "cos": _numeric(sympy.cos, 1),
    "sign": _numeric(sympy.sign, 1),
    "where": _where,
    "masked_fill": _masked_fill,
}
RULES: dict[str, Callable[[Reader, fx.Node, Index], sympy.Basic]] = {
    **{name: _matching_type(rule) for name, rule in _ARITHMETIC.items()},
    "trunc": _numeric(Trunc, 1),
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

# The other half of the rules (tensors made from nothing, indexing, reductions) registers itself here.
from compile_attn.passes import symbolic_makers  # noqa: E402

RULES.update(symbolic_makers.RULES)
__all__ = [
    "Dot",
    "Opaque",
    "Reader",
    "Unreadable",
    "boolean",
    "dim_of",
    "is_boolean",
    "number",
    "shape_of",
    "unreadable",
]

"""Which nodes multiply two tensors and sum over one axis, and which elements of the two does an element of the result take?

A matrix product in any of its ops, a linear layer of two activations, or a product of broadcast tensors with its sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from torch import fx

from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Index, argument, dim_of, op_name, sequence, shape_of

_PLAIN = ("matmul", "bmm", "mm")
_ADDING = ("baddbmm", "addmm")  # beta * x + alpha * product


@dataclass(frozen=True)
class Factor:
    """One operand of a contraction, its index, and the part of the result's index that it alone has."""

    node: fx.Node
    index: Index
    own: sympy.Expr


def is_contraction(node: fx.Node) -> bool:
    """Whether `factors` knows this node."""
    name = op_name(node)
    if name in (*_PLAIN, *_ADDING):
        return all(val(part).dim() >= 2 for part in operands(node))
    if name == "linear":
        return len(node.args) == 2 and all(val(part).dim() >= 2 for part in operands(node))
    return name == "sum" and _summed(node) is not None


def adds(node: fx.Node) -> bool:
    """Whether the contraction adds a further tensor to the product."""
    return op_name(node) in _ADDING


def operands(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a contraction."""
    source = node.args[0] if op_name(node) == "sum" else node
    left, right = source.args[-2:]  # type: ignore[union-attr]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise TypeError(f"{node.name} multiplies something that is no tensor")
    return left, right


def depth(node: fx.Node) -> sympy.Expr:
    """The size of the axis that is summed over."""
    if op_name(node) == "sum":
        return shape_of(node.args[0])[_summed(node)]  # type: ignore[arg-type, index]
    return shape_of(operands(node)[0])[-1]


def factors(node: fx.Node, index: Index, channel: sympy.Expr) -> tuple[Factor, Factor]:
    """What is multiplied for the element of the result at `index`, at `channel` of the axis that is summed over."""
    left, right = operands(node)
    if op_name(node) == "sum":
        return _of_sum(node, index, channel)
    row, column = index[-2:]
    if op_name(node) == "linear":
        return Factor(left, (*index[:-1], channel), row), Factor(right, (column, channel), column)
    return Factor(left, (*_lead(left, index), row, channel), row), Factor(right, (*_lead(right, index), channel, column), column)


def meeting(node: fx.Node, user: fx.Node) -> fx.Node | None:
    """The contraction that `node` enters by this user: the user itself, or the sum over it."""
    if is_contraction(user) and op_name(user) != "sum":
        return user if node in operands(user) else None
    sums = [after for after in user.users if op_name(user) == "mul" and op_name(after) == "sum" and is_contraction(after)]
    return sums[0] if sums and node in operands(sums[0]) else None


def _lead(operand: fx.Node, index: Index) -> Index:
    shape = shape_of(operand)
    leading = index[len(index) - len(shape) : -2]
    return tuple(sympy.Integer(0) if size == 1 else place for place, size in zip(leading, shape, strict=False))


def _summed(node: fx.Node) -> int | None:
    """The axis of `mul(a, b)` that a sum runs over; None where it is no such sum."""
    source, dims = node.args[0], argument(node, 1, "dim")
    if not is_tensor(source) or op_name(source) != "mul" or dims is None or len(sequence(dims)) != 1:  # type: ignore[arg-type]
        return None
    whole: fx.Node = source  # type: ignore[assignment]
    if argument(node, 2, "keepdim", False) or val(whole).dtype != val(node).dtype or not all(map(is_tensor, whole.args)):
        return None
    left, right = operands(node)
    dim = dim_of(sequence(dims)[0], val(whole).dim())
    sizes = [_size(part, dim - val(whole).dim()) for part in (left, right)]
    return dim if left is not right and sizes[0] == sizes[1] else None


def _size(node: fx.Node, dim: int) -> sympy.Expr:
    """The size of a dim counted from the end; 1 where the tensor has none."""
    shape = shape_of(node)
    return shape[dim] if -dim <= len(shape) else sympy.Integer(1)


def _of_sum(node: fx.Node, index: Index, channel: sympy.Expr) -> tuple[Factor, Factor]:
    dim = _summed(node)
    whole = (*index[:dim], channel, *index[dim:])
    sizes = [[_size(part, n - len(whole)) for n in range(len(whole))] for part in operands(node)]
    made = []
    for part, mine, other in zip(operands(node), sizes, reversed(sizes), strict=True):
        rank = val(part).dim()
        place = tuple(sympy.Integer(0) if size == 1 else at for at, size in zip(whole[-rank:], mine[-rank:], strict=True))
        own = [at for n, at in enumerate(whole) if n != dim and mine[n] != 1 and other[n] == 1]
        made.append(Factor(part, place, sympy.Add(*own)))
    return made[0], made[1]

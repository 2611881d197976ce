"""Which element of its input does a layout op read, and how are such indices kept simple?

Sizes and indices are sympy expressions. `index_map` is the whole knowledge of view-like ops: for an element of the output it
names the one element of the input.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from compile_attn.passes.graph import is_tensor, val

Index = tuple[sympy.Expr, ...]
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def as_expr(length: Any) -> sympy.Expr:
    """A size (int, SymInt, or a node that holds one) as a sympy expression."""
    if isinstance(length, fx.Node):
        length = length.meta["val"]
    return length.node.expr if isinstance(length, torch.SymInt) else sympy.sympify(length)


def shape_of(node: fx.Node) -> Index:
    """The shape of a tensor node."""
    return tuple(as_expr(length) for length in val(node).shape)


class Bounds:
    """Upper bounds of index symbols: every index symbol is in [0, bound)."""

    def __init__(self) -> None:
        self._sizes: dict[sympy.Symbol, sympy.Expr] = {}

    def symbol(self, name: str, size: sympy.Expr) -> sympy.Expr:
        """The index symbol of an axis of this size: 0 where the size is 1. Equal names and sizes give equal symbols."""
        if size == 1:
            return sympy.Integer(0)
        symbol = sympy.Symbol(f"{name}_{size}", integer=True, nonnegative=True)
        self._sizes[symbol] = size
        return symbol

    def know(self, symbol: sympy.Symbol, size: sympy.Expr) -> None:
        """Bound a symbol of the expression language by the size of its axis at the present site."""
        self._sizes[symbol] = size

    def size(self, symbol: sympy.Expr) -> sympy.Expr:
        """The size of the axis of an index symbol; 1 for the constant 0."""
        return self._sizes.get(symbol, sympy.Integer(1))

    def below(self, expr: sympy.Expr, size: sympy.Expr) -> bool:
        """Whether 0 <= expr < size is certain."""
        expr = sympy.expand(expr)
        if expr.is_Integer and size.is_Integer:
            return bool(0 <= expr < size)
        if expr in self._sizes and self._sizes[expr] == size:
            return True
        if isinstance(expr, sympy.Mod):
            return bool(expr.args[1] == size)
        if size == 0:
            return False
        most = self._most(expr)
        return most is not None and bool(sympy.expand(size - 1 - most).is_nonnegative)

    def _most(self, expr: sympy.Expr) -> sympy.Expr | None:
        """The greatest value of a sum of non-negative multiples of index symbols; None where that is not known."""
        total: sympy.Expr = sympy.Integer(0)
        for term in sympy.Add.make_args(expr):
            factor, rest = term.as_coeff_Mul()
            if not factor.is_nonnegative:
                return None
            if rest == 1:
                most: sympy.Expr = sympy.Integer(1)
            elif rest in self._sizes:
                most = self._sizes[rest] - 1
            elif isinstance(rest, sympy.Mul):  # index symbols times sizes
                parts = [self._sizes[part] - 1 if part in self._sizes else part for part in rest.args]
                if not all(part in self._sizes or (part.is_Symbol and part.is_positive) for part in rest.args):
                    return None
                most = sympy.Mul(*parts)
            elif isinstance(rest, sympy.Mod) and rest.args[1].is_positive:
                most = rest.args[1] - 1
            elif isinstance(rest, sympy.floor) and (inner := self._most(sympy.expand(rest.args[0]))) is not None:
                most = sympy.floor(inner)
            else:
                return None
            total += factor * most
        return total

    def divmod(self, expr: sympy.Expr, size: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
        """(expr // size, expr % size), split exactly where the terms allow it."""
        if size == 1:
            return expr, sympy.Integer(0)
        whole: sympy.Expr = sympy.Integer(0)
        rest: sympy.Expr = sympy.Integer(0)
        for term in sympy.Add.make_args(sympy.expand(expr)):
            quotient = sympy.cancel(term / size)
            exact = quotient.is_integer and not quotient.has(sympy.Pow) if quotient.is_integer is not None else False
            whole, rest = (whole + quotient, rest) if exact else (whole, rest + term)
        if self.below(rest, size):
            return whole, rest
        for term in sympy.Add.make_args(rest):  # x // (g * m) = (x // m) // g, and x % (g * m) = ((x // m) % g) * m + x % m
            step = sympy.gcd(term, size)
            if step in (1, size):
                continue
            outer, inner = self.divmod(rest, step)
            if self.below(inner, step) and not inner.has(sympy.Mod, sympy.floor):
                top, middle = self.divmod(outer, sympy.cancel(size / step))
                return whole + top, sympy.expand(middle * step + inner)
        return whole + sympy.floor(rest / size), sympy.Mod(rest, size)

    def reshape(self, index: Index, shape: Index, into: Index) -> Index:
        """The index into a tensor of shape `into`, of the element at `index` of the same data in shape `shape`."""
        result: list[sympy.Expr] = []
        for taken, given in _groups(shape, into):
            linear: sympy.Expr = sympy.Integer(0)
            for dim in taken:
                linear = linear * shape[dim] + index[dim]
            parts: list[sympy.Expr] = []
            for place, dim in enumerate(reversed(given)):
                if place == len(given) - 1:
                    parts.append(sympy.Integer(0) if into[dim] == 1 else sympy.expand(linear))
                else:
                    linear, part = self.divmod(linear, into[dim])
                    parts.append(part)
            result.extend(reversed(parts))
        return tuple(result)


def _groups(shape: Index, into: Index) -> list[tuple[list[int], list[int]]]:
    """Runs of dims of `shape` and `into` that hold the same number of elements, as short as possible."""
    groups: list[tuple[list[int], list[int]]] = []
    a, b = 0, 0
    while a < len(shape) or b < len(into):
        taken, given = [], []
        left: sympy.Expr = sympy.Integer(1)
        right: sympy.Expr = sympy.Integer(1)
        if a < len(shape):
            taken.append(a)
            left, a = shape[a], a + 1
        if b < len(into):
            given.append(b)
            right, b = into[b], b + 1
        while sympy.expand(left - right) != 0:
            smaller = _divides(left, right)
            if (smaller or b >= len(into)) and a < len(shape):
                taken.append(a)
                left, a = left * shape[a], a + 1
            elif b < len(into):
                given.append(b)
                right, b = right * into[b], b + 1
            else:
                raise ValueError(f"{shape} and {into} do not hold the same elements")
        groups.append((taken, given))
    return groups


def _divides(left: sympy.Expr, right: sympy.Expr) -> bool:
    """Whether the left product must grow to meet the right one."""
    if left.is_Integer and right.is_Integer:
        return bool(left < right)
    ratio = sympy.cancel(right / left)
    return bool(sympy.denom(ratio) == 1) or (left.is_Integer and not right.is_Integer)


def broadcast(index: Index, node: fx.Node) -> Index:
    """The index into an operand that broadcasts to the output that `index` is of."""
    shape = shape_of(node)
    tail = index[len(index) - len(shape) :] if shape else ()
    return tuple(sympy.Integer(0) if size == 1 else place for place, size in zip(tail, shape, strict=True))


def op_name(node: fx.Node) -> str:
    """`add` for aten.add.Tensor, `` for what is not an aten op."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::") if schema is not None else ""


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument by place or name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def dim_of(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim


def slice_bounds(node: fx.Node) -> tuple[int, sympy.Expr, sympy.Expr]:
    """(dim, start, step) of an aten.slice node, a negative start made positive."""
    source = node.args[0]
    dim = dim_of(argument(node, 1, "dim", 0), val(source).dim())  # type: ignore[arg-type]
    start = argument(node, 2, "start", 0)
    begin = as_expr(0 if start is None else start)
    if begin.is_negative:
        begin = sympy.Max(0, begin + shape_of(source)[dim])  # type: ignore[arg-type]
    return dim, begin, as_expr(argument(node, 4, "step", 1))


def index_map(node: fx.Node, index: Index, bounds: Bounds) -> tuple[fx.Node, Index] | None:
    """For a layout op: its input and the index of the element that output element `index` is. None for any other op."""
    if node.target is operator.getitem:
        return _part(node, index)
    rule = _RULES.get(op_name(node))
    if rule is None or not node.args or not is_tensor(node.args[0]):
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    found = rule(node, source, index, bounds)
    return None if found is None else (source, found)


def _part(node: fx.Node, index: Index) -> tuple[fx.Node, Index] | None:
    """getitem of split, chunk, unbind or meshgrid."""
    whole, number = node.args
    name = op_name(whole)  # type: ignore[arg-type]
    if name == "meshgrid":
        axis = index[number if argument(whole, 1, "indexing", "ij") == "ij" or number > 1 else 1 - number]  # type: ignore
        part: fx.Node = whole.args[0][number]  # type: ignore[union-attr, index, assignment]
        return part, (axis,) if val(part).dim() else ()
    if not isinstance(whole, fx.Node) or name not in ("split", "split_with_sizes", "chunk", "unbind"):
        return None
    source: fx.Node = whole.args[0]  # type: ignore[assignment]
    dim = dim_of(argument(whole, 1 if name == "unbind" else 2, "dim", 0), val(source).dim())
    if name == "unbind":
        return source, (*index[:dim], sympy.Integer(number), *index[dim:])
    start = sum((as_expr(part.shape[dim]) for part in whole.meta["val"][:number]), sympy.Integer(0))
    return source, (*index[:dim], index[dim] + start, *index[dim + 1 :])


def _same(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    return index


def _view(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    try:
        return bounds.reshape(index, shape_of(node), shape_of(source))
    except ValueError:  # sizes whose products cannot be compared
        return None


def _expand(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    return broadcast(index, source)


def _permute(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    rank = len(index)
    order = [dim_of(dim, rank) for dim in argument(node, 1, "dims")]
    return tuple(index[order.index(dim)] for dim in range(rank))


def _transpose(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    places = list(index)
    a, b = (dim_of(argument(node, n, name), len(index)) for n, name in ((1, "dim0"), (2, "dim1")))
    places[a], places[b] = places[b], places[a]
    return tuple(places)


def _t(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    return index[::-1]


def _unsqueeze(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    dim = dim_of(argument(node, 1, "dim"), len(index))
    return (*index[:dim], *index[dim + 1 :])


def _select(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    shape = shape_of(source)
    dim = dim_of(argument(node, 1, "dim"), len(shape))
    place = as_expr(argument(node, 2, "index"))
    place = place + shape[dim] if place.is_negative else place
    return (*index[:dim], place, *index[dim:])


def _slice(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    dim, start, step = slice_bounds(node)
    return (*index[:dim], start + step * index[dim], *index[dim + 1 :])


def _flip(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    shape = shape_of(source)
    dims = [dim_of(dim, len(shape)) for dim in argument(node, 1, "dims")]
    return tuple(shape[n] - 1 - place if n in dims else place for n, place in enumerate(index))


def _repeat_interleave(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    times, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
    if isinstance(times, fx.Node) or dim is None:
        return None
    dim = dim_of(dim, len(index))
    return (*index[:dim], bounds.divmod(index[dim], sympy.Integer(times))[0], *index[dim + 1 :])


def _repeat(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    shape = shape_of(source)
    tail = index[len(index) - len(shape) :]
    return tuple(bounds.divmod(place, size)[1] for place, size in zip(tail, shape, strict=True))


def _cast(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    """A cast between float types moves no element; that it rounds is the reader's business."""
    return index if val(node).dtype in _FLOATS and val(source).dtype in _FLOATS else None


def _dropout(node: fx.Node, source: fx.Node, index: Index, bounds: Bounds) -> Index | None:
    """Dropout that is off."""
    return None if argument(node, 1, "p") > 0 and argument(node, 2, "train") else index


_RULES = {
    **dict.fromkeys(("alias", "clone", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "positive"), _same),
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"), _view),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    **dict.fromkeys(("_to_copy", "to", "type_as"), _cast),
    **dict.fromkeys(("dropout", "native_dropout"), _dropout),
    "permute": _permute,
    "t": _t,
    "unsqueeze": _unsqueeze,
    "select": _select,
    "slice": _slice,
    "flip": _flip,
    "repeat_interleave": _repeat_interleave,
    "repeat": _repeat,
}


def path(node: fx.Node, index: Index, bounds: Bounds) -> list[tuple[fx.Node, Index]]:
    """The node and what it is a layout of, nearest first."""
    steps = [(node, index)]
    while (step := index_map(*steps[-1], bounds)) is not None:
        steps.append(step)
    return steps


def sequence(values: Any) -> Sequence[Any]:
    """An argument that is a tuple, a list or one value."""
    return values if isinstance(values, (tuple, list)) else (values,)

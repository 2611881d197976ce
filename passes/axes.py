"""Which axes of a score are sequences, heads, queries and keys?

A frame names the elementary axes of the scores. An axis of G * T rows, T the number of keys, may be two: the queries of G heads
that were packed into the rows of their key head. Both readings name the same elements, so whichever leads to plain operands is
right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch import fx

from compile_attn.kernels.expr import B, H, I, J
from compile_attn.passes.anchors import Anchor
from compile_attn.passes.heads import head_symbol_values
from compile_attn.passes.indices import Bounds, Index
from compile_attn.passes.terms import unreadable


@dataclass(frozen=True)
class Axis:
    """One elementary axis of the scores: its symbol (0 where its size is 1), its size, and whether it is the first dim, whole."""

    symbol: sympy.Expr
    size: sympy.Expr
    first: bool = False


@dataclass(frozen=True)
class Frame:
    """The index of the scores, written in elementary axes; `axes` are all of them but the keys, in order."""

    index: Index
    axes: tuple[Axis, ...]
    keys: Axis


@dataclass(frozen=True)
class Rows:
    """The axes of a score in canonical terms: a substitution of axis symbols, and the sizes."""

    values: dict[sympy.Expr, sympy.Expr]
    heads: int
    batch: sympy.Expr | None
    queries: sympy.Expr
    keys: sympy.Expr


def splits(name: str, shape: Index, length: sympy.Expr, bounds: Bounds) -> Iterator[tuple[Index, tuple[tuple[Axis, ...], ...]]]:
    """The index of a tensor and the elementary axes of each dim: each dim one axis, then one dim of G * length split in two."""
    index = tuple(bounds.symbol(f"{name}{dim}", size) for dim, size in enumerate(shape))
    whole = tuple((Axis(symbol, size, dim == 0),) for dim, (symbol, size) in enumerate(zip(index, shape, strict=True)))
    yield index, whole
    for dim, size in enumerate(shape):
        count = sympy.cancel(size / length) if length != 1 and size != 0 else sympy.Integer(1)
        if not count.is_Integer or count < 2:
            continue
        head = Axis(bounds.symbol(f"{name}{dim}g", count), count)
        token = Axis(bounds.symbol(f"{name}{dim}t", length), length)
        for outer, inner in ((head, token), (token, head)):
            place = outer.symbol * inner.size + inner.symbol
            yield (*index[:dim], place, *index[dim + 1 :]), (*whole[:dim], (outer, inner), *whole[dim + 1 :])


def frames(anchor: Anchor, bounds: Bounds) -> Iterator[Frame]:
    """Every way to see the axes of the scores. 2 * T rows, T dynamic, are packed heads if they can be; 18 rows of 9 keys are more
    likely 18 queries."""
    length = anchor.shape[anchor.dim]
    found = []
    for index, axes in splits("a", anchor.shape, length, bounds):
        others = (axis for dim, parts in enumerate(axes) for axis in parts if dim != anchor.dim)
        if len(axes[anchor.dim]) == 1:
            found.append(Frame(index, tuple(others), axes[anchor.dim][0]))
    plain, *packed = found
    yield from (plain, *packed) if length.is_Integer else (*packed, plain)


def rows_of(frame: Frame, row: sympy.Expr, anchor: Anchor, product: fx.Node, batched: bool, bounds: Bounds) -> Rows:
    """The meaning of every axis, where `row` is the index of the queries in their product with the keys. Raises Unreadable."""
    query = _query(frame, row, product)
    rest = [axis for axis in frame.axes if axis is not query and axis.symbol != 0]
    batch = None
    if batched and rest and rest[0].first and (len(rest) > 1 or len(frame.axes) > 2 or not rest[0].size.is_Integer):
        batch = rest.pop(0)  # beside heads, of which there may be one
    if not all(axis.size.is_Integer for axis in rest):
        raise unreadable(
            anchor.softmax,
            f"a score of shape {anchor.shape} has a head axis of unknown size",
            "mark only the lengths of batch and sequence dynamic",
        )
    sizes = {axis.symbol: int(axis.size) for axis in rest}
    values = {**head_symbol_values(sizes), frame.keys.symbol: J}
    if query is not None:
        values[query.symbol] = I
    if batch is not None:
        values[batch.symbol] = B
        bounds.know(B, batch.size)
    heads = 1
    for size in sizes.values():
        heads *= size
    queries = sympy.Integer(1) if query is None else query.size
    for symbol, bound in ((H, sympy.Integer(heads)), (I, queries), (J, frame.keys.size)):
        bounds.know(symbol, bound)
    return Rows(values, heads, None if batch is None else B, queries, frame.keys.size)


def _query(frame: Frame, row: sympy.Expr, product: fx.Node) -> Axis | None:
    """The token axis in the row of the product: it alone, or among several that are one axis there."""
    inside = [axis for axis in frame.axes if axis.symbol in row.free_symbols]
    if row == 0:
        return None
    if len(inside) == 1 and inside[0].symbol == row:
        return inside[0]
    tokens = [axis for axis in inside if axis.size == frame.keys.size] or [axis for axis in inside if axis.size.is_Symbol]
    if len(tokens) != 1:
        why = f"the query axis of the product is {row}, not one axis of the score"
        raise unreadable(product, why, "keep tokens on one axis")
    return tokens[0]

"""Which tensors are the queries and keys of a score?

A score holds one product of queries and keys, or several that are added: those are one product of joined channels. Each operand is
followed to its plainest layout (`heads`), and all products must agree on what the axes of the score mean (`axes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from compile_attn.kernels.expr import I, J, S
from compile_attn.passes.anchors import Anchor
from compile_attn.passes.axes import Frame, Rows, rows_of
from compile_attn.passes.contractions import Factor, depth, factors
from compile_attn.passes.heads import Found, Operand, Roles, find_operand
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.terms import Dot, unreadable
from compile_attn.passes.values import number

_LAYOUT = "keep each of heads, tokens and channels on an axis: view(B, T, H, D).transpose(1, 2)"


@dataclass(frozen=True)
class Product:
    """The product in a score: its parts side by side in the channels, and the constant factor that was peeled off them."""

    rows: Rows
    score: sympy.Expr  # the score in s, b, h, i, j
    queries: tuple[Operand, ...]
    keys: tuple[Operand, ...]
    heads: int  # of the keys
    channels: sympy.Expr
    factor: float


def read_product(anchor: Anchor, frame: Frame, value: sympy.Basic, batched: bool, reader: Reader) -> Product:
    """The queries and keys of a score that holds at least one product. Raises Unreadable."""
    dots = sorted(value.atoms(Dot), key=str)
    joined = _joined(anchor, number(value), dots)
    read = [_operands(anchor, frame, dot, batched, reader, scaled=len(dots) == 1) for dot in dots]
    rows, queries, keys = zip(*read, strict=True)
    heads = [found.heads for found in keys]
    agree = all(other == rows[0] for other in rows) and all(max(heads) % each == 0 for each in heads)
    if not agree or len({"b" in found.operand.axes for found in (*queries, *keys)}) > 1:
        why = "the products of queries and keys in the score have different axes"
        raise unreadable(anchor.softmax, why, "give both the same sequences and heads")
    return Product(
        rows[0],
        joined.xreplace(rows[0].values),
        tuple(found.operand for found in queries),
        tuple(found.operand for found in keys),
        max(heads),
        sympy.Add(*(depth(reader.contractions[int(dot.args[0])]) for dot in dots)),
        queries[0].factor * keys[0].factor,
    )


def _joined(anchor: Anchor, value: sympy.Expr, dots: list[sympy.Expr]) -> sympy.Expr:
    """The score in s, the sum of all products."""
    *others, last = dots
    joined = value.xreplace({last: S - sympy.Add(*others)})
    joined = sympy.expand(joined) if others else joined
    if joined.has(Dot):
        why = f"the score holds {len(dots)} products of queries and keys that are not simply added"
        raise unreadable(anchor.softmax, why, "join their channels: cat((q1, q2), -1) @ cat((k1, k2), -1).transpose(-1, -2)")
    return joined


def _operands(
    anchor: Anchor, frame: Frame, dot: sympy.Expr, batched: bool, reader: Reader, scaled: bool
) -> tuple[Rows, Found, Found]:
    node = reader.contractions[int(dot.args[0])]
    length = depth(node)
    channel = reader.bounds.symbol("d", length)
    column = frame.keys.symbol
    sides = factors(node, dot.args[1:], channel)
    if column not in (sides[0].own, sides[1].own):
        why = f"the softmax runs over axis {anchor.dim}, which is not the key axis of the product {node.name}"
        raise unreadable(anchor.softmax, why, "softmax over the keys: dim=-1 of q @ k.transpose(-1, -2)")
    query, key = sides if sides[1].own == column else sides[::-1]
    rows = rows_of(frame, query.own, anchor, node, batched, reader.bounds)

    def find(side: Factor, name: str, token: sympy.Symbol, tokens: sympy.Expr) -> Found:
        place = tuple(sympy.expand(part.xreplace(rows.values)) if part.free_symbols else part for part in side.index)
        roles = Roles(token if tokens != 1 else sympy.Integer(0), channel, rows.batch, tokens, length, rows.heads)
        found = find_operand(side.node, place, roles, reader.bounds, scaled)
        if found is None:
            why = f"the {name} of this product are not laid out as heads, tokens and channels: index {place}"
            raise unreadable(node, why, _LAYOUT)
        return found

    queries, keys = find(query, "queries", I, rows.queries), find(key, "keys", J, rows.keys)
    if queries.heads != rows.heads:
        why = f"{queries.heads} query heads are shared by {rows.heads} heads of scores"
        raise unreadable(node, why, "repeat the queries, one for every head of the scores")
    return rows, queries, keys

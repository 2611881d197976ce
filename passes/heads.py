"""Which tensor, in which layout, holds the queries, keys and values that a contraction reads?

An operand is followed back through layout ops, and each node on the way is asked whether it is a plain [.., head, token,
channel] tensor in some order. The one with the fewest heads is taken, so repeated KV heads are never materialised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
from torch import fx

from compile_attn.kernels.expr import H
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Bounds, Index, index_map, op_name, shape_of

CHANNEL = "c"  # name of the contracted or free channel axis


@dataclass(frozen=True)
class Operand:
    """A node and one letter per dim: "b" sequence, "h" head (several are merged in order), "t" token, "d" channel, "1" size 1."""

    node: fx.Node
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """An operand, how many heads it has, and the constant factor that was peeled off it."""

    operand: Operand
    heads: int
    factor: float = 1.0


@dataclass(frozen=True)
class Roles:
    """What the symbols of an operand's index mean: token and channel symbols, the batch symbol if any, sizes, query heads."""

    token: sympy.Expr
    channel: sympy.Expr
    batch: sympy.Expr | None
    tokens: sympy.Expr
    channels: sympy.Expr
    heads: int


def find_operand(node: fx.Node, index: Index, roles: Roles, bounds: Bounds, scaled: bool) -> Found | None:
    """The best layout of `node[index]`; `scaled`: constant factors may be peeled off. None: no node on the way is plain."""
    best: Found | None = None
    factor = 1.0
    step: tuple[fx.Node, Index] | None = (node, index)
    while step is not None:
        node, index = step
        letters = _letters(node, index, roles, bounds)
        if letters is not None and (best is None or letters[1] <= best.heads):
            best = Found(Operand(node, letters[0]), letters[1], factor)
        step = index_map(node, index, bounds)
        if step is None and scaled and (peeled := _constant_factor(node)) is not None:
            source, times = peeled
            factor, step = factor * times, (source, index)
    return best


def _constant_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """x for x * number and x / number of the same shape."""
    if op_name(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    source, times = node.args
    if op_name(node) == "mul" and isinstance(source, (int, float)):
        source, times = times, source
    if not is_tensor(source) or not isinstance(times, (int, float)) or isinstance(times, bool) or times == 0:
        return None
    if val(source).dtype != val(node).dtype:  # type: ignore[arg-type]
        return None
    return source, float(times if op_name(node) == "mul" else 1.0 / times)  # type: ignore[return-value]


def _letters(node: fx.Node, index: Index, roles: Roles, bounds: Bounds) -> tuple[tuple[str, ...], int] | None:
    """One letter a dim and the number of heads, where the index is plain in every dim."""
    letters, seen, heads = [], [], []
    for place, size in zip(index, shape_of(node), strict=True):
        if size == 1:
            letters.append("1")
        elif place == roles.token and size == roles.tokens:
            letters.append("t")
        elif place == roles.channel and size == roles.channels:
            letters.append("d")
        elif roles.batch is not None and place == roles.batch:
            letters.append("b")
        elif place.free_symbols <= {H} and size.is_Integer:
            letters.append("h")
            heads.append((place, int(size)))
            continue
        else:
            return None
        seen.append(letters[-1])
    if seen.count("t") != (roles.tokens != 1) or seen.count("d") != (roles.channels != 1) or seen.count("b") > 1:
        return None
    count = _head_count(heads, roles.heads)
    return None if count is None else (tuple(letters), count)


def _head_count(heads: list[tuple[sympy.Expr, int]], query_heads: int) -> int | None:
    """How many heads these dims hold, if query head h reads head h // (Hq / heads) of them; None if it reads another."""
    count = 1
    for _, size in heads:
        count *= size
    if count == 0 or query_heads % count:
        return None
    for head in range(query_heads):  # a proof by every case: heads are few
        at = 0
        for place, size in heads:
            value = place.subs(H, head)
            if not value.is_Integer or not 0 <= value < size:
                return None
            at = at * size + int(value)
        if at != head // (query_heads // count):
            return None
    return count


def head_symbol_values(sizes: Mapping[sympy.Expr, int]) -> dict[sympy.Expr, sympy.Expr]:
    """Head axis symbols, slowest first, as functions of the one head number h."""
    values: dict[sympy.Expr, sympy.Expr] = {}
    rest = 1
    for symbol, size in reversed(list(sizes.items())):
        whole = sympy.floor(H / rest) if rest != 1 else H
        values[symbol] = whole if symbol is next(iter(sizes)) else sympy.Mod(whole, size)
        rest *= size
    return values

"""Which tensor, in which layout, holds the queries, keys and values that a contraction reads?

An operand is followed back through layout ops, and each node on the way is asked whether it is a plain [.., head, token,
channel] tensor in some order. The one with the fewest heads is taken, so repeated KV heads are never materialised.
"""

from __future__ import annotations

import functools
import math
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
    """A node and what each dim is: "b" sequence, "h" head (several are merged in order), "t" token, "d" channel, "1" size 1.

    Two letters are one dim that holds both, the slower first: "hd" heads and their channels, "ht" and "th" packed queries.
    `heads`: how many heads each dim holds, 1 where it holds none.
    """

    node: fx.Node
    axes: tuple[str, ...]
    heads: tuple[int, ...]


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
        plain = _operand(node, index, roles, bounds, merged=False)
        operand = plain or _operand(node, index, roles, bounds, merged=True)
        if operand is not None and (best is None or math.prod(operand.heads) < best.heads + (plain is not None)):
            best = Found(operand, math.prod(operand.heads), factor)
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


def _operand(node: fx.Node, index: Index, roles: Roles, bounds: Bounds, merged: bool) -> Operand | None:
    """The meaning of every dim, where the index says it; `merged`: a dim may hold heads and something else."""
    axes, held, heads = [], [], []
    for place, size in zip(index, shape_of(node), strict=True):
        axis = "1" if size == 1 else _axis(place, size, roles)
        count, number = (size if axis == "h" else 1), place
        if axis == "" and merged:
            axis, count, number = _merged_axis(place, size, roles, bounds)
        if axis == "" or not sympy.sympify(count).is_Integer:
            return None
        if "h" in axis:
            heads.append((number, int(count)))
        axes.append(axis)
        held.append(int(count))
    seen = "".join(axes)
    if seen.count("t") != (roles.tokens != 1) or seen.count("d") != (roles.channels != 1) or seen.count("b") > 1:
        return None
    return Operand(node, tuple(axes), tuple(held)) if _in_order(tuple(heads), roles.heads) else None


def _axis(place: sympy.Expr, size: sympy.Expr, roles: Roles) -> str:
    """The one letter of a dim, "" where it has none."""
    if place == roles.token and size == roles.tokens:
        return "t"
    if place == roles.channel and size == roles.channels:
        return "d"
    if roles.batch is not None and place == roles.batch:
        return "b"
    return "h" if place.free_symbols <= {H} and size.is_Integer else ""


def _merged_axis(place: sympy.Expr, size: sympy.Expr, roles: Roles, bounds: Bounds) -> tuple[str, sympy.Expr, sympy.Expr]:
    """The two letters of a dim, its number of heads, and which of them is read; "" where it is no such dim."""
    for letter, symbol, length in (("t", roles.token, roles.tokens), ("d", roles.channel, roles.channels)):
        count = sympy.cancel(size / length)
        if symbol not in place.free_symbols or not count.is_Integer or count < 2:
            continue
        outer, inner = bounds.divmod(place, length)
        if inner == symbol and outer.free_symbols <= {H}:
            return "h" + letter, count, outer
        outer, inner = bounds.divmod(place, count)
        if outer == symbol and inner.free_symbols <= {H}:
            return letter + "h", count, inner
    return "", sympy.Integer(1), place


@functools.lru_cache(maxsize=4096)  # the layers of a model ask the same
def _in_order(heads: tuple[tuple[sympy.Expr, int], ...], query_heads: int) -> bool:
    """Whether query head h reads head h // (query heads / heads) of the heads that these dims hold."""
    count = math.prod(size for _, size in heads)
    if count == 0 or query_heads % count:
        return False
    for head in range(query_heads):  # a proof by every case: heads are few
        at = 0
        for place, size in heads:
            value = place.subs(H, head)
            if not value.is_Integer or not 0 <= value < size:
                return False
            at = at * size + int(value)
        if at != head // (query_heads // count):
            return False
    return True


def head_symbol_values(sizes: Mapping[sympy.Expr, int]) -> dict[sympy.Expr, sympy.Expr]:
    """Head axis symbols, slowest first, as functions of the one head number h."""
    values: dict[sympy.Expr, sympy.Expr] = {}
    rest = 1
    for symbol, size in reversed(list(sizes.items())):
        whole = sympy.floor(H / rest) if rest != 1 else H
        values[symbol] = whole if symbol is next(iter(sizes)) else sympy.Mod(whole, size)
        rest *= size
    return values

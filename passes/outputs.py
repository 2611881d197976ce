"""Where do the probabilities meet the values, and which node is then the output?

The probabilities are followed through layout ops to their product with the values; the output's axes are expressed in the axes of
the scores, and the values are found like any operand. A factor on the output that stands for sinks (`gates`) belongs to the site.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import sympy
from torch import fx

from compile_attn.kernels.expr import B, H, I, J
from compile_attn.passes.anchors import Anchor
from compile_attn.passes.gates import factors, sink_of
from compile_attn.passes.graph import is_tensor
from compile_attn.passes.heads import Found, Operand, Roles, find_operand
from compile_attn.passes.indices import Index, index_map, path, shape_of
from compile_attn.passes.symbolic import Reader, Unreadable, unreadable


@dataclass(frozen=True)
class Rows:
    """The axes of a score in canonical terms: a substitution of axis symbols, and the sizes."""

    values: dict[sympy.Expr, sympy.Expr]
    heads: int
    batch: sympy.Expr | None
    queries: sympy.Expr
    keys: sympy.Expr


@dataclass(frozen=True)
class Output:
    """The node that the fused op replaces, the values and their head size; `back`: axis symbols of the output in b, h, i."""

    operand: Operand
    values: Found
    size: sympy.Expr
    back: dict[sympy.Expr, sympy.Expr]
    index: Index
    sink: sympy.Expr | None = None  # the logit that a factor on the output adds to the normaliser


class OutputReader:
    """Reads the second half of a site."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def values(self, anchor: Anchor, axes: Index, rows: Rows, score: sympy.Expr) -> Output:
        """The output in plain axes. Where the product itself merges heads and tokens on one axis, it is the nearest layout of it
        that does not; where a factor stands for sinks, it is the node with that factor. `score`: its product left as it is, its
        axes in b, h, i, j."""
        product, side = anchor.value_product(self.reader.bounds)
        end = anchor.finish or product
        found: Output | None = None
        output: fx.Node | None = end
        while output is not None:
            onward = _onward(output, self.reader)
            try:
                here = self._values_at(anchor, axes, rows, product, side, output)
            except Unreadable:
                if found is None and onward is None:
                    raise
            else:
                found = found or here
                for factor in factors(output):
                    if (sink := sink_of(factor, here.index, here.back, score, rows.keys, self.reader)) is not None:
                        return replace(here, operand=Operand(factor.product, here.operand.axes), sink=sink)
            output = onward
        assert found is not None
        return found

    def _values_at(self, anchor: Anchor, axes: Index, rows: Rows, node: fx.Node, side: int, output: fx.Node) -> Output:
        outs = tuple(self.reader.bounds.symbol(f"o{n}", size) for n, size in enumerate(shape_of(output)))
        index = dict(path(output, outs, self.reader.bounds))[anchor.finish or node]
        left, right = operands(node)
        depth = shape_of(left)[-1]
        inner = self.reader.bounds.symbol("c", depth)
        left_index = operand_index(left, index, index[-2], inner)
        right_index = operand_index(right, index, inner, index[-1])
        (weights, weight_index), (value, value_index) = ((left, left_index), (right, right_index))[:: 1 if side == 0 else -1]
        steps = path(weights, weight_index, self.reader.bounds)
        place = next((at for step, at in steps if step is anchor.probabilities), None)
        if place is None:
            raise unreadable(node, "the probabilities do not reach their product with the values by layout ops alone")
        if place[anchor.dim] != inner + anchor.offset:
            why = "the softmax runs over another axis than the one that is contracted with the values"
            raise unreadable(node, why, "out = softmax(scores, -1) @ v")
        if depth != rows.keys:
            why = f"{rows.keys} keys are normalised, but {depth} of them meet a value"
            raise unreadable(node, why, "contract all of the probabilities with the values")
        back = self._invert(anchor, axes, rows, place, outs, node)
        value_index = tuple(sympy.expand(p.xreplace({**back, inner: J})) for p in value_index)
        column = index[-1] if side == 0 else index[-2]
        size = shape_of(node)[-1 if side == 0 else -2]
        if column not in outs and column != 0:
            raise unreadable(node, f"the channels of the output are {column}, not one axis")
        roles = Roles(J, column, rows.batch, rows.keys, size, rows.heads)
        found = find_operand(value, value_index, roles, self.reader.bounds, scaled=False)
        if found is None:
            raise unreadable(node, f"the values of this product are not laid out as heads, tokens and channels: {value_index}")
        letters = tuple(self._letter(symbol, back, column) for symbol in outs)
        return Output(Operand(output, letters), found, size, back, outs)

    def _invert(
        self, anchor: Anchor, axes: Index, rows: Rows, place: Index, outs: Index, node: fx.Node
    ) -> dict[sympy.Expr, sympy.Expr]:
        """Each axis symbol of the output as a function of b, h, i."""
        back: dict[sympy.Expr, sympy.Expr] = {}
        merged = [(p, axes[n]) for n, p in enumerate(place) if n != anchor.dim and axes[n] != 0]
        for got, axis in merged:
            if got in outs:
                back[got] = rows.values[axis]
        unknown = {s for got, _ in merged for s in got.free_symbols} - set(back)
        if len(unknown) > 1:
            raise unreadable(node, f"the axes {sorted(map(str, unknown))} of the output mix heads and tokens")
        for symbol in unknown:  # heads that were apart in the scores and are one axis of the output
            back[symbol] = H
        for got, axis in merged:
            want = rows.values[axis]
            have = got.xreplace(back)
            if sympy.expand(want - have) != 0 and not self._same_for_heads(want, have, rows.heads):
                raise unreadable(node, f"output axis {got} holds {axis} of the scores in another order")
        return back

    def _same_for_heads(self, a: sympy.Expr, b: sympy.Expr, heads: int) -> bool:
        return (a.free_symbols | b.free_symbols) <= {H} and all(a.subs(H, h) == b.subs(H, h) for h in range(heads))

    def _letter(self, symbol: sympy.Expr, back: dict[sympy.Expr, sympy.Expr], column: sympy.Expr) -> str:
        if symbol == 0:
            return "1"
        if symbol == column:
            return "d"
        means = back.get(symbol, H)
        return {I: "t", B: "b"}.get(means, "h")


def operand_index(operand: fx.Node, index: Index, row: sympy.Expr, column: sympy.Expr) -> Index:
    shape = shape_of(operand)
    leading = index[len(index) - len(shape) : -2]
    lead = tuple(sympy.Integer(0) if size == 1 else place for place, size in zip(leading, shape, strict=False))
    return (*lead, row, column)


def operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The two factors of a contraction."""
    left, right = product.args[-2:]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        raise TypeError(f"{product.name} multiplies something that is no tensor")
    return left, right


def _onward(node: fx.Node, reader: Reader) -> fx.Node | None:
    """The one layout op over a node, if it has no other user."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if not is_tensor(user):
        return None
    outs = tuple(reader.bounds.symbol(f"o{n}", size) for n, size in enumerate(shape_of(user)))
    step = index_map(user, outs, reader.bounds)
    return user if step is not None and step[0] is node else None

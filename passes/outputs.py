"""Where do the probabilities meet the values, and which node is then the output?

The probabilities are followed through layout ops to their product with the values; the output's axes are expressed in the axes of
the scores, and the values are found like any operand. A factor on the output that stands for sinks (`gates`) belongs to the site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import sympy
from torch import fx

from compile_attn.kernels.expr import B, H, I, J
from compile_attn.passes.anchors import Anchor
from compile_attn.passes.axes import Axis, Frame, Rows, splits
from compile_attn.passes.contractions import depth, factors
from compile_attn.passes.gates import factors as gate_factors
from compile_attn.passes.gates import sink_of
from compile_attn.passes.graph import is_tensor
from compile_attn.passes.heads import Found, Operand, Roles, find_operand, head_symbol_values
from compile_attn.passes.indices import Index, index_map, path, shape_of
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.terms import Unreadable, unreadable

_LAYOUT = "let the values and the output have the heads and tokens of the scores, in their order"


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

    def values(self, anchor: Anchor, frame: Frame, rows: Rows, score: sympy.Expr) -> Output:
        """The product with the values; or, where a factor on it stands for sinks, the node with that factor.

        `score`: its product left as it is, its axes in b, h, i, j.
        """
        product, side = anchor.value_product(self.reader.bounds)
        end = anchor.finish or product
        found = self._values_in_any_frame(anchor, frame, rows, product, side, end)
        output: fx.Node | None = end
        while output is not None:
            gates = list(gate_factors(output))
            try:
                here = self._values_in_any_frame(anchor, frame, rows, product, side, output) if gates else found
            except Unreadable:
                break
            for gate in gates:
                if (sink := sink_of(gate, here.index, here.back, score, rows.keys, self.reader)) is not None:
                    return replace(here, operand=replace(here.operand, node=gate.product), sink=sink)
            output = _onward(output, self.reader)
        return found

    def _values_in_any_frame(
        self, anchor: Anchor, frame: Frame, rows: Rows, product: fx.Node, side: int, output: fx.Node
    ) -> Output:
        first: Unreadable | None = None
        for index, axes in splits("o", shape_of(output), rows.queries, self.reader.bounds):
            try:
                return self._values_at(anchor, frame, rows, product, side, output, index, axes)
            except Unreadable as stop:
                first = first or stop
        assert first is not None
        raise first

    def _values_at(
        self,
        anchor: Anchor,
        frame: Frame,
        rows: Rows,
        node: fx.Node,
        side: int,
        output: fx.Node,
        out_index: Index,
        axes: tuple[tuple[Axis, ...], ...],
    ) -> Output:
        outs = tuple(axis.symbol for parts in axes for axis in parts)
        index = dict(path(output, out_index, self.reader.bounds))[anchor.finish or node]
        length = depth(node)
        inner = self.reader.bounds.symbol("c", length)
        weights, value = factors(node, index, inner)[:: 1 if side == 0 else -1]
        steps = path(weights.node, weights.index, self.reader.bounds)
        place = next((at for step, at in steps if step is anchor.probabilities), None)
        if place is None:
            why = "the probabilities do not reach their product with the values by layout ops alone"
            raise unreadable(node, why, "multiply the softmax by the values directly")
        if place[anchor.dim] != inner + anchor.offset:
            why = "the softmax runs over another axis than the one that is contracted with the values"
            raise unreadable(node, why, "out = softmax(scores, -1) @ v")
        if length != rows.keys:
            why = f"{rows.keys} keys are normalised, but {length} of them meet a value"
            raise unreadable(node, why, "contract all of the probabilities with the values")
        back = self._invert(anchor, frame, rows, place, outs, node)
        value_index = tuple(sympy.expand(p.xreplace({**back, inner: J})) for p in value.index)
        column, size = value.own, self.reader.bounds.size(value.own)
        if column not in outs and column != 0:
            raise unreadable(node, f"the channels of the output are {column}, not one axis", _LAYOUT)
        roles = Roles(J, column, rows.batch, rows.keys, size, rows.heads)
        found = find_operand(value.node, value_index, roles, self.reader.bounds, scaled=False)
        if found is None:
            why = f"the values of this product are not laid out as heads, tokens and channels: {value_index}"
            raise unreadable(node, why, _LAYOUT)
        letters = tuple("".join(self._letter(axis.symbol, back, column) for axis in parts) for parts in axes)
        heads = tuple(math.prod(int(a.size) for a in parts if self._letter(a.symbol, back, column) == "h") for parts in axes)
        return Output(Operand(output, letters, heads), found, size, back, out_index)

    def _invert(
        self, anchor: Anchor, frame: Frame, rows: Rows, place: Index, outs: Index, node: fx.Node
    ) -> dict[sympy.Expr, sympy.Expr]:
        """Each axis symbol of the output in b, h, i: guessed by its size, then proven against the axes of the scores."""
        pairs = enumerate(zip(place, frame.index, strict=True))
        merged = [(got, axis) for dim, (got, axis) in pairs if dim != anchor.dim and axis != 0]
        back = {got: rows.values[axis] for got, axis in merged if got in outs and axis in rows.values}
        used = {symbol for got, _ in merged for symbol in got.free_symbols}
        heads: dict[sympy.Expr, int] = {}
        for symbol in outs:
            size = self.reader.bounds.size(symbol)
            if symbol in used and symbol not in back and size == rows.queries and I not in back.values():
                back[symbol] = I
            elif symbol in used and back.get(symbol, H).free_symbols <= {H}:
                if not size.is_Integer:
                    raise unreadable(node, f"an axis of {size} elements of the output mixes heads and tokens", _LAYOUT)
                heads[symbol] = int(size)
        back.update(head_symbol_values(heads))  # slowest first: the order in which the fused op gives them
        for got, axis in merged:
            have, want = got.xreplace(back), axis.xreplace(rows.values)
            if not same_for_heads(want, have, rows.heads):
                raise unreadable(node, f"an axis of the output holds {axis} of the scores in another order", _LAYOUT)
        return back

    def _letter(self, symbol: sympy.Expr, back: dict[sympy.Expr, sympy.Expr], column: sympy.Expr) -> str:
        if symbol == 0:
            return "1"
        if symbol == column:
            return "d"
        means = back.get(symbol, H)
        return {I: "t", B: "b"}.get(means, "h")


def same_for_heads(a: sympy.Expr, b: sympy.Expr, heads: int) -> bool:
    """Whether two functions of b, h, i are equal for every head."""
    if sympy.expand(a - b) == 0:
        return True
    return all(sympy.expand((a - b).subs(H, head)) == 0 for head in range(heads))


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

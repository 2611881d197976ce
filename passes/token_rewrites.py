"""How does a proven graph become one that reads the batch?

Row numbers become positions, tables cut to the sequence are indexed by position, the last token becomes the last of each
sequence, and shapes that said 1 for it say R.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode  # stable in practice: what torch.export's own users import

from compile_attn.passes import emit
from compile_attn.passes.graph import is_tensor, location, val
from compile_attn.passes.report import TokenRewrite
from compile_attn.passes.token_context import Context, names, op_key
from compile_attn.passes.token_values import LAST, Axis, Index, Iota, Row, Tok, is_one, row_axis

_aten = torch.ops.aten
_SHAPED = frozenset(
    f"aten::{name}"
    for name in names("view reshape _unsafe_view flatten unflatten squeeze view_copy squeeze_copy select select_copy")
)
_SIZED = frozenset(("aten::expand", "aten::broadcast_to", "aten::expand_copy"))
_CUTS = frozenset(("aten::slice", "aten::narrow", "aten::slice_copy"))


@dataclass
class Rewriter:
    """Applies what the rules have noted. `positions` [T] and `rows` [R] stand ahead of everything that they replace."""

    context: Context
    graph: fx.Graph
    positions: fx.Node
    rows: fx.Node
    mode: FakeTensorMode
    done: list[TokenRewrite] = field(default_factory=list)
    selections: list[fx.Node] = field(default_factory=list)  # index_select nodes that keep R of T rows
    _as_positions: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _as_rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    ranks: dict[fx.Node, int] = field(default_factory=dict)
    _offsets: dict[tuple[float, float], fx.Node] = field(default_factory=dict)

    def apply(self) -> None:
        """All rewrites but the rows of the output."""
        self.context.values[self.positions] = Tok(0)
        captured = list(self.graph.nodes)
        live = {node for node in captured if node.users}
        self.ranks.update((node, node.meta["val"].dim()) for node in captured if is_tensor(node))
        for user, arg in sorted(self.context.as_rows, key=_by_name):
            if user.users or user.op == "output":
                user.replace_input_with(arg, self._row_numbers(arg))
        for user, arg in sorted(self.context.as_positions, key=_by_name):
            if user.users or user.op == "output":
                user.replace_input_with(arg, self._position_values(arg))
        for node, (dim, offset) in self.context.tables.items():
            self._cut_table(node, dim, offset)
        for node, dim in self.context.lasts.items():
            self._last_token(node, dim)
        for node in captured:
            value = self.context.values.get(node)
            if isinstance(value, Tok) and value.axis.space is LAST and node not in self.context.lasts:
                self._one_row_a_sequence(node, value)
        self.erase_dead(live)
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in self.context.values:
                self.context.values[node] = self.context.value_of(node)

    def _first(self) -> fx.Node:
        """The first node behind all inputs, positions and rows."""
        nodes = list(self.graph.nodes)
        ahead = max(nodes.index(self.positions), nodes.index(self.rows))
        first: fx.Node = next(node for node in nodes[ahead + 1 :] if node.op != "placeholder")
        return first

    def erase_dead(self, live: set[fx.Node]) -> None:
        """Erase nodes that had users and have lost them all."""
        for node in reversed(list(self.graph.nodes)):
            if node in live and not node.users and node.op == "call_function" and not node.is_impure():
                self.graph.erase_node(node)

    def note(self, kind: str, node: fx.Node, detail: str) -> None:
        self.done.append(TokenRewrite(kind, location(node), detail))

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        """Put a new node in the place of an old one; the old one's value is the new one's."""
        self.ranks[new] = val(node).dim()
        self.context.values[new] = self.context.values[node]
        node.replace_all_uses_with(new)

    def position_plus(self, offset: float, step: float = 1) -> fx.Node:
        """start + step * position of each packed token, [T]."""
        key = (offset, step)
        if key not in self._offsets:
            node = self.positions
            with self.graph.inserting_before(self._first()):
                if step != 1:
                    node = emit.call(self.graph, _aten.mul.Tensor, node, step)
                if offset != 0:
                    node = emit.call(self.graph, _aten.add.Tensor, node, offset)
            self.context.values[node] = Tok(0)
            self._offsets[key] = node
        return self._offsets[key]

    def _position_values(self, node: fx.Node) -> fx.Node:
        """The node with batch positions where it has row numbers."""
        if node in self.context.position_inputs:
            return node
        if node not in self._as_positions:
            value = self.context.values[node]
            source = self._source(node)
            if source is None:
                assert isinstance(value, Iota)
                new = self._fresh_positions(node, value)
                what = f"{node} counted tokens" + (f" from {value.start:g}" if value.start else "")
                self.note("positions", node, f"{what}; it reads the batch's positions now")
            else:
                new = self._clone(node, source, self._position_values(source))
            assert isinstance(value, Row)
            self.context.values[new] = Tok(value.dim, row_axis(value))
            self._as_positions[node] = new
        return self._as_positions[node]

    def _fresh_positions(self, node: fx.Node, value: Iota) -> fx.Node:
        """What an arange over tokens, or a running sum of ones, becomes."""
        new = self.position_plus(value.start, value.step)
        with self.graph.inserting_before(node):
            if val(new).dtype != val(node).dtype:
                new = emit.call(self.graph, _aten.to.dtype, new, val(node).dtype, like=node)
            return self._spread(new, node, value.dim)

    def _spread(self, vector: fx.Node, like: fx.Node, dim: int) -> fx.Node:
        """[T] in the shape of `like`, along this dim of it."""
        rank = val(like).dim()
        for place in range(rank):
            if place != dim:
                vector = emit.call(self.graph, _aten.unsqueeze.default, vector, place, like=like)
        if any(place != dim and not is_one(size) for place, size in enumerate(val(like).shape)):
            shape = [-1 if place == dim else int(size) for place, size in enumerate(val(like).shape)]
            vector = emit.call(self.graph, _aten.expand.default, vector, shape, like=like)
        return vector

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The input from which a node has its row numbers; None where they begin."""
        if op_key(node) in ("aten::arange", "aten::cumsum"):
            return None
        found = [arg for arg in node.all_input_nodes if isinstance(self.context.of(arg), (Iota, Index))]
        return found[0] if found else None

    def _clone(self, node: fx.Node, source: fx.Node, new: fx.Node) -> fx.Node:
        if new is source:
            return node
        with self.graph.inserting_before(node):
            return self.graph.node_copy(node, lambda arg: new if arg is source else arg)

    def _row_numbers(self, node: fx.Node) -> fx.Node:
        """The node with row numbers of the packed batch where it was made of given positions."""
        if node in self._as_rows:
            return self._as_rows[node]
        source = self._source(node) if node.op == "call_function" else None
        if node in self.context.position_inputs:
            with self.graph.inserting_before(self._first()):
                length = emit.size(self.graph, self.positions, 0)
                rows = self.graph.call_function(_aten.arange.default, (length,), {"device": val(self.positions).device})
                remake(rows, self.mode)
                new = self._spread(rows, node, 1)
            self.context.values[new] = self.context.values[node]
        elif source is None or not self._begins_at_positions(node):
            new = node
        else:
            new = self._clone(node, source, self._row_numbers(source))
            self.context.values[new] = self.context.values[node]
        self._as_rows[node] = new
        return new

    def _begins_at_positions(self, node: fx.Node | None) -> bool:
        while node is not None and node.op == "call_function" and isinstance(self.context.of(node), (Iota, Index)):
            if op_key(node) in ("aten::sort", "aten::argsort", "aten::index_put", "aten::scatter"):
                return False
            node = self._source(node)
        return node in self.context.position_inputs

    def _cut_table(self, node: fx.Node, dim: int, offset: int) -> None:
        table: Any = node.args[0]
        index = self.position_plus(offset)
        with self.graph.inserting_before(node):
            new = emit.call(self.graph, _aten.index_select.default, table, dim, index, like=node)
        self.replace(node, new)
        self.note("table", node, f"{table}[{offset}:T] on dim {dim} is indexed by the batch's positions now")

    def _last_token(self, node: fx.Node, dim: int) -> None:
        value = self.context.values[node]
        assert isinstance(value, Tok)
        x: Any = node.args[0]
        with self.graph.inserting_before(node):
            selected = emit.call(self.graph, _aten.index_select.default, x, dim, self.rows, like=node)
            self.context.values[selected] = Tok(dim, Axis(LAST))
            self.selections.append(selected)
            kept = val(x).dim() == val(node).dim() and value.dim == dim
            new = selected if kept else self._reshape(selected, node, value)
        self.replace(node, new)
        self.note("last_token", node, "the last token is the last of each sequence now, by logits_rows")

    def _reshape(self, x: fx.Node, like: fx.Node, value: Tok) -> fx.Node:
        """x in the shape of `like`, with one row a sequence on the dim that the value says."""
        shape: list[Any] = [int(size) for size in val(like).shape]
        rows = emit.size(self.graph, self.rows, 0)
        factor = value.axis.pre * value.axis.post
        shape[value.dim] = emit.product(self.graph, [rows, factor] if factor != 1 else [rows])
        new = self.graph.call_function(_aten.reshape.default, (x, shape))
        new.meta = {key: item for key, item in like.meta.items() if key != "val"}  # which says 1 where it will be R
        return new

    def _one_row_a_sequence(self, node: fx.Node, value: Tok) -> None:
        """Ops that name sizes named 1 for the last token."""
        key = op_key(node)
        source: Any = node.args[0] if node.args else None
        had = self.context.of(source)
        if not isinstance(had, Tok) or had.axis.space is not LAST:
            return
        rank = self.ranks[source]
        if key in _SHAPED:
            if key.startswith("aten::select") and node.args[1] % rank != had.dim:  # type: ignore[operator]
                return
            with self.graph.inserting_before(node):
                self.replace(node, self._reshape(source, node, value))
        elif key in _SIZED:
            sizes = list(node.args[1])  # type: ignore[arg-type]
            sizes[value.dim] = -1
            node.update_arg(1, sizes)
        elif key in _CUTS and (node.args[1] if len(node.args) > 1 else 0) % rank == had.dim:  # type: ignore[operator]
            node.replace_all_uses_with(source)


def remake(node: fx.Node, mode: FakeTensorMode) -> None:
    """Make `val` anew from the inputs' values."""
    with torch.no_grad(), mode:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


def _by_name(pair: tuple[fx.Node, fx.Node]) -> tuple[str, str]:
    return pair[0].name, pair[1].name

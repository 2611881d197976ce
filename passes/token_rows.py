"""Which part of the program may run on the selected rows alone?

A selection of R of T rows is moved up, ahead of every op whose result is used by selected rows only. The proof says that each
token is computed by itself, so running that part of the program on R tokens gives those R rows: sizes of T become sizes of R.
It stops at attention, and where a value is used by tokens that are not selected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from compile_attn.passes import emit
from compile_attn.passes.token_context import Context, op_key
from compile_attn.passes.token_values import TOKENS, Axis, Free, Iota, Size, Tok

_aten = torch.ops.aten


@dataclass
class Mover:
    """Moves the given selections (index_select nodes by `rows`) up as far as they go."""

    context: Context
    graph: fx.Graph
    rows: fx.Node
    selections: list[fx.Node]
    _selected: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def move(self) -> int:
        """Returns how many nodes run on selected rows now."""
        moved = self._movable()
        if not moved:
            return 0
        for node in [node for node in self.graph.nodes if node in moved]:
            for arg in list(node.all_input_nodes):
                node.replace_input_with(arg, self._on_rows(node, arg, moved))
        for selection in self.selections:
            source: Any = selection.args[0]
            if source in moved:
                selection.replace_all_uses_with(source)
                self.graph.erase_node(selection)
        for node in self.graph.nodes:
            if node in moved:
                emit.revalue(node, self.rows)  # it said T
        return len(moved)

    def _movable(self) -> set[fx.Node]:
        """The largest set of nodes used by itself and the selections only, whose other inputs can be selected."""
        ends = set(self.selections)
        moved: set[fx.Node] = set()
        for node in reversed(list(self.graph.nodes)):
            if self._may_move(node) and all(user in moved or user in ends for user in node.users):
                moved.add(node)
        while True:
            stuck = {node for node in moved if not all(arg in moved or self._can_cut(arg) for arg in node.all_input_nodes)}
            stuck |= {node for node in moved if not all(user in moved or user in ends for user in node.users)}
            if not stuck:
                return moved
            moved -= stuck

    def _may_move(self, node: fx.Node) -> bool:
        fixed = node.op != "call_function" or not node.users or node in self.selections
        if fixed or op_key(node).startswith("paged_attn::"):
            return False
        value = self.context.values.get(node)
        return value is not None and not isinstance(value, Free)

    def _can_cut(self, node: fx.Node) -> bool:
        """Whether the rows of an input can be selected, or the input made anew for R rows."""
        value = self.context.values.get(node)
        if isinstance(value, Size):
            return not value.on_tokens or self.context.sizes.count(node.meta["val"]) is not None
        if isinstance(value, Tok):
            return value.axis == Axis(TOKENS)
        return isinstance(value, Free) or self._is_count(node)

    def _is_count(self, node: fx.Node) -> bool:
        """An arange over tokens, read as row numbers."""
        return isinstance(self.context.of(node), Iota) and op_key(node) == "aten::arange"

    def _on_rows(self, user: fx.Node, arg: fx.Node, moved: set[fx.Node]) -> fx.Node:
        value = self.context.of(arg)
        if arg in moved or isinstance(value, Free) or (isinstance(value, Size) and not value.on_tokens):
            return arg
        if arg not in self._selected:
            with self.graph.inserting_before(user):
                self._selected[arg] = self._select(user, arg)
        return self._selected[arg]

    def _select(self, user: fx.Node, arg: fx.Node) -> fx.Node:
        value = self.context.of(arg)
        if isinstance(value, Size):
            count = self.context.sizes.count(arg.meta["val"])
            assert count is not None
            size = emit.product(self.graph, [emit.size(self.graph, self.rows, 0), count])
            assert isinstance(size, fx.Node)
            return size
        if self._is_count(arg):
            made = self.graph.node_copy(arg, lambda size: self._on_rows(user, size, set()))
            emit.revalue(made, self.rows)
            return made
        assert isinstance(value, Tok)
        return emit.call(self.graph, _aten.index_select.default, arg, value.dim, self.rows, like=user)

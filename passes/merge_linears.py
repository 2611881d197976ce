"""Which linears read the same tensor, and how do they become one?

q, k and v; gate and up: one product with the joined weights, and slices of what it gives. The weights of a model are inputs of
its graph. The joined ones are new inputs, which `weights.join` makes when the graph has been rewritten.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from compile_attn.passes import emit
from compile_attn.passes.alike import join_alike
from compile_attn.passes.graph import Location, add_placeholder, location, placeholders, val
from compile_attn.passes.linears import Linear, Numbering, linears, seen_as_complex, stride_bound, transposed
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.report import LinearMerge, counted
from compile_attn.passes.weights import one_block, unmovable

_aten = torch.ops.aten


@dataclass
class Merged:
    """What was done: an entry a group, and one for each linear that stays apart from the others of its tensor.

    `joined`: for each new last input of the graph, the places of the inputs that it joins, in order.
    """

    entries: list[LinearMerge] = field(default_factory=list)
    joined: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """One weight of a group: its linears (more than one where a model applies it twice) and its bias."""

    weight: fx.Node
    bias: fx.Node | None
    uses: tuple[Linear, ...]

    @property
    def width(self) -> int:
        return int(val(self.weight).shape[0])


def merge_linears(normalized: Normalized) -> Merged:
    """Merge what can be proven to be the same, in place."""
    graph = normalized.module.graph
    merger = _Merger(graph, normalized.constants, normalized.sources)
    for group in _readers_of_one_tensor(graph, normalized.constants):
        merger.take(group)
    merger.merge()
    return merger.merged


def _readers_of_one_tensor(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor]) -> list[list[Linear]]:
    """Linears of different weights that read equal values, in the order of the graph."""
    numbering = Numbering(graph)
    groups: dict[int, list[Linear]] = {}
    for linear in linears(graph, constants):
        groups.setdefault(numbering.of(linear.source), []).append(linear)
    return [group for group in groups.values() if len({linear.weight for linear in group}) > 1]


class _Merger:
    """Groups are collected first: a weight that two of them use otherwise belongs to neither."""

    def __init__(self, graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor], sources: Mapping[fx.Node, str]) -> None:
        self.merged = Merged()
        self._graph, self._constants, self._sources = graph, constants, sources
        self._groups: list[list[_Row]] = []
        self._places = {node: place for place, node in enumerate(placeholders(graph))}
        self._inputs: dict[tuple[fx.Node, ...], fx.Node] = {}
        self._ranks: dict[frozenset[fx.Node], dict[fx.Node, int]] = {}  # of the weights of a group

    def take(self, linears_of_one: list[Linear]) -> None:
        """Find what may be merged of the linears of one tensor."""
        rows = []
        for row in (every := _rows(linears_of_one)):
            why = self._alone(row, every)
            if why is None:
                rows.append(row)
            else:
                self._apart(row, why)
        kinds: dict[tuple[object, ...], list[_Row]] = {}
        for row in rows:
            weight = val(row.weight)
            kinds.setdefault((weight.dtype, weight.device, row.bias is None), []).append(row)
        for kind, alike in kinds.items():
            if len(alike) > 1:
                self._groups.append(alike)
            elif len(rows) > 1:
                dtype, device, plain = kind
                self._apart(alike[0], f"is the only one of {dtype} on {device} {'without' if plain else 'with'} a bias")

    def merge(self) -> None:
        """Rewrite the groups."""
        self._numbers = Numbering(self._graph)
        for group in self._groups:
            rows = self._movable(self._used_alike(group))
            if len(rows) > 1:
                self._replace(rows)
        if self.merged.joined:
            self._graph.eliminate_dead_code()

    def _alone(self, row: _Row, every: list[_Row]) -> str | None:
        """Why this weight belongs to no group."""
        if row.uses[0].odd is not None:
            return row.uses[0].odd
        if sum(row.weight is other.weight for other in every) > 1:
            return "is used with more than one bias"
        if row.bias is not None and sum(row.bias is other.bias for other in every) > 1:
            return "shares its bias with another"
        if row.width % 2 and any(seen_as_complex(use.node) for other in every for use in other.uses):
            return f"has {row.width} outputs, and others are viewed as complex numbers, which need even strides"
        return next(filter(None, (stride_bound(use.node) for use in row.uses)), None)

    def _used_alike(self, group: list[_Row]) -> list[_Row]:
        """The rows whose weight and bias have no other user in the graph than groups of the same weights."""
        whole = {row.weight for row in group}
        alike = [rows for rows in self._groups if {row.weight for row in rows} == whole]
        ours = {use.node for rows in alike for row in rows for use in row.uses}
        kept = []
        for row in group:
            users = [user for tensor in (row.weight, row.bias) if tensor is not None for user in _final_users(tensor)]
            other = next((user for user in users if user not in ours), None)
            if other is None:
                kept.append(row)
            else:
                self._apart(row, f"is used by {other.name} as well")
        return kept

    def _movable(self, rows: list[_Row]) -> list[_Row]:
        """The rows whose real tensors are one block already, or may become one; in the order of that block."""
        if len(rows) < 2:
            return rows
        order = one_block([self._constants[row.weight] for row in rows])
        if order is not None:
            rows = [rows[place] for place in order]
        biases = [self._constants[row.bias] for row in rows if row.bias is not None]
        fixed_biases = bool(biases) and one_block(biases) != list(range(len(biases)))
        kept = []
        for row in rows:
            why = unmovable(self._constants[row.weight]) if order is None else None
            if why is None and fixed_biases and row.bias is not None:
                why = unmovable(self._constants[row.bias])
                why = why and f"has a bias that {why}"
            if why is None:
                kept.append(row)
            else:
                self._apart(row, why)
        return kept if len(kept) == len(rows) else self._movable(kept)

    def _replace(self, rows: list[_Row]) -> None:
        """One linear in place of the first, and slices of it in place of all. The same weights always stand in the same order."""
        ranks = self._ranks.setdefault(frozenset(row.weight for row in rows), {row.weight: at for at, row in enumerate(rows)})
        rows = sorted(rows, key=lambda row: ranks[row.weight])
        order = {node: place for place, node in enumerate(self._graph.nodes)}
        uses = sorted((use for row in rows for use in row.uses), key=lambda use: order[use.node])
        first = uses[0]
        weight = self._input("weight", tuple(row.weight for row in rows))
        bias = self._input("bias", tuple(row.bias for row in rows if row.bias is not None)) if rows[0].bias is not None else None
        with self._graph.inserting_before(first.node):
            whole = emit.call(self._graph, _aten.linear.default, first.source, weight, bias, like=first.node)
            widths = [row.width for row in rows]
            parts = emit.call(self._graph, _aten.split_with_sizes.default, whole, widths, -1, like=first.node)
            slices = [emit.call(self._graph, operator.getitem, parts, at, like=first.node) for at in range(len(rows))]
        for row, part in zip(rows, slices, strict=True):
            for use in row.uses:
                use.node.replace_all_uses_with(part)
                self._graph.erase_node(use.node)
        saved = join_alike(self._graph, self._numbers, whole, slices)
        names = self._names([row.weight for row in rows])
        detail = f"{', '.join(names)}: one product of {' + '.join(map(str, widths))} columns"
        detail += f", and {counted(saved, 'op')} on its slices done once" if saved else ""
        self.merged.entries.append(LinearMerge("merged", self._where(rows, first.node), detail))

    def _input(self, kind: str, parts: tuple[fx.Node, ...]) -> fx.Node:
        """The input that joins these; one for every group of the same weights."""
        if parts not in self._inputs:
            rows = sum(int(val(part).shape[0]) for part in parts)
            example = val(parts[0]).new_empty((rows, *val(parts[0]).shape[1:]))
            self._inputs[parts] = add_placeholder(self._graph, f"joined_{kind}_{len(self._inputs)}", example)
            self.merged.joined.append(tuple(self._places[part] for part in parts))
        return self._inputs[parts]

    def _apart(self, row: _Row, why: str) -> None:
        [name] = self._names([row.weight])
        self.merged.entries.append(LinearMerge("apart", self._where([row], row.uses[0].node), f"{name} {why}"))

    def _names(self, weights: list[fx.Node]) -> list[str]:
        """The user's names, without what they begin with alike up to a dot."""
        names = [self._sources.get(weight, weight.name) for weight in weights]
        prefix = self._prefix(weights)
        return [name.removeprefix(prefix + ".") if prefix else name for name in names]

    def _prefix(self, weights: list[fx.Node]) -> str:
        paths = [self._sources.get(weight, weight.name).split(".")[:-2] for weight in weights]
        common = 0
        while all(len(path) > common for path in paths) and len({path[common] for path in paths}) == 1:
            common += 1
        return ".".join(paths[0][:common])

    def _where(self, rows: list[_Row], node: fx.Node) -> Location:
        here = location(node)
        return Location(here.node, self._prefix([row.weight for row in rows]) or here.module, here.source)


def _rows(group: list[Linear]) -> list[_Row]:
    """The linears by weight. A weight with two biases is two rows in name only: both stay apart."""
    found: dict[tuple[fx.Node, fx.Node | None], list[Linear]] = {}
    for linear in group:
        found.setdefault((linear.weight, linear.bias), []).append(linear)
    return [_Row(weight, bias, tuple(uses)) for (weight, bias), uses in found.items()]


def _final_users(tensor: fx.Node) -> list[fx.Node]:
    """Who uses this tensor, a transposition of it counting as itself."""
    return [last for user in tensor.users for last in (_final_users(user) if transposed(user) is tensor else [user])]

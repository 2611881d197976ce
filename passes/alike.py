"""Which ops are done alike to two neighbouring slices of one tensor, and so can be done once?

Queries and keys that come from one product are both rotated, by the same angles. Both are followed in step, op by op; as far as
they go together, one op on the two slices as one tensor takes the place of two.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.passes import emit
from compile_attn.passes.graph import is_tensor, same_size, val
from compile_attn.passes.linears import Numbering, is_view

_aten = torch.ops.aten
_POINTWISE = {_aten._to_copy.default}  # not tagged so
_LISTS = {_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int}


@dataclass
class _Twin:
    """Two nodes that are one tensor's neighbours along `dim`, or tuples of such; `whole` is that tensor once it is made."""

    first: fx.Node
    second: fx.Node
    dim: int
    whole: fx.Node | None = None


def join_alike(graph: fx.Graph, numbers: Numbering, whole: fx.Node, parts: Sequence[fx.Node]) -> int:
    """Join what is done alike to two neighbours among these slices of the last dim of `whole`; how many ops were saved."""
    begin = 0
    for one, two in itertools.pairwise(parts):
        length = int(val(one).shape[-1])
        walk = _Walk(graph, numbers, one, two)
        if walk.saved:
            with graph.inserting_after(parts[-1]):
                end = begin + length + int(val(two).shape[-1])
                walk.rewrite(emit.call(graph, _aten.slice.Tensor, whole, -1, begin, end, like=one))
            return walk.saved
        begin += length
    return 0


class _Walk:
    """Both chains, in step."""

    def __init__(self, graph: fx.Graph, numbers: Numbering, first: fx.Node, second: fx.Node) -> None:
        self._graph, self._numbers = graph, numbers
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._twins = {first: _Twin(first, second, val(first).dim() - 1)}
        self._taken = {second}
        todo = [(self._order[user], user) for user in first.users]
        while todo:  # in order, so that a node comes after all that it reads
            _, node = heapq.heappop(todo)
            twin = None if node in self._twins else self._twin_of(node)
            if twin is not None:
                self._twins[node] = twin
                self._taken.add(twin.second)
                for user in node.users:
                    heapq.heappush(todo, (self._order[user], user))
        self.saved = sum(_pointwise(node) for node in self._twins) if self._pays() else 0

    def _twin_of(self, node: fx.Node) -> _Twin | None:
        """The node that does the same to the partner of what this one reads."""
        read = next(source for source in node.all_input_nodes if source in self._twins)
        for other in self._twins[read].second.users:
            if other.target is node.target and other not in self._taken and other is not node:
                dim = self._dim_after(node, other) if self._same_arguments(node, other) else None
                if dim is not None:
                    return _Twin(node, other, dim)
        return None

    def _same_arguments(self, node: fx.Node, other: fx.Node) -> bool:
        one, two = (self._flat(each) for each in (node, other))
        if len(one) != len(two):
            return False
        free = 1 if node.target is _aten.reshape.default else len(one)  # the sizes of a reshape are looked at by themselves
        for a, b in zip(one[:free], two[:free], strict=True):
            if isinstance(a, fx.Node) and a in self._twins:
                if self._twins[a].second is not b:
                    return False
            elif not self._equal(a, b):
                return False
        return True

    def _flat(self, node: fx.Node) -> list[Any]:
        return torch.utils._pytree.tree_leaves([list(node.args), dict(node.kwargs)], is_leaf=lambda leaf: leaf is None)

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return a is b or self._numbers.equal(a, b)
        return type(a) is type(b) and bool(a == b)

    def _dim_after(self, node: fx.Node, other: fx.Node) -> int | None:
        """Along which dim the results are neighbours; None where they are not, or it is not known."""
        target, twins = node.target, [self._twins[source] for source in node.all_input_nodes if source in self._twins]
        dims = {twin.dim for twin in twins}
        if _pointwise(node):
            return self._broadcast(node)
        if len(dims) != 1:
            return None
        [dim] = dims
        if target is operator.getitem:
            return dim
        rank = val(twins[0].first).dim() if is_tensor(twins[0].first) else 0
        if target is _aten.reshape.default:
            return self._reshaped(node, other, dim)
        if target is _aten.transpose.int:
            dims_given: Any = node.args[1:]
            i, j = (given % rank for given in dims_given)
            return int({i: j, j: i}.get(dim, dim))
        if target in (_aten.slice.Tensor, _aten.select.int, *_LISTS, _aten.cat.default):
            return self._along(node, dim, rank, len(twins))
        return None

    def _along(self, node: fx.Node, dim: int, rank: int, twins: int) -> int | None:
        """Ops along one dim, which must be another."""
        place = 2 if node.target in _LISTS and node.target is not _aten.unbind.int else 1
        along: Any = node.args[place] if len(node.args) > place else 0
        along %= rank
        if along == dim or (node.target is _aten.cat.default and len(node.all_input_nodes) != twins):
            return None
        drops = node.target in (_aten.select.int, _aten.unbind.int) and along < dim
        return dim - 1 if drops else dim

    def _broadcast(self, node: fx.Node) -> int | None:
        """Pointwise: every operand is a twin along the same dim of the result, or has one element there."""
        if not is_tensor(node):
            return None
        rank, found = val(node).dim(), set()
        for source in node.all_input_nodes:
            if source in self._twins:
                found.add(self._twins[source].dim + rank - val(source).dim())
        for source in node.all_input_nodes:
            if source not in self._twins and is_tensor(source):
                place = min(found) - rank + val(source).dim()
                if place >= 0 and not same_size(val(source).shape[place], 1):
                    return None
        return found.pop() if len(found) == 1 else None

    def _reshaped(self, node: fx.Node, other: fx.Node, dim: int) -> int | None:
        """Channels, the last dim, become heads of equal channels; all else stays."""
        [twin] = [self._twins[source] for source in node.all_input_nodes if source in self._twins]
        before, one, two = val(twin.first).shape, val(node).shape, val(other).shape
        whole = all(isinstance(size, int) for size in (*one[dim:], *two[dim:], before[dim]))
        if dim != len(before) - 1 or len(one) != len(two) or len(one) < len(before) or not whole:
            return None
        same = all(same_size(a, b) for a, b in zip((*one[:dim], *one[dim + 1 :]), (*two[:dim], *two[dim + 1 :]), strict=True))
        kept = all(same_size(a, b) for a, b in zip(before[:dim], one[:dim], strict=True))
        return dim if same and kept and _product(one[dim:]) == before[dim] else None

    def _pays(self) -> bool:
        """Whether all that reads them from outside stands behind both twins, and is no op that a compiler would fuse with them."""
        inside = {*self._twins, *self._taken}
        for twin in list(self._twins.values())[1:]:
            end = max(self._order[twin.first], self._order[twin.second])
            for node in (twin.first, twin.second):
                for user in set(node.users) - inside:
                    if self._order[user] < end or not _ends(user):
                        return False
        return True

    def rewrite(self, whole: fx.Node) -> None:
        """Make the joined ops, and give everybody else slices of what they make."""
        root, *rest = self._twins.values()
        root.whole = whole
        for twin in rest:
            late = max(twin.first, twin.second, key=self._order.__getitem__)
            with self._graph.inserting_after(late):
                twin.whole = self._joined(twin)
        inside = {*self._twins, *self._taken}
        for twin in rest:
            self._hand_out(twin, inside)

    def _joined(self, twin: _Twin) -> fx.Node:
        node = twin.first
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), lambda source: self._twins[source].whole if source in self._twins else source
        )
        if node.target is _aten.reshape.default:
            shape: list[Any] = list(args[1])  # type: ignore[arg-type]
            shape[twin.dim] = int(val(node).shape[twin.dim]) + int(val(twin.second).shape[twin.dim])
            args = (args[0], shape)
        return emit.call(self._graph, node.target, *args, like=node, **kwargs)

    def _hand_out(self, twin: _Twin, inside: set[fx.Node]) -> None:
        """Slices for those who read one of the two. `once`: a compiler would compute the whole for each slice by itself."""
        readers = [[user for user in node.users if user not in inside] for node in (twin.first, twin.second)]
        if not any(readers):
            return
        assert twin.whole is not None
        lengths = [int(val(node).shape[twin.dim]) for node in (twin.first, twin.second)]
        with self._graph.inserting_after(twin.whole):
            whole = emit.call(self._graph, torch.ops.paged_attn.once.default, twin.whole, like=twin.first)
        for node, begin, end, users in zip(
            (twin.first, twin.second), (0, lengths[0]), (lengths[0], sum(lengths)), readers, strict=True
        ):
            if users:
                with self._graph.inserting_after(whole):
                    part = emit.call(self._graph, _aten.slice.Tensor, whole, twin.dim, begin, end, like=node)
                for user in users:
                    user.replace_input_with(node, part)


def _ends(user: fx.Node) -> bool:
    """Whether this op is of a kernel of our own, or a view that leads to such only."""
    if isinstance(user.target, torch._ops.OpOverload) and user.target.namespace == "paged_attn":
        return True
    return is_view(user) and all(map(_ends, user.users))


def _pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (torch.Tag.pointwise in target.tags or target in _POINTWISE)


def _product(sizes: Sequence[Any]) -> int:
    result = 1
    for size in sizes:
        result *= int(size)
    return result

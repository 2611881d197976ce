"""What is the same for all layers of a step, and so is computed once?

Rotary angles, say: they depend on positions alone. A compiler that fuses pointwise ops would compute cosines again in every kernel
that reads them, for each layer and head; a `paged_attn::once` node tells it to keep them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import fx

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.passes import emit
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.linears import Numbering, functional, is_view


def compute_once(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor], step: Iterable[fx.Node]) -> int:
    """Keep what follows from these nodes of the step and from constants alone, where it is used more than once; how many."""
    known = _known(graph, constants, frozenset(step))
    _unify(graph, known)
    uses: dict[fx.Node, int] = {}
    for node in known:
        outside = sum(user not in known for user in node.users)
        if outside and is_tensor(node) and val(node).is_floating_point():
            root = _without_views(node, known)
            uses[root] = uses.get(root, 0) + outside
    kept = [root for root, count in uses.items() if count > 1 and root.op == "call_function"]
    for root in kept:
        with graph.inserting_after(root):
            once = emit.call(graph, torch.ops.paged_attn.once.default, root, like=root)
        root.replace_all_uses_with(once, delete_user_cb=partial(operator.is_not, once))
    return len(kept)


def _known(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor], step: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that follow from the step, in order; what follows from constants alone is not among them."""
    fixed, known = set(constants), dict.fromkeys(node for node in graph.nodes if node in step)
    for node in graph.nodes:
        if node in fixed or node in known or not functional(node):
            continue
        if all(source in fixed for source in node.all_input_nodes):
            fixed.add(node)
        elif all(source in fixed or source in known or _is_size(source) for source in node.all_input_nodes):
            known[node] = None
    return known


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _unify(graph: fx.Graph, known: dict[fx.Node, None]) -> None:
    """One node for equal values: what every layer computed for itself."""
    numbering, first = Numbering(graph), dict[int, fx.Node]()
    for node in list(known):
        other = first.setdefault(numbering.of(node), node)
        if other is not node:
            node.replace_all_uses_with(other)
            graph.erase_node(node)
            del known[node]


def _without_views(node: fx.Node, known: dict[fx.Node, None]) -> fx.Node:
    """The tensor of which this node is a view."""
    while is_view(node) and isinstance(node.args[0], fx.Node) and node.args[0] in known and is_tensor(node.args[0]):
        node = node.args[0]
    return node

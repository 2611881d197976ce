"""Do nodes that are added know their shapes, and is nothing added that would do nothing?"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from compile_attn.passes import emit
from compile_attn.passes.graph import placeholders, val
from tests.capture import captured

_aten = torch.ops.aten


class Sigmoid(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()


def _graph() -> tuple[fx.Graph, fx.Node, fx.Node]:
    """A graph that takes x [t, 6], the node of x, and the last node; new nodes go before that."""
    x = torch.ones(5, 6)
    graph = captured(Sigmoid(), x, dynamic=[(x, 0)]).module.graph
    [last] = [node for node in graph.nodes if node.op == "call_function"]
    graph.inserting_before(last)
    return graph, next(node for node in placeholders(graph) if isinstance(node.meta["val"], torch.Tensor)), last


def test_a_call_has_its_value_and_its_place() -> None:
    graph, x, last = _graph()
    node = emit.call(graph, _aten.sum.dim_IntList, x, [1], like=last, dtype=torch.float64)
    assert node.kwargs == {"dtype": torch.float64} and val(node).dtype is torch.float64
    assert val(node).dim() == 1 and isinstance(val(node).shape[0], torch.SymInt), "symbols stay symbols"
    assert node.meta["stack_trace"] == last.meta["stack_trace"]
    assert "stack_trace" not in emit.call(graph, _aten.sin.default, x).meta


def test_sizes() -> None:
    graph, x, _ = _graph()
    length, width = emit.sizes(graph, x, [0, 1])
    assert width == 6 and isinstance(length, fx.Node) and length.target is _aten.sym_size.int
    assert emit.product(graph, []) == 1 and emit.product(graph, [2, 3, 4]) == 24
    assert emit.product(graph, [1, length, 1]) is length
    twice = emit.product(graph, [length, 2])
    assert isinstance(twice, fx.Node) and (twice.target, twice.args) == (operator.mul, (length, 2))


def test_what_changes_nothing_is_not_added() -> None:
    graph, x, last = _graph()
    length = emit.size(graph, x, 0)
    count = len(graph.nodes)
    assert emit.permute(graph, x, [0, 1], last) is x and emit.reshape(graph, x, [length, 6], last) is x
    assert len(graph.nodes) == count
    assert val(emit.permute(graph, x, [1, 0], last)).shape[0] == 6
    assert val(emit.reshape(graph, x, [length, 2, 3], last)).shape[1:] == (2, 3)

"""Is what a rewrite leaves behind removed, and no more?"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from compile_attn.passes.cleanup import cleanup, relax_views

_aten = torch.ops.aten


def test_dead_nodes_go_and_writes_stay() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(_aten.sin.default, (x,))
    graph.call_function(_aten.copy_.default, (x, x))
    graph.output(graph.call_function(_aten.cos.default, (x,)))
    cleanup(graph)
    assert [node.target for node in graph.nodes] == ["x", _aten.copy_.default, _aten.cos.default, "output"]


def test_a_relaxed_view_copies_where_it_must() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(_aten.view.default, (x, [6])))
    module = fx.GraphModule({}, graph)
    crossed: Tensor = torch.arange(6).view(2, 3).T
    try:
        module(crossed)
    except RuntimeError as error:
        assert "view size is not compatible" in str(error)
    else:
        raise AssertionError("this view should not be possible, else the test shows nothing")
    relax_views(graph)
    module.recompile()
    assert module(crossed).tolist() == [0, 3, 1, 4, 2, 5]

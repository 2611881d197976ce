"""Does a node know where in the user's model it came from?"""

from __future__ import annotations

import torch
from torch import fx, nn

from compile_attn.passes.graph import Location, downstream, location, output_node, placeholders
from tests.capture import captured


class Inner(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sigmoid()


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(this, x: torch.Tensor) -> torch.Tensor:  # by another name than self, as some write it
        for layer in this.layers:
            x = layer(x)
        return torch.nn.functional.softplus(x)


def _nodes() -> dict[str, fx.Node]:
    return {node.name: node for node in captured(Outer(), torch.ones(2)).module.graph.nodes}


def test_module_path_and_source_line() -> None:
    nodes = _nodes()
    here = location(nodes["sigmoid_1"])
    assert (here.node, here.module) == ("sigmoid_1", "layers.1")
    file, line, code = here.source.split(":", 2)
    assert file.endswith("test_graph.py") and line.isdigit() and code.strip() == "return x.sigmoid()"


def test_the_users_line_and_not_torchs() -> None:
    """A frame inside torch is where the user's line led to."""
    [node] = [node for node in _nodes().values() if "softplus" in str(node.target)]
    assert location(node).module == ""
    assert location(node).source.endswith("return torch.nn.functional.softplus(x)")


def test_a_node_from_nowhere() -> None:
    graph = fx.Graph()
    assert location(graph.placeholder("x")) == Location("x")


def test_what_follows() -> None:
    nodes = _nodes()
    [x] = placeholders(nodes["sigmoid"].graph)
    end = output_node(nodes["sigmoid"].graph)
    assert downstream([nodes["sigmoid_1"]]) == {node for node in nodes.values() if "softplus" in str(node.target)} | {end}
    assert downstream([x]) == set(nodes.values()) - {x}

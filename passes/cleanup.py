"""What is dead or over-strict once a site has been replaced?"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def cleanup(graph: fx.Graph) -> None:
    """Remove dead nodes, and let every view copy where it must.

    A `view` was legal for the strides of the node that a fused op replaced; the fused result may have others. `reshape` says
    the same without asking for strides, and is a view wherever it can be.
    """
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default


def readable(module: fx.GraphModule) -> str:
    """The graph as text with dtypes and shapes, names numbered anew so that two graphs can be compared line by line."""
    return str(module.print_readable(print_output=False, include_stride=False, include_device=False))

"""What is dead or over-strict once a site has been replaced?"""

from __future__ import annotations

import torch
from torch import fx

_aten = torch.ops.aten
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)


def cleanup(graph: fx.Graph) -> None:
    """Remove dead nodes."""
    graph.eliminate_dead_code()


def relax_views(graph: fx.Graph) -> None:
    """Let every view copy where it must.

    A `view` is legal for the strides of the node that a fused op will replace; the fused result may have others. `reshape` says
    the same without asking for strides, and is a view wherever it can be.
    """
    for node in graph.nodes:
        if node.target in _VIEWS:
            node.target = _aten.reshape.default

"""How do tests get the graph that a backend would get?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from compile_attn.passes.normalize import Normalized, normalize


class Call(nn.Module):
    """A function of tensors as a module, which is what Dynamo's names of sources expect."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(*inputs)


def captured(
    model: nn.Module,
    *args: Any,
    dynamic: Sequence[tuple[torch.Tensor, int]] = (),
    every_size: bool | None = None,
    **kwargs: Any,
) -> Normalized:
    """The normalised graph of one call, made while Dynamo's tracing context is alive, as in a real compilation."""
    found: list[Normalized] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        found.append(normalize(gm, examples))
        return gm.forward

    for tensor, dim in dynamic:
        torch._dynamo.mark_dynamic(tensor, dim)
    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True, dynamic=every_size)(*args, **kwargs)
    return found[0]

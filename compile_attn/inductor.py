"""How is a graph given to Inductor, and what must its cache of compiled graphs know of our ops?

Inductor finds what it has compiled by the graph, in which an op is a name. What else of our ops goes into the code (shapes, what is
written, a lowering) is said by `kernels/ops.py` and here. So the text of both is part of the key.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.compiler.config
from torch import fx

from compile_attn.kernels import ops


def by_inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph, compiled; found where another process has compiled the same one."""
    # Private, fenced here: the call that torch.compile's own "inductor" backend makes.
    from torch._inductor.compile_fx import compile_fx

    _teach()
    config: Any = torch.compiler.config
    with config.patch(cache_key_tag=config.cache_key_tag + _what_ops_are()):
        compiled: Any = compile_fx(module, list(inputs))
    return compiled  # type: ignore[no-any-return]


@functools.cache
def _teach() -> None:
    """`once` keeps its tensor in memory. Private, fenced here: without this lowering the op would copy the tensor."""
    from torch._inductor.lowering import register_lowering

    def keep(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(torch.ops.paged_attn.once.default, type_promotion_kind=None)(keep)


@functools.cache
def _what_ops_are() -> str:
    text = "".join(inspect.getsource(module) for module in (ops, sys.modules[__name__]))
    return f"paged_attn-{hashlib.sha256(text.encode()).hexdigest()}"

"""How are nodes added to a graph so that every later pass may ask for their shapes?"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher  # private; what AOTAutograd itself traces under
from torch._guards import detect_fake_mode  # what every backend uses to find the mode of its inputs
from torch._subclasses.fake_tensor import FakeTensor

from compile_attn.passes.graph import val

_aten = torch.ops.aten


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **options: Any) -> fx.Node:
    """A call_function node at the graph's insert point, with its fake value and, from `like`, the user's source line.

    `options` are keyword arguments of the op that are no nodes.
    """
    node = graph.call_function(target, args, options)
    revalue(node)
    if like is not None:
        node.meta.update({key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta})
    return node


def revalue(node: fx.Node, like: fx.Node | None = None) -> None:
    """Make the node's fake value anew from those of its inputs, in their fake mode or, where all are sizes, that of `like`."""
    mode = detect_fake_mode([n.meta["val"] for n in (*node.all_input_nodes, *([like] if like is not None else []))])

    def value(source: fx.Node) -> Any:
        known = source.meta["val"]  # a lifted constant may hold its real tensor
        real = isinstance(known, torch.Tensor) and not isinstance(known, FakeTensor)
        return mode.from_tensor(known, static_shapes=True) if real and mode is not None else known

    args, options = fx.map_arg((node.args, dict(node.kwargs)), value)
    assert callable(node.target)
    # The mode: composite ops make tensors of their own. The Python dispatcher: on torch 2.11 their C++ kernels guard on sizes.
    with torch.no_grad(), enable_python_dispatcher(), mode or contextlib.nullcontext():
        node.meta["val"] = node.target(*args, **options)


def size(graph: fx.Graph, node: fx.Node, dim: int) -> int | fx.Node:
    """The size of a dim as an argument: an int where it is constant, else a sym_size node."""
    length = val(node).shape[dim]
    return int(length) if isinstance(length, int) else call(graph, _aten.sym_size.int, node, dim)


def sizes(graph: fx.Graph, node: fx.Node, dims: Sequence[int]) -> list[int | fx.Node]:
    """`size` for several dims."""
    return [size(graph, node, dim) for dim in dims]


def product(graph: fx.Graph, lengths: Sequence[int | fx.Node]) -> int | fx.Node:
    """The product of sizes as an argument."""
    import operator

    result: int | fx.Node = 1
    for length in lengths:
        if isinstance(result, int) and isinstance(length, int):
            result = result * length
        elif result == 1:
            result = length
        elif length != 1:
            result = call(graph, operator.mul, result, length)
    return result


def permute(graph: fx.Graph, node: fx.Node, order: Sequence[int], like: fx.Node) -> fx.Node:
    """`node` with its dims in this order; the node itself where that changes nothing."""
    return node if list(order) == sorted(order) else call(graph, _aten.permute.default, node, list(order), like=like)


def reshape(graph: fx.Graph, node: fx.Node, shape: Sequence[int | fx.Node], like: fx.Node) -> fx.Node:
    """`node` in this shape; the node itself where the shape is already so in number of dims and every constant size."""
    have = val(node).shape
    same_kinds = len(have) == len(shape) and all(isinstance(n, int) == isinstance(m, int) for n, m in zip(have, shape, strict=True))
    if same_kinds and all(n == m for n, m in zip(have, shape, strict=True) if isinstance(m, int)):
        return node
    return call(graph, _aten.reshape.default, node, list(shape), like=like)

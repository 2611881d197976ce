"""What in a graph is a linear layer, which two tensors are surely equal, and who would notice other strides?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from compile_attn.passes.graph import is_tensor, val

_aten = torch.ops.aten
_TRANSPOSITIONS = {_aten.t.default, _aten.numpy_T.default, _aten.transpose.int, _aten.permute.default, _aten.mT.default}
_MATMULS = (_aten.mm.default, _aten.matmul.default)


@dataclass(frozen=True)
class Linear:
    """source @ weight.T + bias; `odd` says why its weight, the same at every call, is not the plain rows of a parameter."""

    node: fx.Node
    source: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    odd: str | None


def linears(graph: fx.Graph, constants: Mapping[fx.Node, torch.Tensor]) -> Iterator[Linear]:
    """Every product of a tensor that changes with one that is made of parameters and constants alone."""
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        if node in constants or (node.op == "call_function" and node.all_input_nodes and fixed.issuperset(node.all_input_nodes)):
            fixed.add(node)
        elif (product := _product(node)) is not None:
            source, weight, bias, rows = product
            if weight in fixed and source not in fixed:
                yield Linear(node, source, weight, bias, _odd(node, weight, bias, rows, constants))


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """Source, weight and bias of a product of two tensors; and whether the weight has a row for each output."""
    if node.target is _aten.linear.default:
        source, weight, bias = (*node.args, None)[:3]
        return source, weight, bias, True  # type: ignore[return-value]
    if node.target is _aten.addmm.default:
        bias, source, factor = node.args
    elif node.target in _MATMULS:
        (source, factor), bias = node.args, None
    else:
        return None
    turned = transposed(factor)  # type: ignore[arg-type]
    return source, factor if turned is None else turned, bias, turned is not None  # type: ignore[return-value]


def transposed(node: fx.Node) -> fx.Node | None:
    """The matrix of which this node is the transposed one."""
    source = node.args[0] if node.target in _TRANSPOSITIONS else None
    if not isinstance(source, fx.Node) or not is_tensor(source) or val(source).dim() != 2:
        return None
    dims: Any = node.args[1:]
    if node.target is _aten.permute.default:
        return source if [dim % 2 for dim in dims[0]] == [1, 0] else None
    return source if not dims or dims[0] % 2 != dims[1] % 2 else None


def _odd(node: fx.Node, weight: fx.Node, bias: fx.Node | None, rows: bool, constants: Mapping[fx.Node, torch.Tensor]) -> str | None:
    if not isinstance(constants.get(weight), nn.Parameter):
        return "is no parameter itself" if weight.op == "call_function" else "is no parameter"
    if val(weight).dim() != 2:
        return f"has {val(weight).dim()} dims, not 2"
    if not rows:
        return "has a column for each output, not a row (multiply by weight.T, as nn.Linear does)"
    if bias is not None and not (isinstance(constants.get(bias), nn.Parameter) and val(bias).shape == val(weight).shape[:1]):
        return "has a bias that is no parameter with a number for each output"
    return "is a scaled addmm" if node.kwargs else None


class Numbering:
    """Equal numbers for nodes that surely hold equal values: the same functional op of equal arguments."""

    def __init__(self, graph: fx.Graph) -> None:
        self._numbers: dict[fx.Node, int] = {}
        seen: dict[str, int] = {}
        for node in graph.nodes:
            text = self._text(node) if functional(node) else node.name
            self._numbers[node] = seen.setdefault(text, len(seen))

    def of(self, node: fx.Node) -> int:
        return self._numbers[node]

    def equal(self, a: fx.Node, b: fx.Node) -> bool:
        """False where a node was added since."""
        return a in self._numbers and self._numbers[a] == self._numbers.get(b)

    def _text(self, node: fx.Node) -> str:
        args = fx.map_arg((node.args, dict(node.kwargs)), lambda source: f"%{self._numbers[source]}")
        return f"{node.target} {args!r}"


def functional(node: fx.Node) -> bool:
    """Whether the node gives the same at every execution with the same arguments."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function" and getattr(target, "__module__", "") == "_operator"
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    return target.namespace == "aten" and not target._schema.is_mutable and not seeded


def stride_bound(node: fx.Node) -> str | None:
    """Why the strides of this tensor are somebody's business: a view of it is returned, or is taken by strides or bytes."""
    for user in _users_of_views(node):
        if user.op == "output":
            return "gives an output of the model, whose strides are the caller's"
        if user.target in (_aten.as_strided.default, _aten.view.dtype):
            return f"gives what {user.name} takes by its strides"
    return None


def seen_as_complex(node: fx.Node) -> bool:
    """Whether pairs of channels are viewed as complex numbers, which asks for even strides."""
    return any(user.target is _aten.view_as_complex.default for user in _users_of_views(node))


def is_view(node: fx.Node) -> bool:
    """Whether the op gives a view of its first argument, or may."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(one.alias_info is not None for one in target._schema.returns)


def _users_of_views(node: fx.Node) -> Iterator[fx.Node]:
    """Users of a tensor and of all its views."""
    for user in node.users:
        yield user
        if isinstance(user.target, torch._ops.OpOverload):
            if is_view(user):
                yield from _users_of_views(user)
        elif user.op == "call_function" and not isinstance(user.meta.get("val"), torch.SymInt):
            yield from _users_of_views(user)  # getitem of a split

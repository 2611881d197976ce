"""How is a traced graph written down so that another process can have it, node for node, and its sizes under symbols of its own?

As plain data: ops by name, sizes as trees of symbols, values by their kind. Reading it executes nothing. What this language does
not have is `Unwritten`, and the graph is then traced by whoever needs it.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Max, Min, Mod, PythonMod

Json = Any  # what json writes: None, bool, int, float, str, lists and dicts of it
_SIZES = {kind.__name__: kind for kind in (sympy.Add, sympy.Mul, sympy.Pow, CleanDiv, FloorDiv, Max, Min, Mod, PythonMod)}
_NAMED = {torch.dtype: torch, torch.memory_format: torch, torch.layout: torch}
_BUILTINS = {each.__name__: each for each in (getattr, abs, max, min, pow, round, int, float, bool)}
_ROOTS = {"torch": torch, "_operator": operator, "math": math}  # whose functions are the same wherever torch's version is
_OPS = ("aten", "prims")
_MOST = 1024  # numbers of a literal


class Unwritten(Exception):
    """This cannot be written down."""


class Writer:
    """Writes nodes, values and sizes; text that comes often, such as stacks of source lines, once."""

    def __init__(self) -> None:
        self.texts: dict[str, int] = {}
        self._known: dict[fx.Node, int] = {}

    def graph(self, module: fx.GraphModule) -> Json:
        nodes = [self.node(node, node.meta.get("val"), module) for node in module.graph.nodes]
        return {"nodes": nodes, "texts": list(self.texts)}

    def node(self, node: fx.Node, value: Any, module: fx.GraphModule) -> Json:
        """One of a graph, all of whose earlier ones were written; `value` is the fake value to tell of it."""
        if node.op not in ("placeholder", "get_attr", "call_function", "call_method", "output"):
            raise Unwritten(f"{node.name} is a {node.op}")
        target = self._function(node.target) if node.op == "call_function" else str(node.target)
        literal = self._literal(getattr(module, target, None)) if node.op == "get_attr" else None
        stack = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        where = [self._text(json.dumps(stack)), self._text(node.meta.get("stack_trace") or "")]
        what = [node.op, node.name, target, self.argument(node.args), self.argument(dict(node.kwargs))]
        self._known[node] = len(self._known)
        return [*what, self.value(value), where, literal]

    def argument(self, value: Any) -> Json:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, fx.Node):
            return {"node": self._known[value]}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__ if type(value) in (list, tuple) else "list": [self.argument(each) for each in value]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"dict": [[key, self.argument(each)] for key, each in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.argument(each) for each in (value.start, value.stop, value.step)]}
        if value is ...:
            return {"slice": None}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if type(value) in _NAMED:
            return {"torch": str(value).removeprefix("torch.")}
        raise Unwritten(f"an argument {type(value).__name__}")

    def value(self, value: Any) -> Json:
        """A fake value: a tensor's dtype, shape, strides, offset, device, and whether it asks for a gradient."""
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [self.value(each) for each in value]}
        if isinstance(value, torch.SymInt):
            return {"size": self.size(value)}
        if not isinstance(value, FakeTensor) or value.layout != torch.strided or value.is_conj() or value.is_neg():
            raise Unwritten(f"a value {type(value).__name__}")
        sizes = [[self.size(size) for size in sizes] for sizes in (value.shape, value.stride(), [value.storage_offset()])]
        return {"tensor": [str(value.dtype).removeprefix("torch."), *sizes, str(value.device), value.requires_grad]}

    def size(self, size: int | torch.SymInt) -> Json:
        return size if isinstance(size, int) else self._expression(size.node.expr)

    def _expression(self, size: Any) -> Json:
        if isinstance(size, sympy.Integer):
            return int(size)
        if isinstance(size, sympy.Symbol) and not str(size).startswith("u"):  # not one that data decides
            return str(size)
        if type(size).__name__ not in _SIZES or _SIZES[type(size).__name__] is not type(size):
            raise Unwritten(f"a size {size}")
        return [type(size).__name__, *map(self._expression, size.args)]

    def _function(self, function: Any) -> str:
        if isinstance(function, torch._ops.OpOverload):
            if function.namespace not in _OPS:
                raise Unwritten(f"the op {function}: what it is another process need not know")
            return f"torch.ops.{function}"
        # Private, fenced here: by this name torch writes a function into the code of a graph.
        from torch.fx.node import _get_qualified_name

        try:
            name = _get_qualified_name(function)
        except (AttributeError, AssertionError, RuntimeError, TypeError):  # whatever has no name
            raise Unwritten(f"the function {function!r}") from None
        if _found(name) is not function:
            raise Unwritten(f"the function {name}")
        return name

    def _literal(self, value: Any) -> Json:
        plain = (
            isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and type(value) in (torch.Tensor, torch.nn.Buffer)
        )
        if not plain or value.numel() > _MOST or value.is_quantized or value.is_complex() or value.requires_grad:
            raise Unwritten("a tensor that the graph holds")
        numbers = [self.argument(float(each)) if value.is_floating_point() else int(each) for each in value.flatten().tolist()]
        return [str(value.dtype).removeprefix("torch."), list(value.shape), str(value.device), numbers]

    def _text(self, text: str) -> int:
        return self.texts.setdefault(text, len(self.texts))


def read(told: Json, mode: Any, symbols: Mapping[str, sympy.Symbol]) -> fx.GraphModule:
    """What `Writer.graph` wrote. Nodes of equal shape share their fake tensor, which nobody changes."""
    return _Reader(told["texts"], mode, symbols).graph(told["nodes"])


class _Reader:
    def __init__(self, texts: Sequence[str], mode: Any, symbols: Mapping[str, sympy.Symbol]) -> None:
        self._texts, self._mode, self._symbols = texts, mode, symbols
        self._nodes: list[fx.Node] = []
        self._values: dict[str, Any] = {}

    def graph(self, nodes: Sequence[Json]) -> fx.GraphModule:
        graph, held = fx.Graph(), torch.nn.Module()
        for op, name, target, args, kwargs, value, (modules, trace), literal in nodes:
            if literal is not None:
                held.register_buffer(target, self._tensor(literal))
            called: Any = _found(target) if op == "call_function" else target
            node = graph.create_node(op, called, self._argument(args), self._argument(kwargs), name)
            if op != "output":
                node.meta["val"] = self._value(value)
            if self._texts[trace]:
                node.meta["stack_trace"] = self._texts[trace]
            if stack := json.loads(self._texts[modules]):
                node.meta["nn_module_stack"] = {str(depth): (path, "") for depth, path in enumerate(stack)}
            self._nodes.append(node)
        graph.lint()
        return fx.GraphModule(held, graph)

    def _argument(self, told: Json) -> Any:
        if not isinstance(told, dict):
            return told
        [(kind, value)] = told.items()
        if kind == "node":
            return self._nodes[value]
        if value is None:
            return ...
        if kind in ("list", "tuple", "slice"):
            parts = [self._argument(each) for each in value]
            return parts if kind == "list" else tuple(parts) if kind == "tuple" else slice(*parts)
        if kind == "dict":
            return {key: self._argument(each) for key, each in value}
        return float(value) if kind == "float" else torch.device(value) if kind == "device" else getattr(torch, value)

    def _value(self, told: Json) -> Any:
        if not isinstance(told, dict):
            return told
        [(kind, value)] = told.items()
        if kind in ("list", "tuple"):
            return (list if kind == "list" else tuple)(self._value(each) for each in value)
        if kind == "size":
            return self._size(value)
        if (key := repr(value)) not in self._values:
            dtype, shape, strides, [offset], device, gradient = value
            sizes = [[self._size(size) for size in sizes] for sizes in (shape, strides, [offset])]
            with self._mode, torch.no_grad():
                flat = torch.empty_strided(sizes[0], sizes[1], dtype=getattr(torch, dtype), device=device)
                tensor = flat if offset == 0 else flat.as_strided(sizes[0], sizes[1], sizes[2][0])
            self._values[key] = tensor.requires_grad_(gradient)
        return self._values[key]

    def _size(self, told: Json) -> Any:
        if isinstance(told, int):
            return told
        return self._mode.shape_env.create_symintnode(self._expression(told), hint=None)

    def _expression(self, told: Json) -> Any:
        if isinstance(told, int):
            return sympy.Integer(told)
        if isinstance(told, str):
            return self._symbols[told]
        return _SIZES[told[0]](*map(self._expression, told[1:]))

    def _tensor(self, told: Json) -> torch.Tensor:
        dtype, shape, device, numbers = told
        return torch.tensor(self._argument({"list": numbers}), dtype=getattr(torch, dtype), device=device).reshape(shape)


def _found(name: str) -> Callable[..., Any] | None:
    """A function of torch, or one that comes with Python, by its whole name; None for any other name."""
    root, *parts = name.split(".")
    if not parts or root not in _ROOTS:
        return _BUILTINS.get(name)
    if parts[0] == "ops" and parts[1:2] not in [[each] for each in _OPS]:
        return None
    found: Any = _ROOTS[root]
    for part in parts:
        found = getattr(found, part, None)
    return found if callable(found) else None

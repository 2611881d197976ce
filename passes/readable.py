"""How is a graph written down so that two of them can be compared line by line?

One node a line, under the user's line and module that it came from. Inputs have the user's names. Sizes are named s0, s1, ... in
order of appearance: the names that Dynamo and the passes happen to give them would make every line differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from compile_attn.passes.graph import location

_SYMBOL = re.compile(r"\b[su]\d+\b")  # s27, u0: the symbols of a size, backed and unbacked


def readable(graph: fx.Graph, sources: Mapping[fx.Node, str]) -> str:
    """The graph as text; `sources` says which placeholder is which of the user's tensors."""
    return "\n".join(_Writer(sources).lines(graph))


class _Verbatim(str):
    """A string that is printed without quotes inside lists and tuples."""

    def __repr__(self) -> str:
        return str(self)


class _Writer:
    def __init__(self, sources: Mapping[fx.Node, str]) -> None:
        self._sources = sources
        self._symbols: dict[str, str] = {}
        self._sizes: dict[object, str] = {}

    def lines(self, graph: fx.Graph) -> list[str]:
        written: list[str] = []
        origin = ""
        for node in graph.nodes:
            where = location(node)
            here = "  ".join(part for part in (where.module, where.source) if part)
            if here and here != origin:
                written += ["", f"# {here}"]
                origin = here
            written.append(self._line(node))
        return written

    def _line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._arguments(node.args)}"
        value = node.meta.get("val")
        name = self._name(node)
        typed = f"{name}: {self._type(value)}" if isinstance(value, (torch.Tensor, torch.SymInt)) else name
        if node.op == "placeholder":
            return f"input {name if isinstance(value, torch.SymInt) else typed}"
        if node.op == "get_attr":
            return f"{typed} = {node.target}"
        target = node.target if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", node.target)
        return f"{typed} = {target}({self._arguments(node.args, node.kwargs)})"

    def _arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> str:
        args, kwargs = fx.map_arg((args, dict(kwargs or {})), lambda node: _Verbatim(self._name(node)))
        return ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])

    def _name(self, node: fx.Node) -> str:
        """The user's name for an input, the symbol for a size that is an input, else the node's own."""
        if node.op != "placeholder":
            return node.name
        value = node.meta.get("val")
        return self._size(value) if isinstance(value, torch.SymInt) else self._sources.get(node) or node.name

    def _type(self, value: torch.Tensor | torch.SymInt) -> str:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(self._size, value.shape))}]"

    def _size(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        key = size.node.expr
        if key not in self._sizes:
            self._sizes[key] = _SYMBOL.sub(self._symbol, str(size))
        return self._sizes[key]

    def _symbol(self, found: re.Match[str]) -> str:
        return self._symbols.setdefault(found[0], f"s{len(self._symbols)}")

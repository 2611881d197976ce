"""Which few questions about an FX graph does everyone ask?"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx


@dataclass(frozen=True)
class Location:
    """Where a node came from: its name, the module path (`model.layers.0.self_attn`, or ""), and `file:line: code` (or "").

    Files below the working directory are named from there.
    """

    node: str = ""
    module: str = ""
    source: str = ""


def location(node: fx.Node) -> Location:
    """The user's own code for this node: module path and last source line that Dynamo recorded."""
    stack: dict[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
    module = ""
    for path, _ in stack.values():
        module = _clean_path(path)
    return Location(node.name, module, source_line(node.meta.get("stack_trace")))


def _clean_path(path: str) -> str:
    """`L['self'].model.layers.0.self_attn` or `L['self']._modules['model']...` as a dotted path below the model."""
    path = re.sub(r"^L\['\w+'\]", "", path).replace("._modules", "")  # whatever forward calls its self
    path = path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "")
    return path.strip(".")


def source_line(trace: str | None) -> str:
    """`file:line: code` of the user's innermost frame in a stack as `traceback` writes it; empty without one."""
    if not trace:
        return ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    frames = [at for at, line in enumerate(lines) if line.startswith("File ")]
    own = [at for at in frames if not _is_torchs(lines[at])]  # the user's line, not the one inside torch that it led to
    for at in reversed(own or frames):
        if lines[at].startswith("File "):
            parts = lines[at].split('"')
            number = lines[at].split("line ")[1].split(",")[0] if "line " in lines[at] else "?"
            code = lines[at + 1] if at + 1 < len(lines) else ""
            file = parts[1].removeprefix(os.getcwd() + os.sep) if len(parts) > 1 else "?"
            return f"{file}:{number}: {code}"
    return ""


def _is_torchs(frame: str) -> bool:
    return os.path.dirname(torch.__file__) + os.sep in frame


def val(node: fx.Node) -> torch.Tensor:
    """The fake tensor recorded for a tensor-valued node."""
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} holds {type(value).__name__}, not a tensor")
    return value


def is_tensor(node: object) -> bool:
    """Whether this argument is a node that holds one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The tensor-valued arguments of a node, in order, each once."""
    return [n for n in node.all_input_nodes if is_tensor(n)]


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    """The inputs of a graph in calling order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def output_node(graph: fx.Graph) -> fx.Node:
    """The one output node of a graph."""
    found: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return found


def same_size(a: object, b: object) -> bool:
    """Whether two sizes (int or SymInt) are provably equal; never adds a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a is b or bool(statically_known_true(a == b))


def downstream(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that use any of these, directly or not; the given nodes themselves not counted."""
    seen: set[fx.Node] = set()
    todo = [u for n in nodes for u in n.users]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(node.users)
    return seen


def add_placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    """A new last placeholder."""
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = example
    return node

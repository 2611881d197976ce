"""How does the proof walk the graph, and what may its rules ask?

One pass in order. Each node gets a Value from its inputs' values by the rule of its op; an op without a rule, or a rule that
finds the token axis where it may not be, gives `Mixed`. Rules note which uses must be rewritten; nothing is changed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import fx

from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.token_values import (
    LAST,
    TOKENS,
    Axis,
    Free,
    Index,
    Iota,
    Mixed,
    Row,
    Size,
    Sizes,
    Tok,
    Value,
    has_size,
)

ON_LENGTH = "depends on the length of the sequence"
CURE_LENGTH = "compute it from position_ids, so that it is the same for a token whatever follows it"
BY_ITSELF = "outside attention every op must treat each token by itself"


Apply: TypeAlias = "Callable[[Context, fx.Node, dict[str, Any]], Value]"


@dataclass(frozen=True)
class Rule:
    """What is known about an op. `lengths`: sizes that depend on T may be arguments. `counts`: it takes Mixed arguments."""

    apply: Apply
    lengths: bool = False
    counts: bool = False


RULES: dict[str, Rule] = {}  # name of an op without its overload, as in "aten::add"


def names(text: str) -> list[str]:
    """A list of op names as one text."""
    return text.split()


def rule(*ops: str, lengths: bool = False, counts: bool = False) -> Callable[[Apply], Apply]:
    """Register a rule for ATen ops (or for others, with their namespace)."""

    def register(function: Apply) -> Apply:
        for name in ops:
            RULES[name if "::" in name else f"aten::{name}"] = Rule(function, lengths, counts)
        return function

    return register


@dataclass
class Context:
    """The state of one proof."""

    sizes: Sizes
    tokens: frozenset[fx.Node]
    position_inputs: frozenset[fx.Node]
    constants: dict[fx.Node, torch.Tensor]
    values: dict[fx.Node, Value] = field(default_factory=dict)
    as_positions: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)  # (user, argument): reads it as positions
    as_rows: set[tuple[fx.Node, fx.Node]] = field(default_factory=set)  # (user, argument): reads it as row numbers
    tables: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)  # slice of a table -> (dim, offset)
    lasts: dict[fx.Node, int] = field(default_factory=dict)  # selection of the last token -> token dim of its input
    bounds: list[int] = field(default_factory=list)  # positions that each table can serve
    groups: dict[fx.Node, int] = field(default_factory=dict)  # sort -> number of groups that its rows were split into
    effects: list[Mixed] = field(default_factory=list)  # what happens whether or not the output depends on it

    def of(self, arg: object) -> Value:
        """The value of an argument; literals are free."""
        return self.values.get(arg, Free()) if isinstance(arg, fx.Node) else Free()

    def shape(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(val(node).shape)

    def mixed(self, node: fx.Node, what: str, cure: str = "") -> Mixed:
        return Mixed(f"{op_name(node)} {what}", node, cure)

    def payload(self, user: fx.Node, arg: fx.Node) -> Tok | Mixed:
        """An argument as a value of each row: row numbers of tokens become positions, for this user."""
        value = self.of(arg)
        if isinstance(value, Tok):
            return value
        if isinstance(value, Iota) and value.count == 1:
            self.as_positions.add((user, arg))
            return Tok(value.dim)
        if isinstance(value, Index) and value.axis.space is TOKENS and value.target == Axis():
            self.as_positions.add((user, arg))
            return Tok(value.dim, value.axis)
        if isinstance(value, Mixed):
            return value
        return self.mixed(user, "computes with row numbers of tokens, which differ when sequences are packed")

    def aligned(self, node: fx.Node, operands: Sequence[tuple[object, Sequence[int | None]]], *, strict: bool = False) -> Value:
        """The result of an op that combines operands slice by slice.

        Each operand comes with the result's dim for each of its dims, None for a dim that is summed over. All token axes
        must land on one dim. `strict`: the op does not broadcast.
        """
        joined: Tok | None = None
        for arg, places in operands:
            if not is_tensor(arg) or isinstance(self.of(arg), Free):
                continue
            value = self.payload(node, arg)  # type: ignore[arg-type]
            if isinstance(value, Mixed):
                return value
            place = places[value.dim]
            if place is None:
                return self.mixed(node, f"sums over the token axis; {BY_ITSELF}")
            result = join(self, node, joined, replace(value, dim=place, fill=None))
            if isinstance(result, Mixed):
                return result
            joined = result
        if joined is None:
            return Free()
        return self._broadcast_over_last(node, joined, operands, strict) if joined.axis.space is LAST else joined

    def _broadcast_over_last(
        self, node: fx.Node, joined: Tok, operands: Sequence[tuple[object, Sequence[int | None]]], strict: bool
    ) -> Value:
        """One row per sequence has size 1 in P and many in Q: what is combined with it must broadcast along it."""
        for arg, places in operands:
            if not is_tensor(arg) or not isinstance(self.of(arg), Free) or joined.dim not in places:
                continue
            size = self.shape(arg)[list(places).index(joined.dim)]  # type: ignore[arg-type]
            if strict or not (isinstance(size, int) and size == 1):
                return self.mixed(node, "combines the last token with a tensor of a fixed number of rows")
        return joined

    def run(self, graph: fx.Graph) -> None:
        """Give every node its value."""
        for node in graph.nodes:
            if node.op != "output":
                self.values[node] = self.value_of(node)

    def value_of(self, node: fx.Node) -> Value:
        """The value that a node has by those of its inputs."""
        return self._checked(node, self._value(node))

    def _value(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return Free() if is_tensor(node) else Mixed(f"{node.target} is not a tensor", node)
        if node.target is operator.getitem:
            return self._getitem(node)
        if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list, type(None))):
            return self._number(node)
        if not isinstance(node.target, torch._ops.OpOverload):
            return self.mixed(node, "is control flow or no ATen op; paged models are plain programs", "unroll it")
        return self._op(node, node.target)

    def _placeholder(self, node: fx.Node) -> Value:
        value = node.meta.get("val")
        if node in self.position_inputs:
            return Iota(1)
        if node in self.tokens:
            return Tok(1)
        if not isinstance(value, torch.Tensor):
            return Size(self.sizes.depends(value))
        if any(self.sizes.depends(size) for size in value.shape):
            what = f"input {node.name} of shape {tuple(value.shape)} is given per token"
            return Mixed(f"{what}; a paged step provides token ids and positions only", node, "leave it out of the call")
        return Free()

    def _getitem(self, node: fx.Node) -> Value:
        source = self.of(node.args[0])
        if isinstance(source, tuple) and isinstance(node.args[1], int):
            part: Value = source[node.args[1]]
            return part
        return source if isinstance(source, (Free, Mixed)) else self.mixed(node, "takes a part that is not understood")

    def _number(self, node: fx.Node) -> Value:
        """A node that holds a number: shape arithmetic, or an element read on the host."""
        made = RULES.get(op_key(node))
        inputs = [self.of(arg) for arg in node.all_input_nodes]
        if made is not None:
            return made.apply(self, node, bind(node))
        if (bad := first_mixed(inputs)) is not None:
            return bad
        if all(isinstance(value, (Size, Free)) for value in inputs) or op_key(node) == "aten::sym_size":
            return Size(self.sizes.depends(node.meta.get("val")))
        return self.mixed(node, "reads a number out of the tokens' values")

    def _op(self, node: fx.Node, target: torch._ops.OpOverload) -> Value:
        inputs = [self.of(arg) for arg in node.all_input_nodes]
        op = _described(target)
        known = RULES.get(op.name)
        if op.random and known is None:
            return self.mixed(node, "draws random numbers", "call model.eval()")
        if op.mutable:
            source = next((arg for arg in reversed(node.all_input_nodes) if arg.meta.get("stack_trace")), node)
            what = f"{op_name(node)} writes to a tensor at every call; a paged model keeps no state but its cache"
            self.effects.append(Mixed(what, source))
            return self.effects[-1]
        bad = first_mixed(inputs)
        if bad is not None and (known is None or not known.counts):
            return replace(bad, counts=None)
        on_length = any(isinstance(value, Size) and value.on_tokens for value in inputs)
        if not on_length and all(isinstance(value, (Free, Size)) for value in inputs):
            return self._free(node)
        if on_length and (known is None or not known.lengths):
            return self.mixed(node, ON_LENGTH, CURE_LENGTH)
        if known is not None:
            return known.apply(self, node, bind(node))
        if op.pointwise:
            return RULES["aten::add"].apply(self, node, bind(node))
        return self.mixed(node, f"is not known to keep tokens apart; {BY_ITSELF}", "write it with ops that are known")

    def _free(self, node: fx.Node) -> Value:
        known = RULES.get(op_key(node))
        random = _described(node.target).random
        return known.apply(self, node, bind(node)) if random and known is not None else Free()

    def _checked(self, node: fx.Node, value: Value) -> Value:
        """A second look at every claim: shapes must have the one token axis that the value says, and no other."""
        if isinstance(value, tuple):
            parts = node.meta["val"]
            return tuple(self._check_one(node, part, made) for part, made in zip(value, parts, strict=True))
        return self._check_one(node, value, node.meta.get("val"))

    def _check_one(self, node: fx.Node, value: Value, made: object) -> Value:
        if isinstance(value, Mixed) or not isinstance(made, torch.Tensor):
            return value
        dim = value.dim if isinstance(value, (Tok, Iota, Index)) else -1
        others = [size for place, size in enumerate(made.shape) if place != dim]
        if any(self.sizes.depends(size) for size in others):
            return self.mixed(node, f"pairs tokens with each other; {BY_ITSELF}")
        if isinstance(value, (Tok, Iota, Index)):
            axis = Axis(TOKENS, 1, value.count) if isinstance(value, Iota) else value.axis
            if not has_size(self.sizes, made.shape[dim], axis):
                return self.mixed(node, f"does not keep the token axis whole; {BY_ITSELF}")
        return value

    def constant(self, node: object) -> torch.Tensor | None:
        """The tensor that a node surely holds, where it is a parameter, buffer or literal seen through copies."""
        while isinstance(node, fx.Node) and node not in self.constants:
            if op_key(node) not in _COPIES:
                return None
            node = node.args[0]
        return self.constants.get(node) if isinstance(node, fx.Node) else None


_COPIES = frozenset(f"aten::{name}" for name in ("lift_fresh_copy", "clone", "alias", "detach", "contiguous", "_to_copy"))


def join(context: Context, node: fx.Node, a: Tok | None, b: Tok) -> Tok | Mixed:
    """Two operands of one op, their dims already those of the result."""
    if a is None:
        return b
    if a.axis.space.kind != b.axis.space.kind and LAST in (a.axis.space, b.axis.space):
        return context.mixed(node, f"combines the last token with the others; {BY_ITSELF}")
    if a.dim != b.dim and a.axis.space is LAST:
        return context.mixed(node, "combines last tokens that lie on different axes", "keep the token axis: x[:, -1:]")
    if a.dim != b.dim:
        return context.mixed(node, f"pairs tokens with each other; {BY_ITSELF}")
    if a.axis == b.axis:
        return replace(a, uniform=a.uniform and b.uniform)
    counted = not (a.axis.space.by_data or b.axis.space.by_data)
    if (a.uniform or b.uniform) and counted and a.axis.count == b.axis.count:
        return replace(b if a.uniform else a, uniform=a.uniform and b.uniform)
    return context.mixed(node, "combines rows that stand in different orders")


def first_mixed(values: Sequence[Value]) -> Mixed | None:
    return next((value for value in values if isinstance(value, Mixed)), None)


def is_row(value: Value) -> bool:
    return isinstance(value, Row)


@dataclass(frozen=True)
class _Op:
    """What a schema says, read once: reading it from C++ costs more than the rules do."""

    name: str
    parameters: tuple[tuple[str, Any], ...]
    random: bool
    pointwise: bool
    mutable: bool


@cache
def _described(op: torch._ops.OpOverload) -> _Op:
    parameters = tuple((parameter.name, parameter.default_value) for parameter in op._schema.arguments)
    random, pointwise = torch.Tag.nondeterministic_seeded in op.tags, torch.Tag.pointwise in op.tags
    return _Op(op._schema.name, parameters, random, pointwise, op._schema.is_mutable)


def op_key(node: fx.Node) -> str:
    """`aten::add` for every overload of add; "" for what is no op."""
    return _described(node.target).name if isinstance(node.target, torch._ops.OpOverload) else ""


def op_name(node: fx.Node) -> str:
    """An op as people write it."""
    return op_key(node).replace("::", ".") or getattr(node.target, "__name__", str(node.target))


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op by their names in its schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    args, kwargs = node.args, node.kwargs
    return {
        name: args[place] if place < len(args) else kwargs.get(name, default)
        for place, (name, default) in enumerate(_described(node.target).parameters)
    }


def for_each_result(node: fx.Node, value: Value) -> Value:
    """One value for each result of an op."""
    made = node.meta["val"]
    return tuple(value for _ in made) if isinstance(made, (tuple, list)) else value


def tensors(args: Any) -> list[fx.Node]:
    """The tensor arguments, those in lists too."""
    found: list[fx.Node] = []
    for arg in args:
        if isinstance(arg, (list, tuple)):
            found.extend(tensors(arg))
        elif is_tensor(arg):
            found.append(arg)
    return found

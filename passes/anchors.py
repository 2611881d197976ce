"""Where does a graph normalise something over an axis, in whatever spelling?

An Anchor says: these are the scores, this is the axis, this node holds the probabilities. Softmax ops, exp over its sum (before
or after the product with the values), log_softmax then exp, SDPA, and sinks as an extra column are all anchors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
from torch import fx

from compile_attn.passes.contractions import adds, is_contraction, meeting, operands
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Bounds, Index, argument, dim_of, index_map, op_name, sequence, shape_of
from compile_attn.passes.spelled import Spelled, is_whole_attention, spell_out
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.terms import unreadable
from compile_attn.passes.values import boolean, number

_SOFTMAX = ("softmax", "_softmax", "special_softmax", "_safe_softmax")


@dataclass(frozen=True)
class Anchor:
    """A normalisation: `scores` [..] along `dim`, `probabilities`, and what else takes part."""

    softmax: fx.Node  # the node that names the site
    scores: fx.Node
    dim: int
    probabilities: fx.Node
    sink: fx.Node | None = None  # an extra column of the normaliser, shape of the scores with size 1 along dim
    finish: fx.Node | None = None  # the node that ends the site, where that is not the product with the values
    refused: tuple[str, str] | None = None
    added: float = 0.0  # the normaliser is this + sum: a sink, whose logit is its logarithm
    offset: int = 0  # probabilities of key j stand in column j + offset
    hidden: fx.Node | None = None  # True where exp(score) was replaced by 0 before it was summed
    unit: float = 1.0  # what a score is multiplied by in the exponent: log(2) for powers of 2
    zeroed: tuple[fx.Node, ...] = ()  # masks: True where a probability was replaced by 0 after all

    @property
    def shape(self) -> Index:
        """The shape of the scores."""
        return shape_of(self.scores)

    def score_at(self, reader: Reader, axes: Index) -> sympy.Basic:
        """The score at an index of the axes."""
        score = number(reader.at(self.scores, axes))
        score = score if self.unit == 1 else score * sympy.Float(self.unit)
        if self.hidden is None:
            return score
        return sympy.Piecewise((-sympy.oo, boolean(reader.operand(self.hidden, axes))), (score, True))

    def sinks_at(self, reader: Reader, axes: Index) -> sympy.Basic | None:
        """The logit of the sink in a row."""
        if self.added:
            return sympy.log(sympy.Float(self.added)) if self.added != 1 else sympy.Integer(0)
        if self.sink is None:
            return None
        row = tuple(sympy.Integer(0) if n == self.dim else axis for n, axis in enumerate(axes))
        return number(reader.operand(self.sink, row))

    def value_product(self, bounds: Bounds) -> tuple[fx.Node, int]:
        """The contraction of the probabilities with the values, and which operand (0 or 1) the probabilities are."""
        node = self.probabilities
        while True:
            products = [met for user in node.users if (met := meeting(node, user)) is not None]
            if products:
                product = products[0]
                if adds(product):
                    why = f"the product with the values adds something ({op_name(product)})"
                    raise unreadable(product, why, "use a plain product")
                return product, 0 if operands(product)[0] is node else 1
            onward = [u for u in node.users if _is_layout(u, bounds)]
            if not onward:
                users = ", ".join(f"{u.name} ({op_name(u) or u.op})" for u in node.users) or "nothing"
                why = f"the probabilities go to {users}, not to a product with values"
                raise unreadable(node, why, "dropout must be off (model.eval()); multiply by v directly")
            node = onward[0]


def _is_layout(node: fx.Node, bounds: Bounds) -> bool:
    if not is_tensor(node):
        return False
    index = tuple(bounds.symbol(f"x{n}", size) for n, size in enumerate(shape_of(node)))
    return index_map(node, index, bounds) is not None


def find_anchors(graph: fx.Graph) -> Iterator[Anchor]:
    """Every normalisation of a graph, in order."""
    for anchor in _normalisations(graph):
        yield anchor if anchor.refused else _with_zeros(anchor)


def _with_zeros(anchor: Anchor) -> Anchor:
    """masked_fill(probabilities, mask, 0) and nan_to_num(probabilities): they change nothing if what they hide is hidden before.

    No probability is nan in a row that sees a key, and every row must be proven to see one.
    """
    node, masks = anchor.probabilities, list[fx.Node]()
    while len(node.users) == 1:
        (user,) = node.users
        name = op_name(user)
        if name == "masked_fill" and user.args[0] is node and user.args[2] == 0:
            masks.append(user.args[1])  # type: ignore[arg-type]
        elif name not in ("nan_to_num", "_to_copy", "clone", "dropout") or not val(user).is_floating_point() or _drops(user):
            break
        node = user
    return replace(anchor, probabilities=node, zeroed=tuple(masks))


def _drops(node: fx.Node) -> bool:
    return op_name(node) == "dropout" and bool(argument(node, 1, "p") > 0 and argument(node, 2, "train"))


def _normalisations(graph: fx.Graph) -> Iterator[Anchor]:
    for node in list(graph.nodes):
        name = op_name(node)
        if name in _SOFTMAX:
            yield _from_softmax(node)
        elif name in ("exp", "exp2") and (anchor := _from_exp(node)) is not None:
            yield anchor
        elif is_whole_attention(node):
            spelled = spell_out(graph, node)
            if isinstance(spelled, Spelled):
                weights = spelled.probabilities
                yield Anchor(node, spelled.scores, val(weights).dim() - 1, weights, finish=spelled.finish)
            else:
                yield Anchor(node, node, -1, node, refused=spelled)


def _from_softmax(node: fx.Node) -> Anchor:
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    dim = dim_of(argument(node, 1, "dim"), val(source).dim())
    scores = _without_shift(source, dim)
    split = _sink_column(scores, dim)
    if split is None:
        return Anchor(node, scores, dim, node)
    return Anchor(node, split[0], dim, node, sink=split[1], offset=split[2])


def _without_shift(node: fx.Node, dim: int) -> fx.Node:
    """Softmax ignores what is constant along its axis: x for x - max(x), through casts between floats."""
    while True:
        name = op_name(node)
        shift = node.args[1] if name == "sub" and len(node.args) == 2 else None
        if (isinstance(shift, fx.Node) and is_tensor(shift) and _constant_along(node, shift, dim)) or (
            name in ("_to_copy", "detach", "clone") and val(node).is_floating_point() and _peelable_cast(node)
        ):
            node = node.args[0]  # type: ignore[assignment]
        else:
            return node


def _peelable_cast(node: fx.Node) -> bool:
    source = node.args[0]
    return is_tensor(source) and op_name(source) in ("sub", "cat", "_to_copy") and val(source).is_floating_point()  # type: ignore[arg-type]


def _constant_along(node: fx.Node, part: fx.Node, dim: int) -> bool:
    place = dim - (val(node).dim() - val(part).dim())
    return place < 0 or val(part).shape[place] == 1


def _sink_column(scores: fx.Node, dim: int) -> tuple[fx.Node, fx.Node, int] | None:
    """(scores, sink, columns before the scores) of scores joined with one column of sinks."""
    if op_name(scores) != "cat":
        return None
    parts: Any = scores.args[0]
    at = dim_of(argument(scores, 1, "dim", 0), val(scores).dim())
    if len(parts) != 2 or at != dim:
        return None
    first, last = parts
    if shape_of(last)[dim] == 1:
        return first, last, 0
    return (last, first, 1) if shape_of(first)[dim] == 1 else None


def _from_exp(node: fx.Node) -> Anchor | None:
    """exp(x) with its own sum among the users, or exp of a log_softmax."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if op_name(source) in ("log_softmax", "_log_softmax"):
        inner: fx.Node = source.args[0]  # type: ignore[assignment]
        dim = dim_of(argument(source, 1, "dim"), val(inner).dim())
        return Anchor(node, _without_shift(inner, dim), dim, node)
    if (whole := _log_sum(source)) is not None:
        return Anchor(node, source.args[0], whole, node)  # type: ignore[arg-type]
    unit = math.log(2) if op_name(node) == "exp2" else 1.0
    exponential: fx.Node = node
    hidden: Any = None
    for user in node.users:  # exp(scores).masked_fill(mask, 0)
        if op_name(user) == "masked_fill" and user.args[0] is node and user.args[2] == 0:
            node, hidden = user, user.args[1]
    total = next((u for u in node.users if op_name(u) == "sum" and argument(u, 1, "dim")), None)
    if total is None:
        why = "the exponential of a score is never divided by its sum over the keys"
        return Anchor(exponential, source, -1, node, refused=(why, "write torch.softmax(scores, -1) @ v"))
    dims = argument(total, 1, "dim")
    if len(dims) != 1:
        return Anchor(node, source, -1, node, refused=(f"exp is summed over axes {dims}", "normalise over one axis"))
    dim = dim_of(dims[0], val(node).dim())
    scores = _without_shift(source, dim)
    added, divisor = _added(total)
    if added and scores is not source:
        why = f"the normaliser adds {added} after the maximum was subtracted, so the score of the sink depends on the row"
        return Anchor(node, scores, dim, node, refused=(why, "write torch.softmax(scores, -1), or add the number times exp(-max)"))
    quotient = _quotient(node, divisor)
    if quotient is not None:
        return Anchor(exponential, scores, dim, quotient, added=added, hidden=hidden, unit=unit)
    finish = _quotient_after_product(divisor)
    if finish is None:
        why = "exp and its sum over an axis are not joined by a division that can be read"
        return Anchor(node, scores, dim, node, refused=(why, "write torch.softmax(scores, -1) @ v"))
    return Anchor(exponential, scores, dim, node, finish=finish, added=added, hidden=hidden, unit=unit)


def _log_sum(node: fx.Node) -> int | None:
    """The axis of x - logsumexp(x), the logarithm of a softmax."""
    if op_name(node) != "sub" or len(node.args) != 2 or node.kwargs or not is_tensor(node.args[1]):
        return None
    scores, total = node.args
    if op_name(total) == "unsqueeze":  # type: ignore[arg-type]
        total, kept = total.args[0], dim_of(total.args[1], val(node).dim())  # type: ignore[union-attr, arg-type]
    else:
        kept = None
    if op_name(total) != "logsumexp" or total.args[0] is not scores:  # type: ignore[arg-type, union-attr]
        return None
    dims = sequence(argument(total, 1, "dim"))  # type: ignore[arg-type]
    dim = dim_of(dims[0], val(node).dim())
    keeps = bool(argument(total, 2, "keepdim", False))  # type: ignore[arg-type]
    return dim if len(dims) == 1 and keeps == (kept is None) and kept in (None, dim) else None


def _added(total: fx.Node) -> tuple[float, fx.Node]:
    """The number that is added to the sum, and the node of the result."""
    for user in total.users:
        numbers = [arg for arg in user.args if isinstance(arg, (int, float))]
        if op_name(user) == "add" and len(user.args) == 2 and not user.kwargs and len(numbers) == 1 and numbers[0] > 0:
            return float(numbers[0]), user
    return 0.0, total


def _quotient(exp: fx.Node, divisor: fx.Node) -> fx.Node | None:
    """exp / divisor, the divisor possibly expanded or unsqueezed, or exp * reciprocal."""
    for user in exp.users:
        if op_name(user) == "div" and user.args[0] is exp and _comes_from(user.args[1], divisor):
            return user
        if op_name(user) == "mul" and any(_comes_from(arg, divisor, inverse=True) for arg in user.args if arg is not exp):
            return user
    return None


def _quotient_after_product(divisor: fx.Node) -> fx.Node | None:
    """The division of the product with the values by the divisor."""
    todo = list(divisor.users)
    while todo:
        user = todo.pop()
        if op_name(user) == "div" and _comes_from(user.args[1], divisor) and is_contraction(user.args[0]):  # type: ignore[arg-type]
            return user
        if op_name(user) in ("unsqueeze", "expand", "view", "reshape", "transpose", "clamp_min"):
            todo.extend(user.users)
    return None


def _comes_from(node: object, divisor: fx.Node, inverse: bool = False) -> bool:
    while isinstance(node, fx.Node):
        if node is divisor:
            return not inverse
        if inverse and op_name(node) == "reciprocal":
            inverse = False
        elif op_name(node) not in ("unsqueeze", "expand"):
            return False
        node = node.args[0]
    return False

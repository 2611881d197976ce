"""When is a factor on the output of an attention a sink?

A sink of logit t gives key j the weight exp(x_j) / (Z + exp(t)), Z being the sum of exp(x_j): that is softmax times the factor
Z / (Z + exp(t)). So any spelling of a factor f for which (1 / f - 1) * Z is free of Z is a sink, `sigmoid(logsumexp - t)` for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy
from torch import fx

from compile_attn.kernels.expr import J, Round
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Index, argument, dim_of, op_name, sequence, shape_of
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.terms import Opaque, unreadable
from compile_attn.passes.values import number

_CURE = "write the sink as a further column of the scores, one number per head"


@dataclass(frozen=True)
class Factor:
    """`product` = some node * `by`, or / `by` where `inverse`."""

    product: fx.Node
    by: fx.Node
    inverse: bool


def factors(node: fx.Node) -> Iterator[Factor]:
    """What a node is multiplied by or divided by."""
    for user in node.users:
        if op_name(user) not in ("mul", "div") or len(user.args) != 2 or user.kwargs or val(user).dtype != val(node).dtype:
            continue
        first, by = user.args if user.args[0] is node else user.args[::-1]
        inverse = op_name(user) == "div"
        if inverse and user.args[0] is not node:
            continue
        if isinstance(by, fx.Node) and is_tensor(by) and by is not first and shape_of(user) == shape_of(node):
            yield Factor(user, by, inverse)


def sink_of(
    factor: Factor, index: Index, back: Mapping[sympy.Expr, sympy.Expr], score: sympy.Expr, keys: sympy.Expr, reader: Reader
) -> sympy.Expr | None:
    """The logit of the sink in b, h, i; None where the factor has nothing to do with the normaliser. Raises Unreadable."""
    value = number(reader.operand(factor.by, index))
    sums = [term for term in value.atoms(Opaque) if op_name(reader.opaque[int(term.args[0])]) == "logsumexp"]
    if not sums:
        return None
    value = value.replace(Round, lambda bits, inner: inner)  # a fused kernel keeps the normaliser in float32
    total = sympy.Dummy("total", positive=True)
    for term in sums:
        if not _is_normaliser(term, back, score, keys, reader):
            why = f"the output is multiplied by {factor.by.name}, which takes the logsumexp of other scores"
            raise unreadable(factor.by, why, _CURE)
        value = value.xreplace({term: sympy.log(total)})
    weight = sympy.expand(sympy.cancel(((value if factor.inverse else 1 / value) - 1) * total))
    if weight.has(total) or not weight.is_positive:
        raise unreadable(factor.by, f"the output is multiplied by {factor.by.name}, a function of logsumexp that is no sink", _CURE)
    return sympy.log(weight).xreplace(back)


def _is_normaliser(
    term: sympy.Expr, back: Mapping[sympy.Expr, sympy.Expr], score: sympy.Expr, keys: sympy.Expr, reader: Reader
) -> bool:
    """Whether this is the logsumexp of the same scores over all keys."""
    node, place = reader.opaque[int(term.args[0])], tuple(term.args[1:])
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    shape = shape_of(source)
    dims = sequence(argument(node, 1, "dim"))
    if len(dims) != 1:
        return False
    dim = dim_of(dims[0], len(shape))
    after = place[dim + 1 :] if argument(node, 2, "keepdim", False) else place[dim:]
    value = number(reader.at(source, (*place[:dim], J, *after))).xreplace(back)
    return bool(shape[dim] == keys and (value == score or sympy.expand(value - score) == 0))

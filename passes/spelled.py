"""What does an op that is a whole attention compute, spelled out in the ops that the reader knows?

SDPA and the ATen ops that it becomes after dispatch. The spelling stands beside the op: it is dead code if the site is rejected.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from compile_attn.passes import emit
from compile_attn.passes.graph import is_tensor, same_size, val
from compile_attn.passes.indices import op_name

_aten = torch.ops.aten
_WHOLE = (  # ops that take queries, keys, values, and a mask, dropout, causality and a scale by these names
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_CURE = "call F.scaled_dot_product_attention instead"


@dataclass(frozen=True)
class Spelled:
    """Scores, probabilities, and the node that the attention ends with."""

    scores: fx.Node
    probabilities: fx.Node
    finish: fx.Node


def is_whole_attention(node: fx.Node) -> bool:
    """Whether this op is an attention from end to end, known or not."""
    return "attention" in op_name(node)


def spell_out(graph: fx.Graph, node: fx.Node) -> Spelled | tuple[str, str]:
    """The op in matmul, mul, masked_fill, add, softmax and matmul; or why it cannot be read, and the cure."""
    if op_name(node) not in _WHOLE:
        return f"the fused op {op_name(node)} cannot be read", _CURE
    given = _arguments(node)
    if given["dropout_p"] > 0:
        return f"dropout is on (p = {given['dropout_p']})", "call model.eval() first"
    if given.get("dropout_mask") is not None:
        return f"{op_name(node)} has a mask of dropout", "call model.eval() first"
    q, k, v = (given[name] for name in ("query", "key", "value"))
    heads, kv_heads = (val(x).shape[-3] if val(x).dim() > 2 else 1 for x in (q, k))
    if op_name(node) != "scaled_dot_product_attention":
        if given["is_causal"] and not same_size(val(q).shape[-2], val(k).shape[-2]):
            return f"{op_name(node)} is causal over {val(q).shape[-2]} queries and {val(k).shape[-2]} keys", _CURE
        if heads != kv_heads:
            return f"{op_name(node)} has {heads} heads of queries and {kv_heads} of keys", _CURE
    finish = _only_output(node)
    if finish is None:
        return f"the statistics that {op_name(node)} returns beside its output are used", "use its output alone"
    with graph.inserting_before(node):
        if given.get("enable_gqa") and heads != kv_heads:
            times = [heads // val(x).shape[-3] for x in (k, v)]
            k, v = (
                emit.call(graph, _aten.repeat_interleave.self_int, x, n, -3, like=node) for x, n in zip((k, v), times, strict=True)
            )
        scores = _scores(graph, node, q, k, given)
        weights = emit.call(graph, _aten.softmax.int, scores, -1, like=node)
        emit.call(graph, _aten.matmul.default, weights, v, like=node)
    return Spelled(scores, weights, finish)


def _scores(graph: fx.Graph, node: fx.Node, q: fx.Node, k: fx.Node, given: dict[str, Any]) -> fx.Node:
    mask, scale = given.get("attn_mask", given.get("attn_bias")), given["scale"]
    keys = emit.call(graph, _aten.transpose.int, k, -2, -1, like=node)
    product = emit.call(graph, _aten.matmul.default, q, keys, like=node)
    factor = scale if scale is not None else 1.0 / math.sqrt(val(q).shape[-1])
    scores = emit.call(graph, _aten.mul.Tensor, product, factor, like=node)
    if given["is_causal"]:
        square = emit.call(graph, _aten.ones_like.default, scores, like=node)
        lower = emit.call(graph, _aten.tril.default, square, like=node)
        hidden = emit.call(graph, _aten.eq.Scalar, lower, 0, like=node)
        scores = emit.call(graph, _aten.masked_fill.Scalar, scores, hidden, -math.inf, like=node)
    if mask is not None and val(mask).dtype == torch.bool:
        hidden = emit.call(graph, _aten.logical_not.default, mask, like=node)
        return emit.call(graph, _aten.masked_fill.Scalar, scores, hidden, -math.inf, like=node)
    return scores if mask is None else emit.call(graph, _aten.add.Tensor, scores, mask, like=node)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument by its name, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = {arg.name: node.kwargs.get(arg.name, arg.default_value) for arg in schema}
    return {**given, **dict(zip((arg.name for arg in schema), node.args, strict=False))}


def _only_output(node: fx.Node) -> fx.Node | None:
    """The node of the output; None where something else that the op returns is used."""
    if is_tensor(node):
        return node
    used = [user for user in node.users if user.users]
    return used[0] if len(used) == 1 and used[0].target is operator.getitem and used[0].args[1] == 0 else None

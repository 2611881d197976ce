"""Which keys does a site see, where the user narrows it to a block-sparse mask?

The mask becomes part of the site's spec, before a kernel is chosen: nothing that follows knows a second way to hide a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sympy.logic.boolalg import And

from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.passes.contractions import depth, is_contraction, operands
from compile_attn.passes.graph import downstream, is_tensor, location, placeholders, val
from compile_attn.passes.indices import as_expr, op_name, shape_of
from compile_attn.passes.masks import classify, sees_itself
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.recognise import AttentionSite, Operand
from compile_attn.passes.report import Rejected

ASKED = "asked for by block_sparse"


def impose(sites: Sequence[AttentionSite], params: BlocksparseParams | None, rejected: Sequence[Rejected]) -> list[AttentionSite]:
    """The sites, those of `params.layers` with its mask beside their own. ValueError where it does not fit one."""
    if params is None or not sites:
        return list(sites)
    layers = range(len(sites)) if params.layers is None else params.layers
    if max(layers) >= len(sites):
        others = f"; of another: {rejected[0].reason}" if rejected else ""
        raise ValueError(f"block_sparse: layers={params.layers}; attention that can be read is at {len(sites)} sites{others}")
    return [_narrowed(at, site, params) if at in layers else site for at, site in enumerate(sites)]


def check_lengths(sites: Sequence[AttentionSite], params: BlocksparseParams | None) -> None:
    """Of a call with whole sequences: are there at most max_seqlen keys? Comparing a symbol guards the compiled call."""
    if params is None:
        return
    for site in sites:
        keys = _length(site.k[0])
        if site.asked and keys > params.max_seqlen:
            raise ValueError(
                f"block_sparse: {int(keys)} keys, and max_seqlen={params.max_seqlen}; make it larger, or the sequence shorter"
            )


def unnarrowed(normalized: Normalized, sites: Sequence[AttentionSite], params: BlocksparseParams | None) -> list[Rejected]:
    """Where tokens are mixed as attention without a softmax does, though every attention is to be narrowed; after sites are fused.

    That is a sum over all tokens of a product of two tensors of the call: values by shares, or, as in linear attention, keys by
    values. Where no rows of tokens come of it, as in pooling, it is none.
    """
    if params is None or params.layers is not None:
        return []
    graph = normalized.module.graph
    data = {node for node in placeholders(graph) if is_tensor(node) and node not in normalized.constants}
    for node in graph.nodes:  # a size says nothing of what is in a tensor
        if not data.isdisjoint(node.all_input_nodes) and op_name(node) != "sym_size":
            data.add(node)
    products = [node for node in graph.nodes if is_contraction(node) and data.issuperset(operands(node))]
    keys = {as_expr(_length(site.k[0])) for site in sites}
    queries = {as_expr(_length(site.q[0])) for site in sites}
    rows = {node for node in products if queries.intersection(shape_of(node))}
    found = [node for node in products if depth(node) in keys and not rows.isdisjoint({node} | downstream([node]))]
    why = "a sum over all tokens of a product, with no softmax before it, which block_sparse cannot narrow"
    cure = f"say by layers=range({len(sites)}) that it is meant for the attention with a softmax alone, or write this with one"
    return [Rejected(why, location(node), cure) for node in found]


def _alike(site: AttentionSite) -> str:
    """Rows of a constant number, without an axis of heads beside them, may be sequences or heads: a user must say."""
    axes = "".join(site.q[0].axes)
    if "b" in axes or "1" in axes or axes.count("h") != 1 or site.spec.num_q_heads == 1:
        return ""
    return " (if they are sequences of one head, give heads an axis of their own: unsqueeze(1))"


def _length(operand: Operand) -> Any:
    """Its tokens, a number or a symbol."""
    dims = [dim for dim, axis in enumerate(operand.axes) if "t" in axis]
    return val(operand.node).shape[dims[0]] // operand.heads[dims[0]] if dims else 1


def _narrowed(at: int, site: AttentionSite, params: BlocksparseParams) -> AttentionSite:
    spec, where = site.spec, f"block_sparse: attention site {at} ({site.where.module or site.where.node})"
    cure = "say by layers which sites it is meant for"
    if (spec.num_q_heads, spec.num_kv_heads) != (params.num_heads, params.num_kv_heads):
        raise ValueError(
            f"{where} has {spec.num_q_heads} query heads and {spec.num_kv_heads} KV heads{_alike(site)}, and "
            f"num_heads={params.num_heads}, num_kv_heads={params.num_kv_heads}; give the model's own, of one rank, or {cure}"
        )
    if not spec.mask.causal():
        raise ValueError(f"{where} is not causal ({spec.mask.words()}); {cure}")
    visible = And(spec.mask.predicate(), params.mask().predicate())
    if not sees_itself(visible, spec.num_q_heads):
        raise ValueError(f"{where} might leave a query without keys, with its own mask ({spec.mask.words()}); {cure}")
    return replace(site, spec=replace(spec, mask=classify(visible, spec.num_q_heads)), asked=ASKED)

"""Which keys does a site see, where the user narrows it to a block-sparse mask?

The mask becomes part of the site's spec, before a kernel is chosen: nothing that follows knows a second way to hide a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sympy.logic.boolalg import And

from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.passes.graph import val
from compile_attn.passes.masks import classify, sees_itself
from compile_attn.passes.recognise import AttentionSite
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
        operand = site.k[0]
        dims = [dim for dim, axis in enumerate(operand.axes) if "t" in axis]
        keys = val(operand.node).shape[dims[0]] // operand.heads[dims[0]] if dims else 1
        if site.asked and keys > params.max_seqlen:
            raise ValueError(
                f"block_sparse: {int(keys)} keys, and max_seqlen={params.max_seqlen}; make it larger, or the sequence shorter"
            )


def _narrowed(at: int, site: AttentionSite, params: BlocksparseParams) -> AttentionSite:
    spec, where = site.spec, f"block_sparse: attention site {at} ({site.where.module or site.where.node})"
    cure = "say by layers which sites it is meant for"
    if (spec.num_q_heads, spec.num_kv_heads) != (params.num_heads, params.num_kv_heads):
        raise ValueError(
            f"{where} has {spec.num_q_heads} query heads and {spec.num_kv_heads} KV heads, and num_heads={params.num_heads}, "
            f"num_kv_heads={params.num_kv_heads}; give the model's own, of one rank, or {cure}"
        )
    if not spec.mask.causal():
        raise ValueError(f"{where} is not causal ({spec.mask.words()}); {cure}")
    visible = And(spec.mask.predicate(), params.mask().predicate())
    if not sees_itself(visible, spec.num_q_heads):
        raise ValueError(f"{where} might leave a query without keys, with its own mask ({spec.mask.words()}); {cure}")
    return replace(site, spec=replace(spec, mask=classify(visible, spec.num_q_heads)), asked=ASKED)

"""When does torch's own scaled_dot_product_attention serve a stateless site?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from compile_attn.kernels.backend import Backend
from compile_attn.kernels.evaluate import constant, evaluator
from compile_attn.kernels.mask import Bidirectional, Causal
from compile_attn.kernels.spec import AttentionSpec, Feature


class SdpaBackend(Backend):
    """Any mask and bias, as a mask tensor where SDPA has no argument for it; no softcap, no sinks, no other score."""

    name = "sdpa"
    features = frozenset(Feature) - {Feature.SOFTCAP, Feature.SCORE, Feature.SINKS}
    phases = frozenset({"stateless"})

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        gqa, scale = spec.num_q_heads != spec.num_kv_heads, spec.scale
        if scale <= 0:  # kernels hide keys by -inf, and multiply by the scale afterwards: the queries take its sign
            q, scale = (-q, -scale) if scale < 0 else (q * 0, 1.0)
        if spec.bias is None and isinstance(spec.mask, Bidirectional):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
        if spec.bias is None and isinstance(spec.mask, Causal) and q.shape[2] == k.shape[2]:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
        mask = _mask(q, k, captured, spec)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _mask(q: torch.Tensor, k: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
    """The predicate as a bool mask, or with a bias as an additive one, broadcastable to [B, Hq, Tq, Tk]."""
    env = {
        "b": torch.arange(q.shape[0], device=q.device)[:, None, None, None],
        "h": torch.arange(q.shape[1], device=q.device)[:, None, None],
        "i": torch.arange(q.shape[2], device=q.device)[:, None],
        "j": torch.arange(k.shape[2], device=q.device),
        "captured": captured,
        "dtype": torch.promote_types(q.dtype, torch.float32),
    }
    mask = constant(evaluator(spec.mask.predicate())(env), q.device)
    if spec.bias is not None:
        mask = torch.where(mask, constant(evaluator(spec.bias)(env), q.device), float("-inf"))
        # Softmax knows no shift, but rounding does: what the heaviest keys get is to be near 0.
        highest = mask.detach().amax(-1, keepdim=True)
        mask = (mask - torch.where(highest.isfinite(), highest, 0)).to(q.dtype)
    leading = mask.shape[:-2] if mask.dim() > 2 else ()
    return mask.expand(*leading, q.shape[2], k.shape[2])

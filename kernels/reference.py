"""What is right? Attention in plain torch, on any device, for any spec: every other kernel is held to this one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from compile_attn.kernels.backend import Backend, Paged
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.spec import AttentionSpec, Feature


class ReferenceBackend(Backend):
    """Serves every spec in float32 or float64. `attend` reads lengths on the host: no CUDA graphs."""

    name = "reference"
    features = frozenset(Feature)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        return attention(q, k, v, i, batch, captured, spec)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        out = q.new_zeros((q.shape[0], q.shape[1], kv.v_pages.shape[3]))
        starts, lengths = kv.cu_seqlens_q.tolist(), kv.seq_lens.tolist()
        for row, length in enumerate(lengths):
            begin, end = starts[row], starts[row + 1]
            if begin == end:
                continue
            pages = kv.block_table[row, : math.ceil(length / kv.k_pages.shape[1])].long()
            k, v = (_gather(pool, pages, length, q.dtype) for pool in (kv.k_pages, kv.v_pages))
            k = k if kv.k_scale is None else k * kv.k_scale.to(k.dtype)
            v = v if kv.v_scale is None else v * kv.v_scale.to(v.dtype)
            batch = torch.full((1, 1, 1, 1), row, device=q.device)
            queries = q[begin:end].transpose(0, 1)[None]
            part = attention(queries, k, v, kv.positions[begin:end, None], batch, captured, spec)
            out[begin:end] = part[0].transpose(0, 1)
        return out


def _gather(pool: torch.Tensor, pages: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """The first `length` tokens of a sequence as [1, Hkv, length, D]: nothing beyond them is read (Law 8)."""
    return pool[pages].flatten(0, 1)[:length].transpose(0, 1)[None].to(dtype)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    b: torch.Tensor,
    captured: Sequence[torch.Tensor],
    spec: AttentionSpec,
) -> torch.Tensor:
    """softmax_j(score(s, b, h, i, j)) v in float32 or wider; positions i [Tq, 1], sequences b [B, 1, 1, 1]; the dtype of q."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = spec.num_q_heads // spec.num_kv_heads
    grouped = q.to(dtype).unflatten(1, (spec.num_kv_heads, group))
    s = (grouped @ k.to(dtype)[:, :, None].transpose(-1, -2)).flatten(1, 2)
    j = torch.arange(k.shape[2], device=q.device)
    h = torch.arange(spec.num_q_heads, device=q.device)[:, None, None]
    env = {"s": s, "b": b, "h": h, "i": i, "j": j, "captured": captured}
    score = torch.as_tensor(_score(spec)(env)).to(dtype).expand(s.shape)
    visible = torch.as_tensor(_visible(spec)(env), device=q.device)
    score = score.masked_fill(~visible, -math.inf)
    if spec.sinks is not None:
        sink = torch.as_tensor(evaluator(spec.sinks)(env), device=q.device).to(dtype).expand(*s.shape[:3], 1)
        probabilities = torch.cat([score, sink], -1).softmax(-1)[..., :-1]
    else:
        probabilities = score.softmax(-1)
    out = probabilities.unflatten(1, (spec.num_kv_heads, group)) @ v.to(dtype)[:, :, None]
    return out.flatten(1, 2).to(q.dtype)


@functools.lru_cache(maxsize=1024)
def _score(spec: AttentionSpec):  # type: ignore[no-untyped-def]
    return evaluator(spec.expression())


@functools.lru_cache(maxsize=1024)
def _visible(spec: AttentionSpec):  # type: ignore[no-untyped-def]
    return evaluator(spec.mask.predicate())

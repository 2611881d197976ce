"""What is right? Attention in plain torch, on any device, for any spec: every other kernel is held to this one.

On the CPU, where reading lengths on the host costs nothing, decode rows are computed together and each longer row by
itself, at its own length. Elsewhere shapes follow from the arguments' shapes alone, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from compile_attn.kernels.backend import Backend, Paged
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.spec import AttentionSpec, Feature

# Most elements of gathered keys at a time without host reads: 64 Mi float32 are 256 MiB, small beside a GPU's pool.
_MAX_GATHERED = 1 << 26


class ReferenceBackend(Backend):
    """Serves every spec in float32, or float64 if the queries are."""

    name = "reference"
    features = frozenset(Feature)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        return attention(q, k, v, i, batch, None, captured, spec)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        if q.device.type == "cpu":
            return _attend_on_host(q, kv, captured, spec)
        return _attend_without_host(q, kv, captured, spec)


def _attend_on_host(q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
    out = q.new_zeros((q.shape[0], q.shape[1], kv.v_pages.shape[3]))
    starts, lengths = kv.cu_seqlens_q.tolist(), kv.seq_lens.tolist()
    new = [end - begin for begin, end in itertools.pairwise(starts)]
    decodes = [row for row, count in enumerate(new) if count == 1]
    if decodes:
        tokens = torch.tensor([starts[row] for row in decodes])
        rows = torch.tensor(decodes)
        part = _rows(
            q[tokens, None], kv, rows, kv.positions[tokens, None], max(lengths[row] for row in decodes), captured, spec
        )
        out[tokens] = part[:, 0]
    for row, count in enumerate(new):
        if count > 1:
            span = slice(starts[row], starts[row + 1])
            positions = kv.positions[None, span]
            out[span] = _rows(q[None, span], kv, torch.tensor([row]), positions, lengths[row], captured, spec)[0]
    return out


def _attend_without_host(
    q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec
) -> torch.Tensor:
    """Every token as a row of its own, over the whole width of the table, as many at a time as memory allows."""
    longest = kv.block_table.shape[1] * kv.k_pages.shape[1]
    step = max(1, _MAX_GATHERED // max(1, longest * kv.k_pages.shape[2] * max(spec.head_dim, spec.head_dim_v)))
    parts = [q.new_zeros((0, q.shape[1], kv.v_pages.shape[3]))]
    for first in range(0, q.shape[0], step):
        span = slice(first, first + step)
        rows = kv.token_seq[span].long()
        parts.append(_rows(q[span, None], kv, rows, kv.positions[span, None], longest, captured, spec)[:, 0])
    real = torch.arange(q.shape[0], device=q.device) < kv.cu_seqlens_q[-1]
    return torch.cat(parts).masked_fill(~real[:, None, None], 0)


def _rows(
    q: torch.Tensor,
    kv: Paged,
    rows: torch.Tensor,
    positions: torch.Tensor,
    longest: int,
    captured: Sequence[torch.Tensor],
    spec: AttentionSpec,
) -> torch.Tensor:
    """q [N, Tq, Hq, D] of sequences `rows` [N] at positions [N, Tq], over `longest` slots -> [N, Tq, Hq, Dv]."""
    slots = torch.arange(longest, device=q.device)
    page_size = kv.k_pages.shape[1]
    # Beyond its sequence a table may hold anything; the page read there is discarded below.
    pages = kv.block_table[rows][:, slots // page_size].long().clamp(0, kv.k_pages.shape[0] - 1)
    owned = slots < kv.seq_lens[rows, None]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = _gather(kv.k_pages, pages, slots % page_size, owned, kv.k_scale, dtype)
    v = _gather(kv.v_pages, pages, slots % page_size, owned, kv.v_scale, dtype)
    out = attention(
        q.transpose(1, 2),
        k,
        v,
        positions[:, None, :, None],
        rows[:, None, None, None],
        owned[:, None, None],
        captured,
        spec,
    )
    return out.transpose(1, 2)


def _gather(
    pool: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    owned: torch.Tensor,
    scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Slots as [N, Hkv, L, D], zero where the sequence does not own them: 0 * NaN of a freed page is NaN (Law 8)."""
    if pool.dtype.itemsize == 1:  # fp8 has no masked_fill, and indexing it is not everywhere
        found = pool.view(torch.uint8)[pages, offsets].view(pool.dtype).to(dtype)
    else:
        found = pool[pages, offsets].to(dtype)
    found = found.masked_fill_(~owned[:, :, None, None], 0)
    if scale is not None:
        found = found * scale.to(dtype).reshape(-1, 1)  # one, or one a KV head
    return found.transpose(1, 2)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    i: torch.Tensor,
    b: torch.Tensor,
    owned: torch.Tensor | None,
    captured: Sequence[torch.Tensor],
    spec: AttentionSpec,
) -> torch.Tensor:
    """softmax_j(score(s, b, h, i, j)) v in float32 or wider, returned in the dtype of q; a row without keys gives 0.

    q [N, Hq, Tq, D], k [N, Hkv, L, D], v [N, Hkv, L, Dv]; positions i and sequences b broadcast against [N, Hq, Tq, L];
    `owned`, likewise, says which keys exist.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = spec.num_q_heads // spec.num_kv_heads
    # The heads of a group are rows of one product, so that no key is copied for each.
    grouped = q.to(dtype).reshape(q.shape[0], spec.num_kv_heads, group * q.shape[2], q.shape[3])
    s = (grouped @ k.to(dtype).transpose(-1, -2)).view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    j = torch.arange(k.shape[2], device=q.device)
    h = torch.arange(spec.num_q_heads, device=q.device)[:, None, None]
    env = {"s": s, "b": b, "h": h, "i": i, "j": j, "captured": captured, "dtype": dtype}
    score = torch.as_tensor(evaluator(spec.expression())(env), device=q.device).to(dtype).expand(s.shape)
    hidden = ~torch.as_tensor(evaluator(spec.mask.predicate())(env), device=q.device)
    hidden = hidden if owned is None else hidden | ~owned
    score = score.masked_fill(hidden, -math.inf)
    sink = None
    if spec.sinks is not None:
        sink = torch.as_tensor(evaluator(spec.sinks)(env), device=q.device).to(dtype).expand(*s.shape[:3], 1)
    probabilities = _softmax(score, sink).view(grouped.shape[0], grouped.shape[1], grouped.shape[2], k.shape[2])
    return (probabilities @ v.to(dtype)).view(*q.shape[:3], v.shape[3]).to(q.dtype)


def _softmax(score: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last axis, where the sink takes a share that goes nowhere; zeros where nothing is visible."""
    if sink is not None:
        score = torch.cat([score, sink], -1)
    probabilities = torch.softmax(score, -1)
    probabilities = probabilities if sink is None else probabilities[..., :-1]
    nothing = score.amax(-1, keepdim=True) == -math.inf
    return probabilities.masked_fill(nothing, 0)

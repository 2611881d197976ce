"""What is right? Attention in plain torch, on any device, for any spec: every other kernel is held to this one.

On the CPU, where reading lengths on the host costs nothing, only pages that a mask can show are read, and short
rows are computed together. Elsewhere all shapes follow from the arguments' shapes, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from compile_attn.kernels.backend import FP8, Backend, Paged
from compile_attn.kernels.evaluate import Evaluate, constant, evaluator
from compile_attn.kernels.spec import AttentionSpec, Feature

# Most elements of gathered keys at a time. On a CPU 2^17 float32, 512 KiB, stay in a core's cache (64 decodes over
# 50 to 680 tokens, 4 KV heads of 64, one busy core: 59 ms, with 2^22 161 ms). Elsewhere 2^26: 256 MiB, little
# beside a pool.
_MAX_GATHERED_CPU, _MAX_GATHERED = 1 << 17, 1 << 26
# Most queries of one row at a time: bounds the scores, Hq * 256 * L, and lets a causal mask skip keys.
_MAX_QUERIES = 256


class ReferenceBackend(Backend):
    """Serves every spec in float32, or float64 if the queries are."""

    name = "reference"
    features = frozenset(Feature)
    kv_dtypes = FP8

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        batch = torch.arange(q.shape[0], device=q.device)[:, None, None, None]
        i = torch.arange(q.shape[2], device=q.device)[:, None]
        j = torch.arange(k.shape[2], device=q.device)
        return attention(q, k, v, batch, i, j, None, captured, spec)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        if q.device.type == "cpu":
            return _attend_on_host(q, kv, captured, spec)
        return _attend_without_host(q, kv, captured, spec)


# Work of the host path: queries [first, first + count) of one row, and the pages [low, high) that they can see.
_Part = tuple[int, int, int, int, int]  # first, count, row, low, high


def _attend_on_host(q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
    out = q.new_zeros((q.shape[0], q.shape[1], kv.v_pages.shape[3]))
    parts = list(_parts(kv.cu_seqlens_q.tolist(), kv.seq_lens.tolist(), kv.k_pages.shape[1], spec))
    page_size, heads, dim = kv.k_pages.shape[1:]
    for together in _together(parts, max(1, _MAX_GATHERED_CPU // (page_size * heads * dim))):
        first, count = together[0][:2]
        if len(together) == 1:
            tokens: slice | torch.Tensor = slice(first, first + count)
        else:
            tokens = torch.tensor([part[0] for part in together], device=q.device)
        rows, lows = (torch.tensor([part[at] for part in together], device=q.device) for at in (2, 3))
        queries = q[tokens].view(len(together), count, *q.shape[1:])
        positions = kv.positions[tokens].view(len(together), count)
        width = max(part[4] - part[3] for part in together)
        out[tokens] = _rows(queries, kv, rows, positions, lows, width, captured, spec).flatten(0, 1)
    return out


def _parts(starts: list[int], lengths: list[int], page_size: int, spec: AttentionSpec) -> Iterator[_Part]:
    causal, window = spec.mask.causal(), spec.mask.window()
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        for first in range(begin, end, _MAX_QUERIES):
            count = min(_MAX_QUERIES, end - first)
            position = lengths[row] - (end - first)
            last_key = position + count if causal else lengths[row]
            low = 0 if window is None else max(0, position - window) // page_size
            yield first, count, row, low, -(-last_key // page_size)


def _together(parts: Sequence[_Part], max_pages: int) -> Iterator[list[_Part]]:
    """Single queries in groups of similar width, as many as `max_pages` allow; longer parts alone."""
    yield from ([part] for part in parts if part[1] > 1)
    group: list[_Part] = []
    for part in sorted((part for part in parts if part[1] == 1), key=lambda part: part[4] - part[3]):
        if group and (len(group) + 1) * (part[4] - part[3]) > max_pages:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _attend_without_host(q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
    """Every token as a row of its own, over the whole width of the table, as many at a time as memory allows."""
    width = kv.block_table.shape[1]
    step = max(1, _MAX_GATHERED // max(1, width * kv.k_pages[0].numel()))
    outs = [q.new_zeros((0, q.shape[1], kv.v_pages.shape[3]))]
    for first in range(0, q.shape[0], step):
        span = slice(first, first + step)
        rows = kv.token_seq[span].long()
        part = _rows(q[span, None], kv, rows, kv.positions[span, None], torch.zeros_like(rows), width, captured, spec)
        outs.append(part[:, 0])
    real = torch.arange(q.shape[0], device=q.device) < kv.cu_seqlens_q[-1]
    return torch.cat(outs).masked_fill(~real[:, None, None], 0)


def _rows(
    q: torch.Tensor,
    kv: Paged,
    rows: torch.Tensor,
    positions: torch.Tensor,
    lows: torch.Tensor,
    width: int,
    captured: Sequence[torch.Tensor],
    spec: AttentionSpec,
) -> torch.Tensor:
    """q [N, Tq, Hq, D] of sequences `rows` at [N, Tq], over `width` pages from `lows` on -> [N, Tq, Hq, Dv]."""
    page_size = kv.k_pages.shape[1]
    page = lows[:, None] + torch.arange(width, device=q.device)
    # Beyond its sequence a table may hold anything; what is read through it there is not owned.
    table = kv.block_table[rows[:, None], page.clamp(max=kv.block_table.shape[1] - 1)]
    table = table.clamp(0, kv.k_pages.shape[0] - 1)
    j = (lows * page_size)[:, None] + torch.arange(width * page_size, device=q.device)
    owned = j < kv.seq_lens[rows, None]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = _gather(kv.k_pages, table, kv.k_scale, dtype)
    v = _gather(kv.v_pages, table, kv.v_scale, dtype)
    # A freed page may hold NaN, and 0 * NaN is NaN (Law 8); a score of such a key is replaced, not multiplied.
    v.masked_fill_(~owned[:, None, :, None], 0)
    b, i = rows[:, None, None, None], positions[:, None, :, None]
    out = attention(q.transpose(1, 2), k, v, b, i, j[:, None, None], owned[:, None, None], captured, spec)
    return out.transpose(1, 2)


def _gather(pool: torch.Tensor, table: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Whole pages as [N, Hkv, width * PS, D]."""
    stored = pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool  # bytes: not every device indexes fp8
    found = stored.index_select(0, table.flatten()).view(pool.dtype).to(dtype)
    found = found.view(table.shape[0], table.shape[1] * pool.shape[1], *pool.shape[2:])
    if scale is not None:
        found = found * scale.to(dtype).reshape(-1, 1)  # one, or one a KV head
    return found.transpose(1, 2)


@functools.lru_cache(maxsize=1024)
def _read(spec: AttentionSpec) -> tuple[Evaluate, Evaluate, Evaluate | None]:
    """Score, mask and sinks as functions of tensors: nothing symbolic happens in a step."""
    sinks = None if spec.sinks is None else evaluator(spec.sinks)
    return evaluator(spec.expression()), evaluator(spec.mask.predicate()), sinks


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    i: torch.Tensor,
    j: torch.Tensor,
    owned: torch.Tensor | None,
    captured: Sequence[torch.Tensor],
    spec: AttentionSpec,
) -> torch.Tensor:
    """softmax_j(score(s, b, h, i, j)) v in float32 or wider, returned in the dtype of q; a row without keys gives 0.

    q [N, Hq, Tq, D], k [N, Hkv, L, D], v [N, Hkv, L, Dv]; sequences b and positions i, j broadcast against
    [N, Hq, Tq, L]; `owned`, likewise, says which keys exist.
    """
    score_of, visible_of, sink_of = _read(spec)
    dtype = torch.promote_types(q.dtype, torch.float32)
    # The heads of a group are rows of one product, so that no key is copied for each.
    grouped = (q.shape[0], spec.num_kv_heads, q.shape[1] // spec.num_kv_heads * q.shape[2])
    s = q.to(dtype).reshape(*grouped, q.shape[3]) @ k.to(dtype).transpose(-1, -2)
    s = s.view(*q.shape[:3], k.shape[2])
    h = torch.arange(spec.num_q_heads, device=q.device)[:, None, None]
    env = {"s": s, "b": b, "h": h, "i": i, "j": j, "captured": captured, "dtype": dtype}
    score = constant(score_of(env), q.device, dtype).to(dtype).expand(s.shape)
    visible = constant(visible_of(env), q.device)
    score = score.masked_fill(~(visible if owned is None else visible & owned), -math.inf)
    sink = None
    if sink_of is not None:
        sink = constant(sink_of(env), q.device, dtype).to(dtype).expand(*s.shape[:3], 1)
    probabilities = _softmax(score, sink).reshape(*grouped, k.shape[2])
    return (probabilities @ v.to(dtype)).view(*q.shape[:3], v.shape[3]).to(q.dtype)


def _softmax(score: torch.Tensor, sink: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last axis, where the sink takes a share that goes nowhere; zeros where nothing is visible."""
    if sink is not None:
        score = torch.cat([score, sink], -1)
    probabilities = torch.softmax(score, -1)
    probabilities = probabilities if sink is None else probabilities[..., :-1]
    return probabilities.masked_fill(score.amax(-1, keepdim=True) == -math.inf, 0)

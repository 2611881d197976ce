"""Which token has the largest logit, on a GPU? Two launches, whatever the vocabulary: parts of rows, then rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHUNK = 8192  # logits of a program: 16 KiB of bfloat16; 16 programs read a row of 128k tokens
_MOST_PARTS = 128  # of a row; a program of a larger vocabulary reads more


@triton.jit  # type: ignore[untyped-decorator]
def parts(logits, best, token, stride, vocabulary, num_parts, PER: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest of a part and its place, the first of equals. NaN counts as infinity: both are no token."""
    row, part = tl.program_id(0), tl.program_id(1)
    highest = tl.full((), float("-inf"), tl.float32)
    place = tl.zeros((), tl.int32)
    for n in range(PER):
        at = (part * PER + n) * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits + row.to(tl.int64) * stride + at, mask=at < vocabulary, other=float("-inf")).to(tl.float32)
        x = tl.where(x != x, float("inf"), x)
        top, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        place = tl.where(top > highest, (part * PER + n) * CHUNK + index, place)
        highest = tl.maximum(highest, top)
    tl.store(best + row * num_parts + part, highest)
    tl.store(token + row * num_parts + part, place)


@triton.jit  # type: ignore[untyped-decorator]
def rows(best, token, out, num_parts, NOT_FINITE: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    x = tl.load(best + row * num_parts + part, mask=part < num_parts, other=float("-inf"))
    top, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    chosen = tl.load(token + row * num_parts + index).to(tl.int64)
    tl.store(out + row, tl.where(tl.abs(top) == float("inf"), NOT_FINITE, chosen))


def greedy(logits: torch.Tensor, not_finite: int) -> torch.Tensor:
    """The place of the largest of each row of logits [R, V]: [R] int64; `not_finite` where that is NaN or infinite."""
    count, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    chunk = min(_CHUNK, triton.next_power_of_2(vocabulary))
    per = triton.cdiv(triton.cdiv(vocabulary, chunk), _MOST_PARTS)
    num_parts = triton.cdiv(vocabulary, chunk * per)
    best = torch.empty((count, num_parts), dtype=torch.float32, device=logits.device)
    token = torch.empty_like(best, dtype=torch.int32)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            parts[(count, num_parts)](logits, best, token, logits.stride(0), vocabulary, num_parts, per, chunk, num_warps=8)
            rows[(count,)](best, token, out, num_parts, not_finite, triton.next_power_of_2(num_parts), num_warps=1)
    return out

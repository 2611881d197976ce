"""How do the parts of a row, one a split of its keys, become one softmax?"""

from __future__ import annotations

import triton
import triton.language as tl

from compile_attn.kernels.general_triton import _exp


@triton.jit  # type: ignore[untyped-decorator]
def _combined(row, used, splits, channel, parts, AT_ONCE: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of one row, one a split of its keys, to their common softmax."""
    acc = tl.full(channel.shape, 0.0, tl.float32)
    highest = float("-inf")
    total = 0.0
    for first in range(0, used, AT_ONCE):
        split = first + tl.arange(0, AT_ONCE)
        part = row * splits + split
        top = tl.load(parts.top + part, mask=split < used, other=float("-inf")) * PLAN.factor
        higher = tl.maximum(highest, tl.max(top, 0))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        weight = _exp(top - against, PLAN)
        fade = _exp(highest - against, PLAN)
        highest = higher
        total = total * fade + tl.sum(tl.load(parts.total + part, mask=split < used, other=0.0) * weight, 0)
        seen = (top > float("-inf"))[:, None] & (channel < PLAN.dim_v)
        values = tl.load(parts.acc + part[:, None] * PLAN.dim_v + channel, mask=seen, other=0.0)
        acc = acc * fade + tl.sum(values * weight[:, None], 0, keep_dims=True)
    return acc / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["splits"])  # type: ignore[untyped-decorator]
def combine(parts, out, splits, AT_ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Combines the parts of some rows of a tile, for one block of channels."""
    tile = tl.program_id(0)
    used = tl.load(parts.used + tile)
    if used <= 1:  # no rows, or written already
        return
    channel = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    begin = tl.program_id(1) * ROWS
    for r in range(begin, tl.minimum(begin + ROWS, PLAN.block_q * PLAN.group)):
        row = tile.to(tl.int64) * (PLAN.block_q * PLAN.group) + r
        place = tl.load(parts.place + row).to(tl.int64)
        if place >= 0:
            value = _combined(row, used, splits, channel, parts, AT_ONCE, PLAN)
            tl.store(out + place * PLAN.dim_v + channel, value.to(out.dtype.element_ty), mask=channel < PLAN.dim_v)

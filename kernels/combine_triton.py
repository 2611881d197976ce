"""How do the parts of a row, one for some of its keys each, become one softmax?"""

from __future__ import annotations

import triton
import triton.language as tl

from compile_attn.kernels.general_triton import exponential
from compile_attn.kernels.grid_triton import served


@triton.jit  # type: ignore[untyped-decorator]
def _combined(part, used, r, channel, parts, AT_ONCE: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The parts of a row, which is the r-th of its tile."""
    acc = tl.full(channel.shape, 0.0, tl.float32)
    highest = float("-inf")
    total = 0.0
    for some in range(0, used, AT_ONCE):
        each = some + tl.arange(0, AT_ONCE)
        real = each < used
        row = (part + each).to(tl.int64) * (PLAN.block_q * PLAN.group) + r
        top = tl.load(parts.top + row, mask=real, other=float("-inf")) * PLAN.factor
        higher = tl.maximum(highest, tl.max(top, 0))
        against = tl.where(higher == float("-inf"), 0.0, higher)
        weight = exponential(top - against, PLAN)
        fade = exponential(highest - against, PLAN)
        highest = higher
        total = total * fade + tl.sum(tl.load(parts.total + row, mask=real, other=0.0) * weight, 0)
        seen = (top > float("-inf"))[:, None] & (channel < PLAN.dim_v)
        values = tl.load(parts.acc + row[:, None] * PLAN.dim_v + channel, mask=seen, other=0.0)
        acc = acc * fade + tl.sum(values * weight[:, None], 0, keep_dims=True)
    return acc / tl.where(total == 0, 1.0, total)


@triton.jit(do_not_specialize=["batch", "num_tokens", "num_sequences"])  # type: ignore[untyped-decorator]
def combine(  # type: ignore[no-untyped-def]
    batch, parts, out, num_tokens, num_sequences,
    AT_ONCE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Combines the parts of some rows of a tile, for one block of channels."""
    tile = tl.program_id(0)
    if EARLY:  # brought up before the parts are complete
        tl.extra.cuda.gdc_wait()
    if PLAN.few > 0:  # nobody has announced the tiles of other sequences
        heads: tl.constexpr = PLAN.heads // PLAN.group
        used = tl.load(parts.used + tile, mask=served(tile // heads, batch, num_tokens, num_sequences, PLAN)[0], other=0)
    else:
        used = tl.load(parts.used + tile)
    if used <= 1:  # written already
        return
    part = tl.load(parts.first + tile)
    channel = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    begin = tl.program_id(1) * ROWS
    for r in range(begin, tl.minimum(begin + ROWS, PLAN.block_q * PLAN.group)):
        place = tl.load(parts.place + tile * (PLAN.block_q * PLAN.group) + r).to(tl.int64)
        if place >= 0:
            value = _combined(part, used, r, channel, parts, AT_ONCE, PLAN)
            tl.store(out + place * PLAN.dim_v + channel, value.to(out.dtype.element_ty), mask=channel < PLAN.dim_v)

"""How are keys and values written to pages on a GPU? One program a token and block of features; no host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # features a program: a token of 8 heads of 128; at 4 warps each thread stores 8 in a row, 16 bytes of bf16


@triton.jit  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    new,
    pages,
    slots,
    scale,
    num_slots,
    token_stride,
    head_stride,
    channel_stride,
    width,
    HEAD_DIM: tl.constexpr,
    LIMIT: tl.constexpr,
    SCALED: tl.constexpr,
    SCALE_PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot >= 0) & (slot < num_slots):
        feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = feature < width
        head, channel = feature // HEAD_DIM, feature % HEAD_DIM
        value = tl.load(new + token * token_stride + head * head_stride + channel * channel_stride, mask=inside, other=0.0)
        if SCALED:
            by = tl.load(scale + head, mask=inside, other=1.0) if SCALE_PER_HEAD else tl.load(scale)
            value = tl.div_rn(value.to(tl.float32), by.to(tl.float32))  # as torch divides; `/` is approximate
        if LIMIT > 0:  # fp8: saturate, where a plain cast gives NaN or infinity
            value = tl.clamp(value.to(tl.float32), -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tl.store(pages + slot * width + feature, value.to(pages.dtype.element_ty), mask=inside)


def write_pages(new: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """new [T, Hkv, D] of any strides into contiguous pages [P, PS, Hkv, D] at slots [T] int64; others are skipped."""
    tokens, heads, dim = new.shape
    width = heads * dim
    if tokens == 0:
        return
    limit = torch.finfo(pages.dtype).max if pages.dtype.itemsize == 1 else 0.0
    block = min(_BLOCK, triton.next_power_of_2(width))
    _write[(tokens, triton.cdiv(width, block))](
        new,
        pages,
        slots,
        slots if scale is None else scale,
        pages.shape[0] * pages.shape[1],
        *new.stride(),
        width,
        HEAD_DIM=dim,
        LIMIT=limit,
        SCALED=scale is not None,
        SCALE_PER_HEAD=scale is not None and scale.numel() > 1,
        BLOCK=block,
    )

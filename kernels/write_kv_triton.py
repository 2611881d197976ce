"""How are keys and values written to pages on a GPU? Both in one launch, a tile of tokens and features a program; no host read."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

# Elements of K, and of V, in a program: a token of 8 heads of 128. At 4 warps each thread moves 8 in a row, 16 bytes of bf16.
_TILE = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _read(new, token, real, first, strides, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Features from `first` on of some tokens, their heads side by side."""
    feature = first + tl.arange(0, BLOCK)
    head = feature // DIM
    place = head.to(tl.int64) * strides[1] + feature % DIM * strides[2]
    inside = real[:, None] & (feature < HEADS * DIM)[None, :]
    return tl.load(new + (token * strides[0])[:, None] + place[None, :], mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _read_scale(scale, first, HEADS: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of those features; None without one."""
    by = None
    if scale is not None:
        if PER_HEAD:
            feature = first + tl.arange(0, BLOCK)
            by = tl.load(scale + feature // DIM, mask=feature < HEADS * DIM, other=1.0)[None, :]
        else:
            by = tl.load(scale)
    return by


@triton.jit  # type: ignore[untyped-decorator]
def _put(value, by, pages, slot, held, first, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store them in contiguous pages, divided by the scale and in the dtype of the pages."""
    feature = first + tl.arange(0, BLOCK)
    inside = feature < HEADS * DIM
    if by is not None:
        value = tl.div_rn(value.to(tl.float32), by.to(tl.float32))  # as torch divides; `/` is approximate
    kind: tl.constexpr = pages.dtype.element_ty
    if kind.primitive_bitwidth == 8:  # fp8: saturate, where a plain cast gives NaN or infinity
        limit: tl.constexpr = 448.0 if kind == tl.float8e4nv else 57344.0
        value = tl.clamp(value.to(tl.float32), -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    at = pages + (slot * (HEADS * DIM))[:, None] + feature[None, :]
    tl.store(at, value.to(kind), mask=held[:, None] & inside[None, :])


# Not specialised: the number of tokens changes from step to step, and that of slots brings nothing.
@triton.jit(do_not_specialize=["num_tokens", "num_slots"])  # type: ignore[untyped-decorator]
def write(  # type: ignore[no-untyped-def]
    k, v, k_pages, v_pages, slots, k_scale, v_scale, k_strides, v_strides, num_tokens, num_slots,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, K_PER_HEAD: tl.constexpr, V_PER_HEAD: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = token < num_tokens
    first = tl.program_id(1) * BLOCK
    # All is read before anything is stored, so that it is waited for once; what belongs to a pad token is read in vain.
    slot = tl.load(slots + token, mask=real, other=-1)
    key = _read(k, token, real, first, k_strides, HEADS, DIM, BLOCK)
    value = _read(v, token, real, first, v_strides, HEADS, DIM_V, BLOCK)
    k_by = _read_scale(k_scale, first, HEADS, DIM, K_PER_HEAD, BLOCK)
    v_by = _read_scale(v_scale, first, HEADS, DIM_V, V_PER_HEAD, BLOCK)
    held = (slot >= 0) & (slot < num_slots)
    _put(key, k_by, k_pages, slot, held, first, HEADS, DIM, BLOCK)
    _put(value, v_by, v_pages, slot, held, first, HEADS, DIM_V, BLOCK)


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Tokens and features of a program, and programs a token."""
    block = min(_TILE, triton.next_power_of_2(width))
    return _TILE // block, block, triton.cdiv(width, block)


def write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """k, v [T, Hkv, D or Dv] of any strides into contiguous pages [P, PS, Hkv, D or Dv] at slots [T] int64; others are skipped."""
    tokens, heads, dim = k.shape
    dim_v = v.shape[2]
    if tokens == 0:
        return
    per_token, block, parts = _tile(heads * max(dim, dim_v))
    with torch.cuda.device_of(k):  # type: ignore[no-untyped-call]
        write[(-(-tokens // per_token), parts)](
            k, v, k_pages, v_pages, slots, k_scale, v_scale, k.stride(), v.stride(), tokens, k_pages.shape[0] * k_pages.shape[1],
            heads, dim, dim_v, k_scale is not None and k_scale.numel() > 1, v_scale is not None and v_scale.numel() > 1,
            per_token, block,
        )  # fmt: skip

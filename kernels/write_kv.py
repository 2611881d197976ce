"""How do new keys and values reach their pages? This file is the only writer of pages during a step."""

from __future__ import annotations

import torch

from compile_attn.kernels.backend import FP8


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Token t goes to page slot // PS, offset slot % PS; a negative slot is skipped.

    k [T, Hkv, D], v [T, Hkv, Dv], k_pages [P, PS, Hkv, D], v_pages [P, PS, Hkv, Dv], slot_mapping [T] int64. Pages
    hold x, or with a scale, one or one a KV head, x / scale; fp8 pages saturate.
    """
    _check(k, v, k_pages, v_pages, slot_mapping)
    if k.is_cuda:
        from compile_attn.kernels.write_kv_triton import write_pages

        write_pages(k, v, k_pages, v_pages, slot_mapping, k_scale, v_scale)
        return
    keep = (slot_mapping >= 0).nonzero()[:, 0]
    slots = slot_mapping[keep]
    for new, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        stored = _stored(new[keep], pages.dtype, scale)
        if pages.dtype in FP8:  # bytes: index_copy_ knows no fp8
            stored, pages = stored.view(torch.uint8), pages.view(torch.uint8)
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, stored)


def _stored(new: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        new = new.float() / scale.reshape(-1, 1)
    if dtype in FP8:
        limit = torch.finfo(dtype).max
        new = new.clamp(-limit, limit)
    return new.to(dtype)


def _check(k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor) -> None:
    for name, new, pages in (("k", k, k_pages), ("v", v, v_pages)):
        if new.shape[1:] != pages.shape[2:] or new.shape[0] != slots.shape[0]:
            raise ValueError(
                f"write_kv: {name} {list(new.shape)} does not fit {list(pages.shape)} and {slots.shape[0]} slots; "
                f"{name} must be [T, Hkv, D], its pages [P, PS, Hkv, D], with T slots"
            )
        if not pages.is_contiguous():
            raise ValueError(f"write_kv: {name}_pages have strides {pages.stride()}; pages must be contiguous [P, PS, Hkv, D]")

"""How do new keys and values reach their pages? This file is the only writer of pages during a step."""

from __future__ import annotations

import torch


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

    k [T, Hkv, D], v [T, Hkv, Dv], k_pages [P, PS, Hkv, D], v_pages [P, PS, Hkv, Dv], slot_mapping [T] int64. Pages of an fp8
    dtype hold saturate(x / scale).
    """
    if k.is_cuda:
        # No host read: pad tokens repeat the first token's write, which wins nothing and changes nothing.
        first = slot_mapping[:1].clamp(min=0)
        padding = slot_mapping < 0
        slots = torch.where(padding, first, slot_mapping)
        k, v = (torch.where(padding[:, None, None], new[:1], new) for new in (k, v))
    else:
        keep = (slot_mapping >= 0).nonzero()[:, 0]
        slots, k, v = slot_mapping[keep], k[keep], v[keep]
    for new, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, slots, _stored(new, pages.dtype, scale))


def _stored(new: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is not None:
        new = new / scale
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        limit = torch.finfo(dtype).max
        new = new.clamp(-limit, limit)
    return new.to(dtype)

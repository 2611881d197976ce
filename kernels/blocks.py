"""How are whole pages moved: to another pool (swapping), or inside one (copy on write)?"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """dst[pairs[n, 1]] = src[pairs[n, 0]]; pools [P, ...] of equal page shape and dtype on any devices; pairs [N, 2] int64 on the CPU."""
    _check_pairs(pairs)
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(f"swap_blocks: pages {tuple(src.shape[1:])} {src.dtype} do not fit pages {tuple(dst.shape[1:])} {dst.dtype}")
    for source, target in pairs.tolist():
        dst[target].copy_(src[source], non_blocking=True)


def copy_blocks(k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copy page pairs[n, 0] to page pairs[n, 1] in every pool; pairs [N, 2] int64. All sources are read before any write."""
    _check_pairs(pairs)
    for pool in (*k_pages, *v_pages):
        source, target = pairs.to(pool.device).unbind(1)
        pool[target] = pool[source]


def _check_pairs(pairs: torch.Tensor) -> None:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [N, 2] int64, got {tuple(pairs.shape)} {pairs.dtype}")

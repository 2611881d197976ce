"""How are whole pages moved: to another pool (swapping), or inside one (copy on write)?"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """dst[pairs[n, 1]] = src[pairs[n, 0]] for two pools [P, ...] on any devices; pairs [N, 2] int64, on the CPU."""
    _check_pairs("swap_blocks", pairs, src.shape[0], dst.shape[0])
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"swap_blocks: pages {list(src.shape[1:])} of {src.dtype} do not fit {list(dst.shape[1:])} of {dst.dtype}; "
            f"both pools must come from the same layer layout"
        )
    for source, target in pairs.tolist():
        dst[target].copy_(src[source], non_blocking=True)


def copy_blocks(k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copy page pairs[n, 0] to page pairs[n, 1] in every pool; pairs [N, 2] int64. Reads precede writes."""
    for pool in (*k_pages, *v_pages):
        _check_pairs("copy_blocks", pairs, pool.shape[0], pool.shape[0])
        source, target = pairs.to(pool.device).unbind(1)
        # Bytes: not every device indexes fp8. index_* refuse a negative or too large page instead of wrapping around.
        stored = pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool
        stored.index_copy_(0, target, stored.index_select(0, source))


def _check_pairs(what: str, pairs: torch.Tensor, sources: int, targets: int) -> None:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{what}: pairs must be [N, 2] int64, not {list(pairs.shape)} {pairs.dtype}; pass (from, to) page numbers")
    if pairs.device.type != "cpu":  # reading them would wait for the device; there index_* check
        return
    wrong = [pair for pair in pairs.tolist() if not (0 <= pair[0] < sources and 0 <= pair[1] < targets)]
    if wrong:
        raise ValueError(f"{what}: no pages {wrong[0]} in pools of {sources} and {targets}; page numbers count from 0")

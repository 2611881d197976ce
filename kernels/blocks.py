"""How are whole pages moved: to another pool (swapping), or inside one (copy on write)?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def swap_blocks(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """dst[pairs[n, 1]] = src[pairs[n, 0]] for two pools [P, ...] on any devices; pairs [N, 2] int64, on the CPU.

    Reads precede writes. Nothing waits for a copy from or to pinned memory; it is done when the current stream has come to it.
    """
    check_swap(src, dst, pairs)
    if not len(pairs):
        return
    src, dst = _bytes(src), _bytes(dst)
    if src.device.type == "cpu" and dst.device.type != "cpu":
        swap_in(src, dst, pairs)
    else:
        swap_out(src, dst, pairs)


def check_swap(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """ValueError for what `swap_blocks` refuses; nothing moves."""
    if pairs.device.type != "cpu":
        raise ValueError(f"swap_blocks: pairs on {pairs.device}; the host reads them: pass pairs.cpu()")
    _check_pairs("swap_blocks", pairs, src.shape[0], dst.shape[0])
    if src.shape[1:] != dst.shape[1:] or src.dtype != dst.dtype:
        raise ValueError(
            f"swap_blocks: pages {list(src.shape[1:])} of {src.dtype} do not fit {list(dst.shape[1:])} of {dst.dtype}; "
            f"both pools must come from the same layer layout"
        )


def swap_out(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """Gather the pages, wherever they lie in their pool; then a copy for each run of pages side by side in the other."""
    sources, targets = pairs.unbind(1)
    staged = src.index_select(0, _there(sources, src))
    for at, page, count in _runs(targets):
        dst[page : page + count].copy_(staged[at : at + count], non_blocking=True)


def swap_in(src: torch.Tensor, dst: torch.Tensor, pairs: torch.Tensor) -> None:
    """The way back: a copy for each run of pages side by side here; then to their places there, wherever these are."""
    sources, targets = pairs.unbind(1)
    staged = dst.new_empty((len(pairs), *dst.shape[1:]))
    for at, page, count in _runs(sources):
        staged[at : at + count].copy_(src[page : page + count], non_blocking=True)
    dst.index_copy_(0, _there(targets, dst), staged)


def copy_blocks(k_pages: Sequence[torch.Tensor], v_pages: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """Copy page pairs[n, 0] to page pairs[n, 1] in every pool; pairs [N, 2] int64. Reads precede writes.

    On a GPU all pools take one launch where the host can see that no page is both read and written: pairs on the CPU.
    """
    pools = [*k_pages, *v_pages]
    least = min((pool.shape[0] for pool in pools), default=0)
    if not pools or not len(pairs):
        return
    _check_pairs("copy_blocks", pairs, least, least)
    at_once = all(pool.is_cuda and pool.device == pools[0].device and pool.is_contiguous() for pool in pools)
    if at_once and pairs.device.type == "cpu" and not {*pairs[:, 0].tolist()} & {*pairs[:, 1].tolist()}:
        from compile_attn.kernels.blocks_triton import copy_pages

        copy_pages(pools, pairs)
        return
    for pool in pools:
        source, target = (_there(pages, pool) for pages in pairs.unbind(1))
        stored = _bytes(pool)
        stored.index_copy_(0, target, stored.index_select(0, source))  # these refuse a page that there is not


def _runs(pages: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Numbers that count up one by one: where such a run begins, its first number, and how many they are."""
    listed = pages.tolist()
    begin = 0
    for end in range(1, len(listed) + 1):
        if end == len(listed) or listed[end] != listed[end - 1] + 1:
            yield begin, listed[begin], end - begin
            begin = end


def _there(pages: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Page numbers on the device of the pool; nothing waits."""
    if pool.is_cuda and pages.device.type == "cpu":
        return pages.contiguous().pin_memory().to(pool.device, non_blocking=True)
    return pages.to(pool.device)


def _bytes(pool: torch.Tensor) -> torch.Tensor:
    """Not every device indexes fp8."""
    return pool.view(torch.uint8) if pool.dtype.itemsize == 1 else pool


def _check_pairs(what: str, pairs: torch.Tensor, sources: int, targets: int) -> None:
    if pairs.dtype != torch.int64 or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{what}: pairs must be [N, 2] int64, not {list(pairs.shape)} {pairs.dtype}; pass (from, to) page numbers")
    if pairs.device.type != "cpu":  # reading them would wait for the device; there index_* check
        return
    listed = pairs.tolist()
    wrong = [pair for pair in listed if not (0 <= pair[0] < sources and 0 <= pair[1] < targets)]
    if wrong:
        raise ValueError(f"{what}: no pages {wrong[0]} in pools of {sources} and {targets}; page numbers count from 0")
    if len({target for _, target in listed}) < len(listed):
        raise ValueError(f"{what}: a page is written twice by {listed}; each page can be the target of one pair")

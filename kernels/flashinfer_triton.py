"""Where are the pages of a step, in the order in which FlashInfer reads them? One launch a step, no host read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _gather(table, row_stride, rows, starts, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    request = tl.program_id(0)
    row, start, end = tl.load(rows + request), tl.load(starts + request), tl.load(starts + request + 1)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < end - start
    shown = tl.where(row >= 0, end - start, 0)  # not `inside & (row >= 0)`: see general_triton's `_pages`
    pages = tl.load(table + row.to(tl.int64) * row_stride + place, mask=place < shown, other=0)
    tl.store(out + start + place, pages, mask=inside)


def gather_pages(table: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, most: int, out: torch.Tensor) -> None:
    """out[starts[r] + p] = table[rows[r], p] for every page p of request r, at most `most`; page 0 where rows[r] is -1."""
    with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
        _gather[(rows.shape[0], triton.cdiv(most, _BLOCK))](table, table.stride(0), rows, starts, out, _BLOCK)

"""How are rows built on a GPU? In one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from compile_attn.kernels.flash_rows import Batch

_ROWS = 128  # of a program


# Not specialised: what changes from step to step would only compile the kernel again.
@triton.jit(do_not_specialize=["tokens", "sequences", "size"])  # type: ignore[untyped-decorator]
def rows(  # type: ignore[no-untyped-def]
    seq_lens, cu_seqlens_q, positions, token_seq, out, tokens, sequences, size, BY_TOKEN: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if BY_TOKEN:
        inside = row < tokens
        sequence = tl.load(token_seq + row, mask=inside, other=0)
        keys = tl.load(positions + row, mask=inside, other=0).to(tl.int32) + 1 if CAUSAL else tl.load(seq_lens + sequence)
        length = tl.where(row < tl.load(cu_seqlens_q + sequences), keys, 0)
        start, count = row, tokens
    else:
        count = sequences + 1
        inside = row < count
        sequence = tl.where(row < sequences, row, 0)
        length = tl.load(seq_lens + row, mask=row < sequences, other=0)
        start = tl.load(cu_seqlens_q + row, mask=inside, other=0)
        start = tl.where(inside, start, tokens)
    tl.store(out + row, start, mask=row <= count)
    tl.store(out + size + row, length, mask=inside)
    tl.store(out + 2 * size + row, sequence, mask=inside)
    tl.store(out + 3 * size + row, 0, mask=inside)


def build_rows(at: Batch, causal: bool, out: torch.Tensor, size: int) -> None:
    """As in `flash_rows.build`."""
    tokens, sequences = at.token_seq.shape[0], at.seq_lens.shape[0]
    by_token = tokens == sequences
    with torch.cuda.device_of(out):  # type: ignore[no-untyped-call]
        rows[(triton.cdiv(sequences + 2, _ROWS),)](
            at.seq_lens.contiguous(), at.cu_seqlens_q, at.positions, at.token_seq, out, tokens, sequences, size, by_token, causal,
            _ROWS,
        )  # fmt: skip

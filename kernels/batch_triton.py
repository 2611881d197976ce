"""How does a step learn about its batch on a GPU? One launch for all metadata, one to advance; nothing is read on the host.

`batch.py` holds the same in torch, for the CPU and as what these are tested against.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compile_attn.kernels.batch import NO_LIMIT

_ROWS = 128  # of a program that advances


# Not specialised: what changes from step to step would only compile the kernels again.
@triton.jit(do_not_specialize=["table_stride", "width", "num_rows", "num_tokens"])  # type: ignore[untyped-decorator]
def metadata(  # type: ignore[no-untyped-def]
    table, seq_lens, query_lens, held_lens, cu_seqlens_q, positions, slot_mapping, token_seq,
    table_stride, width, num_rows, num_tokens,
    PAGE_SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = token[:, None]
    row = tl.zeros((TOKENS,), tl.int32)
    shift = tl.zeros((TOKENS,), tl.int32)  # from the packed place of a token to its position
    total = tl.zeros((), tl.int32)  # new tokens of the rows before
    if tl.program_id(0) == 0:
        tl.store(cu_seqlens_q, 0)
    for begin in range(0, num_rows, ROWS):
        b = begin + tl.arange(0, ROWS)
        inside = b < num_rows
        new = tl.load(query_lens + b, mask=inside, other=0)
        length = tl.load(seq_lens + b, mask=inside, other=0)
        end = total + tl.cumsum(new, 0)
        if tl.program_id(0) == 0:
            tl.store(cu_seqlens_q + 1 + b, end, mask=inside)
            if held_lens is not None:
                tl.store(held_lens + b, tl.minimum(length, width * PAGE_SIZE), mask=inside)
        over = (end[None, :] <= at) & inside[None, :]
        own = ((end - new)[None, :] <= at) & (at < end[None, :])
        row += tl.sum(over.to(tl.int32), 1)
        shift += tl.sum(tl.where(own, (length - end)[None, :], 0), 1)  # a row's last new token stands at its length - 1
        total += tl.sum(new, 0)
    row = tl.minimum(row, num_rows - 1)
    real = token < total
    position = tl.where(real, token + shift, 0)
    # On a CPU a token without a page is an error; here it is written nowhere.
    held = real & (position >= 0) & (position < width * PAGE_SIZE)
    page = tl.load(table + row.to(tl.int64) * table_stride + position // PAGE_SIZE, mask=held, other=-1).to(tl.int64)
    slot = tl.where(page >= 0, page * PAGE_SIZE + position % PAGE_SIZE, -1)
    wanted = token < num_tokens
    position = tl.maximum(tl.minimum(position, width * PAGE_SIZE - 1), 0)  # by it some kernels count a token's keys
    tl.store(positions + token, position.to(tl.int64), mask=wanted)
    tl.store(slot_mapping + token, slot, mask=wanted)
    tl.store(token_seq + token, row, mask=wanted)


@triton.jit(do_not_specialize=["num_rows", "limit"])  # type: ignore[untyped-decorator]
def advance(input_ids, position_ids, seq_lens, sampled, num_rows, limit, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    length = tl.load(seq_lens + row, mask=inside, other=0)
    token = tl.load(sampled + row, mask=inside, other=0)
    live = (length > 0) & (length < limit)
    tl.store(input_ids + row, tl.maximum(token, 0), mask=live)
    tl.store(position_ids + row, length.to(tl.int64), mask=live)
    tl.store(seq_lens + row, length + 1, mask=live)


def _tile(rows: int, tokens: int) -> tuple[int, int]:
    """Tokens of a program, and rows whose ends it compares with them at a time, by two numbers of a step.

    Few programs wait for memory once or twice, whatever they compare: few tokens each. Many share the device: large tiles, of
    which 64 tokens by 512 rows would spill registers.
    """
    if rows <= 64:
        return (16 if tokens <= 2048 else 64), 64
    return (16, 512) if tokens <= 2048 else (32, 256)


def build_metadata(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    num_tokens: int,
    page_size: int,
    held_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `batch.build_metadata`."""
    seq_lens, query_lens = seq_lens.contiguous(), query_lens.contiguous()
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    rows, device = seq_lens.shape[0], seq_lens.device
    cu_seqlens_q = torch.empty(rows + 1, dtype=torch.int32, device=device)
    positions = torch.empty(num_tokens, dtype=torch.int64, device=device)
    slot_mapping, token_seq = torch.empty_like(positions), torch.empty_like(positions, dtype=torch.int32)
    tokens, at_a_time = _tile(rows, num_tokens)
    with torch.cuda.device_of(seq_lens):  # type: ignore[no-untyped-call]
        metadata[(max(1, -(-num_tokens // tokens)),)](
            block_table, seq_lens, query_lens, held_lens, cu_seqlens_q, positions, slot_mapping, token_seq,
            block_table.stride(0), block_table.shape[1], rows, num_tokens, page_size, tokens, at_a_time,
        )  # fmt: skip
    return cu_seqlens_q, positions, slot_mapping, token_seq


def advance_step(
    tokens: torch.Tensor, positions: torch.Tensor, seq_lens: torch.Tensor, sampled: torch.Tensor, limit: int | None = None
) -> None:
    """As `batch.advance_step`, of flat tensors."""
    rows = seq_lens.shape[0]
    with torch.cuda.device_of(seq_lens):  # type: ignore[no-untyped-call]
        most = NO_LIMIT if limit is None else limit
        advance[(-(-rows // _ROWS),)](tokens, positions, seq_lens, sampled, rows, most, _ROWS)

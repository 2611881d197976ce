"""Where do the tokens and keys of a batch stand, and how does it advance by one token? Arrays in, arrays out; see `metadata.py`."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

NO_LIMIT = 2**31 - 1  # lengths are int32
Whole = TypeVar("Whole", torch.Tensor, np.ndarray[Any, Any])  # whole numbers, on a device or on the host


def build_metadata(
    block_table: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens_q, positions, slot_mapping, token_seq: see `metadata.AttentionMetadata`. Shapes depend on num_tokens only.

    A token beyond its table has no page, nor has one where the table says a number below 0: a ValueError here, slot -1 on a GPU.
    """
    if block_table.is_cuda:
        from compile_attn.kernels import batch_triton

        return batch_triton.build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size)
    ends = query_lens.cumsum(0, dtype=torch.int32)
    cu_seqlens_q = torch.nn.functional.pad(ends, (1, 0))
    token = torch.arange(num_tokens, device=ends.device, dtype=torch.int32)
    # right=True: the first row that ends beyond the token, so rows without tokens are passed over.
    token_seq = torch.searchsorted(ends, token, right=True, out_int32=True).clamp_(max=ends.shape[0] - 1)
    real = token < ends[-1]
    # The last new token of a row stands at seq_len - 1, so a token does at seq_len - (row's end - token).
    positions = torch.where(real, (seq_lens - ends)[token_seq] + token, 0).long()
    column = positions // page_size
    page = block_table[token_seq, column.clamp(max=block_table.shape[1] - 1)].long()
    lost = real & ((column >= block_table.shape[1]) | (page < 0))
    if lost.any():
        row, position = int(token_seq[lost][0]), int(positions[lost][0])
        raise ValueError(
            f"row {row}: the token at position {position} has no page of {page_size} in a block table of {block_table.shape[1]} "
            "columns; give the row its page before it grows"
        )
    slot_mapping = torch.where(real, page * page_size + positions % page_size, -1)
    return cu_seqlens_q, positions, slot_mapping, token_seq


def advance_step(
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    seq_lens: torch.Tensor,
    sampled: torch.Tensor,
    limit: int | None = None,
) -> None:
    """In place, for a decode batch of one token a row: token = sampled, position = old length, length + 1.

    Pad rows stay, and so do rows of `limit` tokens; a sampled number below 0, which is no token, becomes token 0. input_ids and
    position_ids [B] or [1, B] int64, or longer by pad tokens; seq_lens [B] int32, 0 for a pad row; sampled [B] or [B, 1] int64, or
    longer. The metadata of the step is then `build_metadata`'s.
    """
    rows = seq_lens.shape[0]
    for name, given in (("input_ids", input_ids), ("position_ids", position_ids), ("sampled", sampled)):
        if given.numel() < rows:
            raise ValueError(f"advance_step: {name} holds {given.numel()} values, the batch {rows} rows; give one a row")
    tokens, positions, sampled = input_ids.view(-1)[:rows], position_ids.view(-1)[:rows], sampled.reshape(-1)[:rows]
    if seq_lens.is_cuda:
        from compile_attn.kernels import batch_triton

        batch_triton.advance_step(tokens, positions, seq_lens, sampled, limit)
        return
    live = (seq_lens > 0) & (seq_lens < (NO_LIMIT if limit is None else limit))
    tokens.copy_(torch.where(live, sampled.clamp(min=0), tokens))
    positions.copy_(torch.where(live, seq_lens, positions))
    seq_lens.add_(live)


def page_bounds(lengths: Whole, page_size: int) -> tuple[Whole, Whole]:
    """For sequences of these lengths, of their shape and dtype: how many pages each has, and tokens in its last one; 0 if none."""
    pages = -(-lengths // page_size)
    return pages, (lengths - (pages - 1) * page_size) * (lengths > 0)


def table_width(pages: int, page_size: int) -> int:
    """Columns of a block table whose rows have so many pages at most: room for 256 tokens, 1024, 4096, 16384, ...

    Few widths are few CUDA graphs, and each bounds all lengths of a step by its shape, which is known on the host. The narrowest
    tells short sequences apart: no kernel divides them, and some libraries have another one for them. No table has one column.
    """
    room = 256
    while max(2, room // page_size) < pages:
        room *= 4
    return max(2, room // page_size)

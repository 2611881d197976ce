"""Where do the tokens and keys of a batch stand, and how does it advance by one token? Arrays in, arrays out; see `metadata.py`."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import torch

NO_LIMIT = 2**31 - 1  # lengths are int32
Whole = TypeVar("Whole", torch.Tensor, np.ndarray[Any, Any])  # whole numbers, on a device or on the host


def build_metadata(
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_lens: torch.Tensor,
    num_tokens: int,
    page_size: int,
    held_lens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens_q, positions, slot_mapping, token_seq: see `metadata.AttentionMetadata`. Shapes depend on num_tokens only.

    A token beyond its table has no page, nor has one where the table says a number below 0, nor has one before the first: a
    ValueError here; on a GPU slot -1, if it is a new one, and a position that is not beyond the table.

    held_lens [B] int32: on a GPU seq_lens is written there, no row longer than its table.
    """
    if block_table.is_cuda:
        from compile_attn.kernels import batch_triton

        return batch_triton.build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size, held_lens)
    _check_rows(block_table, seq_lens, query_lens, page_size)
    ends = query_lens.cumsum(0, dtype=torch.int32)
    cu_seqlens_q = torch.nn.functional.pad(ends, (1, 0))
    token = torch.arange(num_tokens, device=ends.device, dtype=torch.int32)
    # right=True: the first row that ends beyond the token, so rows without tokens are passed over.
    token_seq = torch.searchsorted(ends, token, right=True, out_int32=True).clamp_(max=ends.shape[0] - 1)
    real = token < ends[-1]
    # The last new token of a row stands at seq_len - 1, so a token does at seq_len - (row's end - token).
    positions = torch.where(real, (seq_lens - ends)[token_seq] + token, 0).long()
    page = block_table[token_seq, positions // page_size].long()
    slot_mapping = torch.where(real, page * page_size + positions % page_size, -1)
    return cu_seqlens_q, positions, slot_mapping, token_seq


def _check_rows(block_table: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, page_size: int) -> None:
    """That every token of a row, new or not, has a page: what is looked for behind the table is in the row behind."""
    fewer = seq_lens < query_lens
    if fewer.any():
        row = int(fewer.nonzero()[0])
        raise ValueError(
            f"row {row}: {int(query_lens[row])} new tokens in a sequence of {int(seq_lens[row])}; seq_lens count the new ones, too"
        )
    columns = block_table.shape[1]
    missing = torch.nn.functional.pad(block_table < 0, (0, 1), value=True)
    missing &= torch.arange(columns + 1, device=missing.device) < page_bounds(seq_lens, page_size)[0][:, None]
    if missing.any():
        row, column = missing.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: the token at position {column * page_size} has no page of {page_size} in a block table of {columns} "
            "columns; give the row its page before it grows"
        )


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

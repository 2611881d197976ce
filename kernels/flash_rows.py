"""How does a batch become rows of queries that a kernel can take without knowing a length on the host?

The rows cover every token, pads too. The last query of a row stands at its last key; a row without keys gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Batch(Protocol):
    """As in the op `paged_attn::attend`."""

    @property
    def block_table(self) -> torch.Tensor: ...
    @property
    def seq_lens(self) -> torch.Tensor: ...
    @property
    def cu_seqlens_q(self) -> torch.Tensor: ...
    @property
    def positions(self) -> torch.Tensor: ...
    @property
    def token_seq(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Rows:
    """R rows: where each begins among the tokens, its number of keys, its row of the block table, and a 0. All int32."""

    starts: torch.Tensor  # [R + 1]
    lengths: torch.Tensor  # [R]
    of_table: torch.Tensor  # [R]
    zeros: torch.Tensor  # [R]
    behind: torch.Tensor  # the room behind them
    most_queries: int


def part(sequences: int) -> int:
    """Numbers that each of the four lists takes up: room for one row more than sequences, and 16 bytes aligned."""
    return (sequences + 5) // 4 * 4


def size(sequences: int) -> int:
    """Numbers in what `build` gives."""
    return 4 * part(sequences)


def build(at: Batch, causal: bool, more: int = 0) -> torch.Tensor:
    """Rows in one int32 tensor with room for `more` numbers behind them.

    As many tokens as sequences is a row a token: right however they are distributed, and for a decode, whose rows have one
    token, nothing is lost. Otherwise rows are sequences, and pad tokens are one more row.
    """
    sequences, tokens, device = at.seq_lens.shape[0], at.token_seq.shape[0], at.seq_lens.device
    out = torch.empty(size(sequences) + more, dtype=torch.int32, device=device)
    if device.type == "cuda":
        from compile_attn.kernels.flash_rows_triton import build_rows

        build_rows(at, causal, out, part(sequences))
        return out
    rows = read(out, tokens, sequences)
    count = torch.arange(max(tokens, sequences) + 1, device=device)
    rows.zeros.zero_()
    if tokens == sequences:
        keys = at.positions + 1 if causal else at.seq_lens[at.token_seq]
        rows.starts.copy_(count[: tokens + 1])
        rows.lengths.copy_(torch.where(count[:tokens] < at.cu_seqlens_q[-1], keys, 0))
        rows.of_table.copy_(at.token_seq)
    else:
        rows.starts.copy_(torch.nn.functional.pad(at.cu_seqlens_q, (0, 1), value=tokens))
        rows.lengths.copy_(torch.nn.functional.pad(at.seq_lens, (0, 1)))
        rows.of_table.copy_(torch.nn.functional.pad(count[:sequences], (0, 1)))
    return out


def read(built: torch.Tensor, tokens: int, sequences: int) -> Rows:
    """What `build` has written."""
    by_token = tokens == sequences
    rows, room = (tokens if by_token else sequences + 1), part(sequences)
    gap = room - rows
    sizes = (rows + 1, gap - 1, rows, gap, rows, gap, rows, gap, built.shape[0] - 4 * room)
    starts, _, lengths, _, of_table, _, zeros, _, behind = built.split_with_sizes(sizes)
    return Rows(starts, lengths, of_table, zeros, behind, 1 if by_token else tokens)

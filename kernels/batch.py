"""What does a step know about its batch? The one metadata class, its builder, and its advance by one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class AttentionMetadata:
    """A batch of B sequences with T packed new tokens. All tensors on one device; int32 unless said otherwise.

    block_table [B, max_pages]; seq_lens [B], new tokens included; query_lens [B], 0 for a pad row; cu_seqlens_q [B + 1];
    positions [T] int64, in the own sequence, 0 for pad tokens; slot_mapping [T] int64, page * page_size + offset, -1 for pad
    tokens; token_seq [T], the row of each token.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    token_seq: torch.Tensor
    page_size: int

    @classmethod
    def build(
        cls, block_table: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, num_tokens: int, page_size: int
    ) -> AttentionMetadata:
        """Everything else from tables and lengths, on their device, without a host read."""
        derived = build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size)
        return cls(block_table, seq_lens, query_lens, *derived, page_size)

    def advance_step(self) -> AttentionMetadata:
        """The batch one decoded token later: every row with new tokens has one new token at its end."""
        live = (self.query_lens > 0).to(torch.int32)
        rows = self.block_table.shape[0]
        return AttentionMetadata.build(self.block_table, self.seq_lens + live, live, rows, self.page_size)

    def rows(self, first: int, last: int, first_token: int, last_token: int) -> AttentionMetadata:
        """The view of rows first..last-1, whose tokens are first_token..last_token-1, both start locations rebased to 0."""
        part = slice(first, last)
        tokens = slice(first_token, last_token)
        return replace(
            self,
            block_table=self.block_table[part],
            seq_lens=self.seq_lens[part],
            query_lens=self.query_lens[part],
            cu_seqlens_q=self.cu_seqlens_q[first : last + 1] - first_token,
            positions=self.positions[tokens],
            slot_mapping=self.slot_mapping[tokens],
            token_seq=self.token_seq[tokens] - first,
        )


class AttentionMetadataBuilder:
    """Host lists to metadata: one `add` a sequence, in batch order."""

    def __init__(self, page_size: int, max_pages: int) -> None:
        self.page_size, self.max_pages = page_size, max_pages
        self._tables: list[list[int]] = []
        self._seq_lens: list[int] = []
        self._query_lens: list[int] = []

    def add(self, pages: Sequence[int], seq_len: int, query_len: int) -> None:
        """A sequence of seq_len tokens, the last query_len of them new, in these pages."""
        needed = -(-seq_len // self.page_size)
        if query_len > seq_len or len(pages) < needed or len(pages) > self.max_pages:
            raise ValueError(
                f"a sequence of {seq_len} tokens, {query_len} of them new, needs {needed} pages of {self.page_size} tokens "
                f"and at most {self.max_pages}; it was given {len(pages)}"
            )
        self._tables.append([*pages, *[0] * (self.max_pages - len(pages))])
        self._seq_lens.append(seq_len)
        self._query_lens.append(query_len)

    def build(self, device: torch.device | str = "cpu", num_tokens: int | None = None) -> AttentionMetadata:
        """The metadata; `num_tokens` above the sum of new tokens adds pad tokens."""
        total = sum(self._query_lens)
        tensors = (torch.tensor(part, dtype=torch.int32, device=device) for part in (self._tables, self._seq_lens, self._query_lens))
        return AttentionMetadata.build(*tensors, total if num_tokens is None else num_tokens, self.page_size)


def build_metadata(
    block_table: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cu_seqlens_q, positions, slot_mapping, token_seq); see `AttentionMetadata`. Shapes depend on num_tokens alone."""
    ends = query_lens.cumsum(0, dtype=torch.int32)
    cu_seqlens_q = torch.cat([ends.new_zeros(1), ends])
    token = torch.arange(num_tokens, device=ends.device, dtype=torch.int32)
    # right=True: the first row that ends beyond the token, so rows without tokens are passed over.
    token_seq = torch.searchsorted(ends, token, right=True, out_int32=True).clamp(max=ends.shape[0] - 1)
    row = token_seq.long()
    real = token < ends[-1]
    position = (seq_lens - query_lens)[row] + token - cu_seqlens_q[row]
    positions = torch.where(real, position, 0).long()
    page = block_table[row, positions // page_size].long()
    slot_mapping = torch.where(real, page * page_size + positions % page_size, -1)
    return cu_seqlens_q, positions, slot_mapping, token_seq


def advance_step(
    input_ids: torch.Tensor, position_ids: torch.Tensor, seq_lens: torch.Tensor, sampled: torch.Tensor
) -> None:
    """In place, for a decode batch of one token a row: token = sampled, position = old length, length + 1. Pad rows stay.

    input_ids [1, B] int64, position_ids [1, B] int64, seq_lens [B] int32, sampled [B] int64; a pad row has length 0.
    """
    live = seq_lens > 0
    input_ids.copy_(torch.where(live, sampled, input_ids[0])[None])
    position_ids.copy_(torch.where(live, seq_lens.long(), position_ids[0])[None])
    seq_lens.add_(live.to(seq_lens.dtype))

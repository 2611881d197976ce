"""What does a step know about its batch? The one metadata class, its builder, and its advance by one token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

NO_LIMIT = 2**31 - 1  # lengths are int32


@dataclass(frozen=True)
class AttentionMetadata:
    """A batch of B sequences with T packed new tokens. All tensors on one device; int32 unless said otherwise.

    block_table [B, max_pages]; seq_lens [B], new tokens included; query_lens [B], 0 for a pad row;
    cu_seqlens_q [B + 1]; positions [T] int64, in the own sequence, 0 for pad tokens; slot_mapping [T] int64,
    page * page_size + offset, -1 for pad tokens; token_seq [T], the row of each token.
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
        cls,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
        num_tokens: int,
        page_size: int,
    ) -> AttentionMetadata:
        """Everything else from tables and lengths, on their device, without a host read."""
        derived = build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size)
        return cls(block_table, seq_lens, query_lens, *derived, page_size)

    def advance_step(self) -> AttentionMetadata:
        """The batch one decoded token later: every row with new tokens has one new token at its end."""
        live = (self.query_lens > 0).to(torch.int32)
        rows = self.block_table.shape[0]
        return AttentionMetadata.build(self.block_table, self.seq_lens + live, live, rows, self.page_size)

    def prefill_metadata(self, num_prefills: int, num_prefill_tokens: int) -> AttentionMetadata | None:
        """The first rows, where a batch puts its prefill chunks ahead of its decodes; None if there are none."""
        return self._rows(slice(0, num_prefills), slice(0, num_prefill_tokens)) if num_prefills else None

    def decode_metadata(self, num_prefills: int, num_prefill_tokens: int) -> AttentionMetadata | None:
        """The rows after the prefills, pad rows and pad tokens included; None if there are none."""
        if num_prefills == self.block_table.shape[0]:
            return None
        return self._rows(slice(num_prefills, None), slice(num_prefill_tokens, None))

    def _rows(self, rows: slice, tokens: slice) -> AttentionMetadata:
        """A view in which rows and tokens count from 0 again."""
        starts = self.cu_seqlens_q[rows.start : None if rows.stop is None else rows.stop + 1]
        return replace(
            self,
            block_table=self.block_table[rows],
            seq_lens=self.seq_lens[rows],
            query_lens=self.query_lens[rows],
            cu_seqlens_q=starts - tokens.start,
            positions=self.positions[tokens],
            slot_mapping=self.slot_mapping[tokens],
            token_seq=self.token_seq[tokens] - rows.start,
        )


class AttentionMetadataBuilder:
    """Host lists to metadata: one `add` a sequence, in batch order."""

    def __init__(self, page_size: int, max_pages: int) -> None:
        self.page_size, self.max_pages = page_size, max_pages
        self._tables: list[list[int]] = []
        self._seq_lens: list[int] = []
        self._query_lens: list[int] = []

    def add(self, pages: Sequence[int], seq_len: int, query_len: int) -> None:
        """A sequence of seq_len tokens, the last query_len of them new, in these pages. All 0: a pad row."""
        needed = -(-seq_len // self.page_size)
        if not 0 <= query_len <= seq_len or not needed <= len(pages) <= self.max_pages:
            raise ValueError(
                f"a sequence of {seq_len} tokens, {query_len} of them new, in {len(pages)} pages of {self.page_size}: "
                f"give 0 to {seq_len} new tokens and {needed} to {self.max_pages} pages"
            )
        self._tables.append([*pages, *[0] * (self.max_pages - len(pages))])
        self._seq_lens.append(seq_len)
        self._query_lens.append(query_len)

    def build(self, device: torch.device | str = "cpu", num_tokens: int | None = None) -> AttentionMetadata:
        """The metadata; `num_tokens` above the sum of new tokens adds pad tokens."""
        total = sum(self._query_lens)
        if not self._tables or (num_tokens is not None and num_tokens < total):
            raise ValueError(f"{len(self._tables)} sequences with {total} new tokens in num_tokens={num_tokens}; give room for all")
        table, seq_lens, query_lens = (
            torch.tensor(part, dtype=torch.int32, device=device) for part in (self._tables, self._seq_lens, self._query_lens)
        )
        tokens = total if num_tokens is None else num_tokens
        return AttentionMetadata.build(table, seq_lens, query_lens, tokens, self.page_size)


def build_metadata(
    block_table: torch.Tensor, seq_lens: torch.Tensor, query_lens: torch.Tensor, num_tokens: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seqlens_q, positions, slot_mapping, token_seq: see `AttentionMetadata`. Shapes depend on num_tokens only."""
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
    page = block_table[token_seq, positions // page_size].long()
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


def table_width(pages: int, page_size: int) -> int:
    """Columns of a block table whose rows have so many pages at most: room for 256 tokens, 1024, 4096, 16384, ...

    Few widths are few CUDA graphs, and each bounds all lengths of a step by its shape, which is known on the host. The narrowest
    tells short sequences apart: no kernel divides them, and some libraries have another one for them. No table has one column.
    """
    room = 256
    while max(2, room // page_size) < pages:
        room *= 4
    return max(2, room // page_size)

"""What does a step know about its batch? The one metadata class of all kernels, and its builder.

Shapes and dtypes of tensors are in `AttentionMetadata`. What can be derived is derived at each call and never kept: nothing goes
stale when a batch advances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch

from compile_attn.kernels.batch import NO_LIMIT, build_metadata, page_bounds


class PagedKV(NamedTuple):
    """The pages of a batch one after the other, as FlashInfer takes them. int32, of shapes that follow from the batch's own.

    indptr [B + 1], where each row's pages begin; indices [B * max_pages], 0 behind the last; last_page_len [B], tokens in a row's
    last page; block_table_bound [B], pages of each row. A pad row has no page: its indptr repeats, its last_page_len is 0.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last_page_len: torch.Tensor
    block_table_bound: torch.Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """A batch of B sequences with T packed new tokens. All tensors on one device; int32 unless said otherwise.

    block_table [B, max_pages]; seq_lens [B], new tokens included; query_lens [B], 0 for a pad row;
    cu_seqlens_q [B + 1]; positions [T] int64, in the own sequence, 0 for pad tokens; slot_mapping [T] int64,
    page * page_size + offset, -1 for pad tokens; token_seq [T], the row of each token.

    The rest the host knows without waiting. The first `num_prefills` rows hold prompts or chunks of them, `num_prefill_tokens`
    new tokens; to kernels all rows are alike. None where the device alone knows: `lengths`, (seq_len, query_len) of each row, and
    `held_pages`, how many columns of its table are pages of its own. `is_profile_run`: there are no pages yet: the table is [B, 0],
    and all slots are -1.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    token_seq: torch.Tensor
    page_size: int
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    lengths: tuple[tuple[int, int], ...] | None = None
    held_pages: tuple[int, ...] | None = None
    is_profile_run: bool = False

    def __post_init__(self) -> None:
        rows, width = self.block_table.shape
        if self.lengths is None or self.is_profile_run:
            return
        row, length = max(enumerate(seq for seq, _ in self.lengths), key=itemgetter(1), default=(0, 0))
        if length > width * self.page_size:
            raise ValueError(
                f"row {row} of {rows} has {length} tokens, a block table of {width} columns room for {width} pages of "
                f"{self.page_size}; give each row {-(-length // self.page_size)} columns"
            )

    @classmethod
    def build(
        cls,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
        num_tokens: int,
        page_size: int,
    ) -> AttentionMetadata:
        """Everything else from tables and lengths, on their device, without a host read.

        A token for which its row has no page, as the table ends or has a number below 0 there, is a ValueError on a CPU, and so
        are more new tokens than tokens. On a GPU, where nobody waits for lengths, such a new token gets slot -1, and a row ends
        with its table (`seq_lens` is another tensor than was given): no kernel reads the table of the next row. What a GPU is not
        asked is for the caller to see to: that no number is below 0 where a row has tokens.
        """
        held = torch.empty(seq_lens.shape, dtype=torch.int32, device=seq_lens.device) if block_table.is_cuda else None
        derived = build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size, held)
        return cls(block_table, seq_lens if held is None else held, query_lens, *derived, page_size)

    @classmethod
    def pads(cls, rows: int, tokens: int, max_pages: int, page_size: int, device: torch.device | str = "cpu") -> AttentionMetadata:
        """A batch of nothing but pads, of new tensors: buffers for `copy_`, with which a CUDA graph can be recorded."""
        table = torch.zeros(rows, max_pages, dtype=torch.int32, device=device)
        seq_lens, query_lens = (torch.zeros(rows, dtype=torch.int32, device=device) for _ in range(2))
        return cls.build(table, seq_lens, query_lens, tokens, page_size)

    def copy_(self, other: AttentionMetadata) -> AttentionMetadata:
        """Write a batch, on any device, into these tensors; what remains of them becomes pads. Returns it, in these tensors.

        The batch may be what these tensors hold, advanced or in part. ValueError if it does not fit. Only what is returned knows
        what the host knows of the batch.
        """
        rows, width = other.block_table.shape
        fits = rows <= self.block_table.shape[0] and width <= self.block_table.shape[1]
        if other.is_profile_run or not fits or other.num_tokens > self.num_tokens or other.page_size != self.page_size:
            raise ValueError(f"{other._sizes()} does not fit into the buffers of {self._sizes()}; make larger ones with pads()")
        for name in ("block_table", "seq_lens", "query_lens"):
            buffer, new = getattr(self, name), getattr(other, name)
            padded = torch.zeros_like(buffer)  # the other batch may lie in these very tensors
            there = padded[tuple(map(slice, new.shape))]
            there.copy_(new, non_blocking=buffer.is_cuda)  # to a CPU, what is not waited for may not be there yet
            buffer.copy_(padded)
        held = (self.cu_seqlens_q, self.positions, self.slot_mapping, self.token_seq)
        derived = build_metadata(self.block_table, self.seq_lens, self.query_lens, self.num_tokens, self.page_size)
        for buffer, new in zip(held, derived, strict=True):
            buffer.copy_(new)
        pads = self.block_table.shape[0] - rows
        return replace(
            self,
            num_prefills=other.num_prefills,
            num_prefill_tokens=other.num_prefill_tokens,
            lengths=None if other.lengths is None else (*other.lengths, *((0, 0),) * pads),
            held_pages=None if other.held_pages is None else (*other.held_pages, *(0,) * pads),
        )

    def advance_step(self) -> AttentionMetadata:
        """The batch one decoded token later: every row with new tokens has one new token at its end. Prefills become decodes.

        ValueError in a profile run, and where the host knows that a row has no page for its new token.
        """
        self._check_pages("advance_step")
        self._check_room()
        live = (self.query_lens > 0).to(torch.int32)
        rows = self.block_table.shape[0]
        made = AttentionMetadata.build(self.block_table, self.seq_lens + live, live, rows, self.page_size)
        known = self.lengths
        lengths = None if known is None else tuple((seq + (new > 0), int(new > 0)) for seq, new in known)
        return replace(made, lengths=lengths, held_pages=self.held_pages)

    # Views

    @property
    def prefill_metadata(self) -> AttentionMetadata | None:
        """The first rows alone, which hold prompts; None if there are none."""
        return self._rows(slice(0, self.num_prefills), slice(0, self.num_prefill_tokens)) if self.num_prefills else None

    @property
    def decode_metadata(self) -> AttentionMetadata | None:
        """The rows after the prefills alone, pad rows and pad tokens included; None if there are none."""
        if self.num_prefills == self.block_table.shape[0]:
            return None
        return self._rows(slice(self.num_prefills, None), slice(self.num_prefill_tokens, None))

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
            num_prefills=0 if rows.start else self.num_prefills,
            num_prefill_tokens=0 if rows.start else self.num_prefill_tokens,
            lengths=None if self.lengths is None else self.lengths[rows],
            held_pages=None if self.held_pages is None else self.held_pages[rows],
        )

    # What follows from the tensors, on their device

    @property
    def context_lens(self) -> torch.Tensor:
        """Tokens that each row had before its new ones, int32 [B]; 0 for a pad row."""
        return self.seq_lens - self.query_lens

    @property
    def seq_start_loc(self) -> torch.Tensor:
        """Where each row's keys would begin if all were packed, from 0, int32 [B + 1]. Of queries it is `cu_seqlens_q`."""
        return torch.nn.functional.pad(self.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))

    def paged_kv(self) -> PagedKV:
        """The pages that hold the batch's keys. ValueError in a profile run, which has none."""
        self._check_pages("paged_kv")
        bound, last = page_bounds(self.seq_lens, self.page_size)
        ends = bound.cumsum(0, dtype=torch.int32)
        rows, width = self.block_table.shape
        place = torch.arange(rows * width, device=ends.device, dtype=torch.int32)
        row = torch.searchsorted(ends, place, right=True).clamp_(max=rows - 1)
        column = (place - (ends - bound)[row]).clamp_(max=width - 1)
        indices = torch.where(place < ends[-1], self.block_table[row, column], 0)
        return PagedKV(torch.nn.functional.pad(ends, (1, 0)), indices, last, bound)

    # What the host knows

    @property
    def num_tokens(self) -> int:
        """T, pad tokens included."""
        return self.positions.shape[0]

    @property
    def num_decode_tokens(self) -> int:
        """New tokens of the rows after the prefills, and pad tokens."""
        return self.num_tokens - self.num_prefill_tokens

    @property
    def max_query_len(self) -> int | None:
        """New tokens of a row at most; None where lengths are known to the device alone, as below."""
        return self._most(1, slice(None))

    @property
    def max_decode_query_len(self) -> int | None:
        """Of a row after the prefills, and 1 if there is none; above 1 where drafts are verified."""
        most = self._most(1, slice(self.num_prefills, None))
        return most if most is None else max(1, most)

    @property
    def max_prefill_seq_len(self) -> int | None:
        """Tokens of a prefill at most, 0 if there is none."""
        return self._most(0, slice(self.num_prefills))

    @property
    def max_decode_seq_len(self) -> int | None:
        """Tokens of a row after the prefills at most, 0 if there is none."""
        return self._most(0, slice(self.num_prefills, None))

    def _most(self, part: int, rows: slice) -> int | None:
        return None if self.lengths is None else max((each[part] for each in self.lengths[rows]), default=0)

    def _check_pages(self, what: str) -> None:
        if self.is_profile_run:
            raise ValueError(f"{what}: a profile run has no pages, and ends after its step; build the batch with pages")

    def _check_room(self) -> None:
        """Columns behind a row's own pages are 0, which is another's page."""
        if self.lengths is None or self.held_pages is None:
            return
        for row, ((seq, new), pages) in enumerate(zip(self.lengths, self.held_pages, strict=True)):
            if new and seq >= pages * self.page_size:
                raise ValueError(
                    f"advance_step: row {row} has {seq} tokens in {pages} pages of {self.page_size}, and no room for another; "
                    f"build the batch with {seq // self.page_size + 1} pages for it"
                )

    def _sizes(self) -> str:
        rows, width = self.block_table.shape
        kind = "a profile run" if self.is_profile_run else "a batch"
        return f"{kind} of {rows} rows, {self.num_tokens} tokens and {width} pages of {self.page_size} a row"


class AttentionMetadataBuilder:
    """Host lists to metadata: one `add` a sequence, in batch order. Prefills, where they are named, come first."""

    def __init__(self, page_size: int, max_pages: int) -> None:
        self.page_size, self.max_pages = page_size, max_pages
        self._tables: list[list[int] | None] = []
        self._lengths: list[tuple[int, int]] = []
        self._prefills = 0

    def add(self, pages: Sequence[int] | None, seq_len: int, query_len: int, *, prefill: bool = False) -> None:
        """A sequence of seq_len tokens, the last query_len of them new, in these pages. All 0: a pad row.

        A page may stand there twice, as in a ring of pages, unless two new tokens then have one slot.
        No pages at all, None, for all sequences or none: a profile run, without a cache, in which every token is new.
        """
        self._check_whole(() if pages is None else pages, (seq_len, query_len))
        needed = -(-seq_len // self.page_size)
        fits = query_len == seq_len if pages is None else needed <= len(pages) <= self.max_pages
        if not 0 <= query_len <= seq_len or not fits:
            count = "no" if pages is None else len(pages)
            raise ValueError(
                f"a sequence of {seq_len} tokens, {query_len} of them new, in {count} pages of {self.page_size}: "
                f"give 0 to {seq_len} new tokens and {needed} to {self.max_pages} pages, or all tokens new and pages=None"
            )
        if self._tables and (pages is None) != (self._tables[0] is None):
            raise ValueError("sequences with pages beside one with pages=None; a profile run has pages for none of them")
        if prefill and self._prefills < len(self._lengths):
            raise ValueError(f"a prefill after {len(self._lengths) - self._prefills} decodes; add prefills first")
        if pages is not None:
            self._check_slots(pages, seq_len, query_len)
        self._tables.append(None if pages is None else list(pages))
        self._lengths.append((seq_len, query_len))
        self._prefills += prefill

    def _check_whole(self, pages: Sequence[int], lengths: Sequence[int]) -> None:
        for name, each, least in (("page", pages, 0), ("length", lengths, -NO_LIMIT)):
            for one in each:
                if isinstance(one, (bool, np.bool_)) or not isinstance(one, Integral) or not least <= one <= NO_LIMIT:
                    cure = "pages count from 0; the table is padded by itself" if name == "page" else "give tokens"
                    raise ValueError(f"{name} {one!r} of a sequence is no whole number of int32; {cure}")

    def _check_slots(self, pages: Sequence[int], seq_len: int, query_len: int) -> None:
        """Of two new tokens in one slot only one would stay, and nobody could tell which."""
        size, first = self.page_size, seq_len - query_len
        written = [*pages][first // size : -(-seq_len // size)] if query_len else ()
        if len(set(written)) == len(written):
            return
        taken: dict[tuple[int, int], int] = {}
        for position in range(first, seq_len):
            slot = (pages[position // size], position % size)
            if slot in taken:
                raise ValueError(
                    f"page {slot[0]} stands twice in {list(pages)}, so the new tokens at positions {taken[slot]} and {position} "
                    "have one slot; give them pages of their own, or fewer tokens a step"
                )
            taken[slot] = position

    def build(self, device: torch.device | str = "cpu", num_tokens: int | None = None) -> AttentionMetadata:
        """The metadata; `num_tokens` above the sum of new tokens adds pad tokens."""
        total = sum(new for _, new in self._lengths)
        if not self._tables or (num_tokens is not None and num_tokens < total):
            raise ValueError(f"{len(self._tables)} sequences with {total} new tokens in num_tokens={num_tokens}; give room for all")
        seq_lens, query_lens = zip(*self._lengths, strict=True)
        held = tuple(0 if table is None else len(table) for table in self._tables)
        width = self.max_pages
        if self._tables[0] is None:  # of a profile run, while positions are counted
            width = max(1, -(-max(seq_lens) // self.page_size))
        tables = [[*(table or ()), *[0] * (width - pages)] for table, pages in zip(self._tables, held, strict=True)]
        parts = [torch.tensor(part, dtype=torch.int32, device=device) for part in (tables, seq_lens, query_lens)]
        made = AttentionMetadata.build(parts[0], parts[1], parts[2], total if num_tokens is None else num_tokens, self.page_size)
        if self._tables[0] is None:
            slots = torch.full_like(made.slot_mapping, -1)
            made = replace(made, block_table=made.block_table[:, :0], slot_mapping=slots, is_profile_run=True)
        news = sum(query_lens[: self._prefills])
        known = tuple(self._lengths)
        return replace(made, num_prefills=self._prefills, num_prefill_tokens=news, lengths=known, held_pages=held)

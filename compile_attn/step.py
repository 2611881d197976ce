"""What does one step look like to the compiled model?

Packed new tokens of many sequences, in static buffers: written in place every step, pad rows cleared every time. Nothing
here waits for the device: what is written comes from pinned memory that torch's allocator keeps until it has arrived.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from compile_attn.kernels.batch import table_width

if TYPE_CHECKING:
    from compile_attn.cache import CachedSequence

Logits = Literal["last", "all", "none"]
Ints = np.ndarray[Any, np.dtype[np.int64]]

Sizes = tuple[int, int, int]  # B, T and R
# Sizes 0 and 1 are specialised by torch.compile, so a step never has them.
LEAST: Sizes = (2, 2, 2)
_LOGITS = get_args(Logits)
_ZERO: array[int] = array("i", [0])
_NO_PAGES: array[int] = array("i")

NOT_PAGED = (
    "the model ran, but not as its paged graph, so nothing it returned can be trusted; "
    "look for torch.compiler.set_stance, @torch.compiler.disable or TORCH_COMPILE_DISABLE around the model"
)


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence, in order, and for which of them logits come back.

    `carried`: the last of the tokens, whatever stands for it here, is the one that row of the step before has sampled
    (`StepBuffers.recent`); the host need not know it yet.
    """

    seq: CachedSequence
    tokens: Sequence[int] | torch.Tensor
    logits: Logits = "last"
    carried: int | None = None

    def __post_init__(self) -> None:
        if self.logits not in _LOGITS:
            raise ValueError(f"logits={self.logits!r}; choose one of {', '.join(map(repr, _LOGITS))}")


@dataclass
class Batch:
    """What to call the model with: input_ids and position_ids, both [1, T] int64; valid until the next batch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    num_tokens: int  # without padding; likewise below
    num_rows: int
    num_seqs: int
    shape: Sizes  # as the model sees them
    width: int  # pages a row that the block table has room for
    unrun: bool = True  # no paged graph has taken it yet

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The real rows [num_rows, V] of what the model returned ([1, R, V] or [R, V]).

        RuntimeError where torch has run the model as it is written, to which the tokens of many sequences are one: in a stance of
        torch.compiler.set_stance, for example, or beyond Dynamo's recompile limit.
        """
        if self.unrun:
            raise RuntimeError(NOT_PAGED)
        return self.all_rows(logits)[: self.num_rows]

    def all_rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The same with pad rows, [R, V]."""
        flat = logits[0] if logits.dim() == 3 and logits.shape[0] == 1 else logits
        if flat.dim() != 2 or flat.shape[0] != self.shape[2]:
            raise ValueError(
                f"the model returned logits of shape {tuple(logits.shape)}; expected [1, {self.shape[2]}, "
                "vocabulary] for this batch: return logits of every token, [1, T, vocabulary], from the model's forward"
            )
        return flat


class StepBuffers:
    """The buffers on the device, at addresses that never change."""

    def __init__(self, max_seqs: int, max_pages: int, max_tokens: int, device: torch.device) -> None:
        rows = max(max_seqs, LEAST[0])
        tokens = max(max_tokens, rows)  # a decode step has pad rows up to max_seqs, however few tokens there is room for
        self._device, self._max_rows, self._max_pages = device, rows, max_pages
        self._tables: dict[int, _Table] = {}  # by width: how long sequences may be is what kernels share work by
        self.seq_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.query_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self.input_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.position_ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.logits_rows = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.recent = torch.zeros(tokens, dtype=torch.int64, device=device)  # what the last step sampled, by row

    def width(self, pages: int, page_size: int) -> int:
        """The narrowest table for rows of so many pages: 256 tokens, 1024, 4096, ... or all that a sequence may have."""
        return min(table_width(pages, page_size), self._max_pages)

    def widths(self, pages: int, page_size: int) -> list[int]:
        """All that rows of up to so many pages ask for, ascending."""
        out: list[int] = []
        while not out or out[-1] < pages:
            out.append(self.width(out[-1] + 1 if out else 1, page_size))
        return out

    def write(
        self,
        tables: Sequence[array[int]],
        starts: list[int],
        tokens: Ints,
        counts: list[int],
        logits: list[Logits],
        width: int,
        carried: Sequence[int | None] = (),
        least: Sizes = LEAST,
    ) -> Batch:
        """Write one batch: per sequence its pages, the tokens it had before, the rows wanted; all new tokens, and how many of each.

        width: pages a row of the block table; see `width()`. least: with pads.
        """
        lengths, before = np.array(counts, dtype=np.int64), np.array(starts, dtype=np.int64)
        ends, real = np.cumsum(lengths), len(tokens)
        rows = _wanted_rows(ends, lengths, logits)
        seqs, total, wanted = map(max, (len(counts), real, len(rows)), least)
        self.write_table(tables, width)
        self._send(self.seq_lens, before + lengths, seqs)
        self._send(self.query_lens, lengths, seqs)
        self._send(self.input_ids, tokens, total)
        self._send(self.position_ids, np.arange(real) + np.repeat(before + lengths - ends, lengths), total)
        self._send(self.logits_rows, rows, wanted, rows[-1] if len(rows) else 0)  # pad rows repeat a real one, or read token 0
        self._carry(ends - 1, carried)
        ids, positions = (self._packed(buffer, total) for buffer in (self.input_ids, self.position_ids))
        return Batch(ids, positions, real, len(rows), len(counts), (seqs, total, wanted), width)

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table [B, max_pages], seq_lens [B], query_lens [B], logits_rows [R] of this batch."""
        seqs, _, rows = batch.shape
        return self._tables[batch.width].on_device[:seqs], self.seq_lens[:seqs], self.query_lens[:seqs], self.logits_rows[:rows]

    def write_table(self, tables: Sequence[array[int]], width: int) -> None:
        """Bring the block table to these pages, a row each. Only what changed is sent; what a row shows no more is 0."""
        if width not in self._tables:
            shape = (self._max_rows, width)
            self._tables[width] = _Table(torch.zeros(shape, dtype=torch.int32, device=self._device), [])
        self._put(width, *self._tables[width].changes(tables))

    def add_pages(self, rows: list[int], width: int) -> None:
        """The same for these rows alone, each of which has got one page more."""
        self._put(width, *self._tables[width].grown(rows))

    def _put(self, width: int, places: Ints, pages: array[int]) -> None:
        if len(places):
            values = self._sent(np.array(pages, dtype=np.int32))
            self._tables[width].on_device.view(-1).index_copy_(0, self._sent(places), values)

    def _carry(self, lasts: Ints, carried: Sequence[int | None]) -> None:
        """Token ids that only the device knows: the last of a sequence's is what that row of the step before has sampled."""
        rows = [row for row in carried if row is not None]
        if rows:
            if len(rows) < len(carried):
                lasts = lasts[[row is not None for row in carried]]
            places, sampled = self._sent(np.array([lasts, rows]))
            self.input_ids.index_copy_(0, places, self.recent.index_select(0, sampled).clamp_(min=0))

    def _send(self, there: torch.Tensor, values: Ints, size: int, pad: int = 0) -> None:
        """Write the values and pads after them, up to the padded size."""
        host = torch.empty(size, dtype=there.dtype, device="cpu", pin_memory=self._device.type == "cuda")
        flat = host.numpy()
        flat[: len(values)], flat[len(values) :] = values, pad
        there[:size].copy_(host, non_blocking=True)

    def _sent(self, values: np.ndarray[Any, Any]) -> torch.Tensor:
        """The values in a tensor of their own on the device."""
        host = torch.from_numpy(values)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _packed(self, buffer: torch.Tensor, total: int) -> torch.Tensor:
        """The first tokens of a buffer as [1, T], not marked as a view (Dynamo would guard on its base)."""
        from torch._dynamo import maybe_mark_dynamic  # documented under torch.compiler's dynamic shapes

        packed = buffer[:total].unsqueeze(0).detach()
        maybe_mark_dynamic(packed, 1)
        return packed


@dataclass
class _Table:
    """A block table, and by row the pages it shows and how many.

    The array of a row's pages may only grow at its end: it is compared by identity and length, which is all that a step has time
    for. A page replaced in place would never be sent, nor one that came where another was taken off; the row would go on showing a
    page that is somebody else's. So whatever replaces or drops a page gives the sequence a new array.
    """

    on_device: torch.Tensor
    held: list[tuple[array[int], int]]

    def changes(self, tables: Sequence[array[int]]) -> tuple[Ints, array[int]]:
        """Flat places and what they must hold from now on, to show these pages."""
        width = self.on_device.shape[1]
        firsts: list[int] = []
        counts: list[int] = []
        pages: array[int] = array("i")
        rows = [*tables, *[_NO_PAGES] * (len(self.held) - len(tables))]
        held = [*self.held, *[(_NO_PAGES, 0)] * (len(tables) - len(self.held))]
        for row, (table, (shown, count)) in enumerate(zip(rows, held, strict=True)):
            size, same = len(table), table is shown
            if same and size == count:
                continue
            begin, end = count if same else 0, max(size, count)
            firsts.append(row * width + begin)
            counts.append(end - begin)
            pages.extend(table[begin:])
            pages.extend(_ZERO * (end - size))
        self.held = [(table, len(table)) for table in tables]
        return _runs(firsts, counts), pages

    def grown(self, rows: list[int]) -> tuple[Ints, array[int]]:
        """The same where these rows, and no others, have one page more."""
        width = self.on_device.shape[1]
        places: list[int] = []
        pages: array[int] = array("i")
        for row in rows:
            table, count = self.held[row]
            places.append(row * width + count)
            pages.append(table[count])
            self.held[row] = table, count + 1
        return np.array(places, dtype=np.int64), pages


def _runs(firsts: list[int], counts: list[int]) -> Ints:
    """first, first + 1, ..., so many of each, one run after the other."""
    lengths = np.array(counts, dtype=np.int64)
    before = np.cumsum(lengths) - lengths
    runs: Ints = np.arange(lengths.sum()) + np.repeat(np.array(firsts, dtype=np.int64) - before, lengths)
    return runs


def packed_tokens(given: Iterable[Sequence[int] | torch.Tensor]) -> tuple[Ints, list[int]]:
    """The token ids of several sequences, checked, one after the other, and how many of each."""
    ids: array[int] = array("q")
    counts: list[int] = []
    for tokens in given:
        if type(tokens) is list and len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] < 1 << 63:
            ids.append(tokens[0])  # a decode: the common case, and the checks below take ten times as long
            counts.append(1)
        else:
            new = token_array(tokens)
            ids.frombytes(new.tobytes())
            counts.append(len(new))
    return np.array(ids, dtype=np.int64), counts


def token_array(tokens: Sequence[int] | torch.Tensor) -> Ints:
    """Token ids as a checked int64 vector: at least one, whole numbers, none negative."""
    given = tokens.detach().cpu().numpy() if isinstance(tokens, torch.Tensor) else np.asarray(tokens)
    if given.ndim != 1:
        raise ValueError(f"token ids of shape {given.shape}; a sequence takes a flat list of whole numbers")
    if not len(given):
        raise ValueError("no token ids: a prompt or chunk is empty; give at least one token, such as a start token")
    if given.dtype.kind not in "iu":
        raise ValueError(f"token ids of type {given.dtype}; they must be whole numbers")
    if int(given.min()) < 0:
        raise ValueError(f"token id {int(given.min())} is negative; token ids start at 0")
    return given.astype(np.int64)


def _wanted_rows(ends: Ints, lengths: Ints, logits: list[Logits]) -> Ints:
    """Packed places of the tokens whose logits are wanted, in order."""
    if logits.count("last") == len(logits):
        return ends - 1
    wanted = [{"last": 1, "all": length, "none": 0}[each] for each, length in zip(logits, lengths.tolist(), strict=True)]
    return _runs((ends - np.array(wanted)).tolist(), wanted)

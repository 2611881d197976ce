"""What does one step look like to the compiled model?

Packed new tokens of many sequences, in static buffers: written in place every step, pad rows cleared every time.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

if TYPE_CHECKING:
    from compile_attn.cache import CachedSequence

Logits = Literal["last", "all", "none"]
Ints = np.ndarray[Any, np.dtype[np.int64]]

# Sizes 0 and 1 are specialised by torch.compile, so a step never has them: B, T and R are padded to 2.
MIN_SIZE = 2


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence, in order, and for which of them logits come back."""

    seq: CachedSequence
    tokens: Sequence[int] | torch.Tensor
    logits: Logits = "last"

    def __post_init__(self) -> None:
        if self.logits not in get_args(Logits):
            raise ValueError(f"logits={self.logits!r}; choose one of {', '.join(map(repr, get_args(Logits)))}")


@dataclass(frozen=True)
class Batch:
    """What to call the model with: input_ids and position_ids, both [1, T] int64; valid until the next batch."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    num_tokens: int  # without padding; likewise below
    num_rows: int
    num_seqs: int

    def rows(self, logits: torch.Tensor) -> torch.Tensor:
        """The real rows [num_rows, V] of what the model returned ([1, R, V] or [R, V])."""
        flat = logits[0] if logits.dim() == 3 and logits.shape[0] == 1 else logits
        if flat.dim() != 2 or flat.shape[0] != _padded(self.num_rows):
            raise ValueError(
                f"the model returned logits of shape {tuple(logits.shape)}; expected [1, {_padded(self.num_rows)}, "
                "vocabulary] for this batch: return logits of every token, [1, T, vocabulary], from the model's forward"
            )
        return flat[: self.num_rows]


class StepBuffers:
    """The buffers on the device and their mirrors on the host (on the CPU they are the same memory)."""

    def __init__(self, max_seqs: int, max_pages: int, max_tokens: int, device: torch.device) -> None:
        rows, tokens = max(max_seqs, MIN_SIZE), max(max_tokens, MIN_SIZE)
        self._device = device
        self._mirrors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._block_table = self._make("block_table", (rows, max_pages), torch.int32)
        self._seq_lens = self._make("seq_lens", (rows,), torch.int32)
        self._query_lens = self._make("query_lens", (rows,), torch.int32)
        self._input_ids = self._make("input_ids", (tokens,), torch.int64)
        self._position_ids = self._make("position_ids", (tokens,), torch.int64)
        self._logits_rows = self._make("logits_rows", (tokens,), torch.int64)
        self._written = (0, 0)  # rows and pages of the block table that the last batch wrote

    def _make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray[Any, Any]:
        pinned = self._device.type == "cuda"
        host = torch.zeros(shape, dtype=dtype, device="cpu", pin_memory=pinned)
        there = host if self._device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=self._device)
        self._mirrors[name] = (there, host)
        array_of: np.ndarray[Any, Any] = host.numpy()
        return array_of

    def write(self, tables: Sequence[array[int]], starts: list[int], tokens: list[Ints], logits: list[Logits]) -> Batch:
        """Write one batch: per sequence its pages, the tokens it had before, its new tokens, the rows wanted."""
        lengths = [len(new) for new in tokens]
        ends = np.cumsum(lengths)
        rows = _wanted_rows(ends, lengths, logits)
        seqs, total = _padded(len(tokens)), _padded(int(ends[-1]))
        self._write_table(tables, seqs)
        self._fill("seq_lens", self._seq_lens, np.add(starts, lengths), seqs)
        self._fill("query_lens", self._query_lens, lengths, seqs)
        self._fill("input_ids", self._input_ids, np.concatenate(tokens), total)
        places = [np.arange(start, start + count) for start, count in zip(starts, lengths, strict=True)]
        self._fill("position_ids", self._position_ids, np.concatenate(places), total)
        self._fill("logits_rows", self._logits_rows, _repeat_last(rows), _padded(len(rows)))
        ids, positions = (self._packed(name, total) for name in ("input_ids", "position_ids"))
        return Batch(ids, positions, int(ends[-1]), len(rows), len(tokens))

    def views(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """block_table [B, max_pages], seq_lens [B], query_lens [B], logits_rows [R] of this batch."""
        seqs, rows = _padded(batch.num_seqs), _padded(batch.num_rows)
        there = {name: pair[0] for name, pair in self._mirrors.items()}
        return (
            there["block_table"][:seqs],
            there["seq_lens"][:seqs],
            there["query_lens"][:seqs],
            there["logits_rows"][:rows],
        )

    def _write_table(self, tables: Sequence[array[int]], seqs: int) -> None:
        rows, pages = self._written
        self._block_table[:rows, :pages] = 0
        for row, table in enumerate(tables):
            self._block_table[row, : len(table)] = table
        self._written = (len(tables), max(map(len, tables)))
        self._send("block_table", max(rows, seqs))

    def _fill(self, name: str, into: np.ndarray[Any, Any], values: Any, size: int) -> None:
        """Write the values and zeros after them, up to the padded size."""
        into[: len(values)] = values
        into[len(values) : size] = 0
        self._send(name, size)

    def _send(self, name: str, size: int) -> None:
        there, host = self._mirrors[name]
        if there is not host:
            there[:size].copy_(host[:size])

    def _packed(self, name: str, total: int) -> torch.Tensor:
        """The first tokens of a buffer as [1, T], not marked as a view (Dynamo would guard on its base)."""
        from torch._dynamo import maybe_mark_dynamic  # documented under torch.compiler's dynamic shapes

        packed = self._mirrors[name][0][:total].unsqueeze(0).detach()
        maybe_mark_dynamic(packed, 1)
        return packed


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


def _padded(size: int) -> int:
    return max(size, MIN_SIZE)


def _wanted_rows(ends: Any, lengths: list[int], logits: list[Logits]) -> list[int]:
    """Packed places of the tokens whose logits are wanted, in order."""
    rows: list[int] = []
    for end, length, wanted in zip(ends.tolist(), lengths, logits, strict=True):
        first = {"last": end - 1, "all": end - length, "none": end}[wanted]
        rows.extend(range(first, end))
    return rows


def _repeat_last(rows: list[int]) -> list[int]:
    """Pad rows repeat a real one; without any they read token 0."""
    missing = MIN_SIZE - len(rows)
    return rows if missing <= 0 else rows + (rows[-1:] or [0]) * missing

"""Where do keys and values live, which pages does each sequence own, and what does one step read?

`PagedKVCache` owns the pages, hands them to sequences, and writes what a step needs (block table, lengths, rows) in
place into buffers whose addresses never change. Shape letters as in `kernels/spec.py`; R = rows of logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from compile_attn.host_plans import HostPlans
from compile_attn.kv_dtype import Scales
from compile_attn.modes import in_own_modes
from compile_attn.origin import StalePrefix
from compile_attn.pages import OutOfPages, PageAllocator, at_least_one, page_count
from compile_attn.pools import Pools, indexed
from compile_attn.prefixes import Salt
from compile_attn.proving import Proof
from compile_attn.sequences import CachedSequence, Found, Sequences, Tokens
from compile_attn.step import LEAST, Batch, Chunk, Sizes, StepBuffers, packed_tokens

if TYPE_CHECKING:
    from compile_attn.kernels.spec import AttentionSpec
    from compile_attn.passes.pipeline import LayerKV
    from compile_attn.passes.report import Report

__all__ = ["Batch", "CachedSequence", "Chunk", "OutOfPages", "PageAllocator", "PagedKVCache", "StalePrefix"]


class PagedKVCache:
    """Pages for the keys and values of one model.

    kv_tokens     tokens that fit in all sequences together; a multiple of page_size
    page_size     tokens in a page
    max_seqs      most sequences in one batch (any number may be alive)
    device        where it lives; default: torch's default device. It must be the model's.
    kv_dtype      "auto": the model's own; "fp8_e4m3" (or "fp8") or "fp8_e5m2": half the memory of a 16-bit dtype; or the dtype
                  that the model's keys must have
    max_seq_len   longest sequence; default: kv_tokens
    kv_scales     fp8 only: a pair of numbers a site, by which keys and values are divided before they are kept, such as
                  `calibrate()` finds. Default: 1. What is then beyond 448 (e5m2: 57344) is kept as that
    poison        fill pages with NaN when what they hold is given up, so that a stale read cannot go unseen; for tests

    Prefix caching: what `keep()` is told of stays when its sequence is freed, until its pages are needed, and `add(tokens)` begins
    with as much of it as fits. Pages of several sequences are copied on write.
    """

    def __init__(
        self,
        kv_tokens: int = 65_536,
        page_size: int = 16,
        max_seqs: int = 64,
        device: torch.device | str | None = None,
        kv_dtype: torch.dtype | str = "auto",
        max_seq_len: int | None = None,
        *,
        kv_scales: Scales | None = None,
        poison: bool = False,
    ) -> None:
        self.page_size = at_least_one("page_size", page_size)
        self.max_seqs = at_least_one("max_seqs", max_seqs)
        self.device = indexed(torch.get_default_device() if device is None else torch.device(device))
        self.poison = poison
        self.pools = Pools(self.page_size, self.device, kv_dtype, kv_scales, poison)
        self.max_positions: int | None = None  # length of the model's shortest position table
        self.max_tokens: int | None = None  # most new tokens that one step of the model may hold
        self.report: Report | None = None  # of the last compilation against this cache
        self.current: Batch | None = None
        self.steps_run = 0
        self.compilations = 0  # of the model against this cache
        self._seqs = Sequences(self.page_size, self.pools)
        self._in_batch: tuple[CachedSequence, ...] = ()
        self.proof = Proof(self._seqs, self._no_batch)  # that what sequences begin with is what the model would make
        self._longest = 0  # tokens of a sequence in the batch
        self._advances = False  # it was run, decodes, and holds all its pages
        self._host_plans = HostPlans(self.page_size)
        self._closed = False
        self._asked_seq_len = None if max_seq_len is None else at_least_one("max_seq_len", max_seq_len)
        self.resize(kv_tokens)

    @in_own_modes
    def resize(self, kv_tokens: int) -> None:
        """Hold so many tokens from now on, in empty pages. ValueError while any sequence is alive."""
        self._check_open()
        if self._seqs.alive:
            raise ValueError(f"{len(self._seqs.alive)} sequences are in the cache; free them before it is resized")
        self.num_pages = page_count(kv_tokens, self.page_size)
        self.kv_tokens = self.num_pages * self.page_size
        self.max_seq_len = min(self._asked_seq_len or self.kv_tokens, self.kv_tokens)
        self.max_pages_per_seq = -(-self.max_seq_len // self.page_size)
        self._seqs.resize(self.num_pages)
        # At least 2: torch.compile specialises sizes 0 and 1, and one compilation serves caches of every size.
        self.buffers = StepBuffers(self.max_seqs, max(2, self.max_pages_per_seq), self.kv_tokens, self.device)
        self.current, self._advances = None, False
        self.pools.remake(self.num_pages)

    # Pages and sequences

    @property
    def k_pages(self) -> list[torch.Tensor]:
        """By attention site, [1 + pages, page_size, heads, dim]; empty until a model is bound."""
        self._check_open()
        return self.pools.k

    @property
    def v_pages(self) -> list[torch.Tensor]:
        """As `k_pages`, with the values' own head size."""
        self._check_open()
        return self.pools.v

    @property
    def free_pages(self) -> int:
        """Pages that can be taken, those included that only a later prompt would find."""
        return self._seqs.pages.free_pages

    @property
    def pages_in_use(self) -> int:
        """Pages that sequences hold."""
        return self.num_pages - self.free_pages

    @property
    def length_limit(self) -> int:
        """Most tokens that one sequence may have in the cache."""
        return self.max_seq_len if self.max_positions is None else min(self.max_seq_len, self.max_positions)

    def pages_for(self, tokens: int) -> int:
        """Pages that a sequence of this many tokens fills."""
        return -(-tokens // self.page_size)

    def add(self, tokens: Tokens | Found | None = None, *, salt: Salt = None) -> CachedSequence:
        """A new sequence; it takes pages as it grows.

        tokens: what it will hold first, as far as that is known, or what `find` found of it. It begins with what the cache knows of
        them, so `length` tells how many need not be run: whole pages, or all but the last one. salt: only what was kept under the
        same salt is met.

        What it finds was made by the model as it was at the last step. Its own first step proves that this is the model still, or
        raises StalePrefix (see `forget_prefixes`). Nothing is found of a model that has tensors of which torch counts no changes:
        made in inference mode, or of a class of their own.
        """
        self._check_open()
        return self._seqs.add(tokens if isinstance(tokens, Found) else self._seqs.find(tokens, salt))

    def find(self, tokens: Tokens, *, salt: Salt = None) -> Found:
        """What `add` would begin with: how many tokens, and how many free pages it takes to hold all of them; see `Found`."""
        self._check_open()
        return self._seqs.find(tokens, salt)

    def pages_wanted(self, seq: CachedSequence, count: int) -> int:
        """How many of the free pages so many more tokens take, a copy of a page that others hold included."""
        self._check_open()
        self._seqs.check_mine(seq)
        return self._seqs.pages_wanted(seq, count)

    def keep(self, seq: CachedSequence, tokens: Tokens, start: int = 0) -> None:
        """Say which tokens the sequence begins with, so that others that begin alike find its full pages, also after it was freed.

        Nothing is kept of one that has begun before prefixes were forgotten. start: these are the tokens after `kept(seq)` ones.
        """
        self._check_open()
        self._seqs.check_usable(seq)
        self._seqs.keep(seq, tokens, start)

    def kept(self, seq: CachedSequence) -> int:
        """How many tokens of the sequence `keep` need not be told any more: those that are known, or all where nothing is kept."""
        self._check_open()
        self._seqs.check_mine(seq)
        return self._seqs.kept(seq)

    def forget_prefixes(self) -> None:
        """Let no later sequence begin with what was computed so far.

        This is done without asking when a step is run by another compiled graph than before (a Python attribute was changed) or
        with other tensors (a parameter, buffer or module was replaced), and when tensors have moved or been changed in place, which
        is looked at whenever a sequence is added with its tokens. A sequence that has found some by then and has not been run is
        refused (StalePrefix): free it, and add it again. Call this after a change that torch does not count, as one through
        `.data`, through NumPy or from a CUDA graph, and after one that torch.compile has no guard for.
        """
        self._check_open()
        self._seqs.forget()

    def fork(self, seq: CachedSequence, length: int | None = None) -> CachedSequence:
        """A second sequence that begins with the first `length` tokens of this one (default: all), in the same pages."""
        self._check_open()
        length = self._seqs.check_length(seq, length)
        self._advances = False
        return self._seqs.fork(seq, length)

    def truncate(self, seq: CachedSequence, length: int) -> None:
        """Take back all tokens after the first `length`, and the pages that this empties."""
        self._check_open()
        length = self._seqs.check_length(seq, length)
        self._advances = False
        self._seqs.truncate(seq, length)

    def free(self, seq: CachedSequence) -> None:
        """End a sequence; pages that nobody else holds can be taken at once by others."""
        self._check_open()
        self._seqs.check_mine(seq)
        self._advances = False
        self._seqs.free(seq)

    @property
    def prefix_hits(self) -> int:
        """Sequences that began with known tokens."""
        return self._seqs.hits

    @property
    def prefix_tokens(self) -> int:
        """Tokens that need not have been run for that."""
        return self._seqs.hit_tokens

    def close(self) -> None:
        """Drop the pages' memory. Every later use is an error; what was counted, and the report, can still be read."""
        self._closed = True
        self.pools.drop()
        self._seqs.alive.clear()
        self.current = None

    # One step

    @in_own_modes
    def batch(self, chunks: Sequence[Chunk], *, recorded: Sizes | None = None, width: int = 0) -> Batch:
        """Take pages for the new tokens, advance the sequences, and write the step's inputs in place.

        One logits row comes back for the last token of each chunk (see `Chunk.logits`), in the order of the chunks.
        The tensors of the batch are overwritten by the next one. Raises OutOfPages or StalePrefix, with nothing changed.

        recorded: the sizes of a CUDA graph that replays the step; width: the least pages a row of the block table.
        """
        self._check_open()
        tokens, counts = self._check_chunks(chunks)
        seqs = [chunk.seq for chunk in chunks]
        starts, self._advances = [seq.length for seq in seqs], False  # also if what follows fails half-way
        self._seqs.grow(list(zip(seqs, counts, strict=True)))
        tables = [seq._pages for seq in seqs]
        width = self.buffers.width(max(width, *map(len, tables)), self.page_size)
        logits, carried = [chunk.logits for chunk in chunks], [chunk.carried for chunk in chunks]
        self.current = self.buffers.write(tables, starts, tokens, counts, logits, width, carried, recorded or LEAST)
        self._in_batch = tuple(seqs)
        self.proof.begin(zip(self._in_batch, starts, strict=True))
        self._longest = max(seq.length for seq in self._in_batch)
        self._host_plans.plan(self.current, chunks, self.buffers.views(self.current)[0], captured=recorded is not None)
        return self.current

    def advanced_width(self) -> int | None:
        """Pages a row of the block table if the batch is advanced; None where it cannot be."""
        self._check_open()
        if not self._advances or self._longest >= self.length_limit:
            return None
        return self.buffers.width(self.pages_for(self._longest + 1), self.page_size)

    def advance(self) -> Batch:
        """The batch of decodes that was run last, every sequence one token longer, as the device already has it (`advance_step`).

        Only new pages are sent. For when `advanced_width()` is the batch's own. Raises OutOfPages, with nothing changed.
        """
        width = self.advanced_width()
        assert self.current is not None and width == self.current.width
        seqs, size = self._in_batch, self.page_size
        full = [row for row, seq in enumerate(seqs) if seq.length % size == 0]
        for row, page in zip(full, self._seqs.pages.take(len(full)), strict=True):
            seqs[row]._pages.append(page)
        for seq in seqs:
            seq.length += 1
            seq.unrun = True
        self.current.unrun = True
        self._longest, self._advances = self._longest + 1, False
        if full:
            self.buffers.add_pages(full, self.current.width)
        self._host_plans.plan_advanced()
        return self.current

    def width_of(self, chunks: Sequence[Chunk]) -> int:
        """Pages a row of the block table that a batch of these chunks will have."""
        self._check_open()
        longest = max(chunk.seq.length + len(chunk.tokens) for chunk in chunks)
        return self.buffers.width(self.pages_for(longest), self.page_size)

    def dead_batch(self, sizes: Sizes, width: int) -> Batch:
        """A batch of pad rows alone: what it runs writes nothing and means nothing. For recording a CUDA graph."""
        self._check_open()
        self.current = self.buffers.write([], [], *packed_tokens([]), [], width, least=sizes)
        self._in_batch, self._advances = (), False
        self.proof.begin()
        self._host_plans.plan(self.current, [], self.buffers.views(self.current)[0], captured=True)
        return self.current

    def replayed(self) -> None:
        """The current batch was run by a CUDA graph, which asks for no inputs."""
        self._check_open()
        for seq in self._in_batch:
            seq.unrun = False
        self.proof.ran()
        if self.current is not None:
            self.current.unrun = False
        self._advances = self.current is not None and self.current.num_tokens == len(self._in_batch) > 0
        self.steps_run += 1

    def step_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of this batch: block_table [B, max_pages], seq_lens [B], query_lens [B], all int32; logits_rows [R] int64.

        B and R are padded to at least 2. Asking for them counts as running the batch.
        """
        current = self._current()
        self.replayed()
        return self.buffers.views(current)

    def check_inputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Refuse a call with other tensors than those of the current batch."""
        current = self._current()
        for name, given in (("input_ids", input_ids), ("position_ids", position_ids)):
            ours: torch.Tensor = getattr(current, name)
            if given is not None and (given.data_ptr() != ours.data_ptr() or given.shape != ours.shape):
                raise ValueError(
                    f"{name} of shape {tuple(given.shape)} on {given.device} is not the current batch's own tensor of "
                    f"shape {tuple(ours.shape)} on {ours.device}; pass batch.{name} of the last cache.batch() unchanged"
                )

    # Binding to a model

    @in_own_modes
    def bind(
        self,
        layers: Sequence[LayerKV],
        owner: object,
        max_positions: int | None = None,
        max_tokens: int | None = None,
        kernels: Sequence[tuple[str, AttentionSpec]] = (),
        assumed: Mapping[str, int] | None = None,
    ) -> None:
        """Allocate pages for each attention site of `owner`; once. The same owner may come again with equal layers.

        kernels: by site, the kernel and what it computes. assumed: how large sequences, max_pages, pages and tokens may be, where
        compiling has assumed it; ValueError where this cache is larger.
        """
        self._check_open()
        assumed = assumed or {}
        mine = {"sequences": self.max_seqs, "max_pages": self.max_pages_per_seq, "pages": 1 + self.num_pages}
        for name, size in mine.items():
            if assumed.get(name, size) < size:
                raise ValueError(f"{name}={size}; the compiled graph takes at most {assumed[name]}: make the cache smaller")
        max_tokens = min(filter(None, (max_tokens, assumed.get("tokens"))), default=None)
        self.pools.bind(layers, owner, self.num_pages)
        self.compilations += 1
        self.max_positions = min(filter(None, (self.max_positions, max_positions)), default=None)
        self.max_tokens = min(filter(None, (self.max_tokens, max_tokens)), default=None)
        self._host_plans.bind(kernels, [(layer.dtype, self.pools.stored(layer)) for layer in layers])

    # Checks

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this PagedKVCache is closed; make a new one")

    def _no_batch(self) -> None:
        self.current, self._in_batch = None, ()

    def _current(self) -> Batch:
        self._check_open()
        if self.current is None:
            raise ValueError("the paged model was called before any batch was made; call cache.batch([...]) first")
        return self.current

    def _check_chunks(self, chunks: Sequence[Chunk]) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[int]]:
        """All their new tokens, and how many of each."""
        if not 1 <= len(chunks) <= self.max_seqs:
            raise ValueError(f"a batch of {len(chunks)} chunks; from 1 to max_seqs={self.max_seqs} fit in one step")
        if len({id(chunk.seq) for chunk in chunks}) < len(chunks):
            raise ValueError("a sequence occurs twice in one batch; give all its new tokens in one Chunk")
        tokens, counts = packed_tokens(chunk.tokens for chunk in chunks)
        limit = self.length_limit
        for chunk, count in zip(chunks, counts, strict=True):
            self._seqs.check_usable(chunk.seq)
            if chunk.seq.length + count > limit:
                raise ValueError(
                    f"{chunk.seq!r} with {count} new tokens exceeds the limit of {limit} tokens "
                    f"(max_seq_len {self.max_seq_len}, position table {self.max_positions or 'unlimited'}); "
                    "pass fewer tokens or make the cache larger"
                )
        if self.max_tokens is not None and len(tokens) > self.max_tokens:
            raise ValueError(f"a batch of {len(tokens)} new tokens; this model takes at most {self.max_tokens} a step: split")
        return tokens, counts

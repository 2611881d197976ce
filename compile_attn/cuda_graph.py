"""How does a step run without its host?

A CUDA graph holds the model and sampling; that of a decode also `advance_step`, which brings the step's buffers to the next token.
There is one for each size of a step and way of sampling, recorded when first needed; they share one memory pool, since no two run
at once. Steps of many new tokens have none: they keep the device busy for longer than the host takes to launch them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from compile_attn.cache import Batch, PagedKVCache
from compile_attn.kernels.batch import advance_step
from compile_attn.sampling import SamplingRows, sample
from compile_attn.step import Sizes
from compile_attn.step_sizes import MOST_DRAFTED, decode_size, mixed_size, mixed_sizes, with_logits, worth_recording

Forward = Callable[[Batch], torch.Tensor]


class Kind(NamedTuple):
    """What a graph is recorded for. A decode has as many new tokens as rows, and no other step has."""

    rows: int  # sequences
    new_tokens: int
    wanted: int  # rows of logits: one a sequence, or one a token where several of a sequence are asked for
    width: int  # pages a row of the block table
    random: bool  # any row draws at random

    @property
    def decodes(self) -> bool:
        return self.rows == self.new_tokens

    @property
    def sizes(self) -> Sizes:
        return self.rows, self.new_tokens, self.wanted


@dataclass(frozen=True)
class Recorded:
    """One graph: how many rows it serves, of how many tokens at most, how many of all are new (as many as rows: a decode), how many
    tokens it samples, whether it draws at random, and what recording it took."""

    rows: int
    new_tokens: int
    wanted: int
    tokens: int
    random: bool
    seconds: float
    bytes: int  # of GPU memory that torch reserved meanwhile


class StepGraphs:
    """Decodes, and steps with prompts or with drafts to verify, of the sizes of `step_sizes`, each in block tables of up to 256,
    1024, ... tokens (`StepBuffers.width`).

    On a CPU a step is run anew where a GPU replays it.

    forward   runs the model on the cache's current batch and returns one row of logits a row
    model     a graph holds the addresses of its parameters and buffers, and is recorded anew where one has changed, or where a step
              without a graph was run by other code or with other tensors (`Origin`)
    budget    most new tokens in one step
    drafts    whether steps may verify drafts
    """

    def __init__(self, forward: Forward, cache: PagedKVCache, model: nn.Module, budget: int, drafts: bool = False) -> None:
        self._forward, self._cache, self._model, self._drafts = forward, cache, model, drafts
        self._budget, self._prompts = budget, True
        self._tensors: list[torch.Tensor] = []
        self._stands: tuple[object, ...] | None = None  # what the graphs were recorded against
        self._steps: dict[Kind, Callable[[], None]] = {}
        self.recorded: list[Recorded] = []
        self._on_gpu = cache.device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(cache.device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._how = SamplingRows.idle(max(self._most_rows, min(budget, MOST_DRAFTED))).to(cache.device)

    def sizes(self, rows: int, new_tokens: int, wanted: int) -> Sizes | None:
        """Of the graph that serves such a step: a decode if all three are alike; None where it is too large for any."""
        if rows == new_tokens == wanted:
            size, limit = decode_size(rows, self._most_rows), self._cache.max_tokens
            return (size, size, size) if limit is None or size <= limit else None
        found = mixed_size(rows, new_tokens, self._most_rows, self.most_tokens)
        return None if found is None else with_logits(found, wanted > rows)

    @property
    def most_tokens(self) -> int:
        """New tokens of a step with prompts."""
        if not self._prompts:
            return 0
        cache = self._cache
        return min(self._budget, self._worth, cache.buffers.input_ids.shape[0], cache.max_tokens or self._budget)

    @cached_property
    def _worth(self) -> int:
        return worth_recording(self._model, len(self._cache.k_pages))

    def kinds(self, rows: int, tokens: int, random: bool) -> list[Kind]:
        """All that steps of up to so many rows, of up to so many tokens each, ask for; `random`: those that draw, too.

        The largest come first: the others then find room in its memory.
        """
        cache = self._cache
        rows = min(rows, cache.num_pages)  # every row has a page
        decodes = [self.sizes(count, count, count) for count in range(1, rows + 1)]
        pairs = mixed_sizes(rows, tokens, self._most_rows, self.most_tokens)
        mixed = [with_logits(size, each) for size in pairs for each in {False, self._drafts}]
        sizes = sorted(filter(None, {*decodes, *mixed}), key=lambda size: (size[1], size[0], size[2]), reverse=True)
        widths = cache.buffers.widths(cache.pages_for(tokens), cache.page_size)
        ways = (True, False) if random else (False,)
        return [Kind(*size, width, way) for size in sizes for width in reversed(widths) for way in ways]

    @property
    def _most_rows(self) -> int:
        return max(2, self._cache.max_seqs)

    def prepare(self, kind: Kind, again: bool) -> None:
        """Record the graph if it is missing; the current batch is another one afterwards.

        A changed model is noticed here: one whose tensors have moved at every step, and one that has others at every step that
        is not the last one `again`, so that no two requests are served by different weights.
        """
        if not again:
            self._tensors = [*self._model.parameters(), *self._model.buffers()]
        if (stands := self._standing()) != self._stands:
            self._forget()
            self._stands = stands
        if kind in self._steps:
            return
        begin, held = time.perf_counter(), self._reserved()
        buffers = self._cache.buffers
        recent = buffers.recent[: kind.wanted].clone()  # tokens that the host has not read yet
        try:
            batch = self._cache.dead_batch(kind.sizes, kind.width)
            _check_is(kind, batch)
            step = self._body(batch, kind.random)
            self._steps[kind] = self._record(step)
        finally:  # also where the step ran but could not be recorded: the next one goes on from these tokens
            buffers.recent[: kind.wanted].copy_(recent)
        if len(self._steps) == 1:  # recording has called the model, so what it stands on now is what the graph stands on
            self._stands = self._standing()
        seconds, bytes_ = time.perf_counter() - begin, self._reserved() - held
        tokens = kind.width * self._cache.page_size
        self.recorded.append(Recorded(*kind.sizes, tokens, kind.random, seconds, bytes_))

    def forget_prompts(self) -> None:
        """Steps with prompts have no graphs from now on."""
        self._prompts = False
        self._steps = {kind: step for kind, step in self._steps.items() if kind.decodes}
        self.recorded = [one for one in self.recorded if one.rows == one.new_tokens]

    def replay(self, kind: Kind, batch: Batch) -> None:
        """Run the step on the current batch; its tokens are in `buffers.recent`. A decode leaves the buffers one token further."""
        _check_is(kind, batch)
        self._steps[kind]()

    def set_sampling(self, how: SamplingRows) -> None:
        """How the first rows of the next random step are sampled; later ones, being pads, in any way."""
        there = self._how.first(how.seeds.shape[0]).tensors()
        for old, new in zip(there, how.to(self._cache.device).tensors(), strict=True):
            old.copy_(new)

    def _forget(self) -> None:
        """Let go of all graphs. Into a memory pool that no graph holds any more, torch does not record."""
        if self._steps and self._on_gpu:
            torch.cuda.synchronize(self._cache.device)  # the last step may still run
            self._steps.clear()
            self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
        self._steps.clear()
        self.recorded.clear()

    def _standing(self) -> tuple[object, ...]:
        """What the graphs there are stand on."""
        return self._cache.proof.origin, self._cache.buffers, [*map(torch.Tensor.data_ptr, self._tensors)]

    def _body(self, batch: Batch, random: bool) -> Callable[[], None]:
        """The step, reading and writing nothing but buffers whose addresses stay."""
        (rows, new_tokens, wanted), buffers = batch.shape, self._cache.buffers
        how = self._how.first(wanted) if random else None
        recent, seq_lens = buffers.recent[:wanted], buffers.seq_lens[:rows]
        limit = min(batch.width * self._cache.page_size, self._cache.length_limit)

        def step() -> None:
            with torch.no_grad():
                recent.copy_(sample(self._forward(batch), how))
                if new_tokens > rows:
                    return
                advance_step(buffers.input_ids[:rows], buffers.position_ids[:rows], seq_lens, recent, limit)
                if how is not None:
                    how.counts.add_(1)

        return step

    def _record(self, step: Callable[[], None]) -> Callable[[], None]:
        if not self._on_gpu:
            step()
            return step
        graph = torch.cuda.CUDAGraph()
        here: Any = torch.cuda.current_stream(self._cache.device)
        self._stream.wait_stream(here)
        try:
            with torch.cuda.stream(self._stream), _no_garbage():
                step()  # whatever is compiled, tuned or allocated at first use
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    step()
                except BaseException:
                    self._pool = torch.cuda.graph_pool_handle()  # a pool in which recording failed takes no other
                    with suppress(RuntimeError):  # it says that the recording failed
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            here.wait_stream(self._stream)  # what has run there reads the buffers that are written next
        return graph.replay

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self._cache.device) if self._on_gpu else 0


def _check_is(kind: Kind, batch: Batch) -> None:
    """A graph would read less of a batch of other sizes, or more, and say nothing."""
    if batch.shape != kind.sizes or batch.width != kind.width:
        raise RuntimeError(f"a batch of {batch.shape} in tables of {batch.width} pages is not what this graph is for: {kind}")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """No collection meanwhile: one that frees another graph or event would break the recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

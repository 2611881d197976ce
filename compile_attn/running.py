"""How does a planned step reach the device, and how do its tokens come back?

Sending never waits: what a step needs is written behind the steps before it, a token that only the device knows is carried over
there, and the tokens are copied to the host while the next step runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compile_attn.cache import Batch, Chunk, PagedKVCache
from compile_attn.calling import logits_of
from compile_attn.cuda_graph import Kind, Recorded, StepGraphs
from compile_attn.requests import Plan
from compile_attn.sampling import SamplingRows, sample
from compile_attn.step import NOT_PAGED


@dataclass(frozen=True)
class Sent:
    """A step on its way: its plan, and its tokens, which are the host's to read after the event."""

    plan: Plan
    tokens: torch.Tensor
    arrived: Any  # torch.cuda.Event, or None where nothing is asynchronous

    def read(self) -> list[int]:
        """The token of each sampled row; waits for this step, not for later ones."""
        if self.arrived is not None:
            self.arrived.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return tokens


class Runner:
    """Runs plans on a compiled model and its cache, steps of few tokens from graphs where they are wanted.

    run           the compiled model
    budget        most new tokens in one step
    drafts        whether steps may verify drafts
    cuda_graphs   "auto" goes on without them, with a warning, where a step cannot be recorded; True raises; False: never
    """

    def __init__(
        self,
        run: Callable[[torch.Tensor, torch.Tensor], Any],
        cache: PagedKVCache,
        model: nn.Module,
        cuda_graphs: str | bool,
        budget: int,
        drafts: bool = False,
    ) -> None:
        self._run, self._cache = run, cache
        self._strict = cuda_graphs is True
        self.graphs = StepGraphs(self._rows, cache, model, budget, drafts) if cuda_graphs else None
        self._steady: tuple[Kind, Plan, Batch] | None = None  # the step that the device can repeat by itself

    def send(self, plan: Plan) -> Sent:
        """Hand the step to the device."""
        before, (kind, again) = self._cache.current, self._kind(plan)
        if kind is not None and self._prepared(kind, again):
            self._replay(plan, kind, again and self._cache.current is before)  # not if a graph was recorded meanwhile
        else:
            self._run_once(plan)
        tokens = self._cache.buffers.recent[: plan.shape[2]]
        if tokens.device.type != "cuda":
            return Sent(plan, tokens.clone(), None)
        host = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu", pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(tokens.device))
        return Sent(plan, host, arrived)

    def logits(self, chunks: Sequence[Chunk], width: int = 0) -> torch.Tensor:
        """Run the model over new tokens; the logits rows they asked for. `width`: the least pages a row of the block table."""
        self._steady = None
        batch = self._cache.batch(chunks, width=width)
        return self._rows(batch)[: batch.num_rows]

    def record(self, rows: int, tokens: int, random: bool, *, largest: bool = False) -> int:
        """Record the steps of up to so many rows of up to so many tokens, or only the largest decode and the largest of the others.

        `random`: those that draw at random, too. Returns the bytes that this took.
        """
        if self.graphs is None:
            return 0
        before, kinds = list(self.graphs.recorded), self.graphs.kinds(rows, tokens, random)
        if largest:
            kinds = [kind for at, kind in enumerate(kinds) if kind.decodes not in {each.decodes for each in kinds[:at]}]
        for at, kind in enumerate(kinds):
            self._prepared(kind, again=at > 0)
        return sum(one.bytes for one in self.recorded if not any(one is known for known in before))

    @property
    def recorded(self) -> list[Recorded]:
        """The graphs there are."""
        return [] if self.graphs is None else self.graphs.recorded

    def close(self) -> None:
        """Let go of the graphs and their memory."""
        self.graphs = self._steady = None

    def _kind(self, plan: Plan) -> tuple[Kind | None, bool]:
        """The graph that runs this step, None where none can; whether the device has brought the buffers to it by itself."""
        if self.graphs is None:
            return None, False
        last, before, batch = self._steady or (None, None, None)
        if last is not None and before is plan and (width := self._cache.advanced_width()) is not None:
            kind = last._replace(width=width)
            return kind, kind == last and batch is self._cache.current
        sizes = self.graphs.sizes(*plan.shape)
        if sizes is None:
            return None, False
        kind = Kind(*sizes, self._cache.width_of(plan.chunks), plan.random)
        same = kind == last and before is not None and before.sampled == plan.sampled and batch is self._cache.current
        return kind, same and self._cache.advanced_width() == kind.width

    def _prepared(self, kind: Kind, again: bool) -> bool:
        if self.graphs is None or not (kind.decodes or self.graphs.most_tokens):  # another could not be recorded
            return False
        try:
            self.graphs.prepare(kind, again)
        except (RuntimeError, ValueError) as error:
            if self._strict:
                raise
            why = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            which = "steps" if kind.decodes else "steps with prompts"
            warnings.warn(f"{which} run without CUDA graphs: one could not be recorded: {why}", stacklevel=4)
            if kind.decodes:
                self.graphs = None
            else:
                self.graphs.forget_prompts()
            return False
        return True

    def _replay(self, plan: Plan, kind: Kind, again: bool) -> None:
        assert self.graphs is not None
        batch = self._cache.advance() if again else self._cache.batch(plan.chunks, recorded=kind.sizes)
        if not again:
            self._cache.proof.ask(lambda: self._run(batch.input_ids, batch.position_ids))
        if kind.random and not again:
            self.graphs.set_sampling(SamplingRows.of(plan.how, plan.draws))
        self.graphs.replay(kind, batch)
        self._cache.replayed()
        self._steady = (kind, plan, batch) if kind.decodes else None

    def _run_once(self, plan: Plan) -> None:
        logits = self.logits(plan.chunks)
        if plan.sampled:
            how = SamplingRows.of(plan.how, plan.draws).to(logits.device) if plan.random else None
            with torch.no_grad():
                self._cache.buffers.recent[: plan.shape[2]].copy_(sample(logits, how))

    def _rows(self, batch: Batch) -> torch.Tensor:
        """The logits of the current batch, [R, V], pad rows included."""
        before = self._cache.steps_run
        logits = logits_of(self._run(batch.input_ids, batch.position_ids))
        if self._cache.steps_run == before:
            raise RuntimeError(NOT_PAGED)
        return batch.all_rows(logits)

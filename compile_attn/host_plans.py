"""Which kernels plan on the host, and what are they told of each step?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compile_attn.kernels.backend import Backend, HostStep, PlannedSite, Shape, planners
from compile_attn.kernels.select import backend

if TYPE_CHECKING:
    from compile_attn.kernels.spec import AttentionSpec
    from compile_attn.step import Batch, Chunk


class HostPlans:
    """For one cache: what its model's kernels plan, and the step that they planned last."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._sites: list[tuple[Backend, PlannedSite]] = []  # that differ
        self._planning: dict[Backend, list[PlannedSite]] = {}  # in steps of the last one's shapes
        self._step: HostStep | None = None

    def bind(self, kernels: Sequence[tuple[str, AttentionSpec]], dtypes: Sequence[tuple[torch.dtype, torch.dtype]]) -> None:
        """By site, the kernel and what it computes, and the dtypes of queries and pages."""
        pairs = zip(kernels, dtypes, strict=False)
        self._sites = list(dict.fromkeys((backend(kernel), PlannedSite(spec, *dtype)) for (kernel, spec), dtype in pairs))
        self._step = None

    def plan(self, batch: Batch, chunks: Sequence[Chunk], table: torch.Tensor, captured: bool) -> None:
        """Let the kernels of this step plan, from the lengths that the host knows."""
        (rows, tokens, _), room = batch.shape, batch.width * self._page_size
        self._step, self._planning = None, planners(self._sites, Shape(tokens, rows, room))
        if not self._planning:
            return
        seq_lens, query_lens = (torch.zeros(rows, dtype=torch.int32, device="cpu") for _ in range(2))
        seq_lens.numpy()[: len(chunks)] = [chunk.seq.length for chunk in chunks]
        query_lens.numpy()[: len(chunks)] = [len(chunk.tokens) for chunk in chunks]
        self._step = HostStep(table, seq_lens, query_lens, tokens, self._page_size, captured)
        self._plan()

    def plan_advanced(self) -> None:
        """The same for the step of decodes after the last one, whose shapes it has."""
        if self._step is not None:
            self._step = replace(self._step, seq_lens=self._step.seq_lens + self._step.query_lens)
            self._plan()

    def _plan(self) -> None:
        assert self._step is not None
        for kernel, sites in self._planning.items():
            kernel.plan_on_host(self._step, sites)

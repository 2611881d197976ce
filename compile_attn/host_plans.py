"""Which kernels plan on the host, and what are they told of each step?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from compile_attn.kernels.backend import Backend, HostStep, PlannedSite
from compile_attn.kernels.select import backend

if TYPE_CHECKING:
    from compile_attn.kernels.spec import AttentionSpec
    from compile_attn.step import Batch, Chunk


class HostPlans:
    """For one cache: what its model's kernels plan, and the step that they planned last."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._sites: dict[str, list[PlannedSite]] = {}
        self._step: HostStep | None = None

    def bind(self, kernels: Sequence[tuple[str, AttentionSpec]], dtypes: Sequence[tuple[torch.dtype, torch.dtype]]) -> None:
        """By site, the kernel and what it computes, and the dtypes of queries and pages."""
        self._sites, self._step = {}, None
        for (kernel, spec), dtype in zip(kernels, dtypes, strict=False):
            if type(backend(kernel)).plan_on_host is not Backend.plan_on_host:
                sites = self._sites.setdefault(kernel, [])
                site = PlannedSite(spec, *dtype)
                if site not in sites:
                    sites.append(site)

    def plan(self, batch: Batch, chunks: Sequence[Chunk], table: torch.Tensor, captured: bool) -> None:
        """Let them plan, from the lengths that the host knows."""
        if not self._sites:
            return
        seq_lens, query_lens = (torch.zeros(batch.shape[0], dtype=torch.int32, device="cpu") for _ in range(2))
        seq_lens[: len(chunks)] = torch.tensor([chunk.seq.length for chunk in chunks])
        query_lens[: len(chunks)] = torch.tensor([len(chunk.tokens) for chunk in chunks])
        self._step = HostStep(table, seq_lens, query_lens, batch.shape[1], self._page_size, captured)
        self._plan()

    def plan_advanced(self) -> None:
        """The same for the step of decodes after the last one."""
        if self._step is not None:
            self._step = replace(self._step, seq_lens=self._step.seq_lens + self._step.query_lens)
            self._plan()

    def _plan(self) -> None:
        assert self._step is not None
        for kernel, sites in self._sites.items():
            backend(kernel).plan_on_host(self._step, sites)

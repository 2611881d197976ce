"""Which batches are attention kernels measured on, and how much work is in each?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.apart import compiled_apart
from compile_attn.kernels.backend import HostStep, PlannedSite
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.manifest import dtype_name

PAGE_SIZE = 16
LAYERS = 8
APART = 256 << 20  # bytes between layers: one must not find the keys of another in the GPU's cache


@dataclass(frozen=True)
class Case:
    """A batch: for each sequence the tokens it had, and the new ones."""

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def pages(self) -> int:
        return sum(-(-(before + new) // PAGE_SIZE) for before, new in self.rows)

    @property
    def longest(self) -> int:
        return max(before + new for before, new in self.rows)

    @property
    def tokens(self) -> int:
        return sum(new for _, new in self.rows)

    @property
    def most_new(self) -> int:
        return max(new for _, new in self.rows)

    def bytes(self, spec: AttentionSpec, itemsize: int = 2) -> int:
        """Each key, value and query read once, each output written once."""
        keys = sum(before + new for before, new in self.rows) * spec.num_kv_heads
        return (keys + self.tokens * spec.num_q_heads) * (spec.head_dim + spec.head_dim_v) * itemsize

    def operations(self, spec: AttentionSpec) -> int:
        """Two for each multiplied pair, of visible keys only (causal)."""
        pairs = sum(new * before + new * (new + 1) // 2 for before, new in self.rows)
        return 2 * pairs * spec.num_q_heads * (spec.head_dim + spec.head_dim_v)


def decode(batch: int, context: int) -> Case:
    """One new token a sequence, as its last of `context`."""
    return Case(f"decode {batch} x {context}", ((context - 1, 1),) * batch)


def prefill(batch: int, length: int) -> Case:
    return Case(f"prefill {batch} x {length}", ((0, length),) * batch)


# 31 decodes, and a prompt's second chunk
MIXED = Case("mixed: 31 decodes at 4096, a chunk of 2048 at 2048", ((2048, 2048), *((4095, 1),) * 31))


def plain(dim: int, heads: int = 32, kv_heads: int = 8) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, dim, scale=dim**-0.5)


class Pool:
    """Pages with random keys and values, shared by all cases, and by all layers in part."""

    def __init__(
        self, pages: int, spec: AttentionSpec, device: torch.device, dtype: torch.dtype = torch.bfloat16, apart: int = APART
    ) -> None:
        self.spec, self.device, self.dtype, self.pages = spec, device, dtype, pages
        page = PAGE_SIZE * spec.num_kv_heads * (spec.head_dim + spec.head_dim_v) * dtype.itemsize
        step = max(1, apart // page)
        shape = (pages + (LAYERS - 1) * step, PAGE_SIZE, spec.num_kv_heads)
        k = torch.randn(*shape, spec.head_dim, device=device, dtype=dtype)
        v = torch.randn(*shape, spec.head_dim_v, device=device, dtype=dtype)
        # Of one shape for all cases: a compiled step then serves them all.
        self.layers = [(k[at : at + pages], v[at : at + pages]) for at in range(0, LAYERS * step, step)]


class Inputs:
    """The tensors of one case, its pages in shuffled order."""

    def __init__(self, case: Case, pool: Pool, layers: int = LAYERS) -> None:
        self.case, self.spec, self.device, self.dtype = case, pool.spec, pool.device, pool.dtype
        if case.pages > pool.pages:
            raise ValueError(f"{case.name} needs {case.pages} pages, the pool has {pool.pages}; make it larger")
        self.layers = pool.layers[:layers]
        self.tables, self.metadata = _tables(case, pool.device)
        self.q = torch.randn(case.tokens, pool.spec.num_q_heads, pool.spec.head_dim, device=pool.device, dtype=pool.dtype)

    @property
    def where(self) -> tuple[torch.Tensor, ...]:
        """The arguments of the op that say where keys and queries are."""
        at = self.metadata
        return at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq

    def plan(self, kernel: str, captured: bool) -> torch.Tensor | None:
        """What is done once a step: the cache's call before it, and the plan that the graph then holds, if there is one."""
        at, chosen = self.metadata, backend(kernel)
        seq_lens, query_lens = at.seq_lens.cpu(), at.query_lens.cpu()
        step = HostStep(at.block_table, seq_lens, query_lens, self.case.tokens, PAGE_SIZE, captured)
        chosen.plan_on_host(step, [PlannedSite(self.spec, self.dtype, self.dtype)])
        shared = chosen.planned(self.spec)
        if shared is None:
            return None
        given = PAGE_SIZE, dtype_name(self.dtype), shared.encode(), kernel
        return torch.ops.paged_attn.plan(*self.where, *given)  # type: ignore[no-any-return]


def _tables(case: Case, device: torch.device) -> tuple[list[list[int]], AttentionMetadata]:
    """The pages of each sequence, and the batch's metadata, its table as wide as a cache would make it."""
    free = torch.randperm(case.pages, generator=torch.Generator().manual_seed(0)).tolist()
    builder = AttentionMetadataBuilder(PAGE_SIZE, table_width(-(-case.longest // PAGE_SIZE), PAGE_SIZE))
    tables = []
    for before, new in case.rows:
        count = -(-(before + new) // PAGE_SIZE)
        tables.append([free.pop() for _ in range(count)])
        builder.add(tables[-1], before + new, new)
    return tables, builder.build(device)


Step = Callable[[Inputs, torch.Tensor | None], list[torch.Tensor]]


def attend_layers(kernel: str, spec: AttentionSpec) -> Step:
    """Our op for every layer of a step, under a plan."""
    attend, text = torch.ops.paged_attn.attend, spec.encode()

    def step(inputs: Inputs, plan: torch.Tensor | None) -> list[torch.Tensor]:
        return [attend(inputs.q, k, v, *inputs.where, [], text, kernel, None, None, plan) for k, v in inputs.layers]

    return step


def compiled_layers(kernel: str, spec: AttentionSpec, inner: str = "inductor") -> Step:
    """The same through torch.compile: once for all numbers of tokens and sequences of at least two."""
    attend, text = torch.ops.paged_attn.attend, spec.encode()

    def layers(q: torch.Tensor, pages: list[tuple[torch.Tensor, torch.Tensor]], plan: Any, *where: Any) -> list[torch.Tensor]:
        return [attend(q, k, v, *where, [], text, kernel, None, None, plan) for k, v in pages]

    compiled = compiled_apart(layers, backend=inner, fullgraph=True)  # or the recompile limit counts all kernels together

    def step(inputs: Inputs, plan: torch.Tensor | None) -> list[torch.Tensor]:
        for tensor in (inputs.q, *inputs.where, *([] if plan is None else [plan])):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        with torch.no_grad():
            return compiled(inputs.q, inputs.layers, plan, *inputs.where)  # type: ignore[no-any-return]

    return step

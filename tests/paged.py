"""A batch over pages whose every unowned slot is NaN, for the tests of kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import compile_attn.kernels.ops  # noqa: F401  registers the ops
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.reference import ReferenceBackend
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import attend_row


@dataclass
class PagedBatch:
    """Sequences whose keys and values, those of new tokens included, are in pages; q holds the new tokens, packed."""

    spec: AttentionSpec
    metadata: AttentionMetadata
    k: list[torch.Tensor]  # per sequence [L, Hkv, D]
    v: list[torch.Tensor]
    q: torch.Tensor  # [T, Hq, D], NaN for pad tokens
    k_pages: torch.Tensor
    v_pages: torch.Tensor

    def attend(self, captured: Sequence[torch.Tensor], kernel: str = "reference") -> torch.Tensor:
        at = self.metadata
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        spec = self.spec.encode()
        out: torch.Tensor = torch.ops.paged_attn.attend(self.q, self.k_pages, self.v_pages, *where, list(captured), spec, kernel)
        return out

    def expected(self, captured: Sequence[torch.Tensor]) -> torch.Tensor:
        """By the oracle, in float64."""
        out = torch.zeros(self.q.shape[0], self.spec.num_q_heads, self.spec.head_dim_v, dtype=torch.float64)
        token = 0
        for row, (length, new) in enumerate(zip(self.metadata.seq_lens.tolist(), self.metadata.query_lens.tolist(), strict=True)):
            for position in range(length - new, length):
                out[token] = attend_row(self.spec, self.q[token], self.k[row], self.v[row], row, position, captured)
                token += 1
        return out

    def reference(self, captured: Sequence[torch.Tensor]) -> torch.Tensor:
        """By the reference in float64, on the host, where it reads a row's keys once and not for every token."""
        pools = (pages.cpu().double() for pages in (self.k_pages, self.v_pages))
        at = self.metadata
        where = (each.cpu() for each in (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq))
        exact = [each.double() if each.is_floating_point() else each for each in (given.cpu() for given in captured)]
        out = ReferenceBackend().attend(self.q.cpu().double(), Paged(*pools, *where), exact, self.spec)
        return out.to(self.q.device)


def paged_batch(
    spec: AttentionSpec,
    sequences: Sequence[tuple[int, int]],
    *,
    page_size: int = 4,
    pad_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> PagedBatch:
    """A batch of (context, new) sequences in shuffled pages; tables hold page numbers of others beyond their length."""
    make, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    lengths = [context + new for context, new in sequences]
    counts = [-(-length // page_size) for length in lengths]
    free = list(range(sum(counts) + 3))
    shuffle.shuffle(free)
    max_pages = max(1, *counts) + 1
    builder = AttentionMetadataBuilder(page_size, max_pages)
    tables = []
    for (context, new), count in zip(sequences, counts, strict=True):
        tables.append([free.pop() for _ in range(count)])
        builder.add(tables[-1], context + new, new)
    metadata = builder.build(device, sum(new for _, new in sequences) + pad_tokens)
    for row, count in enumerate(counts):
        metadata.block_table[row, count:] = len(counts)  # another's, or a free page: never to be read as a value

    def random_of(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    k = [random_of(length, spec.num_kv_heads, spec.head_dim) for length in lengths]
    v = [random_of(length, spec.num_kv_heads, spec.head_dim_v) for length in lengths]
    pages = (sum(counts) + 3, page_size, spec.num_kv_heads)
    k_pages = torch.full((*pages, spec.head_dim), torch.nan, dtype=dtype)
    v_pages = torch.full((*pages, spec.head_dim_v), torch.nan, dtype=dtype)
    for pool, held in ((k_pages, k), (v_pages, v)):
        for table, tokens in zip(tables, held, strict=True):
            for page, part in zip(table, tokens.split(page_size), strict=False):  # of no tokens, one part
                pool[page, : len(part)] = part
    q = random_of(metadata.positions.shape[0], spec.num_q_heads, spec.head_dim)
    q[sum(new for _, new in sequences) :] = torch.nan
    k, v = ([each.to(device) for each in held] for held in (k, v))
    return PagedBatch(spec, metadata, k, v, q.to(device), k_pages.to(device), v_pages.to(device))

"""A batch over pages whose every unowned slot is NaN, for the tests of kernels."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import compile_attn.kernels.ops  # noqa: F401  registers the ops
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
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
        return torch.randn(shape, generator=make).to(dtype).to(device)

    k = [random_of(length, spec.num_kv_heads, spec.head_dim) for length in lengths]
    v = [random_of(length, spec.num_kv_heads, spec.head_dim_v) for length in lengths]
    pages = (sum(counts) + 3, page_size, spec.num_kv_heads)
    k_pages = torch.full((*pages, spec.head_dim), torch.nan, dtype=dtype, device=device)
    v_pages = torch.full((*pages, spec.head_dim_v), torch.nan, dtype=dtype, device=device)
    for row, table in enumerate(tables):
        for place in range(lengths[row]):
            k_pages[table[place // page_size], place % page_size] = k[row][place]
            v_pages[table[place // page_size], place % page_size] = v[row][place]
    q = random_of(metadata.positions.shape[0], spec.num_q_heads, spec.head_dim)
    q[sum(new for _, new in sequences) :] = torch.nan
    return PagedBatch(spec, metadata, k, v, q, k_pages, v_pages)

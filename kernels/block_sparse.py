"""Which tiles suit a mask that hides whole blocks of keys?

The kernel is the general one: the blocks that it visits are printed from the mask's predicate, for prefill, chunks and
decode alike. Here a block of keys is no larger than a cell of the mask, so that a visit is all of use. Where heads see
different cells, a tile of a prefill holds one head: together they would visit what each of them does not see. A tile of few
visits has little in which to hide its beginning and end, so that two must fit a multiprocessor, and one loop goes over blocks
with and without a mask: two would fill and drain their pipelines for a few blocks each. Where visits are many, what one of
them takes is what counts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from compile_attn.kernels.backend import Request
from compile_attn.kernels.mask import Mask
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.tiles import Tiles, padded, tiles_of
from compile_attn.kernels.triton_launch import TritonBackend
from compile_attn.kernels.triton_print import reads_by_key
from compile_attn.kernels.visible import block_of, bounded, by_head, most_keys


class Cut(NamedTuple):
    """A tile of many tokens: its rows and keys at most, and what works on them."""

    rows: int
    keys: int
    warps: int
    stages: int
    registers: int
    together: bool = True  # one loop over blocks with and without a mask


OTHER = Cut(64, 64, 0, 0, 0)  # 0: as `tiles_of` says
# Of 16-bit numbers, by head size, and by whether heads see different cells. 128 registers let 128 rows fit a multiprocessor
# twice; with 128 channels, blocks of more than 32 keys would then take more registers than there are: the compiler would make
# each product of matrices wait for the one before. Rows of one head are 128 tokens, of two rows of cells of 64: half of what
# they visit near the diagonal is nothing to them. tests/hopper.py compiles these; `python -m bench.tune_block_sparse` measures
# others.
CUTS = {
    (64, False): Cut(128, 64, 8, 3, 128),
    (64, True): Cut(128, 64, 8, 3, 128),
    (128, False): Cut(128, 32, 8, 4, 128),
    (128, True): OTHER,
    (256, False): Cut(128, 32, 8, 3, 0),
    (256, True): Cut(128, 32, 8, 3, 0),
}
# By head size, where the last tokens of a prompt see so many keys, or more. Products do wait here, and each has twice the keys:
# the other tile of the multiprocessor works meanwhile.
MANY, FOR_MANY = 1 << 11, {128: Cut(128, 64, 8, 2, 128, together=False)}
_FEW_ROWS = 64  # of all heads together: reading keys is what takes time, and they are read once for all heads
_LONG, _WASTE = 1 << 13, 1.5  # of a tile with more rows, which may be in different rows of cells: keys, over those of a small one


class BlocksparseFlashAttentionBackend(TritonBackend):
    """Serves every spec whose mask bounds the keys of a query, or skips some of them by blocks."""

    name = "block_sparse"

    def limits(self, request: Request) -> tuple[str, ...]:
        mask = request.spec.mask
        why = f"finds no blocks of keys to skip in the mask '{mask.words()}'; choose kernel='auto'"
        return (*super().limits(request), *(() if bounded(mask) else (why,)))

    def tiles(self, spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int) -> Tiles:
        group = spec.num_q_heads // spec.num_kv_heads
        few = tokens * group <= _FEW_ROWS
        heads = 1 if by_head(spec.mask, group) and not few else group
        cut = OTHER if few or dot.itemsize != 2 else _cut(spec, heads, tokens, shared)
        most = cut.rows, min(cut.keys, block_of(spec.mask) or cut.keys)
        found = tiles_of(spec, dot, tokens, shared, read, heads, most)
        # What is read inside a branch is not fetched ahead; and a branch around three products of float32 spills.
        found = replace(found, together=dot.itemsize == 2 and not reads_by_key(spec))
        if cut is OTHER or found.block_m < cut.rows:
            return found
        return replace(found, warps=cut.warps, stages=cut.stages, registers=cut.registers, together=cut.together)


def _cut(spec: AttentionSpec, heads: int, tokens: int, shared: int) -> Cut:
    """For tiles that hold so many heads of a KV head. What is read for every key takes registers of its own."""
    size = padded(max(spec.head_dim, spec.head_dim_v))
    odd = spec.head_dim % 16 or spec.head_dim_v % 16  # unmeasured, and their loads are not joined
    cut = OTHER if odd else CUTS.get((size, by_head(spec.mask, spec.num_q_heads // spec.num_kv_heads)), OTHER)
    if not odd and most_keys(spec.mask, heads, max(1, OTHER.rows // heads), tokens) >= MANY:
        cut = FOR_MANY.get(size, cut)
    fits = 2 * size * (cut.rows + 2 * cut.stages * cut.keys) <= shared
    return cut if fits and not reads_by_key(spec) and not _wasteful(spec.mask, heads, cut.rows) else OTHER


def _wasteful(mask: Mask, heads: int, rows: int) -> bool:
    """Would a tile of so many rows visit much that only some of them see?"""
    large, small = (most_keys(mask, heads, max(1, each // heads), _LONG) for each in (rows, OTHER.rows))
    return large > _WASTE * small

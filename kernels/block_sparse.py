"""Which tiles suit a mask that hides whole blocks of keys?

The kernel is the general one: the blocks that it visits are printed from the mask's predicate, for prefill, chunks and
decode alike. Here a block of keys is no larger than a cell of the mask, so that a visit is all of use. Where heads see
different cells, a tile of a prefill holds one head: together they would visit what each of them does not see. A tile has few
visits in which to hide its beginning and end, so that two must fit a multiprocessor.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from compile_attn.kernels.backend import Request
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.tiles import Tiles, tiles_of
from compile_attn.kernels.triton_launch import TritonBackend
from compile_attn.kernels.visible import block_of, bounded, by_head

_FEW_ROWS = 64  # of all heads together: reading keys is what takes time, and they are read once for all heads
_MOST_KEYS = 64
_ROWS, _ROWS_OF_A_HEAD = 128, 64  # of a tile, at most: tokens of one head soon are in different rows of cells
_STAGES, _REGISTERS = 2, 128  # with which a multiprocessor holds two tiles of 128 rows and channels


class BlockSparseBackend(TritonBackend):
    """Serves every spec whose mask bounds the keys of a query, or skips some of them by blocks."""

    name = "block_sparse"

    def limits(self, request: Request) -> tuple[str, ...]:
        mask = request.spec.mask
        why = f"finds no blocks of keys to skip in the mask '{mask.words()}'; choose kernel='auto'"
        return (*super().limits(request), *(() if bounded(mask) else (why,)))

    def tiles(self, spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int) -> Tiles:
        keys = min(_MOST_KEYS, block_of(spec.mask) or _MOST_KEYS)
        rows = tokens * (spec.num_q_heads // spec.num_kv_heads)
        apart = rows > _FEW_ROWS and by_head(spec.mask)
        large = dot.itemsize == 2 and max(spec.head_dim, spec.head_dim_v) in range(65, 129) and not read and not apart
        most = (_ROWS if large else _ROWS_OF_A_HEAD, keys)
        found = tiles_of(spec, dot, tokens, shared, read, 1 if apart else None, most)
        return replace(found, stages=_STAGES, registers=_REGISTERS) if found.block_m == _ROWS else found

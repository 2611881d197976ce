"""Which tiles suit a mask that hides whole blocks of keys?

The kernel is the general one: the blocks that it visits are printed from the mask's predicate, for prefill, chunks and
decode alike. Here a block of keys is no larger than a cell of the mask, so that a visit is all of use, and a tile has fewer
rows: there are few visits in which to hide a tile's beginning and end. Where heads see different cells, a tile of a prefill
holds one head: together they would visit what each of them does not see.
"""

from __future__ import annotations

import torch

from compile_attn.kernels.backend import Request
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.tiles import Tiles, tiles_of
from compile_attn.kernels.triton_launch import TritonBackend
from compile_attn.kernels.visible import bounded, by_head, unit_of

_FEW_ROWS = 64  # of all heads together: reading keys is what takes time, and they are read once for all heads
_MOST_ROWS, _MOST_KEYS = 64, 64


class BlockSparseBackend(TritonBackend):
    """Serves every spec whose mask bounds the keys of a query, or skips some of them by blocks."""

    name = "block_sparse"

    def limits(self, request: Request) -> tuple[str, ...]:
        mask = request.spec.mask
        why = f"finds no blocks of keys to skip in the mask '{mask.words()}'; choose kernel='auto'"
        return (*super().limits(request), *(() if bounded(mask) else (why,)))

    def tiles(self, spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int) -> Tiles:
        unit = unit_of(spec.mask) or _MOST_KEYS
        keys = max(16, min(_MOST_KEYS, unit & -unit))  # the largest power of two that divides the unit
        rows = tokens * (spec.num_q_heads // spec.num_kv_heads)
        heads = 1 if rows > _FEW_ROWS and by_head(spec.mask) else None
        return tiles_of(spec, dot, tokens, shared, read, heads, (_MOST_ROWS, keys))

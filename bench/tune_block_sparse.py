"""Which tiles are fastest for block-sparse masks? Prints the best few for every case."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.block_sparse import Case, call, microseconds, prepare
from compile_attn.kernels import tiles as tiling
from compile_attn.kernels import triton_launch
from compile_attn.kernels.block_sparse import BlockSparseBackend
from compile_attn.kernels.mask import BlockSparse, Causal
from compile_attn.kernels.tiles import Tiles

SPREAD = tiling._spread


class Fixed(BlockSparseBackend):
    def __init__(self, *sizes):
        self.sizes = sizes

    def tiles(self, spec, dot, tokens, shared, read):
        group, m, n, warps, stages, together, registers, *_ = self.sizes
        return Tiles(group, max(1, m // group) if tokens > 1 else 1, m, n, warps, stages, dot, registers, together)

    def attend(self, q, kv, captured, spec):
        tiling._spread = a_tile_each if len(self.sizes) > 7 else SPREAD
        triton_launch.forget()
        return super().attend(q, kv, captured, spec)


def a_tile_each(spec, size, tiles, few, shared, multiprocessors):
    blocks, heads = size.blocks(tiles.block_q, few), spec.num_q_heads // tiles.group
    return tiling.Launch(tiles, few, (blocks, heads, 1), 1, 0)


def main() -> None:
    import compile_attn.kernels.ops  # noqa: F401

    started = time.time()
    work = []
    prefill = [
        (64, 64, 4, 3, False, 0),
        (64, 64, 4, 3, True, 0),
        (64, 64, 4, 2, True, 0),
        (64, 64, 4, 2, True, 168),
        (128, 64, 8, 2, True, 128),
        (128, 64, 8, 2, False, 128),
        (128, 64, 8, 3, True, 0),
    ]
    for context in (8192, 32768):
        for step, group in ((0, 4), (1, 1)):
            work += [(Case(1, context, True, BlockSparse(64, 1, 16, step)), (group, *each)) for each in prefill]
        dense = [*prefill[:2], (128, 128, 8, 3, False, 0), (128, 128, 8, 2, True, 0)]
        work += [(Case(1, context, True, Causal()), (4, *each)) for each in dense]
    decode = [
        (64, 4, 3, False, 0),
        (64, 4, 3, True, 0),
        (64, 4, 3, False, 168),
        (64, 4, 3, True, 0, "tile"),
        (64, 4, 3, False, 0, "tile"),
        (64, 4, 2, True, 0, "tile"),
        (64, 2, 3, True, 0, "tile"),
    ]
    for context in (8192, 32768):
        for mask in (BlockSparse(64, 1, 16, 0), BlockSparse(64, 1, 16, 1), Causal()):
            work += [(Case(32, context, False, mask), (4, 16, *each)) for each in decode]
    jobs = [(case, Fixed(*sizes)) for case, sizes in work]
    prepare([job for job in jobs if job[0].context == 8192])
    print(f"compiled in {time.time() - started:.0f} s", flush=True)
    lines, best = [], {}
    for (case, sizes), (_, by) in zip(work, jobs, strict=True):
        try:
            took = microseconds(call(case, by))
        except Exception as error:
            took = float("inf")
            lines.append(f"{case.name()} {sizes}: {str(error)[:80]}")
        best.setdefault(case, []).append((took, sizes))
    for case, found in best.items():
        lines.append(f"{case.name():16} {case.mask!r:80}" + "  ".join(f"{took:.1f} {sizes}" for took, sizes in sorted(found)))
    print("\n".join(lines))
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "tune_block_sparse.txt").write_text("\n".join(lines))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()

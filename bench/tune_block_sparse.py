"""Which tiles are fastest for block-sparse masks? Prints the best few for every case."""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.block_sparse import Case, call, microseconds, prepare
from compile_attn.kernels.block_sparse import BlockSparseBackend
from compile_attn.kernels.mask import BlockSparse, Causal
from compile_attn.kernels.triton_launch import Tiles


class Fixed(BlockSparseBackend):
    def __init__(self, *sizes):
        self.sizes = sizes

    def tiles(self, spec, dot, tokens, shared, read):
        group, m, n, warps, stages = self.sizes
        return Tiles(group, max(1, m // group) if tokens > 1 else 1, m, n, warps, stages, dot)


def main() -> None:
    import compile_attn.kernels.ops  # noqa: F401

    started = time.time()
    work = []
    prefill = [
        (4, 128, 64, 8, 3),
        (4, 128, 64, 8, 2),
        (4, 128, 64, 4, 3),
        (4, 64, 64, 4, 3),
        (4, 64, 64, 4, 2),
        (4, 128, 128, 8, 2),
        (4, 128, 128, 8, 3),
        (4, 128, 64, 4, 2),
    ]
    alone = [(1, *each[1:]) for each in prefill]
    for context in (8192, 32768):
        for mask in (BlockSparse(64, 1, 16, 0), BlockSparse(64, 1, 4, 0)):
            work += [(Case(1, context, True, mask), each) for each in prefill if each[2] <= 64]
        work += [(Case(1, context, True, BlockSparse(64, 1, 16, 1)), each) for each in alone if each[2] <= 64]
        work += [(Case(1, context, True, Causal()), each) for each in prefill]
    decode = [(4, 16, 64, 4, 3), (4, 16, 64, 4, 2), (4, 16, 64, 2, 3), (4, 16, 64, 2, 2), (4, 16, 64, 4, 4), (4, 16, 32, 2, 4)]
    for context in (8192, 32768):
        for mask in (BlockSparse(64, 1, 16, 0), BlockSparse(64, 1, 16, 1), Causal()):
            work += [(Case(32, context, False, mask), each) for each in decode]
    jobs = [(case, Fixed(*sizes)) for case, sizes in work]
    prepare([job for job in jobs if job[0].context == 8192])
    print(f"compiled in {time.time() - started:.0f} s")
    lines, best = [], {}
    for (case, sizes), (_, by) in zip(work, jobs, strict=True):
        try:
            took = microseconds(call(case, by))
        except Exception as error:
            took = float("inf")
            lines.append(f"{case.name()} {sizes}: {str(error)[:80]}")
        best.setdefault(case, []).append((took, sizes))
    for case, found in best.items():
        lines.append(f"{case.name():16} {case.mask!r:80}" + "  ".join(f"{took:.0f} {sizes}" for took, sizes in sorted(found)))
    print("\n".join(lines))
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "tune_block_sparse.txt").write_text("\n".join(lines))
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()

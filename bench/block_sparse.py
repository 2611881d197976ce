"""Does time follow density? Block-sparse attention over pages against our own causal kernel, on one GPU.

    python -m bench.block_sparse [--out FOLDER]

Density: keys that some query head of a KV head sees where keys are what takes time (decode), pairs of query and key that are
seen where products are (prefill); of those of the causal mask.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.measuring import RESULTS, Table, publish, stamp
from compile_attn.kernels.backend import Backend, Paged
from compile_attn.kernels.mask import BlockSparse, Causal, Mask
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

HEADS, KV_HEADS, DIM, PAGE, BLOCK = 32, 8, 128, 16, 64
MOST = 1.25  # time / dense time, over density


@dataclass(frozen=True)
class Case:
    """`batch` sequences of `context` keys; all of them new, or one."""

    batch: int
    context: int
    prefill: bool
    mask: Mask

    def name(self) -> str:
        return f"{'prefill' if self.prefill else 'decode'} {self.batch} x {self.context // 1024}k"

    def spec(self) -> AttentionSpec:
        return AttentionSpec(HEADS, KV_HEADS, DIM, DIM, self.mask, DIM**-0.5)

    def density(self) -> float:
        """Counted in blocks, and in pairs on the diagonal."""
        assert isinstance(self.mask, BlockSparse)
        behind = torch.arange(self.context // BLOCK, 0, -1)[:, None]  # blocks of queries that a block of keys could have
        slide = (torch.arange(HEADS) + self.mask.head_offset) // self.mask.heads_per_step * self.mask.head_step
        vertical = (len(behind) - behind + slide + 1) % self.mask.vert_stride == 0
        if not self.prefill:
            seen = (behind <= self.mask.local_blocks) | vertical
            return seen.view(len(behind), KV_HEADS, -1).any(2).double().mean().item()
        has = torch.where(vertical, behind, behind.clamp(max=self.mask.local_blocks))  # its own among them
        pairs = (has - 1) * BLOCK**2 + BLOCK * (BLOCK + 1) // 2
        return pairs.sum().item() / HEADS / (self.context * (self.context + 1) / 2)


def masks(context: int, prefill: bool, step: int, together: int = 1) -> Iterator[BlockSparse]:
    """For densities of about 1/16, 1/8, 1/4 and 1/2: one local block, and verticals, of so many heads the same."""
    strides = range(2, 64)
    for wanted in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        found = (BlockSparse(BLOCK, 1, stride, step, heads_per_step=together) for stride in strides)
        yield min(found, key=lambda mask: abs(Case(1, context, prefill, mask).density() / wanted - 1))


def cases() -> list[Case]:
    sizes = [(1, 8192, True), (1, 32768, True), (32, 8192, False), (32, 32768, False)]
    return [
        Case(batch, context, prefill, mask)
        for batch, context, prefill in sizes
        for step, together in ((0, 1), (1, 1), (1, HEADS // KV_HEADS))
        for mask in ([Causal()] if step == 0 else []) + list(masks(context, prefill, step, together))
    ]


@functools.lru_cache(maxsize=1)
def batch_of(batch: int, context: int, new: int) -> tuple[torch.Tensor, Paged]:
    """Random queries, and random keys and values in pages in a random order."""
    pages = batch * context // PAGE
    table = torch.randperm(pages, dtype=torch.int32, device="cuda").view(batch, -1)
    pools = [torch.randn(pages, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    lengths, news = (torch.full((batch,), n, dtype=torch.int32, device="cuda") for n in (context, new))
    starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(table, lengths, news, batch * new, PAGE)
    q = torch.randn(batch * new, HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    return q, Paged(*pools, table, lengths, starts, positions, token_seq)


def call(case: Case, by: Backend) -> Callable[[], torch.Tensor]:
    q, kv = batch_of(case.batch, case.context, case.context if case.prefill else 1)
    spec = case.spec()
    return lambda: by.attend(q, kv, [], spec)


def kernel_of(case: Case) -> Backend:
    return backend("general" if isinstance(case.mask, Causal) else "block_sparse")


def prepare(work: list[tuple[Case, Backend]]) -> None:
    """Compile in parallel, into Triton's cache on disk."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context) as pool:
        list(pool.map(compile_one, work))


def compile_one(work: tuple[Case, Backend]) -> None:
    import compile_attn.kernels.ops  # noqa: F401

    with contextlib.suppress(Exception):  # it comes again, and is told, where it is measured
        call(*work)()
    batch_of.cache_clear()


def microseconds(run: Callable[[], torch.Tensor], rep: int = 40) -> float:
    """A call inside a CUDA graph, the median of several replays."""
    import triton.testing

    run()
    return float(triton.testing.do_bench_cudagraph(run, rep=rep, return_mode="median")) * 1e3


def measure(work: list[Case]) -> Iterator[tuple[Case, float, float]]:
    """Each block-sparse case with its microseconds, and those of the dense case of its size."""
    dense = 0.0
    for case in work:
        took = microseconds(call(case, kernel_of(case)))
        if isinstance(case.mask, Causal):
            dense = took
        else:
            yield case, took, dense


def row(case: Case, took: float, dense: float) -> list[str]:
    assert isinstance(case.mask, BlockSparse)
    density = case.density()
    over = took / dense / density
    each = "each head" if case.mask.heads_per_step == 1 else "each KV head"
    heads = f"of {each}" if case.mask.head_step else "of all heads"
    mark = "" if over <= MOST else " (!)"
    figures = [f"{density:.4f}", f"{took:.1f}", f"{dense:.1f}", f"{took / dense:.4f}", f"{over:.2f}{mark}"]
    return [case.name(), f"{heads}, 1 of {case.mask.vert_stride}", *figures]


def main() -> None:
    import compile_attn.kernels.ops  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    work = cases()
    prepare([(case, kernel_of(case)) for case in work])
    found, rows = [], []
    for case, took, dense in measure(work):
        rows.append(row(case, took, dense))
        found.append({"call": case.name(), "mask": repr(case.mask), "density": case.density(), "us": took, "dense_us": dense})
        print(*rows[-1], sep=" | ", flush=True)
    columns = ("call", "vertical blocks", "density", "us", "dense us", "ratio", "ratio / density")
    note = (
        f"bf16, {HEADS} heads on {KV_HEADS} KV heads of {DIM}, pages of {PAGE}; blocks of {BLOCK}, one local block and verticals. "
        f"Dense: `general`, causal. A call inside a CUDA graph, median. Wanted: ratio / density at most {MOST}; (!) is more."
    )
    table = Table("Time over density", columns, rows, note)
    publish("block_sparse", "Block-sparse attention", [table], {"found": found}, stamp(torch.device("cuda")), out)


if __name__ == "__main__":
    main()

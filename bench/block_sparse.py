"""Does time follow density? Block-sparse attention over pages against our own causal kernel, on one GPU.

    python -m bench.block_sparse [--write]

Density: keys that some query head of a KV head sees where keys are what takes time (decode), pairs of query and key that are
seen where products are (prefill); of those of the causal mask. `--write` renews bench/results/block_sparse.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from compile_attn.kernels.backend import Backend, Paged
from compile_attn.kernels.mask import BlockSparse, Causal, Mask
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

HEADS, KV_HEADS, DIM, PAGE, BLOCK = 32, 8, 128, 16, 64
RESULT = Path(__file__).parent / "results" / "block_sparse.md"
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
        blocks = self.context // BLOCK
        a, b, h = torch.arange(blocks)[:, None, None], torch.arange(blocks)[:, None], torch.arange(HEADS)
        vertical = (b + h * self.mask.head_step + 1) % self.mask.vert_stride == 0
        seen = (b <= a) & ((a - b < self.mask.local_blocks) | vertical)
        if not self.prefill:
            return seen[-1].view(blocks, KV_HEADS, -1).any(2).double().mean().item()
        pairs = torch.where(b == a, BLOCK * (BLOCK + 1) / 2, float(BLOCK**2))
        return (seen * pairs).sum().item() / HEADS / (self.context * (self.context + 1) / 2)


def masks(context: int, prefill: bool, step: int) -> Iterator[BlockSparse]:
    """For densities of about 1/16, 1/8, 1/4 and 1/2: one local block, and verticals."""
    strides = range(2, 64)
    for wanted in (1 / 16, 1 / 8, 1 / 4, 1 / 2):
        found = (BlockSparse(BLOCK, 1, stride, step) for stride in strides)
        yield min(found, key=lambda mask: abs(Case(1, context, prefill, mask).density() / wanted - 1))


def cases() -> list[Case]:
    sizes = [(1, 8192, True), (1, 32768, True), (32, 8192, False), (32, 32768, False)]
    return [
        Case(batch, context, prefill, mask)
        for batch, context, prefill in sizes
        for step in (0, 1)
        for mask in ([Causal()] if step == 0 else []) + list(masks(context, prefill, step))
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

    call(*work)()
    batch_of.cache_clear()


def microseconds(run: Callable[[], torch.Tensor]) -> float:
    """A call inside a CUDA graph, the median of several replays."""
    import triton.testing

    run()
    return float(triton.testing.do_bench_cudagraph(run, rep=40, return_mode="median")) * 1e3


def main() -> None:
    import compile_attn.kernels.ops  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    work = cases()
    prepare([(case, kernel_of(case)) for case in work])
    rows, dense = [], 1.0
    for case in work:
        took = microseconds(call(case, kernel_of(case)))
        if isinstance(case.mask, Causal):
            dense = took
            continue
        assert isinstance(case.mask, BlockSparse)
        ratio, density = took / dense, case.density()
        heads = "each head its own" if case.mask.head_step else "all heads alike"
        rows.append((case.name(), heads, case.mask.vert_stride, density, took, dense, ratio, ratio / density))
    lines = [
        "| call | verticals | stride | density | us | dense us | ratio | ratio / density |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, heads, stride, density, took, whole, ratio, over in rows:
        mark = "" if over <= MOST else " (!)"
        lines.append(f"| {name} | {heads} | {stride} | {density:.4f} | {took:.1f} | {whole:.1f} | {ratio:.4f} | {over:.2f}{mark} |")
    table = "\n".join(lines)
    print(table)
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "block_sparse.json").write_text(json.dumps(rows))
    if write:
        RESULT.write_text(report(table))


def report(table: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    versions = f"torch {torch.__version__}, triton {version('triton')}"
    return f"""# Time over density, block-sparse attention

{datetime.date.today()}, commit {commit or "unknown"}, {versions}, {torch.cuda.get_device_name()}.
`python -m bench.block_sparse --write`

bf16, {HEADS} heads on {KV_HEADS} KV heads of {DIM}, pages of {PAGE}; blocks of {BLOCK}, one local block and verticals. Dense is
`general` on the causal mask. Each call inside a CUDA graph, median. Wanted: ratio / density at most {MOST}; (!) is more.

{table}
"""


if __name__ == "__main__":
    main()

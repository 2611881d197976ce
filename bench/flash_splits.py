"""What do splits, a schedule made beforehand, and page size change in FlashAttention 3? Microseconds a call, in a CUDA graph.

The answers are the rules in kernels/flash_splits.py and kernels/flash_attn.py. Tables are as wide as a cache makes them. "Planned":
the schedule is made once a step and not in the time; "ours": the op's backend, everything in.

    python -m bench.flash_splits [decode] [prefill] [mixed] [--dims 128 64]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import compile_attn.kernels.ops  # noqa: F401  registers the ops
from bench.measuring import keep_busy
from compile_attn.kernels import flash_attn
from compile_attn.kernels.backend import DeviceStep, Paged
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.flash_providers import Call, Grid, HopperExtension
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

_L2 = 50 << 20
FA3 = HopperExtension()


def batch(
    spec: AttentionSpec, sequences: Sequence[tuple[int, int]], page_size: int, pools: int = 1
) -> list[tuple[torch.Tensor, Paged]]:
    """The same batch over several pools, so that no call finds its keys in the cache of the one before."""
    lengths = [context + new for context, new in sequences]
    counts = [-(-length // page_size) for length in lengths]
    shape = (sum(counts), page_size, spec.num_kv_heads, spec.head_dim)
    table = torch.zeros((len(lengths), table_width(max(counts), page_size)), dtype=torch.int32)
    order, first = torch.randperm(sum(counts), dtype=torch.int32), 0
    for row, count in enumerate(counts):
        table[row, :count] = order[first : first + count]
        first += count
    at = table.cuda(), torch.tensor(lengths, dtype=torch.int32).cuda(), torch.tensor([n for _, n in sequences]).int().cuda()
    tokens = sum(new for _, new in sequences)
    starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(*at, tokens, page_size)
    out = []
    for _ in range(pools):
        q, k, v = (
            torch.randn(size, device="cuda", dtype=torch.bfloat16)
            for size in ((tokens, spec.num_q_heads, spec.head_dim), shape, shape)
        )
        out.append((q, Paged(k, v, *at[:2], starts, positions, token_seq)))
    return out


def microseconds(calls: dict[str, Sequence[Callable[[], Any]]]) -> dict[str, float]:
    """Of one call of each, from graphs that hold all of them several times and are run in turn, so that all see the same clock."""
    graphs, times = {}, {}
    for name, each in calls.items():
        for call in each:
            call()
        times[name] = max(1, 24 // len(each))
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(times[name]):
                for call in each:
                    call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(7):
        for name, graph in graphs.items():
            keep_busy()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) * 1000 / times[name] / len(calls[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def raw(
    spec: AttentionSpec, q: torch.Tensor, kv: Paged, most_queries: int, splits: int, planned: bool, named: bool = False
) -> Callable[[], Any]:
    """The library itself, told the truth about the batch: rows are sequences. `named`: and says which row of the table is whose."""
    most_keys = kv.block_table.shape[1] * kv.k_pages.shape[1]
    rows = kv.cu_seqlens_q, kv.seq_lens, kv.token_seq if named else None, None
    grid = Grid(spec, q.dtype, kv.k_pages.shape[1], *rows, most_queries, most_keys, -1, 0, splits)
    call = Call(grid, q, kv.k_pages, kv.v_pages, kv.block_table, schedule=FA3.schedule(grid) if planned else None)
    return lambda: FA3.run(call)


def ours(spec: AttentionSpec, q: torch.Tensor, kv: Paged, planned: bool) -> Callable[[], Any]:
    run = backend("flash_attn")
    if planned:
        at = (kv.block_table, kv.seq_lens, kv.cu_seqlens_q, kv.positions, kv.token_seq)
        kv = kv._replace(plan=run.plan(DeviceStep(*at, kv.k_pages.shape[1], q.dtype), run.planned(spec) or spec))
    return lambda: run.attend(q, kv, [], spec)


def compare(
    spec: AttentionSpec, name: str, sequences: Sequence[tuple[int, int]], page_size: int, splits: Sequence[int]
) -> dict[str, Any]:
    keys = sum(context + new for context, new in sequences) * spec.num_kv_heads * spec.head_dim * 4
    batches = batch(spec, sequences, page_size, max(1, min(8, 4 * _L2 // max(1, keys))))
    most = max(new for _, new in sequences)
    row: dict[str, Any] = {"case": name, "head size": spec.head_dim, "page": page_size}
    calls = {
        f"{count}{'p' * planned}": [raw(spec, q, kv, most, count, planned) for q, kv in batches]
        for count in splits
        for planned in (False, True)
    }
    if most == 1:
        calls |= {f"named {count}": [raw(spec, q, kv, most, count, count > 1, True) for q, kv in batches] for count in splits}
    else:
        calls["T"] = [raw(spec, q, kv, q.shape[0], 1, False) for q, kv in batches]
    calls |= {f"ours{'p' * planned}": [ours(spec, q, kv, planned) for q, kv in batches] for planned in (False, True)}
    row |= microseconds(calls)
    numbers = " ".join(f"{key}={value:.1f}" for key, value in row.items() if isinstance(value, float))
    print(f"{name:18} head size {spec.head_dim:3} page {page_size:3}  floor {keys / 4.27e6:.1f}  {numbers}", flush=True)
    return row


def measure(spec: AttentionSpec, asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    if "decode" in asked:
        for context in (127, 1023, 8191, 32_700):
            for size in (1, 8, 32, 128):
                if size * context <= 300_000:
                    yield compare(spec, f"decode {size}x{context + 1}", [(context, 1)] * size, 16, (1, 8, 16, 32))
        yield compare(spec, "decode ragged", [(32_000, 1)] + [(200, 1)] * 63, 16, (1, 16, 32))
        yield compare(spec, "decode 32x4096", [(4095, 1)] * 32, 128, (1, 16))
    if "prefill" in asked:
        for page_size in (16, 128):
            for name, sequences in (("1x2048", [(0, 2048)]), ("1x8192", [(0, 8192)]), ("4x4096", [(0, 4096)] * 4),
                                    ("16x128", [(0, 128)] * 16), ("512 at 16k", [(16_000, 512)])):  # fmt: skip
                yield compare(spec, f"prefill {name}", sequences, page_size, (1, 4))
    if "mixed" in asked:
        yield compare(spec, "mixed 64d+512", [(2000, 1)] * 64 + [(0, 512)], 16, (1, 16))
        yield compare(spec, "mixed 1d@32k+2048", [(32_000, 1), (0, 2048)], 16, (1, 4, 16))
        yield compare(spec, "mixed 8d@8k+512", [(8000, 1)] * 8 + [(0, 512)], 16, (1, 4, 16))


def main() -> None:
    kinds, parser = ("decode", "prefill", "mixed"), argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"{', '.join(kinds)}; all by default")
    parser.add_argument("--dims", nargs="+", type=int, default=(128,))
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; microseconds a call, Np: N splits and planned,")
    print("named N: with table rows by name, planned where divided, T: one split and most_queries = T")
    flash_attn._multiprocessors(torch.device("cuda", 0))
    for dim in chosen.dims:
        rows += measure(AttentionSpec(32, 8, dim, dim, scale=dim**-0.5), chosen.kinds or kinds)
    if out := os.environ.get("OUT"):
        with open(os.path.join(out, "flash_splits.json"), "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()

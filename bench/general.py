"""How fast is the Triton kernel for any score, beside the libraries and what the machine could do?

Every line is a causal batch over pages of 16 tokens, in a table as wide as a cache makes it (256 tokens, 1024, ...):
microseconds in a CUDA graph, whose calls read different pages, and called one by one; the share of the floor (bytes over
copy bandwidth, or operations over matrix rate, both measured first); and the others, where installed.

    python -m bench.general                          the table
    python -m bench.general --sweep decode|prefill   tiles and splits, from which those of kernels/tiles.py are chosen
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from bench.measuring import MISSING, RESULTS, Table, percent, publish, stamp
from compile_attn.kernels import tiles as tiling
from compile_attn.kernels import triton_launch
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.metadata import AttentionMetadata
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

PAGE = 16
CALLS = 8  # in a graph
Shape = tuple[tuple[int, int], ...]  # of a batch: keys and new tokens of every sequence


@dataclass(frozen=True)
class Case:
    name: str
    shape: Shape
    dim: int = 128
    kv_dtype: str = "bfloat16"
    heads: tuple[int, int] = (32, 8)
    softcap: float | None = None

    def spec(self) -> AttentionSpec:
        return AttentionSpec(*self.heads, self.dim, self.dim, scale=self.dim**-0.5, softcap=self.softcap)

    def bound(self) -> int:
        """Keys that the table has room for."""
        return PAGE * table_width(-(-max(keys for keys, _ in self.shape) // PAGE), PAGE)

    def bytes(self) -> int:
        width = getattr(torch, self.kv_dtype).itemsize
        return sum(keys for keys, _ in self.shape) * self.heads[1] * self.dim * 2 * width

    def operations(self) -> float:
        return 4.0 * self.heads[0] * self.dim * sum(new * (keys - new / 2) for keys, new in self.shape)


def decode(batch: int, keys: int, **more: Any) -> Case:
    return Case(f"decode {batch} x {keys}", ((keys, 1),) * batch, **more)


def prefill(batch: int, keys: int, **more: Any) -> Case:
    return Case(f"prefill {batch} x {keys}", ((keys, keys),) * batch, **more)


RAGGED = Case("decode ragged 31 x 500, 32000", ((500, 1),) * 31 + ((32_000, 1),))
MIXED = Case("mixed 64 x 4096 decodes, chunk of 2048", ((4096, 1),) * 64 + ((2048, 2048),))
LATE = Case("chunk of 512 behind 32000", ((32_512, 512),))
DECODES = [decode(batch, keys) for batch in (1, 8, 32, 128) for keys in (128, 1024, 8192, 32_768)]
PREFILLS = [prefill(1, 2048), prefill(1, 8192), prefill(4, 4096), prefill(1, 32_768)]
OTHERS = [
    RAGGED, MIXED, LATE,
    replace(decode(32, 8192, dim=64), name="decode 32 x 8192, 64 channels"),
    replace(prefill(1, 8192, dim=64), name="prefill 1 x 8192, 64 channels"),
    replace(decode(32, 8192, kv_dtype="float8_e4m3fn"), name="decode 32 x 8192, fp8"),
    replace(prefill(1, 8192, kv_dtype="float8_e4m3fn"), name="prefill 1 x 8192, fp8"),
    replace(prefill(1, 8192, softcap=30.0), name="prefill 1 x 8192, softcap"),
    replace(prefill(1, 8192, dim=256, heads=(16, 4)), name="prefill 1 x 8192, 256 channels"),
    replace(prefill(1, 8192, heads=(32, 32)), name="prefill 1 x 8192, 32 KV heads"),
    replace(decode(32, 4096, heads=(32, 32)), name="decode 32 x 4096, 32 KV heads"),
]  # fmt: skip


class Bench:
    """Pools of pages that all cases share, and what the machine can do."""

    def __init__(self, elements: int = 1 << 32) -> None:
        self.flat = [torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2)]
        self.fp8 = [part[: 1 << 30].to(torch.float8_e4m3fn) for part in self.flat]

    def calls(self, case: Case) -> list[tuple[torch.Tensor, Paged]]:
        """The arguments of `attend`, with as many different pages as there are, at most CALLS times."""
        _, kv_heads = case.heads
        stored = self.flat if case.kv_dtype == "bfloat16" else self.fp8
        pools = [part[: part.numel() // (PAGE * kv_heads * case.dim) * (PAGE * kv_heads * case.dim)] for part in stored]
        pools = [part.view(-1, PAGE, kv_heads, case.dim) for part in pools]
        scale = None if case.kv_dtype == "bfloat16" else torch.ones((), device="cuda")
        counts = [-(-keys // PAGE) for keys, _ in case.shape]
        pages = torch.randperm(pools[0].shape[0], device="cuda", dtype=torch.int32)
        lengths = [torch.tensor(each, dtype=torch.int32, device="cuda") for each in zip(*case.shape, strict=True)]
        tokens = sum(new for _, new in case.shape)
        found = []
        for number in range(max(1, min(CALLS, len(pages) // sum(counts)))):
            table = torch.zeros(len(counts), case.bound() // PAGE, dtype=torch.int32, device="cuda")
            begin = number * sum(counts)
            for row, count in enumerate(counts):
                table[row, :count] = pages[begin : begin + count]
                begin += count
            at = AttentionMetadata.build(table, *lengths, tokens, PAGE)
            kv = Paged(*pools, table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq, scale, scale)
            found.append((torch.randn(tokens, case.heads[0], case.dim, dtype=torch.bfloat16, device="cuda"), kv))
        return found


def seconds(run: Callable[[int], Any], different: int) -> float:
    """Of one call, in a graph of several."""
    count = max(CALLS, different)
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(count):
            run(number % different)
    graph.replay()
    return _timed(graph.replay) / count


def _timed(run: Callable[[], Any], least: float = 0.01) -> float:
    begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
    found = []
    for _ in range(3):
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) * 1e-3)
        if sum(found) > least * 10:
            break
    return min(found)


def eager(run: Callable[[int], Any], different: int, each: float) -> float:
    run(0)
    torch.cuda.synchronize()
    count = max(5, min(100, int(0.1 / each)))
    begin = time.perf_counter()
    for number in range(count):
        run(number % different)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def machine() -> tuple[float, float]:
    """Bytes a second of a copy, both ways counted, and operations a second of a product of matrices."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = min(_timed(lambda: target.copy_(source)) for _ in range(3))
    product = min(_timed(lambda: a @ b) for _ in range(5))
    return 2 * source.numel() / copied, 2 * 8192**3 / product


def ours(case: Case, calls: list[tuple[torch.Tensor, Paged]]) -> Callable[[int], Any]:
    run, spec = backend("general"), case.spec()
    return lambda number: run.attend(*calls[number], [], spec)


def sdpa(case: Case, _: list[tuple[torch.Tensor, Paged]]) -> Callable[[int], Any] | None:
    """On keys that lie in one piece; only for prefill without cached keys."""
    (keys, new), *others = sorted(set(case.shape))
    if others or keys != new or case.softcap is not None:
        return None
    q, k, v = (
        torch.randn(len(case.shape), n, keys, case.dim, device="cuda", dtype=torch.bfloat16)
        for n in (case.heads[0], *case.heads[1:] * 2)
    )
    return lambda number: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flashinfer(case: Case, calls: list[tuple[torch.Tensor, Paged]]) -> Callable[[int], Any] | None:
    """Its tensor-core decode, or its prefill on FA2; planned beforehand."""
    try:
        import flashinfer as library
    except ImportError:
        return None
    if case.softcap is not None:
        return None
    wrappers = []
    for q, kv in calls:
        counts = (kv.seq_lens + PAGE - 1) // PAGE
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)).cpu()
        pages = torch.cat([kv.block_table[row, :count] for row, count in enumerate(counts.tolist())])
        last = ((kv.seq_lens - 1) % PAGE + 1).cpu()
        space = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        sizes = (*case.heads, case.dim)
        dtypes = {"q_data_type": q.dtype, "kv_data_type": kv.k_pages.dtype}
        if all(new == 1 for _, new in case.shape):
            wrapper = library.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
            wrapper.plan(starts, pages, last, *sizes, PAGE, **dtypes)
        else:
            wrapper = library.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
            wrapper.plan(kv.cu_seqlens_q.cpu(), starts, pages, last, *sizes, PAGE, causal=True, **dtypes)
        wrappers.append(wrapper)
    pools = calls[0][1].k_pages, calls[0][1].v_pages
    return lambda number: wrappers[number].run(calls[number][0], pools)


def measure(bench: Bench, case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    calls = bench.calls(case)
    run = ours(case, calls)
    found: dict[str, Any] = {"case": case.name, "graph": seconds(run, len(calls))}
    found["eager"] = eager(run, len(calls), found["graph"])
    found["of floor"] = max(case.bytes() / bandwidth, case.operations() / rate) / found["graph"]
    if case.shape[-1][1] > 1:
        found["TFLOP/s"] = case.operations() / found["graph"] / 1e12
    for name, make in (("SDPA", sdpa), ("FlashInfer", flashinfer)):
        try:
            other = make(case, calls)
            if other is not None:
                found[name] = seconds(other, len(calls))
        except Exception as error:
            print(f"  {name}: {type(error).__name__} {str(error)[:150]}")
    return found


COLUMNS = ("graph", "eager", "SDPA", "FlashInfer", "of floor", "TFLOP/s")


def cells(line: dict[str, Any]) -> list[str]:
    times = [line.get(name) for name in COLUMNS[:4]]
    shown = [MISSING if each is None else f"{each * 1e6:.1f}" for each in times]
    return [*shown, percent(line["of floor"]), MISSING if "TFLOP/s" not in line else f"{line['TFLOP/s']:.0f}"]


def compare(bench: Bench, cases: list[Case]) -> dict[str, Any]:
    bandwidth, rate = machine()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 {rate / 1e12:.0f} TFLOP/s")
    print(" " * 40 + "".join(f"{name:>11s}" for name in COLUMNS))
    found = []
    for case in cases:
        found.append(measure(bench, case, bandwidth, rate))
        print(f"{case.name:40s}" + "".join(f"{each:>11s}" for each in cells(found[-1])), flush=True)
    return {"bytes a second": bandwidth, "operations a second": rate, "table": found}


def tables(result: dict[str, Any]) -> list[Table]:
    rates = f"Copying {result['bytes a second'] / 1e12:.2f} TB/s, matrices {result['operations a second'] / 1e12:.0f} TFLOP/s."
    note = f"{rates} 32 query heads on 8, 128 channels, bfloat16, unless a case says otherwise; SDPA has no pages."
    rows = [[line["case"], *cells(line)] for line in result["table"]]
    return [Table("Microseconds of a call", ("case", *COLUMNS), rows, note)]


# Tuning.


@contextlib.contextmanager
def tuned(knobs: dict[str, int]) -> Iterator[None]:
    """Other tiles, or other constants of the module, than `general` would choose."""
    tiles_of, constants = triton_launch.tiles_of, {name: value for name, value in knobs.items() if name in vars(tiling)}
    tiles = {name: value for name, value in knobs.items() if name not in vars(tiling)}
    before = {name: getattr(tiling, name) for name in constants}

    def chosen(spec: AttentionSpec, *rest: Any) -> tiling.Tiles:
        return changed(tiles_of(spec, *rest), spec, tiles)

    try:
        for name, value in constants.items():
            setattr(tiling, name, value)
        triton_launch.tiles_of = chosen
        triton_launch.forget()
        yield
    finally:
        triton_launch.tiles_of = tiles_of
        triton_launch.forget()
        for name, value in before.items():
            setattr(tiling, name, value)


def changed(tiles: tiling.Tiles, spec: AttentionSpec, knobs: dict[str, int]) -> tiling.Tiles:
    tiles = replace(tiles, **knobs)
    if "block_m" in knobs and tiles.block_q > 1:
        tiles = replace(tiles, block_q=tiles.block_m // tiles.group)
    return tiles


def grid(**values: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


SWEEPS = {
    "decode": (
        [
            decode(1, 128),
            decode(1, 1024),
            decode(1, 8192),
            decode(8, 1024),
            decode(32, 128),
            decode(32, 1024),
            decode(32, 4096),
            decode(128, 1024),
            RAGGED,
            replace(decode(32, 8192, dim=64), name="32 x 8192, 64 channels"),
            MIXED,
        ],
        [
            {},
            *grid(block_n=(64,), stages=(2, 3, 4), registers=(0,), _AT_ONCE=(1, 2, 3)),
            *grid(block_n=(64,), stages=(2, 3), registers=(128, 168), _SMALL_AT_ONCE=(2, 3, 4)),
            *grid(block_n=(32,), warps=(2, 4), stages=(3, 4), registers=(0,), _AT_ONCE=(3, 4)),
            *grid(block_n=(128,), stages=(2,), registers=(0,)),
            *grid(_PARTS_EACH=(0, 2, 8)),
            *grid(COMBINE_EARLY=(1,)),
            *grid(_KEYS_A_PROGRAM=(128, 512)),
        ],
    ),
    "prefill": (
        [
            prefill(1, 2048),
            prefill(1, 8192),
            LATE,
            replace(prefill(1, 8192, dim=64), name="64 channels"),
            replace(prefill(1, 8192, dim=256), name="256 channels"),
        ],
        [
            {},
            *grid(block_m=(64,), block_n=(64,), warps=(4,), stages=(2, 3)),
            *grid(block_m=(128,), block_n=(32,), warps=(4, 8), stages=(2, 3)),
            *grid(block_m=(128,), block_n=(64,), warps=(4, 8), stages=(2, 3)),
            *grid(block_m=(128,), block_n=(128,), warps=(8,), stages=(2, 3)),
            *grid(block_m=(256,), block_n=(64,), warps=(8,), stages=(3,)),
        ],
    ),
}


def sweep(bench: Bench, name: str) -> dict[str, Any]:
    cases, variants = SWEEPS[name]
    calls = [bench.calls(case) for case in cases]
    print(f"{name}, microseconds: " + " | ".join(case.name for case in cases))
    found = []
    for knobs in variants:
        times: list[float | None] = []
        for case, each in zip(cases, calls, strict=True):
            with tuned(knobs):
                try:
                    times.append(seconds(ours(case, each), len(each)) * 1e6)
                except Exception as error:  # too much shared memory
                    times.append(None)
                    if "shared" not in str(error):
                        print(f"  {knobs}: {type(error).__name__} {str(error)[:200]}")
        found.append({"knobs": knobs, "us": times})
        shown = " ".join(f"{math.nan if each is None else each:8.1f}" for each in times)
        print(shown, " ".join(f"{key}={value}" for key, value in knobs.items()), flush=True)
    return {"cases": [case.name for case in cases], "variants": found}


SWEPT = "Tiles and spreads tried for the kernel for any score"


def sweep_tables(result: dict[str, Any]) -> list[Table]:
    """Every variant of each sweep, and what it changes of what `general` chooses; microseconds, in a CUDA graph."""
    found = []
    for name, swept in result.items():
        rows = []
        for line in swept["variants"]:
            times = [MISSING if each is None or each != each else f"{each:.1f}" for each in line["us"]]
            rows.append([*times, " ".join(f"{key}={value}" for key, value in line["knobs"].items()) or "as chosen then"])
        found.append(Table(f"{name.capitalize()}, microseconds", (*swept["cases"], "changed"), rows))
    return found


def _compile(work: tuple[str, int, int]) -> None:
    """One share of a sweep's variants, once, so that Triton's cache on disk holds them."""
    name, share, shares = work
    torch.cuda.set_per_process_memory_fraction(0.05)
    bench = Bench(1 << 28)
    cases, variants = SWEEPS[name]
    for case in {(each.dim, each.shape[0][1] > 1, len(each.shape) > 1): each for each in cases}.values():
        ends = {0: case.shape[0], len(case.shape) - 1: case.shape[-1]}.values()
        small = replace(case, shape=tuple((min(keys, 4096), min(new, 2048)) for keys, new in ends))
        calls = bench.calls(small)[:1]
        for knobs, parts in itertools.product(variants[share::shares], (0, 1000)):  # each way of spreading small tiles
            with tuned({**knobs, "_PARTS_EACH": parts}), contextlib.suppress(Exception):
                ours(small, calls)(0)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for general.md and .json, or general_sweep.md and .json")
    parser.add_argument("--sweep", choices=SWEEPS, action="append", default=[], help="try tiles and splits")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    chosen = parser.parse_args()
    result: dict[str, Any] = {}
    if chosen.sweep:
        shares = max(1, min(12, (os.cpu_count() or 2) - 2))
        with ProcessPoolExecutor(shares, get_context("spawn")) as pool:
            list(pool.map(_compile, [(name, share, shares) for name in chosen.sweep for share in range(shares)]))
    bench = Bench()
    for name in chosen.sweep:
        result[name] = sweep(bench, name)
    if not chosen.sweep:
        result = compare(bench, [case for case in DECODES + PREFILLS + OTHERS if chosen.only in case.name])
        publish("general", "The kernel for any score, tuned", tables(result), result, stamp(torch.device("cuda")), chosen.out)
    else:
        publish("general_sweep", SWEPT, sweep_tables(result), result, stamp(torch.device("cuda")), chosen.out)


if __name__ == "__main__":
    main()

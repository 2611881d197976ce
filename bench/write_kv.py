"""How long do writing keys and values, a step's metadata and advancing take on a GPU, and how near is that to what copying takes?

`python -m bench.write_kv [--json FILE]`. Times are of one call among many in a replayed CUDA graph. The floor of a write is its
bytes over the bandwidth of a large copy, measured in the same run, and at least the time of a kernel that does nothing. `host` is
the time to issue a call without a graph. vLLM's reshape_and_cache_flash is timed where vLLM is installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn

HEADS, DIM, PAGE_SIZE = 8, 128, 16
TOKENS = (1, 8, 32, 128, 512, 8192)
BATCHES = ((1, 1), (8, 8), (32, 32), (128, 128), (512, 512), (64, 8192), (512, 16384))  # rows, tokens
CALLS = 64  # in a graph
OPS = torch.ops.paged_attn


@triton.jit
def nothing(at):  # type: ignore[no-untyped-def]
    pass


def microseconds(calls: Sequence[Callable[[], Any]], replays: int = 20) -> float:
    """Of one call: the graph of all of them, the least of several replays."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / len(calls))
    return best


def host_microseconds(call: Callable[[], Any], count: int = 300) -> float:
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, (time.perf_counter() - begin) / count * 1e6)
    return best


def bandwidth() -> float:
    """Bytes a microsecond that a large copy reads and writes."""
    source = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds([lambda: torch.neg(source, out=target)] * 4)  # copy_ is slower: it is a memcpy


def vllm_writer() -> Callable[..., Any] | None:
    try:
        import vllm._custom_ops  # noqa: F401  registers the op

        writer: Callable[..., Any] = torch.ops._C_cache_ops.reshape_and_cache_flash
    except (ImportError, AttributeError):
        return None
    return writer


def writes(stored: torch.dtype, tokens: int) -> tuple[list[Callable[[], Any]], list[Callable[[], Any]] | None, int]:
    """Calls of ours and of vLLM's, each over pages of its own; and the bytes that one must move."""
    count = min(CALLS, max(8, (1 << 18) // tokens))
    # As one projection gives them; a model writes what it has just made, which is in the L2 cache where it fits.
    joined = torch.randn(tokens, 6 * HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    k, v = joined[:, 4 * HEADS : 5 * HEADS], joined[:, 5 * HEADS :]
    slots = torch.randperm(-(-tokens // PAGE_SIZE) * PAGE_SIZE * 2, device="cuda")[:tokens]
    scales = (None, None) if stored.itemsize > 1 else tuple(torch.full((), 0.05, device="cuda") for _ in range(2))
    other, ours, theirs = vllm_writer(), [], []
    for _ in range(count):
        pages = [torch.zeros(-(-tokens // PAGE_SIZE) * 2, PAGE_SIZE, HEADS, DIM, dtype=stored, device="cuda") for _ in range(2)]
        ours.append(lambda pages=pages: OPS.write_kv(k, v, *pages, slots, *scales))
        if other is not None:
            kind, one = ("auto", "fp8")[stored.itemsize == 1], torch.ones(1, device="cuda")
            raw = [each.view(torch.uint8) if stored.itemsize == 1 else each for each in pages]
            theirs.append(lambda raw=raw, kind=kind, one=one: other(k, v, *raw, slots, kind, one, one))
    moved = 2 * tokens * HEADS * DIM * (2 + stored.itemsize) + 8 * tokens
    return ours, theirs if other is not None else None, moved


def measure_writes(table: list[dict[str, Any]], rate: float, least: float) -> None:
    for stored in (torch.bfloat16, torch.float8_e4m3fn):
        for tokens in TOKENS:
            ours, theirs, moved = writes(stored, tokens)
            took, floor = microseconds(ours), max(moved / rate, least)
            row = {
                "what": "write_kv",
                "pages": str(stored)[6:],
                "tokens": tokens,
                "us": took,
                "floor": floor,
                "host": host_microseconds(ours[0]),
            }
            table.append(row | ({} if theirs is None else {"vllm": microseconds(theirs)}))


def measure_steps(table: list[dict[str, Any]], least: float) -> None:
    for rows, tokens in BATCHES:
        block_table = torch.randint(1000, (rows, 8192), dtype=torch.int32, device="cuda")
        query_lens = torch.full((rows,), tokens // rows, dtype=torch.int32, device="cuda")
        seq_lens = query_lens + 1000

        def build(given: tuple[torch.Tensor, ...] = (block_table, seq_lens, query_lens), tokens: int = tokens) -> Any:
            return OPS.build_metadata(*given, tokens, PAGE_SIZE)

        took = microseconds([build] * CALLS)
        table.append(
            {"what": "build_metadata", "rows": rows, "tokens": tokens, "us": took, "floor": least, "host": host_microseconds(build)}
        )
    for rows in (1, 32, 512):
        ids, lengths = torch.ones(1, rows, dtype=torch.int64, device="cuda"), torch.ones(rows, dtype=torch.int32, device="cuda")

        def advance(given: tuple[torch.Tensor, ...] = (ids, ids.clone(), lengths, ids.clone())) -> Any:
            return OPS.advance_step(*given)

        table.append(
            {
                "what": "advance_step",
                "rows": rows,
                "us": microseconds([advance] * CALLS),
                "floor": least,
                "host": host_microseconds(advance),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    where = parser.parse_args().json
    at = torch.zeros(1, device="cuda")
    rate, least = bandwidth(), microseconds([lambda: nothing[(1,)](at)] * CALLS)
    table: list[dict[str, Any]] = []
    measure_writes(table, rate, least)
    measure_steps(table, least)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"a copy moves {rate / 1e6:.2f} TB/s; a kernel that does nothing takes {least:.2f} us\n")
    print("| what | pages | rows | tokens | us | of the floor | vLLM us | host us |\n|---|---|---|---|---|---|---|---|")
    for row in table:
        cells = [row["what"], row.get("pages", ""), row.get("rows", ""), row.get("tokens", ""), f"{row['us']:.2f}"]
        cells += [f"{row['floor'] / row['us']:.0%}", f"{row['vllm']:.2f}" if "vllm" in row else "", f"{row['host']:.1f}"]
        print(f"| {' | '.join(map(str, cells))} |")
    if where is not None:
        where.write_text(json.dumps({"bandwidth": rate, "nothing": least, "rows": table}, indent=1))


if __name__ == "__main__":
    main()

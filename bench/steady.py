"""Does a steady decode step wait for anything, and does memory stay as it is over ten thousand steps?

Three looks: decode steps while torch makes every synchronisation an error; a trace of a few steps, drawn; and the allocator's
figures before and after many steps in which requests join and leave.

    python -m bench.steady [--shape llama-3.2-1b] [--batch 32] [--steps 10000] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.measuring import RESULTS, Table, number, percent, publish, stamp
from bench.naive_llama import SHAPES, Shape, random_llama
from compile_attn import PagedLM, Sampling

TRACED = 12  # steps
DRAWN = 3
KINDS = {  # what a kernel's name says it does; the first that fits
    "attention": ("attend", "combine", "flash", "fmha", "BatchDecode", "BatchPrefill", "MergeStates"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitK"),
    "copies": ("Memcpy", "Memset", "copy"),
}
OTHER = "everything else"
WAITS = "host waits for the tokens of the step before"
COLOURS = {
    "attention": "#c1432e",
    "matrix products": "#2f5d8c",
    "copies": "#8a8a8a",
    OTHER: "#d9a441",
    "host calls": "#5b8c5a",
    WAITS: "#c9dcc8",
}


@dataclass(frozen=True)
class Event:
    """Something in a trace, in microseconds."""

    name: str
    begin: float
    length: float

    @property
    def end(self) -> float:
        return self.begin + self.length


def made(shape: Shape, device: torch.device, batch: int, **options: Any) -> PagedLM:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return PagedLM(random_llama(shape, device, dtype), max_seqs=batch, **options)


def until_steady(lm: PagedLM, batch: int, prompt: int, steps: int) -> None:
    """Every request decodes, and for so many steps more than are made here no one leaves."""
    source = random.Random(0)
    for _ in range(batch):
        lm.submit([source.randrange(10, lm.vocab_size) for _ in range(prompt)], Sampling(max_new_tokens=batch + steps + 64))
    seen: set[int] = set()
    while len(seen) < batch:
        seen.update(out.index for out in lm.step())
    for _ in range(32):
        lm.step()


@contextmanager
def synchronisation_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def milliseconds(lm: PagedLM, device: torch.device, steps: int) -> float:
    """Of a step, none of which may synchronise; RuntimeError by torch names the call that does."""
    begin = time.perf_counter()
    with synchronisation_is_an_error(device):
        for _ in range(steps):
            lm.step()
    return (time.perf_counter() - begin) / steps * 1e3


def traced(lm: PagedLM, device: torch.device, steps: int = TRACED) -> tuple[list[Event], list[Event]]:
    """What the host called and what the device ran, in steps of which the profiler has seen others before."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    looked_at = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=looked_at, acc_events=True) as trace:  # without acc_events torch 2.11 warns
        for _ in range(steps):
            lm.step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        found = json.loads(file.read_text())["traceEvents"]
    return read_trace(found)


def read_trace(found: Sequence[dict[str, Any]]) -> tuple[list[Event], list[Event]]:
    """Calls of CUDA on the host, and what ran on the device, in order of time."""

    def of(*categories: str) -> list[Event]:
        events = [Event(one["name"], one["ts"], one["dur"]) for one in found if one.get("cat") in categories and "dur" in one]
        return sorted(events, key=lambda event: event.begin)

    host = of("cuda_runtime", "cuda_driver")
    last = max((event.begin for event in host if "Launch" in event.name), default=0.0)  # what follows is the profiler's own
    return [event for event in host if event.begin <= last], of("kernel", "gpu_memcpy", "gpu_memset")


def kind_of(name: str) -> str:
    if name.startswith("triton_"):  # Inductor's, which names all that it has fused
        return OTHER
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def host_kind(name: str) -> str:
    return WAITS if "Synchronize" in name else "host calls"


def busy(events: Sequence[Event]) -> float:
    """The part of the time from first to last in which at least one runs."""
    covered, end = 0.0, events[0].begin
    for event in events:
        covered += max(0.0, event.end - max(end, event.begin))
        end = max(end, event.end)
    return covered / (end - events[0].begin)


def kernels_of(device: Sequence[Event], steps: int, most: int = 14) -> Table:
    """Where a step's time on the device goes."""
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in device:
        times[event.name] += event.length
        counts[event.name] += 1
    whole = sum(times.values()) or 1.0
    kinds: Counter[str] = Counter()
    for name, time_ in times.items():
        kinds[kind_of(name)] += time_
    rows = [[f"all {kind}", "", number(each / steps), percent(each / whole)] for kind, each in kinds.most_common()]
    for name, each in times.most_common(most):
        rows.append([_short(name), number(counts[name] / steps), number(each / steps), percent(each / whole)])
    return Table("Where a decode step's time goes", ["kernel", "a step", "us a step", "of it"], rows)


def _short(name: str) -> str:
    plain = name.removeprefix("void ").split("(")[0]
    return (plain if len(plain) <= 72 else f"{plain[:69]}...").replace("|", "/")


def waits(host: Sequence[Event], steps: int) -> Table:
    """What the host asked of CUDA. Waiting for an event is how it reads the tokens of the step before."""
    counts = Counter(event.name for event in host)
    times: Counter[str] = Counter()
    for event in host:
        times[event.name] += event.length
    rows = [[name, number(count / steps), number(times[name] / steps)] for name, count in counts.most_common()]
    return Table("What the host calls in a decode step", ["call", "a step", "us a step"], rows)


def picture(host: Sequence[Event], device: Sequence[Event], steps: int, title: str, file: Path) -> None:
    """Steps from the middle of the trace: the host's calls above what the device runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole, drawn = device[-1].end - device[0].begin, min(DRAWN, steps) / steps
    begin = device[0].begin + whole * (1 - drawn) / 2
    end = begin + whole * drawn
    figure, axes = pyplot.subplots(figsize=(12, 2.8), constrained_layout=True)
    named: set[str] = set()
    for height, events, kind in ((1, host, host_kind), (0, device, kind_of)):
        for event in (one for one in events if one.end > begin and one.begin < end):
            what = kind(event.name)
            label = None if what in named else what
            named.add(what)
            left = max(event.begin, begin)
            axes.barh(
                height, min(event.end, end) - left, left=left - begin, height=0.7, color=COLOURS[what], label=label, linewidth=0
            )
    axes.set_yticks([0, 1], ["device", "host"])
    axes.set_xlabel("microseconds")
    axes.set_xlim(0, end - begin)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=len(named), frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def churn(lm: PagedLM, device: torch.device, steps: int, settle: int, most_new: int = 200) -> list[dict[str, int]]:
    """Memory after `settle` steps, in the middle, and at the end, while requests join and leave at random."""
    source, samples, waiting = random.Random(1), [], 0
    for step in range(steps + settle):
        while waiting < lm.cache.max_seqs:
            prompt = [source.randrange(10, lm.vocab_size) for _ in range(source.randrange(1, 60))]
            lm.submit(prompt, Sampling(max_new_tokens=source.randrange(1, most_new)))
            waiting += 1
        waiting -= sum(out.finished for out in lm.step())
        if step in (settle - 1, settle + steps // 2 - 1, settle + steps - 1):
            samples.append({"steps": step + 1 - settle, **memory(device)})
    return samples


def memory(device: torch.device) -> dict[str, int]:
    """Bytes in use and reserved on the device, and of the host's memory at its highest."""
    found = {"host_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        torch.cuda.synchronize()
        stats = torch.cuda.memory_stats(device)
        found |= {name: stats[f"{name}_bytes.all.current"] for name in ("allocated", "reserved")}
        found["segments"] = stats["segment.all.current"]
    return found


def memory_table(samples: Sequence[dict[str, int]]) -> Table:
    names = [name for name in ("allocated", "reserved", "segments", "host_peak") if name in samples[0]]
    rows = [[f"{one['steps']:,}", *(f"{one[name]:,}" for name in names)] for one in samples]
    note = "Bytes, except segments. Requests join and leave at random; steps are counted from when every graph was recorded."
    return Table("Memory over many steps", ["steps", *names], rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.2-1b", help="of the model that is traced")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10_000, help="of the tiny model, for memory; 0: none")
    parser.add_argument("--options", type=json.loads, default={}, help='PagedLM\'s, such as \'{"kernel": "flashinfer"}\'')
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for steady.md, steady.json, steady.png")
    chosen = parser.parse_args()
    device, found, tables = torch.device("cuda"), {}, []
    chosen.out.mkdir(parents=True, exist_ok=True)
    pages = -(-(chosen.context + 1024) // 16) * 16 * chosen.batch
    with made(SHAPES[chosen.shape], device, chosen.batch, kv_tokens=pages, max_batch_tokens=8192, **chosen.options) as lm:
        until_steady(lm, chosen.batch, chosen.context, 400)
        found["ms_a_step"] = milliseconds(lm, device, 200)
        traced(lm, device)  # the profiler's own start
        host, ran = traced(lm, device)
        found["busy"] = busy(ran)
        what = f"{chosen.shape}, {chosen.batch} sequences of {chosen.context}"
        title = f"{what}: {found['ms_a_step']:.3f} ms a step, device busy {100 * found['busy']:.0f} % under the profiler"
        picture(host, ran, TRACED, title, chosen.out / "steady.png")
        row = [what, "200, none synchronised", number(found["ms_a_step"]), percent(found["busy"])]
        tables.append(Table("Steady decode", ["model", "steps while synchronising is an error", "ms a step", "busy"], [row]))
        tables += [waits(host, TRACED), kernels_of(ran, TRACED)]
    if chosen.steps:
        with made(SHAPES["tiny"], device, 16, kv_tokens=8192, **chosen.options) as lm:
            found["memory"] = churn(lm, device, chosen.steps, settle=4000)
        tables.append(memory_table(found["memory"]))
    publish("steady", "A steady decode step", tables, found, stamp(device), chosen.out)


if __name__ == "__main__":
    main()

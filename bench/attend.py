"""What does our op cost, through torch.compile, over a direct call of the library on the same tensors?

Times are for one layer of a step of 8 (of 2 for the prefill): in a CUDA graph, launched while the device is busy, as a server's is;
and eager, launched by a host whose time counts. What is planned once a step is left out on both sides. Direct is the library's
fastest way; the floor is bytes over the copy rate or operations over the matrix rate, whichever is more.

    python -m bench.attend [--kernels flash_attn flashinfer general] [--dims 128 64] [--seconds 90] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.direct import LIBRARIES
from bench.floor import Floor
from bench.floor import measure as measure_floor
from bench.measuring import RESULTS, Call, Table, compare, number, percent, publish, ratio, recorded, stamp
from bench.paged_case import APART, LAYERS, MIXED, PAGE_SIZE, Case, Inputs, Pool, Step, compiled_layers, decode, plain, prefill
from bench.processes import Clock, Progress, keep_measuring
from compile_attn.kernels.backend import Request
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

CASES = [
    *(decode(batch, context) for context in (128, 1024, 8192, 32768) for batch in (1, 8, 32, 128)),
    prefill(1, 8192),
    MIXED,
]
KERNELS = ("flash_attn", "flashinfer", "general")
Found = dict[str, Any]


class Bench:
    """One spec on one device: our op compiled once a kernel, pages shared by all cases."""

    def __init__(
        self,
        spec: AttentionSpec,
        kernels: Sequence[str],
        cases: Sequence[Case],
        device: torch.device,
        progress: Progress,
        inner: str = "inductor",
    ) -> None:
        self.spec, self.device, self.progress = spec, device, progress
        self.dtype = torch.bfloat16
        self.missing = {name: why for name in kernels if (why := why_not(name, spec, device, self.dtype))}
        torch._dynamo.reset()  # type: ignore[no-untyped-call]
        self.ours = {name: compiled_layers(name, spec, inner) for name in kernels if name not in self.missing}
        self.pool = Pool(max(case.pages for case in cases), spec, device, self.dtype, APART if device.type == "cuda" else 1)

    def run(self, case: Case, seconds: float = 0.05) -> Found:
        """Microseconds of each call for one layer: {"graph": {call: time}, "eager": ..., "errors": ..., "off": ...}."""
        layers = 2 if case.tokens > 4096 else LAYERS
        inputs = Inputs(case, self.pool, layers)
        found: Found = {"case": case.name, "head_dim": self.spec.head_dim, "errors": {}, "off": {}}
        for kind, captured in (("graph", True), ("eager", False)):
            calls = self._calls(inputs, captured, found)
            self.progress.trying(f"{case.name}, all")
            times = compare(calls, self.device, seconds if captured else seconds / 2, queued=captured) if calls else {}
            found[kind] = {name: time / layers for name, time in times.items()}
        return found

    def _calls(self, inputs: Inputs, captured: bool, found: Found) -> dict[str, Call]:
        """Everything that runs, by name: "KERNEL" ours, "KERNEL: way" the library's."""
        calls: dict[str, Call] = {}
        for name, ours in self.ours.items():
            self._try(name, lambda name=name, ours=ours: _planned(inputs, name, captured, ours), captured, calls, found)
        for library, ways_of in LIBRARIES.items():
            try:
                ways = ways_of(inputs, captured)
            except ImportError as error:
                found["errors"][f"{library}: direct"] = str(error)
                continue
            for way, make in ways.items():
                self._try(f"{library}: {way}", make, captured, calls, found)
        return calls

    def _try(self, name: str, make: Callable[[], Callable[[], Any]], captured: bool, calls: dict[str, Call], found: Found) -> None:
        """Keep a call that runs, and how far its result is from the first one's; note why another does not."""
        what = f"{found['case']}, {name}{'' if captured else ', eager'}"
        if what in self.progress.without:
            found["errors"][name] = self.progress.without[what]
            return
        self.progress.trying(what)
        try:
            call: Any = make()
            call()
            call = recorded(call, self.device) if captured else call
            first: Any = next(iter(calls.values()), call)
            found["off"][name] = distance(call()[0], first()[0])
            calls[name] = call
        except Exception as error:
            found["errors"][name] = f"{type(error).__name__}: {str(error)[:200]}"
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises again where the device is lost; the next process leaves this call out


def _planned(inputs: Inputs, kernel: str, captured: bool, ours: Step) -> Callable[[], list[torch.Tensor]]:
    plan = inputs.plan(kernel, captured)
    return lambda: ours(inputs, plan)


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative: what rounding to bfloat16 leaves is some 3e-3."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())


def why_not(name: str, spec: AttentionSpec, device: torch.device, dtype: torch.dtype, page_size: int | None = PAGE_SIZE) -> str:
    """What is against a kernel; empty: nothing."""
    try:
        return "; ".join(backend(name).reasons(Request(spec, device, dtype, page_size)))
    except (ImportError, ValueError) as error:
        return str(error)


def direct(times: Mapping[str, float], kernel: str) -> float | None:
    """The library's fastest way; where a kernel is ours alone, the fastest of all libraries."""
    names = [name for name in times if ": " in name]
    own = [name for name in names if name.startswith(f"{kernel}: ")]
    return min((times[name] for name in (own if kernel in LIBRARIES else names)), default=None)


def table(found: Sequence[Found], kernels: Sequence[str], spec: AttentionSpec, floor: Floor, cases: Sequence[Case]) -> Table:
    """A row a case; of each kernel its time, over direct in a graph and eager, and the floor's part of it."""
    columns = ["case", "floor us"]
    for kernel in kernels:
        columns += [f"{kernel} us", "/ direct", "/ direct, eager", "of floor"]
    by_name, rows = {case.name: case for case in cases}, []
    for one in found:
        case = by_name[one["case"]]
        least = floor.seconds(case.bytes(spec), case.operations(spec)) * 1e6
        cells = [case.name, number(least)]
        for kernel in kernels:
            ours = one["graph"].get(kernel)
            of_floor = ratio(least, ours)
            cells += [number(ours), number(ratio(ours, direct(one["graph"], kernel)))]
            cells += [number(ratio(one["eager"].get(kernel), direct(one["eager"], kernel)))]
            cells += [percent(of_floor)]
        rows.append(cells)
    title = f"Head size {spec.head_dim}, {spec.num_q_heads} query heads on {spec.num_kv_heads}, pages of {PAGE_SIZE}, bfloat16"
    note = "Decoding mostly reads, which is faster than copying: it may take less than the floor."
    return Table(title, columns, rows, note)


def run_here(dim: int, kernels: Sequence[str], seconds: float, file: Path) -> None:
    """One head size; goes on where the last process stopped."""
    clock, progress, device = Clock(seconds), Progress(file), torch.device("cuda")
    if "floor" not in progress.found:
        progress.add("stamp", stamp(device))
        progress.add("floor", vars(measure_floor(device)))
    bench = Bench(plain(dim), kernels, CASES, device, progress)
    progress.add("missing", bench.missing)
    for case in CASES:
        if not (clock.over or case.name in progress.found or f"{case.name}, all" in progress.without):
            progress.add(case.name, bench.run(case))
            print(f"{clock.spent:5.1f} s  head size {dim}, {case.name}: {progress.found[case.name]['graph']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=KERNELS)
    parser.add_argument("--dims", nargs="+", type=int, default=(128, 64))
    parser.add_argument("--seconds", type=float, default=90, help="for each head size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for attend.md and attend.json")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.file:
        return run_here(chosen.dims[0], chosen.kernels, chosen.seconds - 5, chosen.file)
    tables, everything, stamped = [], {}, {}
    for dim in chosen.dims:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "attend.json"
            command = [sys.executable, "-m", "bench.attend", "--dims", str(dim), "--seconds", str(chosen.seconds)]
            progress = keep_measuring([*command, "--file", str(file), "--kernels", *chosen.kernels], file, chosen.seconds)
        everything[f"head size {dim}"] = {**progress.found, "without": progress.without}
        if "floor" in progress.found:
            found, floor = [each for name, each in progress.found.items() if "graph" in each], Floor(**progress.found["floor"])
            tables.append(table(found, chosen.kernels, plain(dim), floor, CASES))
            stamped = progress.found["stamp"]
            _complain(found, progress)
    heading = "Our op through torch.compile over a direct call of the library"
    publish("attend", heading, tables, everything, stamped, chosen.out)


def _complain(found: Sequence[Found], progress: Progress) -> None:
    """Print what did not run, each reason once, and which results are not what the others are."""
    said = {f"{name}: {why}" for one in found for name, why in one["errors"].items()}
    print(*sorted(said), *(f"{name}: {why}" for name, why in progress.found.get("missing", {}).items()), sep="\n")
    wrong = {f"{one['case']}, {name}": off for one in found for name, off in one["off"].items() if not off < 1e-2}
    if wrong:
        print(f"RESULTS DIFFER by more than rounding: {wrong}")


if __name__ == "__main__":
    main()

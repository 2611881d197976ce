"""Which kernel is fastest, by head size and by query heads a KV head? Writes the table that `auto` chooses by.

Each point of the mix (`kernels/speeds.py`) is one op a layer, causal, bfloat16, 32 query heads: paged in a CUDA graph, as decode
steps run, with a block table as wide as a cache would make it; stateless as the host launches it, its own work included where the
device would wait for it. With `--write`, sizes that are not measured keep what the module holds of them.

    python -m bench.speeds [--dims 64 128 256] [--groups 1 4 8] [--phases paged stateless] [--seconds 150] [--dry]
                           [--write kernels/measured.py] [--out DIR]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.attend import why_not
from bench.measuring import RESULTS, Call, Table, compare, number, publish, recorded, said, stamp
from bench.paged_case import APART, LAYERS, PAGE_SIZE, Case, Inputs, Pool, attend_layers, decode, plain, prefill
from bench.processes import Clock, Progress, keep_measuring
from compile_attn.kernels import measured
from compile_attn.kernels.select import known_kernels
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.speeds import BETWEEN, PAGED, STATELESS, Key, Point, Speeds

QUERY_HEADS = 32
SLOW = ("reference",)  # never the fastest, and it would take most of the time
PHASES = {"paged": PAGED, "stateless": STATELESS}
SECONDS_A_POINT = 0.7  # on an H200, with three kernels that can, what they compile included
Found = dict[Key, dict[str, float]]


def measure(
    spec: AttentionSpec,
    kernels: Sequence[str],
    device: torch.device,
    clock: Clock,
    progress: Progress,
    points: Sequence[Point] = PAGED + STATELESS,
    seconds: float = 0.03,
) -> None:
    """Adds microseconds of each kernel at each point, for one layer, and what is against the kernels that did not run."""
    paged = [_case(each) for each in points if each.phase != "stateless"]
    pool = Pool(max(case.pages for case in paged), spec, device, apart=APART if device.type == "cuda" else 1) if paged else None
    group = spec.num_q_heads // spec.num_kv_heads
    for point in points:
        name = name_of((point.phase, spec.head_dim, group, point.sequences, point.length))
        if clock.over or name in progress.found or f"{name}, all" in progress.without:
            continue
        inputs = None if pool is None or point.phase == "stateless" else _inputs(point, pool)
        calls: dict[str, Call] = {}
        against: dict[str, str] = {}
        for kernel in kernels:
            why = why_not(kernel, spec, device, torch.bfloat16, None if inputs is None else PAGE_SIZE)
            why = why or progress.without.get(f"{name}, {kernel}", "")
            if why:
                against[kernel] = why
                continue
            progress.trying(f"{name}, {kernel}")
            try:
                call = _stateless(point, spec, kernel, device) if inputs is None else _paged(inputs, kernel)
                call()
                calls[kernel] = call if inputs is None else recorded(call, device)
            except Exception as error:
                against[kernel] = f"{type(error).__name__}: {str(error)[:200]}"
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises again where the device is lost; the next process leaves this call out
        layers = LAYERS if inputs is None else len(inputs.layers)
        progress.trying(f"{name}, all")
        times = compare(calls, device, seconds, queued=inputs is not None) if calls else {}
        progress.add(name, {"times": {kernel: round(time / layers, 2) for kernel, time in times.items()}, "against": against})
        print(f"{clock.spent:5.1f} s  {name}: {progress.found[name]['times']}", flush=True)


def name_of(key: Key) -> str:
    return " ".join(map(str, key))


def key_of(name: str) -> Key:
    phase, *numbers = name.split()
    dim, group, sequences, length = map(int, numbers)
    return phase, dim, group, sequences, length


def _case(point: Point) -> Case:
    if point.phase == "mixed":
        name, (n, length, new) = "mixed {} x {}", (point.sequences, point.length, point.length // 2)
        return Case(name.format(n, length), ((length - new, new), *((length - 1, 1),) * (n - 1)))
    return (decode if point.phase == "decode" else prefill)(point.sequences, point.length)


def _inputs(point: Point, pool: Pool) -> Inputs:
    case = _case(point)
    return Inputs(case, pool, 2 if case.tokens > 4096 else LAYERS)


def _paged(inputs: Inputs, kernel: str) -> Call:
    step, plan = attend_layers(kernel, inputs.spec), inputs.plan(kernel, captured=True)
    return lambda: step(inputs, plan)


def _stateless(point: Point, spec: AttentionSpec, kernel: str, device: torch.device) -> Call:
    def random(heads: int) -> torch.Tensor:
        return torch.randn(point.sequences, point.length, heads, spec.head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2)

    q, k, v = random(spec.num_q_heads), random(spec.num_kv_heads), random(spec.num_kv_heads)
    attention, text = torch.ops.paged_attn.attention, spec.encode()
    sdpa = torch.nn.functional.scaled_dot_product_attention  # which stands in a graph as itself
    gqa = spec.num_q_heads != spec.num_kv_heads

    def layers() -> None:
        for _ in range(LAYERS):
            if kernel == "sdpa":
                sdpa(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=gqa)
            else:
                attention(q, k, v, [], text, kernel)

    return layers


def as_module(found: Mapping[Key, Mapping[str, float]], where: str) -> str:
    """The text of kernels/measured.py."""
    rows = [f'    ("{key[0]}", {", ".join(map(str, key[1:]))}): {_times(times)},' for key, times in sorted(found.items()) if times]
    return "\n".join(
        [
            '"""How fast was each kernel? Written by `python -m bench.speeds`, not by hand."""',
            "",
            "from __future__ import annotations",
            "",
            f'WHERE = "{where}"',
            "# phase, head size, query heads a KV head, sequences, length: microseconds by kernel",
            "MICROSECONDS: dict[tuple[str, int, int, int, int], dict[str, float]] = {",
            *rows,
            "}",
            "",
        ]
    )


def _times(times: Mapping[str, float]) -> str:
    return "{" + ", ".join(f'"{kernel}": {time}' for kernel, time in times.items()) + "}"


def whole(found: Found) -> Found:
    """Without the sizes that time cut off before their last point: their means would be of another mix."""

    def done(phase: str, dim: int, group: int) -> bool:
        return all((each.phase, dim, group, each.sequences, each.length) in found for each in PHASES[phase])

    return {key: times for key, times in found.items() if done(*_size(key))}


def kept(found: Mapping[Key, object]) -> Found:
    """What was measured before, of sizes and phases that are not measured now."""
    now = set(map(_size, found))
    return {key: dict(times) for key, times in measured.MICROSECONDS.items() if _size(key) not in now}


def _size(key: Key) -> tuple[str, int, int]:
    """What is compared by itself: paged or stateless, head size, group."""
    return "stateless" if key[0] == "stateless" else "paged", key[1], key[2]


def table(found: Mapping[Key, Mapping[str, float]], kernels: Sequence[str]) -> Table:
    """The mean over the mix, and what `auto` would take."""
    rows = []
    for dim, group in sorted({key[1:3] for key in found}):
        for name, points in PHASES.items():
            known = Speeds.of(points, dim, group, found)
            if known.times:
                best = known.several(list(kernels)) if name == "paged" else (known.best(list(kernels)),)
                auto = BETWEEN.join(best)
                steps = known.words(best) if len(best) > 1 else "all"
                rows.append([name, str(dim), str(group), *(number(known.mean(each)) for each in (*kernels, auto)), auto, steps])
    note = "Weighted geometric means of microseconds over the mix in kernels/speeds.py."
    return Table("Kernels by head size and group", ["calls", "head size", "group", *kernels, "auto", "is", "for steps"], rows, note)


def cost(points: Sequence[Point], sizes: int) -> str:
    """What a run would measure, and about how long it takes."""
    names = [f"{each.phase} {each.sequences} x {each.length}, {each.shape.room} tokens a row" for each in points]
    many = len(points) * sizes
    return "\n".join([*names, f"{many} points, for {sizes} head sizes and groups: about {many * SECONDS_A_POINT:.0f} s on an H200"])


def main() -> None:
    able = tuple(name for name in known_kernels() if name not in SLOW)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", default=able)
    parser.add_argument("--dims", nargs="+", type=int, default=(64, 128, 256))
    parser.add_argument("--groups", nargs="+", type=int, default=(1, 4, 8))
    parser.add_argument("--phases", nargs="+", choices=tuple(PHASES), default=tuple(PHASES))
    parser.add_argument("--seconds", type=float, default=150, help="for all together")
    parser.add_argument("--dry", action="store_true", help="say what would be measured and how long it takes, and end")
    parser.add_argument("--write", type=Path, help="the module to write: kernels/measured.py")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for speeds.md and speeds.json")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.file:
        return _run_here(chosen)
    print(cost(_points(chosen), len(chosen.dims) * len(chosen.groups)), flush=True)
    if chosen.dry:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "speeds.json"
        command = [sys.executable, "-m", "bench.speeds", *sys.argv[1:], "--file", str(file)]
        progress = keep_measuring(command, file, chosen.seconds)
    stamped = progress.found.pop("stamp", {})
    found = whole({key_of(name): each["times"] for name, each in progress.found.items()})
    against = {f"{kernel}: {why}" for each in progress.found.values() for kernel, why in each["against"].items()}
    print(*sorted(against), sep="\n")
    if chosen.write:
        where = said({name: stamped[name] for name in ("device", "date", "commit", "torch")})
        before = kept(found)
        chosen.write.write_text(as_module(before | found, f"{where}; some sizes before" if before else where))
    publish("speeds", "Which kernel is fastest", [table(found, chosen.kernels)], progress.found, stamped, chosen.out)


def _points(chosen: argparse.Namespace) -> list[Point]:
    return [point for phase in chosen.phases for point in PHASES[phase]]


def _run_here(chosen: argparse.Namespace) -> None:
    """Everything in this process; goes on where the last one stopped."""
    device, clock, progress = torch.device("cuda"), Clock(chosen.seconds - 5), Progress(chosen.file)
    progress.add("stamp", stamp(device))
    for dim in chosen.dims:
        for group in chosen.groups:
            measure(plain(dim, QUERY_HEADS, QUERY_HEADS // group), chosen.kernels, device, clock, progress, _points(chosen))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

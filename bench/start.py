"""How much sooner does a second process reach its first token, as graphs and kernels are compiled already?

Three starts of a server, each a process of its own, timed from the moment it is asked for to the first token of a prompt: the first
one with folders that are empty, the second one with what it has left there, and one with empty folders again that is given the
artefacts of the first (`torch.compiler.save_cache_artifacts`), as on another machine.

    python -m bench.start [--shape llama-3.1-8b] [--device cuda] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measuring import RESULTS, Table, number, publish, ratio, stamp
from bench.naive_llama import SHAPES

STARTS = {"first": "the first start", "second": "the second", "elsewhere": "with artefacts alone"}
WARM_UP = "warm-up"  # is after the first token
SHORT = 0.01  # seconds: what takes less is not compared
MOST = 0.4  # of the first start's time: what the second may take
# Wherever anything that is compiled is kept: by Inductor and by us, Triton, FlashInfer, CUDA's driver, torch's extensions, others.
FOLDERS = (
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_HOME",
    "FLASHINFER_WORKSPACE_BASE",
    "CUDA_CACHE_PATH",
    "TORCH_EXTENSIONS_DIR",
    "XDG_CACHE_HOME",
)
Found = dict[str, Any]
WHOLE: dict[str, Callable[[Found], float]] = {
    "process to first token": lambda one: one["total"],
    "the same without making weights": lambda one: one["total"] - one["seconds"]["weights"],
}


def starts(shape: str, device: str, options: Mapping[str, Any], warm_up: bool, limit: float) -> dict[str, Found]:
    """What each start has found. RuntimeError where they do not make one token."""
    with tempfile.TemporaryDirectory() as place:
        artefacts = str(Path(place) / "artefacts")
        request = {"shape": shape, "device": device, "options": dict(options), "warm_up": warm_up, "load": "", "save": ""}
        _read_files()
        found = {
            "first": _start({**request, "save": artefacts}, Path(place) / "here", limit),
            "second": _start(request, Path(place) / "here", limit),
            "elsewhere": _start({**request, "load": artefacts}, Path(place) / "elsewhere", limit),
        }
    tokens = {name: one["token"] for name, one in found.items()}
    if len(set(tokens.values())) > 1:
        raise RuntimeError(f"the starts do not agree on the first token: {tokens}")
    return found


def _read_files() -> None:
    """The libraries' files are in memory before anything is measured: the first start must not be alone in reading them."""
    code = "import importlib.util, torch, torch._inductor.compile_fx, compile_attn.lm, compile_attn.backend\n"
    code += "for name in ('triton', 'flashinfer'): importlib.util.find_spec(name) and __import__(name)"
    subprocess.run([sys.executable, "-c", code], check=False)


def _start(request: Found, folder: Path, limit: float) -> Found:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHINDUCTOR_", "TRITON_CACHE"))}
    environment |= {name: str(folder / name.lower()) for name in FOLDERS}
    before = _kernels(folder)
    begin = time.monotonic()
    command = [sys.executable, "-m", "bench.first_token", str(begin)]
    done = subprocess.run(
        command, input=json.dumps(request), env=environment, stdout=subprocess.PIPE, text=True, timeout=limit, check=True
    )
    found: Found = json.loads(done.stdout.splitlines()[-1])
    bundled = found["counters"]["triton_bundler_read_and_emit_kernel"]  # written out of the artefacts, not compiled
    found["compiled"] = {
        kind: len([one for one in _kernels(folder) - before if one[0].suffix == f".{kind}"]) for kind in ("cubin", "so")
    }
    found["compiled"]["cubin"] = max(0, found["compiled"]["cubin"] - bundled)
    found["total"] = sum(seconds for phase, seconds in found["seconds"].items() if phase != WARM_UP)
    return found


def _kernels(folder: Path) -> set[tuple[Path, int]]:
    """What Triton and the C++ compiler have made there, and when."""
    files = [*folder.rglob("*.cubin"), *folder.rglob("*.so")]
    return {(file, file.stat().st_mtime_ns) for file in files}


def ratios(found: Mapping[str, Found], name: str) -> dict[str, float]:
    """The time of a start over the first one's: as it is, and without the making of weights, which a server loads instead."""
    one, first = found[name], found["first"]
    return {what: get(one) / get(first) for what, get in WHOLE.items()}


def tables(found: Mapping[str, Found]) -> list[Table]:
    return [_seconds(found), _compiled(found)]


def _seconds(found: Mapping[str, Found]) -> Table:
    rows: list[Sequence[str]] = []
    for phase in dict.fromkeys(phase for one in found.values() for phase in one["seconds"] if phase != WARM_UP):
        rows.append(_row(phase, found, lambda one, phase=phase: one["seconds"].get(phase)))
        if phase == "PagedLM":
            parts = found["first"]["of PagedLM"]
            rows += [_row(f"of it {part}", found, lambda one, part=part: one["of PagedLM"][part]) for part in parts]
        if phase == "the first token":
            rows.append(_row("of it recording CUDA graphs", found, lambda one: one["recording"]))
    rows += [_row(what, found, get) for what, get in WHOLE.items()]
    if WARM_UP in found["first"]["seconds"]:
        rows.append(_row("then a warm-up of every step", found, lambda one: one["seconds"][WARM_UP]))
    columns = ["seconds", *STARTS.values(), "second / first", "artefacts / first"]
    worst = max(ratios(found, "second").values())
    verdict = "at most" if worst <= MOST else "more than"
    note = f"The second start takes {worst:.3f} of the first one's time, weights made or not: {verdict} {MOST}."
    return Table("From the process to the first token", columns, rows, note)


def _row(name: str, found: Mapping[str, Found], get: Callable[[Found], float | None]) -> Sequence[str]:
    values = {start: get(found[start]) for start in STARTS}
    over = [ratio(values[start], values["first"]) for start in STARTS if start != "first"]
    over = [None if (values["first"] or 0) < SHORT else one for one in over]
    return [name, *(number(values[start]) for start in STARTS), *(number(one) for one in over)]


def _compiled(found: Mapping[str, Found]) -> Table:
    said: dict[str, Callable[[Found], int]] = {
        "Triton kernels compiled": lambda one: one["compiled"]["cubin"],
        "C++ libraries compiled": lambda one: one["compiled"]["so"],
        "graphs found in Inductor's cache": lambda one: one["counters"]["fxgraph_cache_hit"],
        "graphs compiled": lambda one: one["counters"]["fxgraph_cache_miss"] + one["counters"]["fxgraph_cache_bypass"],
        "graphs found in AOTAutograd's cache": lambda one: one["counters"]["autograd_cache_hit"],
        "graphs traced by AOTAutograd": lambda one: (
            one["counters"]["autograd_cache_miss"] + one["counters"]["autograd_cache_bypass"]
        ),
        "CUDA graphs recorded until then": lambda one: one["graphs"],
    }
    rows = [[what, *(str(get(found[start])) for start in STARTS)] for what, get in said.items()]
    return Table("What was compiled again", ["number", *STARTS.values()], rows, "Counted until the end of the process.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--options", type=json.loads, default={}, help='PagedLM\'s, such as \'{"kernel": "flashinfer"}\'')
    parser.add_argument(
        "--warm-up", action="store_true", help="then record every step that a server may need, and say how long it takes"
    )
    parser.add_argument("--limit", type=float, default=300, help="seconds for one start")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for start.md and start.json")
    chosen = parser.parse_args()
    found = starts(chosen.shape, chosen.device, chosen.options, chosen.warm_up, chosen.limit)
    heading = f"Starting a server of {chosen.shape}: the second process against the first"
    publish(
        "start", heading, tables(found), {"shape": chosen.shape, "starts": found}, stamp(torch.device(chosen.device)), chosen.out
    )


if __name__ == "__main__":
    main()

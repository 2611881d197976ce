"""How fast are steps and prompts of a naive Llama through PagedLM, against vLLM, transformers and the floor?

Every side runs in a process of its own, one after another on the same device, and writes what it has found after each row, so
that a side that is missing, fails or runs out of time leaves dashes.

    python -m bench.decode [--shapes llama-3.1-8b llama-3.2-1b] [--sides ours vllm transformers] [--limit 240] [--out DIR]
    python -m bench.decode --sides --out DIR        # no run: the tables again, from what earlier runs left in DIR
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.floor import Floor
from bench.floor import measure as measure_floor
from bench.measuring import RESULTS, Table, number, percent, ratio, said, stamp
from bench.naive_llama import SHAPES, Shape
from bench.processes import run_apart
from bench.sides import OURS, SIDES
from bench.workload import NEW, REQUESTS, ROWS, Found, decode_work, measure, prefill_work, row_name

NAMES = {"ours": "ours", "packaged": "ours, packaged", "vllm": "vLLM", "transformers": "transformers"}
HEADING = f"""# A naive Llama through PagedLM, against vLLM, transformers and the floor

`python -m bench.decode`: random weights, bfloat16, greedy, each side right after the other on one device. A step is
(time for {NEW + 1} new tokens - time for 1) / {NEW}, the better of two runs each. The floor is the time to read weights and cache
at the rate of copying, or to multiply at the rate of bf16 matrix products, whichever is more.
"""
FIRST_ROWS = 3  # what transformers is asked: it has no ragged batches, and long static caches take long to compile


def run_side(side: str, shape: Shape, chosen: argparse.Namespace, file: Path) -> Found:
    """Measure one side in this process; `file` grows with every result."""
    device = torch.device(chosen.device)
    found: Found = {"rows": {}}

    def save(name: str, figures: Found) -> None:
        found["rows"][name] = figures
        found["stamp"] = stamp(device)  # not before the engine runs: vLLM starts otherwise where CUDA is in use already
        print(side, name, figures, flush=True)
        file.write_text(json.dumps(found, indent=1) + "\n")

    if side in OURS and device.type == "cuda":
        found["floor"] = vars(measure_floor(device))
        torch.cuda.empty_cache()
    options = chosen.options if side in OURS else {}
    generate, seconds = SIDES[side](shape, device, **options)
    found["start"] = {name: round(value, 2) for name, value in seconds.items()}
    plain = side == "transformers"
    rows = [row for row in ROWS if not chosen.rows or row_name(*row) in chosen.rows]
    rows, requests = (rows[:FIRST_ROWS], 0) if plain else (rows, chosen.requests)
    measure(generate, shape.vocabulary, save, rows, requests, NEW, 1 if chosen.quick else 2, warm=not plain)
    if side in OURS and device.type == "cuda":
        save("memory", {"peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1)})
    return found


def tables(shape: Shape, sides: Mapping[str, Found], floor: Floor | None) -> list[Table]:
    """Decode, prefill, ragged requests, start."""
    names = [side for side in SIDES if side in sides]
    return [_steps(shape, names, sides, floor), _prompts(shape, names, sides, floor), _ragged(names, sides), _starts(names, sides)]


def _steps(shape: Shape, names: Sequence[str], sides: Mapping[str, Found], floor: Floor | None) -> Table:
    def least(batch: int, context: int) -> float | None:
        return None if floor is None else 1e3 * floor.seconds(*decode_work(shape, batch, context + NEW // 2))

    get = functools.partial(_figure, sides, "decode_ms_per_step")
    return _against("Decode, milliseconds a step", "ms", names, get, least)


def _prompts(shape: Shape, names: Sequence[str], sides: Mapping[str, Found], floor: Floor | None) -> Table:
    def least(batch: int, context: int) -> float | None:
        return None if floor is None else 1e3 * floor.seconds(*prefill_work(shape, batch, context))

    def get(side: str, batch: int, context: int) -> float | None:
        seconds = _figure(sides, "prefill_s", side, batch, context)
        return None if seconds is None else 1e3 * seconds

    return _against("Prompts to first tokens, milliseconds", "ms", names, get, least)


def _against(title: str, unit: str, names: Sequence[str], get: Any, least: Any) -> Table:
    """A row a batch; ours over the others, and each one's part of the floor."""
    others = [name for name in names if name != "ours"]
    columns = ["batch, context", "floor", *(f"{NAMES[name]} {unit}" for name in names)]
    columns += [f"ours / {NAMES[name]}" for name in others if "ours" in names] + [f"{NAMES[name]} at" for name in names]
    rows = []
    for batch, context in ROWS:
        values, floor = {name: get(name, batch, context) for name in names}, least(batch, context)
        cells = [f"{batch}, {context}", number(floor), *(number(values[name], 4) for name in names)]
        cells += [number(ratio(values.get("ours"), values[name])) for name in others if "ours" in names]
        cells += [percent(ratio(floor, values[name])) for name in names]
        rows.append(cells)
    return Table(title, columns, rows, "'at': the floor over the time.")


def _ragged(names: Sequence[str], sides: Mapping[str, Found]) -> Table:
    made = {name: sides[name]["rows"].get("mixed", {}).get("out_tok_s") for name in names}
    counts = {sides[name]["rows"]["mixed"]["requests"] for name in names if "mixed" in sides[name]["rows"]} or {REQUESTS}
    columns = ["requests", *(f"{NAMES[name]} tokens/s" for name in names), "ours / vLLM"]
    cells = ["/".join(map(str, sorted(counts))), *(number(made[name], 6) for name in names)]
    over = number(ratio(made.get("ours"), made.get("vllm")), 4)
    return Table("Ragged requests: prompts of 50 to 600 tokens, answers of 50 to 400", columns, [[*cells, over]])


def _starts(names: Sequence[str], sides: Mapping[str, Found]) -> Table:
    rows = []
    for name in names:
        rows += [[NAMES[name], what, number(seconds)] for what, seconds in sides[name].get("start", {}).items()]
    return Table("Start, seconds", ["side", "what", "seconds"], rows)


def _figure(sides: Mapping[str, Found], what: str, side: str, batch: int, context: int) -> float | None:
    value: float | None = sides[side]["rows"].get(row_name(batch, context), {}).get(what)
    return value


def start_side(side: str, shape: str, chosen: argparse.Namespace) -> None:
    """One process; what it wrote counts, however it ends."""
    command = [sys.executable, "-m", "bench.decode", "--measure", side, "--shapes", shape, "--out", str(chosen.out)]
    command += ["--device", chosen.device, "--requests", str(chosen.requests), *(["--quick"] if chosen.quick else [])]
    command += ["--rows", *chosen.rows, "--options", json.dumps(chosen.options)]
    _file(chosen.out, shape, side).unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if side in OURS or not key.startswith("FLASHINFER_")}
    sites = [site.removeprefix(f"{side}=") for site in chosen.sites if site.startswith(f"{side}=")]
    environment["PYTHONPATH"] = os.pathsep.join([*sites, *filter(None, [os.environ.get("PYTHONPATH")])])
    status = run_apart(command, chosen.limit, environment)
    if status is None:
        print(f"{side} took longer than {chosen.limit} s", flush=True)
    elif status:
        print(f"{side} ended with status {status}", flush=True)


def merge(shapes: Sequence[str], out: Path) -> None:
    """decode.md from the files that the sides left."""
    page = [HEADING]
    for name in shapes:
        sides = {side: json.loads(file.read_text()) for side in SIDES if (file := _file(out, name, side)).exists()}
        if not sides:
            continue
        floor = next((Floor(**one["floor"]) for one in sides.values() if "floor" in one), None)
        made = tables(SHAPES[name], sides, floor)
        page += [f"## {name}", ""]
        page += [f"* {NAMES[side]}: {said(one['stamp'])}." for side, one in sides.items()]
        if floor is not None:
            page += [
                f"* The device: copying {number(floor.bytes / 1e12)} TB/s, bf16 products {number(floor.operations / 1e12)} TFLOP/s."
            ]
        print(f"\n{name}")
        for table in made:
            table.show()
            page += ["", table.markdown(level=3)]
    (out / "decode.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")


def _file(out: Path, shape: str, side: str) -> Path:
    return out / f"decode_{shape}_{side}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["llama-3.1-8b", "llama-3.2-1b"])
    parser.add_argument("--sides", nargs="*", choices=tuple(SIDES), default=["ours", "vllm"])
    parser.add_argument("--rows", nargs="*", default=[], help="such as b1_ctx128; default: all")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="ragged requests; 0: none")
    parser.add_argument("--quick", action="store_true", help="one run instead of the better of two")
    parser.add_argument("--options", type=json.loads, default={}, help='PagedLM\'s, such as \'{"kernel": "flashinfer"}\'')
    parser.add_argument("--limit", type=float, default=240, help="seconds for one side of one shape")
    parser.add_argument("--sites", nargs="*", default=[], metavar="SIDE=FOLDER", help="packages that only one side sees")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for decode.md and a JSON file a side")
    parser.add_argument("--measure", choices=tuple(SIDES), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.measure:
        [shape] = chosen.shapes
        run_side(chosen.measure, SHAPES[shape], chosen, _file(chosen.out, shape, chosen.measure))
        return
    for shape in chosen.shapes:
        for side in chosen.sides:
            start_side(side, shape, chosen)
    merge(chosen.shapes, chosen.out)


if __name__ == "__main__":
    main()

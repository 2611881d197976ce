"""How is a time taken on a device, and how does a table of times come to paper?

On a GPU calls are timed by events, launched by the host or recorded into a CUDA graph; on a CPU, for tests, by a clock.
Calls that are compared take turns, in another order each time, and the median of each counts.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("triton", "flashinfer-python", "vllm", "transformers")
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """What is printed, and written as Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self, level: int = 2) -> str:
        lines = [f"{'#' * level} {self.title}", "", _row(self.columns), _row(["---"] * len(self.columns)), *map(_row, self.rows)]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])

    def show(self) -> None:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn

        drawn = Drawn(title=self.title, caption=self.note or None, box=box.SIMPLE)
        for column in self.columns:
            drawn.add_column(column, no_wrap=True)
        for row in self.rows:
            drawn.add_row(*row)
        Console(width=max(80, _width(self))).print(drawn)


def _row(cells: Sequence[str]) -> str:
    """A bar, as in the name of several kernels, ends no cell."""
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _width(table: Table) -> int:
    """Enough that nothing is folded where the output is no terminal."""
    columns = zip(table.columns, *table.rows, strict=True)
    return sum(max(map(len, column)) + 3 for column in columns) + 2


def number(value: float | None, digits: int = 3) -> str:
    """With that many significant digits; a dash for what was not measured."""
    if value is None:
        return MISSING
    return f"{value:,.{max(0, digits - len(str(int(abs(value)))))}f}"


def percent(part: float | None) -> str:
    return MISSING if part is None else f"{100 * part:.0f} %"


def ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def compare(calls: Mapping[str, Call], device: torch.device, seconds: float = 0.05, queued: bool = False) -> dict[str, float]:
    """Microseconds of each call, in about that many seconds of measuring for each.

    `queued`: of calls that the host launches while the device is busy, as a server does with the graph of its next step. What the
    host takes is then in no time. Calls of the same kernels find them in the device's caches, so that none comes always first.
    """
    once = functools.partial(_cuda_once, queued=queued) if device.type == "cuda" else _cpu_once
    for call in calls.values():
        once(call)
    first = sum(once(call) for call in calls.values())
    rounds = max(5, min(200, int(len(calls) * seconds * 1e6 / max(first, 1.0))))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, order = list(calls), random.Random(0)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            taken[name].append(once(calls[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def recorded(call: Call, device: torch.device) -> Call:
    """On a GPU a replay of its CUDA graph. Unlike torch.cuda.graph, it empties no cache: that takes longer than measuring."""
    if device.type != "cuda":
        return call
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    gc.disable()  # a graph that is freed meanwhile would end the recording
    try:
        with torch.cuda.stream(side):
            call()
            torch.cuda.synchronize()
            graph.capture_begin()
            try:
                held = call(), call  # outputs, and what the call reads, live as long as the graph
            except BaseException:
                with contextlib.suppress(RuntimeError):  # it says that the recording failed
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        gc.enable()
    torch.cuda.current_stream().wait_stream(side)

    def replay() -> object:
        graph.replay()
        return held[0]

    replay()
    torch.cuda.synchronize()  # what goes wrong is then said of this call
    return replay


def keep_busy() -> None:
    """Give the device some 0.1 ms to wait, in which the host launches what is timed."""
    torch.cuda._sleep(200_000)  # private; no public call keeps a device busy and its caches as they are


def _cuda_once(call: Call, queued: bool) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        keep_busy()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def _cpu_once(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def stamp(device: torch.device) -> dict[str, str]:
    """When, with which commit, and on what."""
    found = {"date": datetime.date.today().isoformat(), "commit": _commit(), "python": platform.python_version()}
    found["torch"] = torch.__version__
    found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for name in LIBRARIES:
        version = _version(name)
        if version:
            found[name] = version
    return found


def said(stamped: Mapping[str, str]) -> str:
    """A stamp as one line."""
    return ", ".join(value if key in ("date", "device") else f"{key} {value}" for key, value in stamped.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """PAGED_ATTN_COMMIT, for a copy without its history; else what git says."""
    told = os.environ.get("PAGED_ATTN_COMMIT")
    if told:
        return told
    try:
        asked = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def publish(
    name: str, heading: str, tables: Sequence[Table], found: Mapping[str, Any], stamped: Mapping[str, str], out: Path
) -> None:
    """Print the tables; write NAME.md with them and NAME.json with every figure."""
    for table in tables:
        table.show()
    out.mkdir(parents=True, exist_ok=True)
    page = [f"# {heading}", "", f"{said(stamped)}.", "", *(table.markdown() for table in tables)]
    (out / f"{name}.md").write_text("\n".join(page).rstrip() + "\n", encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps({"stamp": dict(stamped), **found}, indent=1) + "\n", encoding="utf-8")

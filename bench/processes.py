"""How does measuring go on after a kernel has broken its process?

A kernel that reads a wrong address leaves the device unusable for its process, and one that crashes ends it. So measuring runs in a
process that writes what it has found, and what it is about to try, into a file; another goes on from there without the culprit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Clock:
    """A budget of seconds, for scripts that measure what time allows."""

    def __init__(self, seconds: float) -> None:
        self._begin, self._budget = time.perf_counter(), seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self._begin

    @property
    def over(self) -> bool:
        return self.spent > self._budget


class Progress:
    """What was found so far by name, what is being tried, and what is left out because it broke a process."""

    def __init__(self, file: Path) -> None:
        self._file = file
        state = json.loads(file.read_text()) if file.exists() else {}
        self.found: dict[str, Any] = state.get("found", {})
        self.without: dict[str, str] = state.get("without", {})
        self._trying: str = state.get("trying", "")

    def trying(self, name: str) -> None:
        self._trying = name
        self._save()

    def add(self, name: str, value: Any) -> None:
        self.found[name] = value
        self._trying = ""
        self._save()

    def blame(self, how: str) -> str:
        """Leave out what was being tried when its process ended; its name, or nothing if the process was between two."""
        if self._trying:
            self.without[self._trying] = how
            self._save()
        return self._trying

    def _save(self) -> None:
        self._file.write_text(json.dumps({"found": self.found, "without": self.without, "trying": self._trying}, indent=1))


def _leave(signal_number: int, _: Any) -> None:
    raise SystemExit(128 + signal_number)


@contextlib.contextmanager
def _leaving_in_order() -> Iterator[None]:
    """Whoever asks this process to end lets it tidy up."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_apart(command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """The exit status; None after that many seconds. Nothing that it started is left behind, also if this process is ended."""
    with _leaving_in_order():
        process = subprocess.Popen(command, start_new_session=True, env=environment)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # processes of an engine would keep the device's memory
            process.wait()


def keep_measuring(command: Sequence[str], file: Path, seconds: float) -> Progress:
    """Run the command, which works on `file`, until it ends well, time is over, or it breaks without having tried anything."""
    clock = Clock(seconds)
    file.unlink(missing_ok=True)
    while not clock.over:
        status = run_apart(command, seconds - clock.spent)
        progress = Progress(file)
        if status is None:
            print(f"cut off after {seconds:.0f} s", flush=True)
        if status in (0, None):
            return progress
        culprit = progress.blame(f"ended its process with status {status}")
        print(f"{culprit or 'the process itself'} ended with status {status}", flush=True)
        if not culprit:
            return progress
    return Progress(file)

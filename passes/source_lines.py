"""What stands in the user's files around the lines that a report names?

Files are read when this is asked. A line that no longer stands where it was recorded is not taken for the one that does.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass

_AROUND = 2  # lines before the first and after the last one
_APART = 6  # lines between two that are shown in one excerpt
_RECORDED = re.compile(r"(?P<file>.+?):(?P<line>\d+): ?(?P<code>.*)")


@dataclass(frozen=True)
class Excerpt:
    """Lines of one file as (number, text, whether it was named). With a `missing`, only the named ones, as they were recorded."""

    file: str
    lines: tuple[tuple[int, str, bool], ...]
    missing: str = ""  # why there are no lines around


def excerpts(recorded: Iterable[str]) -> list[Excerpt]:
    """The places that `file:line: code` names, in the order of their files, each with the lines around it.

    What is not of that form is no place in a file, and left out.
    """
    files: dict[str, dict[int, str]] = {}
    for line in recorded:
        found = _RECORDED.fullmatch(line)
        if found:
            files.setdefault(found["file"], {}).setdefault(int(found["line"]), found["code"])
    return [excerpt for file, named in files.items() for excerpt in _of_file(file, named)]


def _of_file(file: str, named: dict[int, str]) -> list[Excerpt]:
    linecache.checkcache(file)  # a file that was changed since is read anew
    lines = linecache.getlines(file)  # knows the cells of a notebook, too; empty for what cannot be read
    if missing := _missing(lines, named):
        return [Excerpt(file, tuple((number, code, True) for number, code in sorted(named.items())), missing)]
    runs: list[list[int]] = []
    for number in sorted(named):
        if runs and number - runs[-1][-1] <= _APART:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [Excerpt(file, _around(lines, run)) for run in runs]


def _missing(lines: list[str], named: dict[int, str]) -> str:
    if not lines:
        return "the file is not here to be read"
    moved = [number for number, code in named.items() if number > len(lines) or lines[number - 1].strip() != code.strip()]
    return f"the file has changed since: line {moved[0]} is another one" if moved else ""


def _around(lines: list[str], run: list[int]) -> tuple[tuple[int, str, bool], ...]:
    first, last = max(run[0] - _AROUND, 1), min(run[-1] + _AROUND, len(lines))
    while first < run[0] and not lines[first - 1].strip():
        first += 1
    while last > run[-1] and not lines[last - 1].strip():
        last -= 1
    shown = [(number, lines[number - 1], number in run) for number in range(first, last + 1)]
    margin = min((len(text) - len(text.lstrip()) for _, text, _ in shown if text.strip()), default=0)
    return tuple((number, text[margin:].rstrip(), named) for number, text, named in shown)


def short(source: str) -> str:
    """Without the folder that packages are installed in."""
    return re.sub(r"^.*/(?:site|dist)-packages/", "", source)

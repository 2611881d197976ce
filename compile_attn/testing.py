"""How does a test of your own notice that a model's attention, or what is made of it, has changed?

A golden is a small text in your repository: the sites of a report, a line for all that are equal, and what changes in the graph.
It holds for one kind of device: another one has other kernels.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from compile_attn.explaining import explain
from compile_attn.logs import untraced_by_pytest
from compile_attn.passes.places import places
from compile_attn.passes.report import Report
from compile_attn.passes.stable import stable_diff, without_numbers

_LINES, _WIDTH = 28, 150  # of a message: with what pytest prints around it, it fits a screen of 40
_PART = re.compile(r"@@ -(\d+)")
_FIRST = "paged_attn graph diff, format 1"


def assert_graph_diff(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    golden: str | PathLike[str] | None = None,
    *,
    paged: bool = False,
    update: bool = False,
    **options: Any,
) -> None:
    """Hold what `explain` says of model(*args, **kwargs), or with `paged` of its paged form, against the file `golden`.

    `options` are explain's: kernel, call, kv_dtype, block_sparse. With `update` the file is written and nothing is compared; keep
    it in your repository. AssertionError where they differ or the file is missing: the message shows the change and says how to
    accept it. ValueError without a golden, where it is a folder, or where `args` is no tuple.
    """
    __tracebackhide__ = True
    if golden is None:
        raise ValueError("golden is a path, such as 'tests/graph_diffs/decoder.txt'; pytest's fixture `graph_diff` names it itself")
    report = explained(model, args, kwargs, paged=paged, **options)
    if update:
        write_golden(golden, golden_text(report))
    else:
        check_golden(report, golden, "call assert_graph_diff with update=True once")


def explained(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None, *, paged: bool, **options: Any
) -> Report:
    """The report of `explain`. ValueError where `args` is one argument, not a tuple of them."""
    if not isinstance(args, (tuple, list)):
        raise ValueError(f"args is a tuple of what the model is called with, such as (input_ids,), not a {type(args).__name__}")
    with untraced_by_pytest():
        return explain(model, *args, paged=paged, **options, **(kwargs or {}))


def golden_text(report: Report) -> str:
    """What a golden holds of a report: no line numbers, no names that torch gives, equal layers once."""
    graph = stable_diff(report.before, report.after)
    return "\n".join([_FIRST, "", *_head(report), *(["", *graph] if graph else [])]) + "\n"


def write_golden(golden: str | PathLike[str], text: str) -> bool:
    """Write it, folders and all; whether the file was not that already. ValueError where it is a folder."""
    path = _file(golden)
    if path.exists() and _read(path) == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    return True


def check_golden(report: Report, golden: str | PathLike[str], cure: str) -> None:
    """AssertionError where the golden is missing or says something else; `cure` is what to do, as an imperative."""
    __tracebackhide__ = True
    path = _file(golden)
    now = golden_text(report)
    if not path.exists():
        raise AssertionError(f"there is no golden {shown_path(path)} yet; to make it {cure}, read it, and commit it")
    if (then := _read(path)) != now:
        raise AssertionError(_message(path, then, now, report, cure))


def shown_path(path: Path) -> str:
    """From the working directory, where it is below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _file(golden: str | PathLike[str]) -> Path:
    path = Path(golden)
    if path.is_dir():
        raise ValueError(f"the golden {path} is a folder; name a file in it")
    return path


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")  # what cannot be read is a difference, too


def _head(report: Report) -> list[str]:
    """A line for all sites of which the same is to be said."""
    told: dict[str, list[str]] = {}
    for site in report.sites:
        asked = f" ({site.asked})" if site.asked else ""
        told.setdefault(f"{site.spec.words()}{asked} -> {site.kernel}", []).append(site.where.module)
    for one in report.rejected:
        told.setdefault(f"rejected: {without_numbers(one.reason, report.before)}", []).append(one.where.module)
    return [report.summary(), *(f"{places(modules)}: {what}" for what, modules in told.items())]


def _message(path: Path, then: str, now: str, report: Report, cure: str) -> str:
    """The change, sites first, in one screen."""
    (old_head, old_graph), (new_head, new_graph) = (_parts(text) for text in (then, now))
    head = [line for line in list(difflib.unified_diff(old_head, new_head, n=0, lineterm=""))[2:] if line[0] in "-+"]
    graph = [_shortened(line) for line in _changed_graph(old_graph, new_graph)]
    sites = [part for line in head for part in textwrap.wrap(line, _WIDTH, subsequent_indent="    ")]
    shown = _cut([*sites, *_sources(report, head)], _LINES - min(len(graph), _LINES // 4), "sites")
    shown += _cut(graph, _LINES - len(shown), "the graph")
    return "\n".join([f"not the graph diff of {shown_path(path)} (- golden, + now)", *shown, f"to accept this {cure}"])


def _parts(text: str) -> tuple[list[str], list[str]]:
    """The lines on sites, and those on the graph. A file of another format is shown from its first line."""
    head, _, graph = text.removeprefix(f"{_FIRST}\n\n").partition("\n\n")
    return head.splitlines(), graph.splitlines()


def _changed_graph(old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    """A diff of diffs: the first sign is of the golden, the second of the graph. Its parts are named by their modules."""
    for line in list(difflib.unified_diff(old, new, n=1, lineterm=""))[2:]:
        start = _PART.match(line)
        if start:
            line = next((one for one in reversed(old[: int(start[1])]) if one.startswith("@@")), "@@")
        yield line


def _sources(report: Report, changed: Sequence[str]) -> Iterator[str]:
    """Where the sites stand that a changed line speaks of."""
    words = {site.spec.words(): site.where.source for site in reversed(report.sites)}
    words |= {without_numbers(one.reason, report.before): one.where.source for one in reversed(report.rejected)}
    for what, source in words.items():
        if source and any(line[0] == "+" and what in line for line in changed):
            yield _shortened(f"    at {source}")


def _cut(lines: Sequence[str], room: int, what: str) -> list[str]:
    if len(lines) <= room:
        return list(lines)
    return [*lines[: room - 1], f"... {len(lines) - room + 1} more lines on {what} left out"]


def _shortened(line: str) -> str:
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH - 4]} ..."

"""How do the graph before and the graph after stand side by side, with what is equal folded away?

Lines are named as in `passes/stable.py`, so that only what was rewritten differs. A graph is cut where its layers are, and layers
that are alike are shown once. Everything folds without a script.
"""

from __future__ import annotations

import difflib
import html
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.places import NUMBER, places
from compile_attn.passes.report import counted
from compile_attn.passes.source_lines import short
from compile_attn.passes.stable import Line, named_graphs

_FUSED = re.compile(r" = (paged_attn\.(?:attend|attention)|aten\.scaled_dot_product_attention)\b")
_WORD = re.compile(r"[A-Za-z_][\w.]*|(?<![\w.])\d[\w.]*(?=/)")
_TURN = re.compile(r"_\d+$")
_GAP = 2  # equal lines between two changes that are one region
_LONG = 4  # equal lines in a row that are worth folding
_OPEN = 12  # lines of a region that is shown unfolded


@dataclass(frozen=True)
class Row:
    """A line before and the line after that stands beside it. Equal lines are on both sides."""

    old: Line | None
    new: Line | None

    @property
    def line(self) -> Line:
        """Whichever there is."""
        line = self.old or self.new
        assert line is not None
        return line

    @property
    def equal(self) -> bool:
        return self.old == self.new


def side_by_side(before: str, after: str) -> str:
    """Both texts of a report as HTML: a part for each layer, and of layers that are alike the first. They may be one text."""
    parts = []
    stay = "unchanged line" if before != after else "line"
    graphs = list(named_graphs(before, after))
    level = "h4" if len(graphs) > 1 else "h3"
    for number, (old, new) in enumerate(graphs):
        parts += [f"<h3>Graph {number + 1} of {len(graphs)}</h3>"] if len(graphs) > 1 else []
        inputs, nodes = ([[line for line in lines if line.is_input is kind] for lines in (old, new)] for kind in (True, False))
        parts.append(_inputs(_aligned(*inputs)))
        parts += [_part(group, level, stay) for group in _grouped(_by_layer(_aligned(*nodes)))]
    return "".join(parts)


def _aligned(old: Sequence[Line], new: Sequence[Line]) -> list[Row]:
    rows: list[Row] = []
    for kind, start, end, first, last in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        was, now = old[start:end], new[first:last]
        rows += itertools.starmap(Row, zip(was, now, strict=True)) if kind == "equal" else _beside(was, now)
    return rows


def _beside(old: Sequence[Line], new: Sequence[Line]) -> Iterator[Row]:
    """What came from the same line of the user stands side by side, all else by itself."""
    before, after = ([(origin, list(lines)) for origin, lines in itertools.groupby(side, _origin)] for side in (old, new))
    matcher = difflib.SequenceMatcher(None, [origin for origin, _ in before], [origin for origin, _ in after], autojunk=False)
    for kind, start, end, first, last in matcher.get_opcodes():
        if kind == "equal":
            for (_, was), (_, now) in zip(before[start:end], after[first:last], strict=True):
                yield from itertools.starmap(Row, itertools.zip_longest(was, now))
        else:
            yield from (Row(line, None) for _, lines in before[start:end] for line in lines)
            yield from (Row(None, line) for _, lines in after[first:last] for line in lines)


def _origin(line: Line) -> tuple[str, str]:
    return line.module, line.source


def _layer(row: Row) -> str | None:
    """The path of a line's module up to its first number; "" for a module outside of all layers, None for the model itself."""
    module = row.line.module
    if not module:
        return None
    number = NUMBER.search(module)
    return module[: number.end()] if number else ""


def _by_layer(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """What the model itself does between two layers stays with the first of them."""
    part: list[Row] = []
    current: str | None = None
    for row in rows:
        layer = _layer(row)
        if part and layer is not None and layer != current:
            yield part
            part = []
        current = current if layer is None else layer
        part.append(row)
    if part:
        yield part


class _Alike:
    """Parts of a graph in which the same stands but for numbers in names, each of which stays or grows evenly from part to part."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        self.rows, self.others = rows, list[Sequence[Row]]()
        self._numbers = numbers
        self._growth: list[int] | None = None  # of each number, when the first one grows by 1

    def take(self, rows: Sequence[Row], numbers: Sequence[int]) -> bool:
        """Whether this part is one of them."""
        step = numbers[0] - self._numbers[0] if numbers else 0
        grown = [now - was for was, now in zip(self._numbers, numbers, strict=True)]
        if step < 1 or any(each < 0 or each % step for each in grown):
            return False
        growth = [each // step for each in grown]
        if self._growth not in (None, growth):
            return False
        self._growth = growth
        self.others.append(rows)
        return True


def _grouped(parts: Iterable[Sequence[Row]]) -> list[_Alike]:
    groups: list[_Alike] = []
    known: dict[str, list[_Alike]] = {}
    for rows in parts:
        text, numbers = _without_numbers(rows)
        like = known.setdefault(text, [])
        if not any(group.take(rows, numbers) for group in like):
            like.append(_Alike(rows, numbers))
            groups.append(like[-1])
    return groups


def _without_numbers(rows: Sequence[Row]) -> tuple[str, list[int]]:
    """The text of both sides, with the specs, without the numbers in names; and these, that of the layer first."""
    numbers: list[int] = []

    def number(found: re.Match[str]) -> str:
        numbers.append(int(found[0].strip("_")))
        return "#"

    def word(found: re.Match[str]) -> str:
        return _TURN.sub(number, NUMBER.sub(number, found[0]))

    sides = ((sign, line) for row in rows for sign, line in (("-", row.old), ("+", row.new)) if line is not None)
    return _WORD.sub(word, "\n".join(f"{sign}{line.module}/ {line} {line.spec}" for sign, line in sides)), numbers


def _title(rows: Sequence[Row]) -> str:
    """The layer of a part; of a part outside of all layers its first module."""
    return next((layer or row.line.module for row in rows if (layer := _layer(row)) is not None), "")


def _inputs(rows: Sequence[Row]) -> str:
    """Each input alone, or with those that are alike."""
    body = ""
    for group in _grouped([row] for row in rows):
        names = [row.line.text.removeprefix("input ").partition(":")[0] for [row] in group.others]
        body += _row(*group.rows)
        body += f"<p class=at>… and {len(names)} more like it: {_text(places(names))}</p>" if names else ""
    added, removed = (sum(getattr(row, side) is None for row in rows) for side in ("old", "new"))
    told = f"Inputs: {len(rows) - added} before, {len(rows) - removed} after" + (f", {added} of them new" if added else "")
    return _fold(told if added or removed else counted(len(rows), "input"), body, "part") if rows else ""


def _part(group: _Alike, level: str, stay: str) -> str:
    rows, like = group.rows, [_title(other) for other in group.others]
    more = f" <small>and {len(like)} more like it: {_text(places(like))}</small>" if like else ""
    title = f"<{level}><code>{_text(_title(rows)) or 'the model itself'}</code>{more}</{level}>"
    return f"<section class=part>{title}{''.join(_run(run, stay) for run in _runs(rows))}</section>"


def _runs(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Changed regions, which hold short runs of equal lines, and the equal lines between them, by turns."""
    runs = [(equal, list(run)) for equal, run in itertools.groupby(rows, lambda row: row.equal)]
    region: list[Row] = []
    for at, (equal, run) in enumerate(runs):
        if equal and (len(run) > _GAP or at in (0, len(runs) - 1)):
            if region:
                yield region
            yield run
            region = []
        else:
            region += run
    if region:
        yield region


def _run(rows: Sequence[Row], stay: str) -> str:
    body = "".join(_told(rows))
    if all(row.equal for row in rows):
        return _fold(counted(len(rows), stay), body, "same") if len(rows) > _LONG else f"<div class=rows>{body}</div>"
    fused = [(found[1], row.new.spec) for row in rows if row.new and not row.equal and (found := _FUSED.search(row.new.text))]
    told = _counts(rows)
    for op, spec in fused:
        told += f": <code>{op}</code>" + (f", {_text(AttentionSpec.decode(spec).mask.words())}" if spec else "")
    return _fold(told, body, "changed", opened=not fused and len(rows) <= _OPEN)


def _counts(rows: Sequence[Row]) -> str:
    old, new = (sum(getattr(row, side) is not None and not row.equal for row in rows) for side in ("old", "new"))
    if old and new:
        return f"{counted(old, 'line')} replaced by {new}"
    return f"{counted(old, 'line')} removed" if old else f"{counted(new, 'line')} added"


def _told(rows: Sequence[Row]) -> Iterator[str]:
    """The rows, under the user's lines that they came from."""
    origin = None
    for row in rows:
        if _origin(row.line) != origin and any(_origin(row.line)):
            yield f"<p class=at><b>{_text(row.line.module)}</b> {_text(short(row.line.source))}</p>"
        origin = _origin(row.line)
        yield _row(row)


def _row(row: Row) -> str:
    """What is equal is read once: the other side is for the eye."""
    if row.equal:
        text = _text(str(row.line))
        return f"<div class=row><code>{text}</code><code aria-hidden=true>{text}</code></div>"
    old = f"<del>{_text(str(row.old))}</del>" if row.old else "<i></i>"
    new = f"<ins>{_text(str(row.new))}</ins>" if row.new else "<i></i>"
    return f"<div class=row>{old}{new}</div>"


def _fold(summary: str, body: str, kind: str, opened: bool = False) -> str:
    return f"<details class={kind}{' open' if opened else ''}><summary>{summary}</summary><div class=rows>{body}</div></details>"


def _text(text: str) -> str:
    return html.escape(text, quote=True)

"""How does a report look as one page that needs no network?"""

from __future__ import annotations

import html as escape
import itertools
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import Load
from compile_attn.kernels.mask import BlockSparse, Mask
from compile_attn.kernels.text import print_expr
from compile_attn.passes.graph import Location
from compile_attn.passes.report import Report, Rewritten, counted, grouped

_CELLS = 32  # a picture has 32 x 32 cells
_PIXELS = 4  # of that many pixels each
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e6e8eb); --back: light-dark(#fff, #16181b);
  --line: light-dark(#d8dce1, #353a40); --seen: light-dark(#2f6fde, #6ea0ff); --maybe: light-dark(#b9cff5, #2f4a7d);
  --plus: light-dark(#e3f6e6, #16351d); --minus: light-dark(#fdeaea, #3f1a1c); --at: light-dark(#5b6570, #9aa4af); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .5rem .7rem; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; min-width: 9rem; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; padding: .5rem; border: 1px solid var(--line); }
pre span { display: block; width: max-content; min-width: 100%; } summary { cursor: pointer; }
.plus { background: var(--plus); } .minus { background: var(--minus); } .at { color: var(--at); }
svg { border: 1px solid var(--line); } .seen { fill: var(--seen); } .maybe { fill: var(--maybe); } small { opacity: .75; }
"""


def html(report: Report) -> str:
    """The whole page."""
    parts = [f"<h1>paged_attn</h1><p>{_text(report.summary())}</p>"]
    if report.sites:
        rows = [_site(site, places) for site, places in grouped(report.sites)]
        parts.append("<h2>Rewritten</h2>" + _table(("where", "what it computes", "mask", "kernel"), rows))
    if report.rejected:
        rows = [(_where(places), _text(one.reason), _text(one.cure)) for one, places in grouped(report.rejected)]
        parts.append("<h2>Rejected</h2>" + _table(("where", "reason", "cure"), rows))
    if report.tokens:
        rows = [(_where(places), _text(one.kind), _text(one.detail)) for one, places in grouped(report.tokens)]
        parts.append("<h2>Tokens</h2>" + _table(("where", "kind", "rewrite"), rows))
    if report.linears:
        rows = [(_where(places), _text(one.kind), _text(one.detail)) for one, places in grouped(report.linears)]
        parts.append("<h2>Linears</h2>" + _table(("where", "kind", "what"), rows))
    parts.append(_diff(report.diff()))
    seconds = [(_text(name), f"{value * 1e3:.1f} ms") for name, value in report.seconds.items()]
    parts.append("<h2>Time</h2>" + _table(("phase", "time"), seconds))
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>paged_attn report</title>"
    # An icon of its own, empty: a browser would ask the server for one otherwise.
    head += "<link rel=icon href='data:,'>"
    return f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"


def picture(mask: Mask) -> str:
    """An SVG of the mask for head 0: queries downwards, keys to the right. Pale where a tensor decides."""
    step = _step(mask)
    surely, perhaps = _cells(mask.predicate(), step)
    size = _CELLS * _PIXELS
    drawn = _path("seen", surely) + _path("maybe", perhaps & ~surely)
    label = _text(f"keys to the right, queries downwards: {mask.words()}")
    notes = ["a cell is a position" if step == 1 else f"a cell stands for {step} positions"]
    notes += ["pale: a tensor decides"] if bool((perhaps & ~surely).any()) else []
    notes += ["head 0"] if "h" in {symbol.name for symbol in mask.predicate().free_symbols} else []
    svg = f"<svg width={size} height={size} viewBox='0 0 {size} {size}' role=img aria-label='{label}'>{drawn}</svg>"
    return f"{svg}<br><small>{'; '.join(notes)}</small>"


def _step(mask: Mask) -> int:
    """Positions a cell stands for: as many as show the longest reach of the mask twice."""
    if isinstance(mask, BlockSparse):
        return mask.block_size
    numbers = [int(number) for number in mask.predicate().atoms(sympy.Integer)]
    reach = max([mask.window() or 0, *map(abs, numbers)])
    return max(1, -(-2 * (reach + 1) // _CELLS))


def _cells(predicate: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where keys are visible whatever the tensors hold, and where they are visible for some contents.

    Comparisons that read a tensor are taken for free truth values.
    """
    places = torch.arange(_CELLS) * step
    env = {"b": torch.tensor(0), "h": torch.tensor(0), "i": places[:, None], "j": places[None], "captured": []}
    atoms = [atom for atom in predicate.atoms(Relational) if atom.has(Load)]
    seen = []
    for values in itertools.product((sympy.true, sympy.false), repeat=min(len(atoms), 6)):
        known = predicate.xreplace(dict(zip(atoms, values, strict=False)))
        try:
            cells = torch.as_tensor(evaluator(known)(env)).expand(_CELLS, _CELLS)
        except IndexError:  # a tensor is read elsewhere than in a comparison: nothing is known
            return torch.zeros(_CELLS, _CELLS, dtype=torch.bool), torch.ones(_CELLS, _CELLS, dtype=torch.bool)
        seen.append(cells.bool())
    return torch.stack(seen).all(0), torch.stack(seen).any(0)


def _path(kind: str, cells: torch.Tensor) -> str:
    """The cells as one path: a bar for each run of a row."""
    bars = []
    for row, line in enumerate(cells.tolist()):
        place = 0
        for filled, run in itertools.groupby(line):
            length = len(list(run))
            if filled:
                bars.append(f"M{place * _PIXELS} {row * _PIXELS}h{length * _PIXELS}v{_PIXELS}h-{length * _PIXELS}z")
            place += length
    return f"<path class={kind} d='{''.join(bars)}'/>" if bars else ""


def _site(site: Rewritten, places: Sequence[Location]) -> tuple[str, ...]:
    others = "".join(f"<li><b>{_text(name)}</b> {_text('; '.join(why))}</li>" for name, why in site.passed_over.items())
    why_not = f"<details><summary>why not the others</summary><ul>{others}</ul></details>" if others else ""
    words = "<br>".join(map(_text, filter(None, [site.spec.words(), site.asked])))
    meaning = (
        f"{words}<br>score <code>{_text(print_expr(site.spec.expression()))}</code>"
        f"<br>visible where <code>{_text(print_expr(site.spec.mask.predicate()))}</code>"
    )
    nodes = f"<small>{counted(site.nodes_removed, 'node')} removed, {site.nodes_added} added</small>"
    kernel = f"<b>{_text(site.kernel)}</b>" + (f"<div>{_text(site.steps)}</div>" if site.steps else "")
    return _where(places), meaning, picture(site.spec.mask), f"{kernel}{why_not}<div>{nodes}</div>"


def _where(places: Sequence[Location]) -> str:
    """The place of an entry; of several equal ones the first, and all behind a click."""
    names = [_text(at.module or at.node) for at in places]
    source = f"<br><small><code>{_text(places[0].source)}</code></small>" if places[0].source else ""
    if len(names) == 1:
        return f"<b>{names[0]}</b>{source}"
    return f"<details><summary><b>{names[0]}</b> and {len(names) - 1} more</summary>{'<br>'.join(names[1:])}</details>{source}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _diff(text: str) -> str:
    """The diff, folded where it is long."""
    if not text:
        return "<h2>Graph</h2><p>Nothing was rewritten.</p>"
    kinds = {"+": "plus", "-": "minus", "@": "at"}
    lines = text.splitlines()
    body = "".join(f"<span class={kinds.get(line[:1], 'same')}>{_text(line) or ' '}</span>" for line in lines)
    title = f"diff of the normalised graph, {counted(len(lines), 'line')}"
    return f"<h2>Graph</h2><details{' open' if len(lines) <= 400 else ''}><summary>{title}</summary><pre>{body}</pre></details>"


def _text(text: str) -> str:
    return escape.escape(text, quote=True)

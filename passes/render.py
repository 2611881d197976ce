"""How does a report look as one page that needs no network?"""

from __future__ import annotations

import html as escape
from collections.abc import Sequence

import torch

from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.mask import Mask
from compile_attn.kernels.text import print_expr
from compile_attn.passes.report import Rejected, Report, Rewritten

_CELLS = 32  # a picture has 32 x 32 cells, of one position each, or of as many as show the window twice
_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c1e21, #e6e8eb); --back: light-dark(#fff, #16181b);
  --line: light-dark(#d8dce1, #353a40); --seen: light-dark(#2f6fde, #6ea0ff); --plus: light-dark(#e3f6e6, #16351d);
  --minus: light-dark(#fdeaea, #3f1a1c); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; }
th, td { border-bottom: 1px solid var(--line); padding: .45rem .6rem; text-align: left; vertical-align: top; }
code, pre { font: 13px/1.45 ui-monospace, monospace; } pre { overflow-x: auto; } pre span { display: block; }
.plus { background: var(--plus); } .minus { background: var(--minus); } svg rect.seen { fill: var(--seen); }
svg { border: 1px solid var(--line); } small { opacity: .75; }
"""


def html(report: Report) -> str:
    """The whole page."""
    parts = [f"<h1>paged_attn</h1><p>{_text(report.summary())}</p>"]
    if report.sites:
        parts.append(_sites(report.sites))
    if report.rejected:
        parts.append(_rejected(report.rejected))
    if report.tokens:
        rows = [(_text(t.kind), _place(t.where.module, t.where.node, t.where.source), _text(t.detail)) for t in report.tokens]
        parts.append("<h2>Tokens</h2>" + _table(("kind", "where", "rewrite"), rows))
    seconds = [(_text(name), f"{value * 1e3:.1f} ms") for name, value in report.seconds.items()]
    parts.append("<h2>Time</h2>" + _table(("phase", "time"), seconds))
    parts.append(f"<h2>Graph</h2><details><summary>diff</summary><pre>{_diff(report.diff())}</pre></details>")
    title = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>paged_attn report</title>"
    return f"<!doctype html><html lang=en><head>{title}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"


def picture(mask: Mask) -> str:
    """An SVG of the mask: queries downwards, keys to the right; masks that read tensors have none."""
    step = max(1, -(-2 * ((mask.window() or 0) + 1) // _CELLS))
    places = torch.arange(_CELLS) * step
    env = {"b": torch.tensor(0), "h": torch.tensor(0), "i": places[:, None], "j": places[None], "captured": []}
    try:
        seen = torch.as_tensor(evaluator(mask.predicate())(env)).expand(_CELLS, _CELLS)
    except IndexError:
        return "<small>depends on a tensor</small>"
    cells = "".join(f"<rect class=seen x={j * 4} y={i * 4} width=4 height=4 />" for i, j in seen.nonzero().tolist())
    scale = f"<br><small>a cell is {step} position{'s' if step > 1 else ''}</small>"
    return f"<svg width=128 height=128 viewBox='0 0 128 128' role=img aria-label='{_text(mask.words())}'>{cells}</svg>{scale}"


def _sites(sites: Sequence[Rewritten]) -> str:
    rows = []
    for site in sites:
        others = "<br>".join(f"<b>{_text(name)}</b> {_text(', '.join(why))}" for name, why in site.passed_over.items())
        formula = f"<code>{_text(print_expr(site.spec.expression()))}</code>"
        meaning = (
            f"{_text(site.spec.words())}<br>score = {formula}<br>where <code>{_text(print_expr(site.spec.mask.predicate()))}</code>"
        )
        kernel = f"<b>{_text(site.kernel)}</b><details><summary>why not the others</summary>{others}</details>"
        nodes = f"<small>{site.nodes_removed} nodes removed, {site.nodes_added} added</small>"
        rows.append(
            (_place(site.where.module, site.where.node, site.where.source), meaning, picture(site.spec.mask), kernel + nodes)
        )
    return "<h2>Rewritten</h2>" + _table(("where", "what it computes", "mask", "kernel"), rows)


def _rejected(rejected: Sequence[Rejected]) -> str:
    rows = [(_place(r.where.module, r.where.node, r.where.source), _text(r.reason), _text(r.cure)) for r in rejected]
    return "<h2>Rejected</h2>" + _table(("where", "reason", "cure"), rows)


def _place(module: str, node: str, source: str) -> str:
    return f"<b>{_text(module or node)}</b><br><small><code>{_text(source)}</code></small>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _diff(text: str) -> str:
    kinds = {"+": "plus", "-": "minus"}
    return "".join(f"<span class={kinds.get(line[:1], 'same')}>{_text(line)}</span>" for line in text.splitlines())


def _text(text: str) -> str:
    return escape.escape(text, quote=True)

"""How does a report look as one page that needs no network?

Nothing on it is a script, and its policy lets a browser load nothing: what folds is <details>, mathematics are MathML, pictures are
SVG. Whatever comes from a model is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html as escape
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location
from compile_attn.passes.mask_picture import picture
from compile_attn.passes.mathml import formula
from compile_attn.passes.places import places
from compile_attn.passes.report import LinearMerge, Rejected, Report, Rewritten, TokenRewrite, counted, grouped
from compile_attn.passes.side_by_side import side_by_side
from compile_attn.passes.source_lines import Excerpt, excerpts, short
from compile_attn.passes.stable import without_numbers

_STYLE = Path(__file__).with_name("page.css")


def html(report: Report) -> str:
    """The whole page. The lines around those that the report names are read from their files now."""
    sections = [
        ("rewritten", "Rewritten", "".join(_site(site, at) for site, at in grouped(report.sites))),
        ("rejected", "Rejected", "".join(_rejected(one, at) for one, at in _alike(report))),
        ("tokens", "Tokens", _table(("where", "kind", "rewrite"), _rows(grouped(report.tokens)))),
        ("linears", "Linears", _table(("where", "kind", "what"), _rows(grouped(report.linears)))),
        ("graph", "Graph, before and after" if report.before else "Graph", _graph(report)),
        ("time", "Time", _table(("phase", "time"), _times(report.seconds), "time")),
    ]
    shown = [(name, title, body) for name, title, body in sections if body]
    links = "".join(f"<a href='#{name}'>{title}</a>" for name, title, _ in shown)
    body = "".join(f"<section><h2 id={name}>{title}</h2>{body}</section>" for name, title, body in shown)
    limit = "" if report.max_positions is None else f"<p>Its position table ends after {report.max_positions} positions.</p>"
    top = f"<header><h1>paged_attn</h1><p>{_text(report.summary())}</p>{limit}<nav aria-label=Sections>{links}</nav></header>"
    return f"<!doctype html><html lang=en><head>{_head()}</head><body>{top}<main>{body}</main></body></html>"


def _head() -> str:
    style = _STYLE.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    # An icon of its own, empty: a browser would ask the server for one otherwise.
    return (
        f'<meta charset=utf-8><meta http-equiv=Content-Security-Policy content="{policy}">'
        "<meta name=viewport content='width=device-width,initial-scale=1'><title>paged_attn report</title>"
        f"<link rel=icon href='data:,'><style>{style}</style>"
    )


def _site(site: Rewritten, at: Sequence[Location]) -> str:
    asked = f"<p>{_text(site.asked)}</p>" if site.asked else ""
    steps = f"<p>{_text(site.steps)}</p>" if site.steps else ""
    nodes = f"{counted(site.nodes_removed, 'node')} removed, {site.nodes_added} added" if site.nodes_removed else ""
    meaning = f"<p>{_text(site.spec.words())}</p>{asked}{_formula(site.spec)}"
    kernel = f"<h4>Kernel</h4><p><b>{_text(site.kernel)}</b> <small>{nodes}</small></p>{steps}{_others(site.passed_over)}"
    body = f"<div class=meaning>{picture(site.spec.mask)}<div>{meaning}</div></div>{kernel}"
    return f"<article class=good>{_title(at)}{body}{_source([at[0].source, *site.lines])}</article>"


def _formula(spec: AttentionSpec) -> str:
    written = formula(spec)
    letters = "".join(f"<div><dt><math>{letter}</math></dt><dd>{_text(words)}</dd></div>" for letter, words in written.letters)
    # What scrolls can be reached by keyboard.
    lines = "".join(written.lines)
    return f"<div class=formula tabindex=0 role=group aria-label='the formula'>{lines}</div><dl class=letters>{letters}</dl>"


def _others(passed_over: Mapping[str, Sequence[str]]) -> str:
    """For each other kernel why it was not taken."""
    if not passed_over:
        return ""
    rows = "".join(f"<li><b>{_text(name)}</b>: {_text('; '.join(reasons))}</li>" for name, reasons in passed_over.items())
    others = "the other one" if len(passed_over) == 1 else f"the {len(passed_over)} others"
    return f"<details><summary>Why not {others}</summary><ul>{rows}</ul></details>"


def _alike(report: Report) -> list[tuple[Rejected, list[Location]]]:
    """Refusals that differ in the numbers of the nodes that they name alone, as those of equal layers do, once."""
    groups: dict[tuple[str, str], tuple[Rejected, list[Location]]] = {}
    for one, at in grouped(report.rejected):
        reason = without_numbers(f"{one.reason}\n{one.cure}", report.before)
        groups.setdefault((reason, one.where.source), (one, []))[1].extend(at)
    return list(groups.values())


def _rejected(one: Rejected, at: Sequence[Location]) -> str:
    cure = f"<p><b>Cure:</b> {_text(one.cure)}</p>" if one.cure else ""
    return f"<article class=bad>{_title(at)}<p>{_text(one.reason)}</p>{cure}{_source([at[0].source])}</article>"


def _title(at: Sequence[Location]) -> str:
    """All places in one line; those of several entries one by one behind a click, with their nodes."""
    title = f"<h3><code>{_text(places(one.module for one in at))}</code></h3>"
    if len(at) == 1:
        return title.replace("</h3>", f" <small>{_text(at[0].node)}</small></h3>") if at[0].node else title
    rows = "".join(f"<li><code>{_text(one.module)}</code> <small>{_text(one.node)}</small></li>" for one in at)
    return f"{title}<details><summary><small>{len(at)} places</small></summary><ol>{rows}</ol></details>"


def _source(recorded: Iterable[str]) -> str:
    """The lines that it came from, marked, among those around them."""
    found = excerpts(filter(None, recorded))
    return "<h4>Source</h4>" + "".join(map(_excerpt, found)) if found else ""


def _excerpt(excerpt: Excerpt) -> str:
    first = next(number for number, _, named in excerpt.lines if named)
    place = f"<span title='{_text(excerpt.file)}'><code>{_text(short(excerpt.file))}:{first}</code></span>"
    note = f" <small>({_text(excerpt.missing)})</small>" if excerpt.missing else ""
    lines = "".join(
        f"<{tag} data-n={number}>{_text(text) or ' '}</{tag}>"
        for number, text, named in excerpt.lines
        for tag in ("mark" if named else "span",)
    )
    return f"<p>{place}{note}</p><pre tabindex=0 role=group aria-label='lines of the model'>{lines}</pre>"


def _rows(entries: Iterable[tuple[TokenRewrite | LinearMerge, Sequence[Location]]]) -> list[tuple[str, str, str]]:
    return [(_where(at), _text(one.kind), _text(one.detail)) for one, at in entries]


def _where(at: Sequence[Location]) -> str:
    names = places(one.module or one.node for one in at)
    source = f"<br><code class=soft>{_text(short(at[0].source))}</code>" if at[0].source else ""
    return f"<b>{_text(names)}</b>{source}"


def _times(seconds: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(_text(name), f"{value * 1e3:.1f} ms") for name, value in seconds.items()]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "plain") -> str:
    if not rows:
        return ""
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class={kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _graph(report: Report) -> str:
    if not report.before and report.after:  # a program that was loaded
        graph = side_by_side(report.after, report.after)
        return f"<p>The graph as it runs; what it was made from, a program does not know.</p><div class=alone>{graph}</div>"
    if not report.diff():
        return f"<p>{'Nothing was rewritten.' if report.before else 'This report holds no graph.'}</p>"
    told = (
        "The graph of ATen ops, one a line. A value is named by its module and op. Attention that is replaced is behind a click, "
        "and so are lines that stay. Layers that are alike are shown once."
    )
    sides = "<div class=sides aria-hidden=true><div>before</div><div>after</div></div>"
    return f"<p class=soft>{told}</p>{sides}{side_by_side(report.before, report.after)}"


def _text(text: str) -> str:
    return escape.escape(text, quote=True)

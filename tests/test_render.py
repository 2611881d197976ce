"""Is the page whole, self-contained and true to the masks?"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import sympy

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location
from compile_attn.passes.render import html, picture
from compile_attn.passes.report import Rejected, Report, Rewritten
from tests.test_report import REPORT, TOKENS

VOID = {"meta", "link", "br"}
CELLS = 32


def cells(svg: str, kind: str) -> set[tuple[int, int]]:
    """The (query, key) cells that a picture fills."""
    path = re.search(rf"<path class={kind} d='([^']*)'", svg)
    bars = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path[1]) if path else []
    assert all(length == back for _, _, length, _, back in bars)
    return {
        (int(y) // int(height), x // int(height))
        for left, y, length, height, _ in bars
        for x in range(int(left), int(left) + int(length), int(height))
    }


@pytest.mark.parametrize(
    ("mask", "step"),
    [
        (m.Causal(), 1),
        (m.Bidirectional(), 1),
        (m.Window(5), 1),
        (m.Window(4095), 256),
        (m.Chunked(8), 1),
        (m.Prefix(6), 1),
        (m.BlockSparse(64, 2, 8), 64),
        (m.General(sympy.Le(J, I) & sympy.Eq(sympy.Mod(I - J, 3), 0)), 1),
    ],
    ids=lambda value: str(value),
)
def test_a_cell_is_filled_where_the_predicate_holds(mask: m.Mask, step: int) -> None:
    svg = picture(mask)
    holds = sympy.lambdify((B, H, I, J), mask.predicate(), "math")
    wanted = {(i, j) for i in range(CELLS) for j in range(CELLS) if holds(0, 0, i * step, j * step)}
    assert cells(svg, "seen") == wanted
    assert ("a cell is a position" if step == 1 else f"a cell stands for {step} positions") in svg
    assert "pale" not in svg


def test_what_a_tensor_decides_is_pale() -> None:
    svg = picture(m.All(m.Causal(), m.SameDocument(0)))
    assert cells(svg, "maybe") == {(i, j) for i in range(CELLS) for j in range(i + 1)}
    assert not cells(svg, "seen") and "pale: a tensor decides" in svg
    padded = m.General(sympy.Le(J, I) & (sympy.Eq(I, J) | sympy.Ne(Load(0, B, J), 0)))
    assert cells(picture(padded), "seen") == {(i, i) for i in range(CELLS)}


class Strict(HTMLParser):
    """Every tag is closed in its turn; notes what the page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and value != "data:,"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Closed in itself."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _parsed(page: str) -> Strict:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_a_page_needs_no_network() -> None:
    page = html(REPORT)
    assert _parsed(page).loads == []
    assert "http" not in page and "@import" not in page and "url(" not in page and "<script" not in page


def test_the_page_says_what_the_report_says() -> None:
    whole = Report("paged", REPORT.sites, REPORT.rejected, (TOKENS,), {"normalize": 0.5}, REPORT.before, REPORT.after)
    page = _parsed(html(whole)).text
    for wanted in ("layers.0.attn and 2 more", "scale 0.5", "reference", "has no softcap", "9 nodes removed, 3 added"):
        assert wanted in page
    for wanted in ("softmax", "probabilities are also used by [mean]", "positions", "normalize", "500.0 ms", "-b", "+c"):
        assert wanted in page


def test_user_code_is_escaped() -> None:
    where = Location("n", "<layer>", "a.py:1: x = y < z & \"q\" + '</pre>'")
    spec = AttentionSpec(1, 1, 4, 4)
    report = Report("stateless", (Rewritten(where, spec, "<k>"),), (Rejected("<r>", where),), before="<a>", after="<b>")
    text = _parsed(html(report)).text
    for wanted in ("<layer>", "x = y < z & \"q\" + '</pre>'", "<k>", "<r>", "-<a>", "+<b>"):
        assert wanted in text


def test_nothing_rewritten() -> None:
    assert "Nothing was rewritten." in html(Report("stateless", rejected=REPORT.rejected, before="a"))


def test_the_page_is_written(tmp_path: Path) -> None:
    page = REPORT.to_html(str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")

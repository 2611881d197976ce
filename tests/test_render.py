"""Is the page whole and self-contained, and does it say what the report says?"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location
from compile_attn.passes.render import html
from compile_attn.passes.report import LinearMerge, Rejected, Report, Rewritten
from tests.test_report import LINE, REJECTED, REPORT, SITES, TOKENS

VOID = {"meta", "link", "br"}


class Strict(HTMLParser):
    """Every tag is closed in its turn; notes what the page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [value or "" for name, value in attrs if name in ("src", "href") and value != "data:,"]
        self.loads += [link for link in links if not link.startswith("#")]
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
    """And its policy would let it have none; what it allows is its own style, by its hash."""
    page = html(REPORT)
    assert _parsed(page).loads == []
    assert "://" not in page and "@import" not in page and "url(" not in page and "<script" not in page and "style=" not in page
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; " in page
    assert page.index("Content-Security-Policy") < page.index("<link") < page.index("<style")


def test_the_page_says_what_the_report_says() -> None:
    linears = (LinearMerge("apart", Location("", "layers.1.mlp"), "up.weight has a hook"),)
    told = {"tokens": (TOKENS,), "linears": linears, "seconds": {"normalize": 0.5}, "max_positions": 77}
    sites = (replace(SITES[0], steps="reference in all steps", asked="asked for by block_sparse"), *SITES[1:])
    page = _parsed(html(replace(REPORT, sites=sites, **told))).text
    for wanted in ("layers.0.attn", "layers.[1-2].attn", "2 places", "scale 0.5", "reference", "Why not the other one"):
        assert wanted in page
    for wanted in ("has no softcap", "9 nodes removed, 3 added", "reference in all steps", "asked for by block_sparse"):
        assert wanted in page
    for wanted in ("probabilities are also used by [mean]", "return them no more", "positions", "reads the batch's positions"):
        assert wanted in page
    for wanted in ("layers.1.mlp", "up.weight has a hook", "normalize", "500.0 ms", "77 positions", "1 line replaced by 1"):
        assert wanted in page
    assert "zij=30·tanh\u2061(0.5·qi·kj30)" in page and "Vi={j:j≤i∧i−j≤7}" in page


def test_empty_sections_are_left_out() -> None:
    page = html(Report("stateless"))
    assert re.findall("<h2.*?>(.*?)</h2>", page) == ["Graph"]
    assert re.findall("<h2.*?>(.*?)</h2>", html(REPORT)) == ["Rewritten", "Rejected", "Graph, before and after"]


def test_refusals_of_equal_layers_are_told_once() -> None:
    """Though each names a node of its own."""
    before = "view_3: float32[2] = aten.view.default(a)\nview_8: float32[2] = aten.view.default(b)"
    refused = [
        replace(REJECTED, reason=f"used by view_{node}", where=Location("n", f"layers.{at}", LINE)) for at, node in ((0, 3), (1, 8))
    ]
    other = replace(REJECTED, reason="used by softmax_4", where=Location("n", "layers.2", LINE))
    page = html(Report("stateless", rejected=(*refused, other), before=before, after=before))
    assert page.count("<article") == 2 and "used by view_3" in page and "layers.[0-1]" in page and "used by softmax_4" in page


def test_user_code_is_escaped() -> None:
    where = Location("n", "<layer>", "a.py:1: x = y < z & \"q\" + '</pre>'")
    spec = AttentionSpec(1, 1, 4, 4)
    site = Rewritten(where, spec, "<k>", lines=(where.source,))
    report = Report("stateless", (site,), (Rejected("<r>", where),), before="# <layer>  <s>\n<a>", after="# <layer>  <s>\n<b>")
    page = html(report)
    text = _parsed(page).text
    for wanted in ("<layer>", "x = y < z & \"q\" + '</pre>'", "<k>", "<r>", "<a>", "<b>", "<layer>  <s>"):
        assert wanted in text
    assert not re.search("<(layer|k|r|a|s)>", page), "and the ins of the page are no <b>"


def test_lines_around_are_shown_where_the_file_is(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("".join(f"    line {number}\n" for number in range(1, 30)))
    site = replace(SITES[0], where=Location("n", "attn", f"{file}:9: line 9"), lines=(f"{file}:9: line 9", f"{file}:12: line 12"))
    page = html(Report("stateless", (site,)))
    assert re.findall(r"<(span|mark) data-n=(\d+)>(.*?)</", page) == [
        ("mark" if number in (9, 12) else "span", str(number), f"line {number}") for number in range(7, 15)
    ]
    file.unlink()
    gone = html(Report("stateless", (site,)))
    assert "the file is not here to be read" in gone
    assert re.findall(r"<(span|mark) data-n=(\d+)>(.*?)</", gone) == [("mark", "9", "line 9"), ("mark", "12", "line 12")]


def test_many_equal_layers_are_one() -> None:
    """A page grows with what differs, not with the number of layers."""

    def report(layers: int) -> Report:
        sites = tuple(replace(SITES[0], where=Location(f"softmax_{at}", f"layers.{at}.attn", LINE)) for at in range(layers))
        nodes = "".join(
            f"# layers.{at}.attn  {LINE}\n"
            + "".join(f"add_{40 * at + turn}: float32[2] = aten.add.Tensor(w{turn}, w{turn})\n" for turn in range(40))
            for at in range(layers)
        )
        return Report("stateless", sites, before=f"{nodes}return softmax", after=f"{nodes}return attention")

    few, many = (len(html(report(layers))) for layers in (3, 64))
    assert many < few + 61 * 100, "a place of each layer in the list"


def test_nothing_rewritten() -> None:
    assert "Nothing was rewritten." in html(Report("stateless", rejected=REPORT.rejected, before="a"))
    assert "This report holds no graph." in html(Report("paged", REPORT.sites))


def test_a_program_knows_only_the_graph_that_it_runs() -> None:
    site = Rewritten(Location(module="layers.0"), SITES[0].spec, "general")
    page = html(Report("paged", (site,), after="a: float32[2] = aten.relu.default(b)\nreturn a"))
    assert "a program does not know" in page and "relu: float32[2] = aten.relu.default(b)" in page
    assert "<ins>" not in page and "<del>" not in page and "unchanged" not in page and "before and after" not in page
    assert "nodes removed" not in page and "Source" not in page and "<b>general</b>" in page


def test_the_page_is_written(tmp_path: Path) -> None:
    page = REPORT.to_html(str(tmp_path / "r.html"))
    assert (tmp_path / "r.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")

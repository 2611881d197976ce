"""Does a report's page hold in a real browser: no error, nothing loaded, nothing cut off, everything folds, formulas are set?

Where no browser is installed these tests are skipped; with PAGED_ATTN_BROWSER=1 that is a failure.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compile_attn as ca
from compile_attn.passes.graph import Location
from compile_attn.passes.render import html
from compile_attn.passes.report import LinearMerge, Rejected, Report, Rewritten
from tests.models.handwritten_more import decoder
from tests.test_report import REJECTED, REPORT, SPEC, TOKENS

NEEDS = "a browser: apt-get install chromium chromium-driver, and pip install selenium"
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-dev-shm-usage"),
)
WIDTHS = (1280, 400)
EVIL = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">'\">"

CUT_OFF = """
const scrolls = e => e && (getComputedStyle(e).overflowX === 'auto' || scrolls(e.parentElement));
const out = e => { const box = e.getBoundingClientRect(); return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5); };
const spills = e => e.clientWidth && e.scrollWidth > e.clientWidth + 1;
return [...document.body.querySelectorAll('*')].filter(e => !scrolls(e) && (out(e) || spills(e)))
  .map(e => e.outerHTML.slice(0, 200));
"""
UNSET = """
const box = e => e.getBoundingClientRect();
const flat = [...document.querySelectorAll('math')].filter(e => !(box(e).width > 0 && box(e).height > 0));
const level = [...document.querySelectorAll('mfrac')].filter(e => box(e.children[0]).bottom > box(e.children[1]).top + 1);
return [...flat, ...level].map(e => e.outerHTML.slice(0, 200));
"""
PALE = """
const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgb = colour => { context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data]; };
const light = colour => rgb(colour).slice(0, 3).map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
const style = e => getComputedStyle(e);
const seen = e => rgb(style(e).backgroundColor)[3] || !e.parentElement;
const behind = e => seen(e) ? style(e).backgroundColor : behind(e.parentElement);
const contrast = e => { const [low, high] = [style(e).color, behind(e)].map(light).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05); };
return [...document.body.querySelectorAll('*')].filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
  .filter(e => contrast(e) < 4.5).map(e => contrast(e) + ' ' + e.outerHTML.slice(0, 200));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    try:
        from selenium.webdriver import Chrome, ChromeOptions, ChromeService
    except ImportError:
        program = None
    if not program or not driver:
        if os.environ.get("PAGED_ATTN_BROWSER") == "1":
            pytest.fail(f"PAGED_ATTN_BROWSER=1 needs {NEEDS}")
        pytest.skip(f"needs {NEEDS}")
    options = ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options=options, service=ChromeService(driver))
    yield chrome
    chrome.quit()


def _open(browser: Any, page: str, folder: Path, width: int = 1280, scheme: str = "light") -> str:
    """Show it in a window of that width. Returns its address."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    for log in ("browser", "performance"):
        browser.get_log(log)  # what is said of pages before
    address = (folder / "page.html").as_uri()
    browser.get(address)
    return address


def _asked_for(browser: Any) -> dict[str, str]:
    """Every address that the page has requested, whether it got an answer or not; and by what it was blocked."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    told = [(event["method"], event["params"]) for event in events]
    blocked = {params["requestId"]: params.get("blockedReason", "") for name, params in told if name == "Network.loadingFailed"}
    sent = [params for name, params in told if name == "Network.requestWillBeSent"]
    return {params["request"]["url"]: blocked.get(params["requestId"], "") for params in sent}


def _said(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def _unfold_all(browser: Any) -> None:
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Real ones, stateless and paged, one with everything that a report may hold, and one that means harm."""
    ids = torch.arange(12)[None]
    evil = Location(EVIL, EVIL, f"{EVIL}.py:1: {EVIL}")
    harm = Rewritten(evil, SPEC, EVIL, {EVIL: (EVIL,)}, 1, 1, EVIL, EVIL, (evil.source,))
    stateless = ca.explain(decoder("t5_bias"), ids)
    return {
        "stateless": stateless,
        "paged": ca.explain(decoder("sinks").eval(), paged=True),
        "everything": replace(
            stateless,
            rejected=(REJECTED,) * 2,
            tokens=(TOKENS,),
            linears=(LinearMerge("merged", REJECTED.where, "one product of 3 columns"),),
            max_positions=64,
        ),
        "harm": Report(
            *(EVIL, (harm,), (Rejected(EVIL, evil, EVIL),), (replace(TOKENS, where=evil, detail=EVIL),), {EVIL: 1.0}),
            *(f"# {EVIL}  {EVIL}\n{EVIL}\nx = {EVIL}", f"{EVIL}{EVIL}\nx: {EVIL} = y({EVIL})", (LinearMerge(EVIL, evil, EVIL),)),
        ),
    }


NAMES = ("stateless", "paged", "everything", "harm")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_quiet_and_loads_nothing(browser: Any, reports: dict[str, Report], name: str, tmp_path: Path) -> None:
    address = _open(browser, html(reports[name]), tmp_path)
    assert _said(browser) == []
    assert set(_asked_for(browser)) <= {address, "data:,"}
    assert browser.title == "paged_attn report", "a script of the model's names was run"
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"


def test_what_would_load_or_run_is_stopped_and_noticed(browser: Any, tmp_path: Path) -> None:
    """The policy of the page is a second wall; and the checks above see what they look for."""
    harm = "<img src='http://127.0.0.1:9/x.png'><script>document.title = 'run'</script></body>"
    _open(browser, html(REPORT).replace("</body>", harm), tmp_path)
    said = "\n".join(_said(browser))
    assert "x.png" in said and "inline script" in said and browser.title == "paged_attn report"
    assert _asked_for(browser)["http://127.0.0.1:9/x.png"] == "csp"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_cut_off(browser: Any, reports: dict[str, Report], name: str, width: int, tmp_path: Path) -> None:
    _open(browser, html(reports[name]), tmp_path, width)
    _unfold_all(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CUT_OFF) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out(browser: Any, reports: dict[str, Report], scheme: str, tmp_path: Path) -> None:
    """A contrast of 4.5, as WCAG AA asks, in both schemes."""
    _open(browser, html(reports["everything"]), tmp_path, scheme=scheme)
    _unfold_all(browser)
    assert browser.execute_script(PALE) == []


def test_mathematics_are_set_and_pictures_have_sizes(browser: Any, reports: dict[str, Report], tmp_path: Path) -> None:
    _open(browser, html(reports["stateless"]), tmp_path)
    assert browser.execute_script("return document.querySelectorAll('.formula > math').length") == 3
    assert browser.execute_script("return document.querySelectorAll('mfrac').length") > 1
    assert browser.execute_script(UNSET) == []
    for picture in browser.find_elements("css selector", "svg, svg path"):
        assert picture.rect["width"] > 100 and picture.rect["height"] > 100
        assert picture.tag_name == "path" or picture.accessible_name.startswith("keys to the right")


@pytest.mark.parametrize("by", ["click", "keyboard"])
def test_a_replaced_region_unfolds(browser: Any, reports: dict[str, Report], by: str, tmp_path: Path) -> None:
    _open(browser, html(reports["stateless"]), tmp_path)
    region = next(each for each in browser.find_elements("css selector", ".changed") if "paged_attn.attention" in each.text)
    softmax = next(each for each in region.find_elements("css selector", "del") if "softmax" in each.get_attribute("textContent"))
    assert not softmax.is_displayed()
    summary = region.find_element("css selector", "summary")
    summary.click() if by == "click" else summary.send_keys("\ue007")  # Enter
    assert softmax.is_displayed() and softmax.size["height"] > 10
    fused = next(each for each in region.find_elements("css selector", "ins") if "paged_attn.attention" in each.text)
    assert softmax.rect["x"] < 100 and fused.rect["x"] > 600, "before is at the left, after at the right"


def test_headings_are_in_order(browser: Any, reports: dict[str, Report], tmp_path: Path) -> None:
    for name in NAMES:
        _open(browser, html(reports[name]), tmp_path)
        levels = browser.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4,h5')].map(each => +each.tagName[1])")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), (name, levels)

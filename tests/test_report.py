"""Does a report say what was done, where, and why not otherwise?"""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from compile_attn.kernels.mask import Bidirectional, Causal, Window
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location
from compile_attn.passes.report import Rejected, Report, Rewritten, TokenRewrite

LINE = "model.py:9: att = scores.softmax(-1) @ v"
SPEC = AttentionSpec(4, 2, 8, 8, Window(7), scale=0.5, softcap=30.0)
SITES = tuple(
    Rewritten(Location(f"matmul_{n}", f"layers.{n}.attn", LINE), SPEC, "reference", {"sdpa": ("has no softcap",)}, 9, 3)
    for n in range(3)
)
REJECTED = Rejected("probabilities are also used by [mean]", Location("softmax_3", "layers.3.attn", LINE), "return them no more")
TOKENS = TokenRewrite("positions", Location("arange", "", "model.py:4: torch.arange(t)"), "reads the batch's positions")
REPORT = Report("stateless", SITES, (REJECTED,), before="a\nb", after="a\nc")
TABLE = """
3 attention sites rewritten (stateless), 1 rejected
rewritten
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ where                             ┃ what it computes                  ┃ kernel                   ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ layers.0.attn ... layers.2.attn   │ causal, window of 8 keys, 4       │ reference                │
│ (3)                               │ heads, 2 KV heads, head size 8,   │ not sdpa: has no softcap │
│ model.py:9: att =                 │ scale 0.5, softcap 30             │ 9 nodes removed, 3 added │
│ scores.softmax(-1) @ v            │ visible where (j <= i) & (i - j   │                          │
│                                   │ <= 7)                             │                          │
└───────────────────────────────────┴───────────────────────────────────┴──────────────────────────┘
rejected
┏━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━┓
┃ where                               ┃ reason                               ┃ cure                ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━┩
│ layers.3.attn                       │ probabilities are also used by       │ return them no more │
│ model.py:9: att =                   │ [mean]                               │                     │
│ scores.softmax(-1) @ v              │                                      │                     │
└─────────────────────────────────────┴──────────────────────────────────────┴─────────────────────┘
"""


def test_the_table() -> None:
    """Equal layers share a row; brackets are text, not markup."""
    console = Console(width=100, color_system=None)
    with console.capture() as shown:
        console.print(REPORT)
    assert [line.rstrip() for line in shown.get().splitlines()] == TABLE.splitlines()[1:]
    assert str(REPORT).startswith("3 attention sites rewritten (stateless), 1 rejected\nrewritten\n")


def test_token_rewrites_are_listed() -> None:
    text = str(Report("paged", SITES, tokens=(TOKENS,)))
    assert text.startswith("3 attention sites rewritten (paged), 0 rejected, 1 token rewrite\n")
    assert "positions" in text and "reads the batch's positions" in text and "model.py:4: torch.arange(t)" in text


def test_several_kernels_and_their_steps() -> None:
    shared = replace(SITES[0], kernel="flash_attn|general", steps="general where it measured faster; flash_attn in all others")
    text = str(Report("paged", (shared,)))
    assert "│ flash_attn|general " in text and "│ general where it measured faster;" in text
    assert shared.steps in Report("paged", (shared,)).to_html()


def test_only_equal_sites_share_a_row() -> None:
    other = replace(SITES[1], spec=replace(SPEC, mask=Causal()))
    text = str(Report("stateless", (SITES[0], other, SITES[2])))
    assert "layers.0.attn ... layers.2.attn (2)" in text
    assert "layers.1.attn " in text and "visible where j <= i " in text


def test_a_mask_that_hides_nothing() -> None:
    assert "every key is visible" in str(Report("stateless", (replace(SITES[0], spec=replace(SPEC, mask=Bidirectional())),)))


def test_summaries() -> None:
    assert Report("stateless").summary() == "0 attention sites rewritten (stateless), 0 rejected"
    assert Report("stateless", SITES[:1]).summary() == "1 attention site rewritten (stateless), 0 rejected"
    refused = Report("paged", rejected=(REJECTED, REJECTED)).summary()
    assert refused == "this model cannot be paged, for 2 reasons; nothing was rewritten"


def test_the_diff() -> None:
    assert REPORT.diff() == "--- before\n+++ after\n@@ -1,2 +1,2 @@\n a\n-b\n+c"
    assert Report("stateless", before="a", after="a").diff() == ""
    assert Report("paged", rejected=(REJECTED,), before="a").diff() == "", "refused: there is no graph after"

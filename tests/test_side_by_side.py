"""Do two graphs stand side by side with nothing lost, nothing moved, and only what is alike told once?"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import pytest
import torch

import compile_attn as ca
from compile_attn.kernels.mask import Window
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.side_by_side import side_by_side
from compile_attn.passes.stable import named_graphs
from tests.models.handwritten_more import decoder

SPEC = AttentionSpec(2, 2, 8, 8)
ROW = re.compile(r"<div class=row>(.*?)</div>")
CELL = re.compile(r"<(code|del|ins|i)(?: aria-hidden=true)?>(.*?)</\1>")
"""Cells of a row: <code> twice where it is equal, else <del> or <i> and <ins> or <i>."""


def rows(page: str) -> list[tuple[str, str, bool]]:
    """(left, right, equal) of each row, in order."""
    found = []
    for row in ROW.findall(page):
        (kind, left), (_, right) = CELL.findall(row)
        found.append((html.unescape(left), html.unescape(right), kind == "code"))
    return found


def folds(page: str) -> list[tuple[str, bool, str]]:
    """(kind, whether open, summary) of each thing that folds."""
    found = re.findall(r"<details class=(\w+)( open)?><summary>(.*?)</summary>", page)
    return [(kind, bool(opened), re.sub("<.*?>", "", summary)) for kind, opened, summary in found]


def layers(count: int, attend: Callable[[int], list[str]], calm: int = 6) -> str:
    """A graph of equal layers: lines of no interest, then what `attend` gives, then an op of the model itself."""
    lines = ["input x: float32[8]", *(f"input blocks.{at}.w: float32[8, 8]" for at in range(count))]
    value = "x"
    for at in range(count):
        lines += ["", f"# blocks.{at}.mlp  model.py:3: return f(x)"]
        for turn in range(calm):
            lines.append(f"relu_{calm * at + turn}: float32[8] = aten.relu.default({value})")
            value = f"relu_{calm * at + turn}"
        lines += ["", f"# blocks.{at}.attn  model.py:7: return softmax(x)", *attend(at)]
        value = f"out_{at}"
        lines += ["", "# model.py:9: x = x + y", f"add_{at}: float32[8] = aten.add.Tensor({value}, {value})"]
    return "\n".join([*lines, f"return add_{count - 1}"])


def softmax(at: int) -> list[str]:
    return [
        f"scores_{at}: float32[8] = aten.matmul.default(blocks.{at}.w, x)",
        f"out_{at}: float32[8] = aten.softmax.int(scores_{at})",
    ]


def fused(at: int, spec: AttentionSpec = SPEC) -> list[str]:
    return [f"out_{at}: float32[8] = paged_attn.attention.default(blocks.{at}.w, x, [], '{spec.encode()}', 'sdpa')"]


def test_a_region_that_attention_replaces_is_folded() -> None:
    page = side_by_side(layers(1, softmax), layers(1, fused))
    assert [fold for fold in folds(page) if fold[0] == "changed"] == [
        ("changed", False, "2 lines replaced by 1: paged_attn.attention, causal")
    ]
    left, right, equal = rows(page)[8]
    assert "aten.matmul" in left and "paged_attn.attention" in right and not equal
    assert rows(page)[9][0].endswith("= aten.softmax.int(matmul)") and rows(page)[9][1] == ""


def test_torchs_own_attention_is_attention() -> None:
    own = layers(1, lambda at: [f"out_{at}: float32[8] = aten.scaled_dot_product_attention.default(x, x, x)"])
    assert ("changed", False, "2 lines replaced by 1: aten.scaled_dot_product_attention") in folds(
        side_by_side(layers(1, softmax), own)
    )


def test_a_short_region_is_open_and_long_equal_runs_are_folded() -> None:
    changed = layers(1, softmax).replace("softmax.int(scores_0)", "softmax.int(scores_0, -1)")
    assert folds(side_by_side(layers(1, softmax), changed)) == [
        ("part", False, "2 inputs"),
        ("same", False, "7 unchanged lines"),
        ("changed", True, "1 line replaced by 1"),
    ]


def test_layers_that_are_alike_are_shown_once() -> None:
    """The first reads the input, the others the layer before; the last one is returned."""
    page = side_by_side(layers(9, softmax), layers(9, fused))
    titles = [re.sub("<.*?>", "", title) for title in re.findall("<h3>(.*?)</h3>", page)]
    assert titles == ["blocks.0", "blocks.1 and 6 more like it: blocks.[2-7]", "blocks.8"]
    assert "… and 8 more like it: blocks.[1-8].w" in page


@pytest.mark.parametrize(
    "other",
    [
        lambda at: fused(at, AttentionSpec(2, 2, 8, 8, Window(3 if at == 4 else 9))),
        lambda at: [line.replace("sdpa", "general" if at == 4 else "sdpa") for line in fused(at)],
        lambda at: [line.replace("float32", "bfloat16" if at == 4 else "float32") for line in fused(at)],
        lambda at: [line.replace(", x,", f", relu_{24 if at == 4 else 6 * at + 5},") for line in fused(at)],
        lambda at: [line.replace(f"blocks.{at}.w", f"blocks.{1 if at == 4 else at}.w") for line in fused(at)],
    ],
    ids=["spec", "kernel", "dtype", "operand", "another layer's weight"],
)
def test_a_layer_that_differs_is_never_hidden(other: Callable[[int], list[str]]) -> None:
    page = side_by_side(layers(9, softmax), layers(9, other))
    titles = [re.sub("<.*?>", "", title) for title in re.findall("<h3>(.*?)</h3>", page)]
    assert titles == [
        "blocks.0",
        "blocks.1 and 5 more like it: blocks.[2-3, 5-7]",
        "blocks.4",
        "blocks.8",
    ]


def test_what_came_from_one_line_stands_side_by_side() -> None:
    before = "# model.py:1: a\nneg: float32[1] = aten.neg.default(x)\n"
    before += "# model.py:2: b\nabs: float32[1] = aten.abs.default(neg)\nreturn abs"
    after = "# model.py:2: b\nsign: float32[1] = aten.sign.default(x)\nreturn sign"
    page = side_by_side(before, after)
    assert [(left.partition(":")[0], right.partition(":")[0]) for left, right, _ in rows(page)] == [
        ("neg", ""),
        ("abs", "sign"),
        ("return abs", "return sign"),
    ]
    assert re.findall("<p class=at>.*?</p>", page) == [
        "<p class=at><b></b> model.py:1: a</p>",
        "<p class=at><b></b> model.py:2: b</p>",
    ]


def test_graphs_of_a_broken_model_are_told_apart() -> None:
    page = side_by_side("a = f(x)\nreturn a\n\nb = g(x)\nreturn b", "a = f(x)\nreturn a\n\nc = g(x)\nreturn c")
    assert re.findall("<h3>(.*?)</h3>", page) == ["Graph 1 of 2", "Graph 2 of 2"] and page.count("<h4>") == 2


@pytest.mark.parametrize("name", ["t5_bias", "sinks"])
def test_no_line_of_a_model_is_lost(name: str) -> None:
    """Its two layers differ in what they read, so all is shown: the columns are the graphs, in their order."""
    report = ca.explain(decoder(name), torch.arange(12)[None])
    [(old, new)] = named_graphs(report.before, report.after)
    found = rows(side_by_side(report.before, report.after))
    nodes = [row for row in found if not (row[0] or row[1]).startswith("input ")]
    assert [left for left, _, _ in nodes if left] == [str(line) for line in old if not line.is_input]
    assert [right for _, right, _ in nodes if right] == [str(line) for line in new if not line.is_input]
    assert all(left == right for left, right, equal in nodes if equal) and any(not equal for *_, equal in nodes)

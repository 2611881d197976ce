"""Does a golden notice what it should, stay quiet otherwise, and say on one screen what has changed?"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.passes.places import places, ranges
from compile_attn.passes.stable import stable_diff
from compile_attn.testing import assert_graph_diff, golden_text
from tests.tiny import tiny

IDS = torch.arange(12)[None]
MODEL = """
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            t, y = x.shape[1], self.norm(x)
            place = torch.arange(t)
            seen = place[None, :] <= place[:, None]
            scores = (y @ y.mT) * 8**-0.5
            return x + torch.sin(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ y)

    class Model(nn.Module):
        def __init__(self, layers=6):
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(layers))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x
"""
MASK = "place[None, :] <= place[:, None]"
WINDOWED = "(place[None, :] <= place[:, None]) & (place[:, None] - place[None, :] < 3)"
TESTS = """
    import torch
    from model import Model

    def test_model(graph_diff):
        graph_diff(Model(), (torch.randn(1, 9, 8),))
"""


def _project(pytester: pytest.Pytester, tests: str = TESTS) -> pytest.Pytester:
    """A stranger's repository. Other plugins of this environment stay out of it."""
    pytester.makepyfile(model=MODEL, test_it=tests)
    return pytester


def _run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return pytester.runpytest_subprocess("-p", "compile_attn.pytest_plugin", *arguments)


def _edit(pytester: pytest.Pytester, old: str, new: str) -> None:
    file = pytester.path / "model.py"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_life_with_goldens(pytester: pytest.Pytester) -> None:
    """Missing, with the cure; written; passing, also where lines move; failing on one line of the mask, on one screen."""
    project = _project(pytester)
    missing = _run(project)
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(
        ["E*there is no golden graph_diffs?test_model.txt yet; to make it run pytest --update-graph-diffs test_it.py::*"]
    )
    assert not (project.path / "graph_diffs").exists(), "nothing is written unasked"

    written = _run(project, "--update-graph-diffs")
    written.assert_outcomes(passed=1)
    written.stdout.fnmatch_lines(["graph diff written: graph_diffs?test_model.txt"])
    golden = (project.path / "graph_diffs" / "test_model.txt").read_text()
    assert golden.splitlines()[3].startswith("layers.[0-5]: causal, 1 heads, head size 8, scale 0.353553 -> ")
    assert len(golden.splitlines()) < 40 and golden.count("@@ layers.") == 1 and "... and 5 more like it, with 1-5 for 0" in golden

    _edit(project, "class Attention", "# a comment that moves every line\n\nclass Attention")
    _edit(project, "        scores =", "        places = None\n        scores =")
    quiet = _run(project)
    quiet.assert_outcomes(passed=1)
    quiet.stdout.no_fnmatch_line("graph diff written*")

    _edit(project, MASK, WINDOWED)
    failed = _run(project)
    failed.assert_outcomes(failed=1)
    told = failed.outlines[: next(at for at, line in enumerate(failed.outlines) if "short test summary" in line)]  # CI has it twice
    shown = [line for line in told if line.startswith("E ")]
    assert 5 < len(shown) <= 32 and len(told) <= 50 and all(len(line) <= 160 for line in shown)
    failed.stdout.fnmatch_lines(
        [
            "E*not the graph diff of graph_diffs?test_model.txt (- golden, + now)",
            "E*-layers.?0-5?: causal, 1 heads, *",
            "E*+layers.?0-5?: causal, window of 3 keys, 1 heads, *",
            "E*model.py:*: return x + torch.sin(scores.masked_fill*",
            "E*to accept this run pytest --update-graph-diffs test_it.py::test_model",
        ]
    )
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(line.removeprefix("E").strip() for line in shown[1:3]) in readme
    assert "def test_model(graph_diff):\n    graph_diff(Model(), (torch.randn(1, 9, 8),))" in readme


def test_names_of_goldens(pytester: pytest.Pytester) -> None:
    """One for each class, test and parameter, or the one that is named; never two different texts in one file."""
    tests = """
        import pytest, torch
        from model import Model

        X = torch.randn(1, 9, 8)

        class TestModels:
            @pytest.mark.parametrize("layers", [1, 2], ids=["a b", "c/d"])
            def test_layers(self, graph_diff, layers):
                graph_diff(Model(layers), (X,), golden=None)

        def test_named(graph_diff):
            graph_diff(Model(1), kwargs={"x": X}, golden="kept/one.txt")
            graph_diff(Model(1), kwargs={"x": X}, golden="kept/one.txt")

        def test_two_in_one(graph_diff):
            graph_diff(Model(1), (X,))
            graph_diff(Model(2), (X,))
    """
    project = _project(pytester, tests)
    result = _run(project, "--update-graph-diffs")
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*two calls of this run have different graph diffs for *test_two_in_one.txt; name one *"])
    found = sorted(str(file.relative_to(project.path)) for file in project.path.rglob("*.txt"))
    assert found == [
        "graph_diffs/TestModels.test_layers_a_b.txt",
        "graph_diffs/TestModels.test_layers_c_d.txt",
        "graph_diffs/test_two_in_one.txt",
        "kept/one.txt",
    ]


def test_who_does_not_use_it_is_not_disturbed(pytester: pytest.Pytester) -> None:
    """Nothing heavy is imported, no warning, no line; loading it under both of its names is loading it once."""
    pytester.makepyfile("import sys\n\ndef test_light():\n    assert not {'torch', 'sympy', 'rich'} & set(sys.modules)")
    twice = ("-p", "compile_attn.pytest_plugin") * 2
    result = pytester.runpytest_subprocess(*twice, "-W", "error")
    result.assert_outcomes(passed=1)
    assert not any("graph" in line for line in result.outlines)
    listed = pytester.runpytest_subprocess(*twice, "--fixtures")
    assert sum("graph_diff --" in line or line.startswith("graph_diff") for line in listed.outlines) == 1


def test_the_entry_point_is_named_as_its_module() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert '"compile_attn.pytest_plugin" = "compile_attn.pytest_plugin"' in text
    installed = [point for point in importlib.metadata.entry_points(group="pytest11") if point.value.startswith("compile_attn")]
    assert all(point.name == point.value for point in installed)


def test_without_pytest(tmp_path: Path) -> None:
    golden = tmp_path / "deep" / "tiny.txt"
    with pytest.raises(AssertionError, match=r"there is no golden .*to make it call assert_graph_diff with update=True once"):
        assert_graph_diff(tiny(), (IDS,), golden=golden)
    assert_graph_diff(tiny(), (IDS,), golden=golden, update=True)
    assert_graph_diff(tiny(seed=7), kwargs={"input_ids": IDS}, golden=str(golden))
    with pytest.raises(AssertionError, match=r"-attention.\[0-1\]: .*-> sdpa\n\+attention.\[0-1\]: .*-> reference\n"):
        assert_graph_diff(tiny(), (IDS,), golden=golden, kernel="reference")
    with pytest.raises(AssertionError, match=r"-attention.\[0-1\]: .*\n\+3 attention sites .*\n\+attention.\[0-2\]: "):
        assert_graph_diff(tiny(3), (IDS,), golden=golden)
    code = "import sys, compile_attn.testing; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"args": (IDS,)}, "golden is a path, such as"),
        ({"args": (IDS,), "golden": Path(__file__).parent}, "is a folder; name a file in it"),
        (
            {"args": IDS, "golden": "x.txt"},
            r"args is a tuple of .*, such as \(input_ids,\), not a Tensor",
        ),
        ({"args": (IDS,), "golden": "x.txt", "kernel": "fast"}, "unknown kernel 'fast'"),
    ],
)
def test_bad_input(given: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        assert_graph_diff(tiny(), **given)  # type: ignore[arg-type]


def test_another_file_is_a_difference(tmp_path: Path) -> None:
    """An older format, or what is no text: shown in part, and lines of any number are cut with their count."""
    golden = tmp_path / "old.txt"
    golden.write_bytes(b"paged_attn graph diff, format 0\n\n" + b"\xff a site\n" * 99)
    with pytest.raises(AssertionError) as caught:
        assert_graph_diff(tiny(), (IDS,), golden=golden)
    message = str(caught.value)
    assert "-paged_attn graph diff, format 0" in message and message.count("\n") < 32
    assert "... 99 more lines on the graph left out" in message
    golden.write_text("".join(f"{number}\n" for number in range(99)))
    with pytest.raises(AssertionError, match=r"-19\n... 82 more lines on sites left out\n@@\n\+@@ attention"):
        assert_graph_diff(tiny(), (IDS,), golden=golden)


def test_line_ends_do_not_matter(tmp_path: Path) -> None:
    golden = tmp_path / "tiny.txt"
    assert_graph_diff(tiny(), (IDS,), golden=golden, update=True)
    golden.write_bytes(golden.read_bytes().replace(b"\n", b"\r\n"))
    assert_graph_diff(tiny(), (IDS,), golden=golden)


BEFORE = """
input blocks.0.w: float32[4]

# blocks.{0}.norm  model.py:{line}: x = self.norm(x)
sum_7: float32[4] = aten.sum.default(blocks.{0}.w)

# blocks.{0}  model.py:9: return x
split_3 = aten.split.Tensor(sum_7, 2)
getitem_9: float32[2] = getitem(split_3, 1)
mul_5: float32[2] = aten.mul.Tensor(getitem_9, 2.5)
return (mul_5,)"""


def _diff(read: int, line: int = 3) -> list[str]:
    """One op more."""
    before = BEFORE.format(0, line=line)
    after = before.replace("return (", f"neg_4: float32[2] = aten.neg.default(mul_5, sum_7, blocks.{read}.page, dim=1)\nreturn (")
    return stable_diff(before, after)


def test_names_and_numbers() -> None:
    """A value is named by its module, op and turn; what stands before a hunk, and lines of source, do not matter."""
    added = "+neg: float32[2] = aten.neg.default(mul, blocks.0.norm/sum, blocks.0.page, dim=1)"
    assert _diff(0) == _diff(0, line=77) == ["@@ blocks.0", added]
    moved = stable_diff(BEFORE.format(0, line=3), BEFORE.format(0, line=3).replace("getitem(split_3, 1)", "getitem(split_3, 0)"))
    assert moved == [
        "@@ blocks.0",
        "-mul: float32[2] = aten.mul.Tensor(split[1], 2.5)",
        "+mul: float32[2] = aten.mul.Tensor(split[0], 2.5)",
    ]


def test_only_what_is_alike_is_left_out() -> None:
    """Hunks whose numbers all follow from one are told once; one that reads another layer's page is not."""

    def joined(*reads: int) -> list[str]:
        before = "\n\n".join(BEFORE.format(number, line=3) for number in range(len(reads)))
        graphs = [
            BEFORE.format(number, line=3).replace("return (", f"neg_4 = aten.neg.default(mul_5, blocks.{read}.page)\nreturn (")
            for number, read in enumerate(reads)
        ]
        return stable_diff(before, "\n\n".join(graphs))

    first = ["@@ blocks.0", "+neg = aten.neg.default(mul, blocks.0.page)"]
    assert joined(0, 1, 2) == [*first, "... and 2 more like it, with 1-2 for 0"]
    assert joined(0, 0) == [*first, "@@ blocks.1", "+neg = aten.neg.default(mul, blocks.0.page)"]


def test_layers_of_two_kinds() -> None:
    class Attention(nn.Module):
        def __init__(self, keys: int) -> None:
            super().__init__()
            self.keys = keys

        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[1])
            gap = place[:, None] - place[None, :]
            return x + ((x @ x.mT).masked_fill((gap < 0) | (gap >= self.keys), -torch.inf).softmax(-1) @ x).sin()

    text = golden_text(ca.explain(nn.Sequential(*map(Attention, (4, 99, 4, 4, 99))), torch.randn(1, 16, 8)))
    assert "\n[0, 2-3]: causal, window of 4 keys, 1 heads" in text and "\n[1, 4]: causal, window of 99 keys, 1 heads" in text


def test_a_refusal_names_no_numbered_node(tmp_path: Path) -> None:
    class Leaking(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.mean(-1, keepdim=True) + x
            seen = (x @ x.mT).softmax(-1)
            return seen @ x, seen.mean(-1)

    text = golden_text(ca.explain(Leaking(), torch.randn(1, 5, 16)))
    assert text.splitlines()[2] == "0 attention sites rewritten (stateless), 1 rejected"
    assert (
        text.splitlines()[3].startswith("(the model itself): rejected: ")
        and text.splitlines()[3].endswith("used by mean (mean)")
        and len(text.splitlines()) == 4
    )


def test_places() -> None:
    assert places(["a.0.b", "a.1.b", "a.2.b", "c"]) == "a.[0-2].b, c"
    assert places(["a.0.b", "a.0.b", "a.1.b"]) == "2 x a.0.b, a.1.b"
    assert places(["a.0.1", "a.0.2", "a.3.1", "a.3.2"]) == "a.[0, 3].[1-2]"
    assert places(["a.0.1", "a.3.2"]) == "a.0.1, a.3.2", "not a.0.2"
    assert places(["", "a"]) == "(the model itself), a"
    assert ranges([3, 1, 2, 7]) == "1-3, 7"

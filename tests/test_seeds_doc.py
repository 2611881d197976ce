"""Does docs/seeds.md speak of code and tests that exist, and does the script that says so see what is wrong?"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
HEAD = "| of the seeds | here | shown by | differs, because |\n|---|---|---|---|\n"


@pytest.fixture(scope="module")
def seeds() -> ModuleType:
    spec = importlib.util.spec_from_file_location("seeds", ROOT / ".ci" / "seeds.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["seeds"] = module
    spec.loader.exec_module(module)
    return module


def test_every_name_exists(seeds: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert seeds.main([]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("slots | kernels/batch.py:build_metadata | test_batch::test_slots | |", []),
        (
            "a view | kernels/mask.py:Mask.predicate | test_mask::test_no_such | |",
            ["a view: tests/test_mask.py has no test_no_such"],
        ),
        ("x | kernels/batch.py:nothing | test_batch::test_slots | |", ["x: kernels/batch.py has no nothing"]),
        ("x | kernels/none.py:a | test_batch::test_slots | |", ["x: kernels/none.py has no a"]),
        ("x | nowhere | test_batch::test_slots | |", ["x: it names no place, and no reason"]),
        ("x | kernels/batch.py:build_metadata | | |", ["x: it names no test, and no reason"]),
        ("x | | | nobody needs it |", []),
        ("x | | | see kernels/batch.py:nothing |", ["x: kernels/batch.py has no nothing"]),
        ("x | kernels/batch.py | test_batch | why |", ["x: it names a file without a name in it"]),
    ],
)
def test_rows(row: str, said: list[str], seeds: ModuleType) -> None:
    [found] = seeds.rows_of(f"other | table |\n\n{HEAD}| {row}\n")
    assert seeds.wrong(found) == said


def test_a_row_of_another_width(seeds: ModuleType) -> None:
    with pytest.raises(ValueError, match="3 cells instead of 4"):
        seeds.rows_of(f"{HEAD}| a | b | c |\n")


@pytest.mark.parametrize(("gpu", "wrong"), [(False, "test_interpreted"), (True, "test_gpu")])
def test_what_did_not_pass(gpu: bool, wrong: str, tmp_path: Path, seeds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('n', [1, 2])\ndef test_half(n): assert n == 1\n"
        "@pytest.mark.skip(reason='later')\ndef test_skipped(): pass\n"
        "@pytest.mark.skip(reason='needs a CUDA device')\ndef test_gpu(): pass\n"
        "@pytest.mark.skip(reason='a GPU, where the gpu tests run instead')\ndef test_interpreted(): pass\n"
    )
    monkeypatch.setattr(seeds, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    names = ("test_good", "test_half", "test_skipped", "test_gpu", "test_interpreted")
    assert seeds.not_passed([("tests/test_some.py", name) for name in names]) == [
        "tests/test_some.py::test_half: failed",
        "tests/test_some.py::test_skipped: skipped",
        f"tests/test_some.py::{wrong}: skipped",
    ]
    assert seeds.not_passed([("tests/test_some.py", "test_gone")]) == ["tests/test_some.py::test_gone: did not run"]

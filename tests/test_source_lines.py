"""Are the lines that a page shows those that the report means?"""

from __future__ import annotations

import linecache
from pathlib import Path

import pytest

from compile_attn.passes.source_lines import excerpts, short


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text("def f():\n" + "".join(f"    x{number} = {number}\n" for number in range(2, 41)) + "\n\n")
    return path


def named(file: Path, *numbers: int) -> list[str]:
    return [f"{file}:{number}: x{number} = {number}" for number in numbers]


def test_lines_near_each_other_are_one_excerpt(file: Path) -> None:
    near, far = excerpts(named(file, 20, 14, 20, 32))
    assert [number for number, _, _ in near.lines] == [*range(12, 23)] and [number for number, _, _ in far.lines] == [
        *range(30, 35)
    ]
    assert [number for number, _, marked in near.lines if marked] == [14, 20]
    assert near.lines[0] == (12, "x12 = 12", False), "the margin that all share is left out"
    assert not near.missing


def test_the_ends_of_a_file(file: Path) -> None:
    first, last = excerpts([f"{file}:1: def f():", *named(file, 40)])
    assert [text for _, text, _ in first.lines] == ["def f():", "    x2 = 2", "    x3 = 3"]
    assert [number for number, _, _ in last.lines] == [38, 39, 40], "no blank lines at an end"


def test_a_file_that_is_not_there() -> None:
    [excerpt] = excerpts(["nowhere.py:3: y = 1", "nowhere.py:2: x = 1"])
    assert excerpt.lines == ((2, "x = 1", True), (3, "y = 1", True)) and excerpt.missing == "the file is not here to be read"


@pytest.mark.parametrize("line", [5, 99])
def test_a_line_that_was_moved_is_not_taken_for_another(file: Path, line: int) -> None:
    [excerpt] = excerpts([f"{file}:{line}: secret = 1"])
    assert excerpt.lines == ((line, "secret = 1", True),)
    assert excerpt.missing == f"the file has changed since: line {line} is another one"


def test_a_file_is_read_anew(file: Path) -> None:
    assert not excerpts(named(file, 5))[0].missing
    file.write_text(file.read_text().replace("x6 = 6", "x6 = 66  # longer"))
    assert (6, "x6 = 66  # longer", False) in excerpts(named(file, 5))[0].lines


def test_a_cell_of_a_notebook_is_known() -> None:
    """It has no file: IPython leaves its text in linecache."""
    linecache.cache["<ipython-input-3>"] = (9, None, ["a = 1\n", "b = a\n"], "<ipython-input-3>")
    try:
        [excerpt] = excerpts(["<ipython-input-3>:2: b = a"])
        assert excerpt.lines == ((1, "a = 1", False), (2, "b = a", True))
    finally:
        del linecache.cache["<ipython-input-3>"]


def test_what_is_no_place_is_left_out() -> None:
    assert excerpts(["", "somewhere", "a.py:x: y"]) == []
    [windows] = excerpts([r"C:\a.py:3: y = b[1:2]"])
    assert windows.file == r"C:\a.py" and windows.lines == ((3, "y = b[1:2]", True),)


def test_short() -> None:
    assert short("/venv/lib/python3.11/site-packages/transformers/a.py:3: x") == "transformers/a.py:3: x"
    assert short("tests/a.py:3: x = '/site/'") == "tests/a.py:3: x = '/site/'"

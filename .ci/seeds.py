"""Does docs/seeds.md speak of code and tests that exist, and do these tests pass?

    python .ci/seeds.py [--run] [FILE]

Without `--run` only names are looked up. With it pytest runs exactly the tests that are named: each must pass, those marked gpu
where there is a GPU, and those of Triton's interpreter where there is none. Rows without a test must say why ours differs.
Ends with 1 and the rows that are wrong.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"\b((?:compile_attn|passes|kernels)/\w+\.py):([A-Za-z_]\w*(?:\.\w+)*)")
TEST = re.compile(r"\b(test_\w+)::(\w+)")
HEADINGS = ("of the seeds", "here", "shown by", "differs, because")


class Row(NamedTuple):
    """One behaviour: what it was, where it lives, which tests show it, why it is another one here."""

    seed: str
    here: str
    tests: str
    because: str

    @property
    def named(self) -> list[tuple[str, str]]:
        """File and function of each test."""
        return [(f"tests/{file}.py", test) for file, test in TEST.findall(self.tests)]


def rows_of(text: str) -> list[Row]:
    """Of all tables with our headings. ValueError for a row of another width."""
    rows, inside = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|")))
        if cells == HEADINGS:
            inside = True
        elif inside and not set("".join(cells)) <= set("-: "):
            if len(cells) != len(HEADINGS):
                raise ValueError(f"{len(cells)} cells instead of {len(HEADINGS)}: {line}")
            rows.append(Row(*cells))
    return rows


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """Functions, classes, their members and what is assigned, as `Class.member`."""

    def inside(body: Sequence[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name
                yield from inside(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            yield from (prefix + name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))

    return frozenset(inside(ast.parse(file.read_text()).body, "")) if file.exists() else frozenset()


def wrong(row: Row, root: Path = ROOT) -> list[str]:
    """What the row names and nobody finds, and what it lacks."""
    places = PLACE.findall(row.here)
    named = [*places, *row.named, *PLACE.findall(row.because)]
    said = [f"{file} has no {name}" for file, name in named if name not in names_in(root / file)]
    unread = PLACE.sub("", row.here) + TEST.sub("", row.tests)
    if ".py" in unread or "test_" in unread:
        said.append("it names a file without a name in it")
    if not places and not row.because:
        said.append("it names no place, and no reason")
    if not row.named and not row.because:
        said.append("it names no test, and no reason")
    return [f"{row.seed}: {each}" for each in said]


def not_passed(tests: Sequence[tuple[str, str]]) -> list[str]:
    """Those that failed, were skipped though they are not of the other kind of machine alone, or did not run."""
    import torch

    elsewhere = "where the gpu tests run instead" if torch.cuda.is_available() else "needs a CUDA device"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, *(f"{file}::{name}" for file, name in tests)], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase") if report.exists() else iter(())
        states: dict[tuple[str, str], set[str]] = {}
        for case in cases:
            file = case.attrib["classname"].replace(".", "/") + ".py"
            skipped = case.find("skipped")
            reason = "" if skipped is None else skipped.attrib.get("message", "")
            failed = case.find("failure") is not None or case.find("error") is not None
            state = "failed" if failed else "passed" if skipped is None else "elsewhere" if elsewhere in reason else "skipped"
            states.setdefault((file, case.attrib["name"].split("[")[0]), set()).add(state)
    found = [(test, states.get(test, {"did not run"}) - {"passed", "elsewhere"}) for test in tests]
    return [f"{file}::{name}: {', '.join(sorted(state))}" for (file, name), state in found if state]


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="run the tests that are named, and no others")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "docs" / "seeds.md")
    chosen = parser.parse_args(args)
    rows = rows_of(chosen.file.read_text())
    said = [each for row in rows for each in wrong(row)]
    tests = sorted({test for row in rows for test in row.named})
    if not said and chosen.run:
        said = not_passed(tests)
    print(*said, f"{len(rows)} rows, {len(tests)} tests, {len(said)} wrong", sep="\n")
    return 1 if said or not rows else 0


if __name__ == "__main__":
    raise SystemExit(main())

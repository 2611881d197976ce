"""How does pytest keep graph diffs? The fixture `graph_diff`, and the flag --update-graph-diffs.

pytest loads this file wherever the package is installed: so it imports nothing heavy until the fixture is called.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import pytest

_WRITTEN = pytest.StashKey[dict[Path, str]]()  # goldens of this run
_PROPERTY = "graph diff written"  # of a test's report: so it comes back from the workers of xdist, too


def pytest_addoption(parser: pytest.Parser) -> None:
    """The flag."""
    group = parser.getgroup("paged_attn")
    group.addoption("--update-graph-diffs", action="store_true", help="write the goldens of the fixture graph_diff anew")


@pytest.fixture
def graph_diff(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`compile_attn.testing.assert_graph_diff`, whose golden is graph_diffs/TEST.txt beside the test file unless it is named.

    A relative golden is taken from the folder of the test file. With --update-graph-diffs, or `update=True`, it is written and the
    test passes.
    """

    def check(
        model: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        golden: str | PathLike[str] | None = None,
        *,
        paged: bool = False,
        update: bool = False,
        **options: Any,
    ) -> None:
        from compile_attn.testing import check_golden, explained, golden_text

        __tracebackhide__ = True
        path = request.path.parent / (_named_after(request.node) if golden is None else golden)
        report = explained(model, args, kwargs, paged=paged, **options)
        if update or request.config.getoption("--update-graph-diffs"):
            _write(request, path, golden_text(report))
        else:
            check_golden(report, path, f"run pytest --update-graph-diffs {shlex.quote(request.node.nodeid)}")

    return check


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say which goldens were written."""
    for report in (one for reports in terminalreporter.stats.values() for one in reports):
        if getattr(report, "when", None) == "call":
            for name, what in report.user_properties:
                if name == _PROPERTY:
                    terminalreporter.write_line(f"{_PROPERTY}: {what}")


def _write(request: pytest.FixtureRequest, path: Path, text: str) -> None:
    """Two different texts for one file would leave the last one there, and the other test failing in the next run."""
    from compile_attn.testing import shown_path, write_golden

    written = request.config.stash.setdefault(_WRITTEN, {})
    if written.setdefault(path, text) != text:
        pytest.fail(f"two calls of this run have different graph diffs for {path}; name one with golden=", pytrace=False)
    what = "" if write_golden(path, text) else " (as it was)"
    request.node.user_properties.append((_PROPERTY, f"{shown_path(path)}{what}"))


def _named_after(node: Any) -> str:
    """graph_diffs/TestClass.test_name_parameters.txt: what a file may be called everywhere."""
    within = ".".join(node.nodeid.split("::")[1:])
    return f"graph_diffs/{re.sub(r'[^A-Za-z0-9_.-]+', '_', within).strip('_')}.txt"

"""Do TORCH_LOGS and TORCH_TRACE show what was done, as they do for torch's own compilers?

Both are read when torch is imported, so each case is a process of its own; nothing of it stays in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from compile_attn.passes.report import Report

PROGRAM = """
import torch
from tests.tiny import tiny
with torch.no_grad():
    torch.compile(tiny(), backend="paged_attn", options={"inner": "eager"})(torch.arange(9)[None])
"""
SUMMARY = "2 attention sites rewritten (stateless), 0 rejected"


def _run(**variables: str) -> str:
    """What the program prints on standard error."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=quiet | variables, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def _artefacts(log: str) -> dict[str, str]:
    """What tlparse lists: a JSON line for each artefact, and its payload in the tab-indented lines that follow."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in log.splitlines():
        if line.startswith("\t"):
            found.setdefault(name, []).append(line[1:])
        else:
            record = json.loads(line[line.index("{") :])
            name = record.get("artifact", {}).get("name", "")
            assert not name.startswith("paged_attn") or record["frame_id"] == 0, "it belongs to a compilation"
    return {name: "\n".join(lines) for name, lines in found.items() if name.startswith("paged_attn")}


def test_logs_and_trace(tmp_path: Path) -> None:
    shown = _run(TORCH_LOGS="+compile_attn", TORCH_TRACE=str(tmp_path))
    assert SUMMARY in shown and "stateless graph before:" in shown and "aten.scaled_dot_product_attention" in shown
    [file] = tmp_path.glob("*.log")
    found = _artefacts(file.read_text())
    assert sorted(found) == [f"paged_attn_{name}" for name in ("graph_after", "graph_before", "graph_diff", "report")]
    assert found["paged_attn_report"].startswith(SUMMARY)
    assert "aten.softmax.int" in found["paged_attn_graph_before"] and "aten.softmax.int" not in found["paged_attn_graph_after"]
    assert found["paged_attn_graph_diff"].startswith("--- before\n+++ after\n")


def test_the_report_alone() -> None:
    shown = _run(TORCH_LOGS="compile_attn")
    assert SUMMARY in shown and "graph before" not in shown


def test_nothing_is_rendered_that_nobody_reads() -> None:
    from compile_attn.logs import emit_report

    class Unread(Report):
        def __str__(self) -> str:
            raise AssertionError("rendered")

    emit_report(Report("stateless"))  # torch's handler goes at its first record, where TORCH_TRACE is not set
    emit_report(Unread("stateless"))

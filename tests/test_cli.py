"""Does the command line say what is there, what was wrong with the call, and what to do?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compile_attn.cli import main
from tests.tiny import tiny

HERE = "tests.test_cli"


def good() -> Any:
    return tiny(), (torch.arange(9)[None],)


def by_name() -> Any:
    return tiny(), (), {"input_ids": torch.arange(9)[None]}


def alone() -> Any:
    return tiny()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        seen = (x @ x.mT).softmax(-1)
        return seen @ x + seen.sum()


def unreadable() -> Any:
    return Mixing(), [torch.randn(1, 4, 8)]


def nothing() -> Any:
    return "no model", 1


def test_explain(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    assert main(["explain", f"{HERE}:good", "--diff", "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "2 attention sites rewritten (stateless), 0 rejected" in shown and "visible where j <= i" in shown
    assert "--- before\n+++ after\n" in shown and f"the report is in {page}" in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_explain_with_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{HERE}:by_name", "--kernel", "reference"]) == 0
    shown = capsys.readouterr().out
    assert "│ reference " in shown and "│ sdpa " not in shown


def test_explain_paged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{HERE}:alone", "--paged"]) == 0
    assert "2 attention sites rewritten (paged), 0 rejected" in capsys.readouterr().out


def test_something_was_not_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{HERE}:unreadable"]) == 1
    assert "0 attention sites rewritten (stateless), 1 rejected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere_at_all:make"], "'nowhere_at_all:make' was not found (No module named 'nowhere_at_all'); name a function"),
        ([f"{HERE}:make"], f"'{HERE}:make' was not found (module '{HERE}' has no attribute 'make')"),
        ([HERE], f"'{HERE}' was not found"),
        ([f"{HERE}:nothing"], "returned tuple, not a model with its inputs; name a function MODULE:FACTORY that returns"),
        ([f"{HERE}:alone"], "returned a model without inputs; return (model, args), or ask for --paged"),
        ([f"{HERE}:good", "--kernel", "sdpa", "--paged"], "kernel 'sdpa' was asked for, but it does not serve paged calls"),
        ([f"{HERE}:good", "--kernel", "fast"], "unknown kernel 'fast'; known kernels are"),
    ],
)
def test_bad_input(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["explian"])
    assert "choose from" in capsys.readouterr().err


def test_demo_is_called_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def failing(*given: object) -> bool:
        calls.append(given)
        return False

    monkeypatch.setattr("compile_attn.demo.demo", failing)
    assert main(["demo", "--seconds", "2", "--tokens", "5", "--inner", "eager", "--html", "x.html"]) == 1
    assert calls == [(2.0, "eager", "x.html", "cpu", 5)]


def test_bench(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert main(["bench"]) == 0
    listed = capfd.readouterr().out
    assert "floor          How fast can this device copy memory" in listed and "naive_llama" not in listed
    assert main(["bench", "flor"]) == 2
    assert "bench/ has no 'flor'; choose one of the above" in capfd.readouterr().err
    assert main(["bench", "floor", "--help"]) == 0
    assert "usage: floor.py" in capfd.readouterr().out
    monkeypatch.setattr("compile_attn.cli.__file__", str(tmp_path / "compile_attn" / "cli.py"))
    assert main(["bench", "floor"]) == 2
    assert "it is part of the source checkout" in capfd.readouterr().err

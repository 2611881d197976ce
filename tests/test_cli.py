"""Does the command line say what is there, what was wrong with the call, and what to do?"""

from __future__ import annotations

import json
import sys
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


def narrowed() -> Any:
    model, args = good()
    for attention in model.attention:
        attention.seen &= attention.seen.mT.tril(3).mT
    return model, args


def squashed() -> Any:
    """The same attention in another graph."""
    model, args = good()
    model.head.register_forward_hook(lambda module, args, out: out.tanh())
    return model, args


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


def test_diff_of_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{HERE}:good", f"{HERE}:by_name", "--graphs"]) == 0
    assert capsys.readouterr().out == "no difference\nthe graphs are the same\n"


def test_diff_of_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{HERE}:good", f"{HERE}:narrowed", "--kernel", "reference"]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("0 sites gained, 0 lost, 2 changed\n") and "+++" not in shown
    assert [line.split() for line in shown.splitlines() if "attention.[0-1]" in line] == [
        ["│", "attention.[0-1]", "│", "mask", "│", "causal", "│", "causal,", "window", "of", "4", "keys", "│"]
    ]


def test_diff_of_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    """Graphs count where they are asked for."""
    assert main(["diff", f"{HERE}:good", f"{HERE}:squashed"]) == 0
    capsys.readouterr()
    assert main(["diff", f"{HERE}:good", f"{HERE}:squashed", "--graphs"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["no difference", f"--- {HERE}:good", f"+++ {HERE}:squashed"]
    assert "+tanh: float32[1, 9, 31] = aten.tanh.default(linear)" in lines[3:]


def test_diff_paged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{HERE}:alone", f"{HERE}:narrowed", "--paged"]) == 1
    assert "2 changed" in capsys.readouterr().out


CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _configuration(folder: Path, **changes: object) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(folder)


def test_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """By folder or by file, without memory: a width of 2**20 would need terabytes."""
    small = _configuration(tmp_path / "small")
    mistral = _configuration(tmp_path / "mistral", model_type="mistral", sliding_window=8)
    assert main(["diff", small, f"{mistral}/config.json"]) == 1
    shown = capsys.readouterr().out
    assert "2 changed" in shown and "model.layers.[0-1].self_attn" in shown and "causal, window of 8 keys" in shown
    huge = _configuration(tmp_path / "huge", hidden_size=2**20, intermediate_size=2**20, num_attention_heads=2**13)
    assert main(["explain", huge]) == 0
    assert "causal, 8192 heads" in capsys.readouterr().out


def test_a_configuration_that_needs_its_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """GPT-Neo mixes tensors of its own with its weights: nothing is computed on the meta device."""
    sizes = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8}
    assert main(["explain", _configuration(tmp_path / "neo", model_type="gpt_neo", **sizes)]) == 0
    assert "2 attention sites rewritten (stateless), 0 rejected" in capsys.readouterr().out


def test_a_configuration_paged(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["explain", _configuration(tmp_path / "small"), "--paged"]) == 0
    assert "2 attention sites rewritten (paged), 0 rejected" in capsys.readouterr().out


def test_bad_configurations(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit status 2 for either side; code that comes with a model is not run."""
    good = _configuration(tmp_path / "good")
    assert main(["diff", good, str(tmp_path)]) == 2
    assert f"there is no {tmp_path / 'config.json'}; name a config.json of transformers" in capsys.readouterr().err
    assert main(["explain", _configuration(tmp_path / "odd", model_type="no_such_type")]) == 2
    assert "makes no causal LM: " in capsys.readouterr().err
    foreign = _configuration(tmp_path / "foreign", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (Path(foreign) / "mine.py").write_text("raise SystemExit('it was run')")
    assert main(["explain", foreign]) == 2
    assert "makes no causal LM: " in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["diff", good, good]) == 2
    assert "transformers, which is not installed: pip install transformers" in capsys.readouterr().err


def test_bad_input_of_diff(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{HERE}:good", f"{HERE}:alone"]) == 2
    assert "returned a model without inputs" in capsys.readouterr().err
    assert main(["diff", f"{HERE}:good", f"{HERE}:good", "--kernel", "fast"]) == 2
    assert "unknown kernel 'fast'" in capsys.readouterr().err


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

"""Does the demo run, and would it say so if the tokens differed?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from compile_attn.demo import PROMPTS, demo
from compile_attn.demo_model import GPT
from compile_attn.lm import PagedLM


def test_a_second_of_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert demo(1.0, "eager", str(page), "cpu", 6)
    shown = capsys.readouterr().out
    assert re.search(r"trained a GPT of [\d,]+ parameters for 1 s, loss \d\.\d\d", shown)
    assert "4 attention sites rewritten (paged), 0 rejected" in shown
    assert all(repr(prompt) in shown for prompt in PROMPTS)
    said = " ".join(shown.split())
    assert re.search(r"5 prompts together, 6 tokens each: paged [\d.]+ s, recomputed [\d.]+ s, equal, token for token", said)
    assert "<code>blocks.[0-3].attention</code>" in page.read_text(encoding="utf-8")


def test_a_wrong_token_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = PagedLM.generate

    def wrong(self: PagedLM, *args: object, **kwargs: object) -> list[list[int]]:
        made = right(self, *args, **kwargs)  # type: ignore[arg-type]
        made[2][-1] = (made[2][-1] + 1) % 50  # another character of the alphabet
        return made

    monkeypatch.setattr(PagedLM, "generate", wrong)
    monkeypatch.setattr("compile_attn.demo.GPT", lambda vocabulary: GPT(vocabulary, width=32, heads=2, layers=1))
    assert not demo(0.1, "eager", None, "cpu", 2)
    assert "DIFFERENT" in capsys.readouterr().out


def test_without_a_compiler_it_runs_without_inductor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("compile_attn.demo.GPT", lambda vocabulary: GPT(vocabulary, width=32, heads=2, layers=1))
    assert demo(0.1, "inductor", None, "cpu", 2)
    assert "no C++ compiler was found" in capsys.readouterr().out


def test_the_model_is_a_plain_decoder() -> None:
    torch.manual_seed(0)
    model = GPT(17, width=16, heads=2, layers=2, context=12).eval()
    ids = torch.randint(17, (2, 12))
    assert torch.allclose(model(ids)[:, :5], model(ids[:, :5]), atol=1e-5), "causal"

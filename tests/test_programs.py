"""Does the command line compare saved programs with each other, and with models, and refuse every other file?"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compile_attn as ca
from compile_attn.cli import main
from compile_attn.manifest import FILE
from tests import test_cli
from tests.test_cli import CONFIG
from tests.tiny import tiny

HERE = "tests.test_programs"


def model() -> nn.Module:
    return tiny(seed=1)


def others() -> nn.Module:
    """The same, with other weights."""
    return tiny(seed=2)


def narrowed() -> nn.Module:
    return without_inputs(test_cli.narrowed())


def squashed() -> nn.Module:
    """The same attention in another graph."""
    return without_inputs(test_cli.squashed())


def without_inputs(made: Any) -> nn.Module:
    return made[0]  # type: ignore[no-any-return]


def summing() -> nn.Module:
    """Something else than attention mixes its tokens."""
    made = model()
    made.get_submodule("norm").register_forward_hook(lambda module, args, out: out.cumsum(1))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A program of a function of this file, for a cache of some kind; each is made once."""
    folder, files = tmp_path_factory.mktemp("programs"), {}

    def at(made: Callable[[], nn.Module], **cache: Any) -> str:
        key = made.__name__ + repr(cache)
        if key not in files:
            files[key] = str(folder / f"{len(files)}.pt2")
            ca.save(ca.export(made(), cache=ca.PagedKVCache(512, max_seqs=4, **cache)), files[key])
        return files[key]

    return at


Saved = Callable[..., str]


def rows(shown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]


def test_the_same_program(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights are no difference, nor is the run that exported it."""
    assert main(["diff", saved(model), saved(others), "--graphs"]) == 0
    assert capsys.readouterr().out == "no difference\nthe graphs are the same\n"


@pytest.mark.parametrize("turned", [False, True])
def test_a_program_and_its_model(saved: Saved, turned: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is exported for pages as the program's."""
    pair = [saved(model, page_size=32, kv_dtype="fp8_e5m2"), f"{HERE}:model"]
    assert main(["diff", *(pair[::-1] if turned else pair), "--graphs"]) == 0
    assert capsys.readouterr().out == "no difference\nthe graphs are the same\n"


def test_a_mask(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    for other in (saved(narrowed), f"{HERE}:narrowed"):
        assert main(["diff", saved(model), other]) == 1
        shown = capsys.readouterr().out
        assert "2 changed" in shown
        assert [row[2:] for row in rows(shown) if row[1] == "mask"] == [["causal", "causal, window of 4 keys"]], shown


def test_a_kernel(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a model's to choose, and a program's no longer."""
    assert main(["diff", saved(model), f"{HERE}:model", "--kernel", "general"]) == 1
    assert [row[1:] for row in rows(capsys.readouterr().out)] == [["kernel", "reference", "general"]]
    assert main(["diff", saved(model), saved(others), "--kernel", "general"]) == 2
    assert "kernels of saved programs were chosen when they were exported; leave --kernel out" in capsys.readouterr().err
    assert main(["explain", saved(model), "--kernel", "general"]) == 2
    assert "its kernel was chosen when it was exported; leave --kernel out" in capsys.readouterr().err


def test_a_graph(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """Only where it is asked for, and then the change alone: values are named by the weight that was read last."""
    assert main(["diff", saved(model), saved(squashed)]) == 0
    capsys.readouterr()
    assert main(["diff", saved(model), f"{HERE}:squashed", "--graphs"]) == 1
    shown = capsys.readouterr().out.splitlines()
    changed = [line for line in shown if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    returned = [line for line in changed if line[1:].startswith("return ")]
    [tanh] = [line for line in changed if line not in returned]
    assert tanh.startswith("+tanh: float32[1, ") and tanh.endswith("aten.tanh.default(linear)") and len(returned) == 2, shown
    assert " # head" in shown


def test_pages(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """What a server must give a program is told of two programs."""
    assert main(["diff", saved(model), saved(model, page_size=32, kv_dtype="fp8_e5m2")]) == 1
    shown = capsys.readouterr().out
    assert rows(shown) == [["page_size", "16", "32"], ["kv_dtype", "auto", "float8_e5m2"]], shown
    assert shown.startswith("0 sites gained, 0 lost, 0 changed, 2 other differences\n")


def test_a_model_that_cannot_be_paged(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", saved(model), f"{HERE}:summing"]) == 1
    shown = capsys.readouterr().out
    assert "2 lost" in shown and "rejected: " in shown


def test_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the dtype of the program's keys."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    half = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ca.save(ca.export(half, cache=ca.PagedKVCache(512, max_seqs=4)), tmp_path / "p.pt2")
    assert main(["diff", str(tmp_path / "p.pt2"), str(tmp_path), "--graphs"]) == 0
    assert capsys.readouterr().out == "no difference\nthe graphs are the same\n"
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral", "sliding_window": 8}))
    assert main(["diff", str(tmp_path / "p.pt2"), str(tmp_path)]) == 1
    assert "causal, window of 8 keys" in capsys.readouterr().out


def test_explain(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", saved(narrowed), "--html", str(tmp_path / "page.html")]) == 0
    shown = capsys.readouterr().out
    assert "2 attention sites rewritten (paged), 0 rejected" in shown and "causal, window of 4 keys" in shown
    assert "removed" not in shown and "<svg" in (tmp_path / "page.html").read_text()
    assert main(["explain", saved(narrowed), "--diff"]) == 2
    assert "has no graph from before its rewriting; leave --diff out" in capsys.readouterr().err


def with_manifest(file: str, to: Path, **fields: Any) -> str:
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, json.dumps({**json.loads(data), **fields}) if entry.filename.endswith(FILE) else data)
    return str(to)


def test_bad_files(saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One error each, exit status 2, for either side; torch is given none of them, and no good one whose manifest is enough."""
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("the file was given to torch"))
    good = saved(model)
    cut, empty = tmp_path / "cut.pt2", tmp_path / "empty.pt2"
    cut.write_bytes(Path(good).read_bytes()[:5000])
    empty.write_bytes(b"")
    site = {"module": "layers.0", "spec": "", "encoded": "AttentionSpec(__import__('os'))", "kernel": "reference"}
    bad = {
        str(cut): "damaged, or no saved program",
        str(empty): "damaged, or no saved program",
        str(tmp_path / "none.pt2"): "there is no ",
        with_manifest(good, tmp_path / "format.pt2", format=9): "has format 9",
        with_manifest(good, tmp_path / "spec.pt2", sites=[site] * 2): "says of its sites cannot be read",
        with_manifest(good, tmp_path / "sites.pt2", sites=[{"kernel": "reference"}]): "says of its sites cannot be read",
    }
    for file, why in bad.items():
        for pair in ((file, good), (f"{HERE}:model", file)):
            assert main(["diff", *pair, "--graphs"]) == 2
            shown = capsys.readouterr()
            assert shown.err.startswith("compile-attn: ") and why in shown.err and shown.err.count("\n") == 1, shown.err
            assert shown.out == ""
    assert main(["diff", good, saved(others)]) == 0

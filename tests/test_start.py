"""Does the measuring of a server's start time what it says, and count what is compiled again?"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from bench import start


@pytest.fixture(scope="module")
def found() -> dict[str, start.Found]:
    options = {"inner": "eager", "kernel": "reference", "kv_tokens": 256}
    return start.starts("tiny", "cpu", options, warm_up=True, limit=200)


@pytest.mark.every_form
def test_starts(found: dict[str, start.Found]) -> None:
    assert list(found) == list(start.STARTS)
    for one in found.values():
        assert one["total"] == pytest.approx(sum(one["seconds"].values()) - one["seconds"]["warm-up"], abs=1e-6)
        assert sum(one["of PagedLM"].values()) == pytest.approx(one["seconds"]["PagedLM"], rel=1e-6)
        assert one["of PagedLM"]["Dynamo's capture"] > 0 < one["of PagedLM"]["normalize (tracing to ATen)"]
        assert one["kernels"] == ["reference"] and one["compiled"] == {"cubin": 0, "so": 0}
    assert "artefacts loaded" not in found["second"]["seconds"]


@pytest.mark.every_form
def test_tables(found: dict[str, start.Found]) -> None:
    """The stricter of the two ratios is the verdict."""
    told = copy.deepcopy(found)
    for name, total in (("first", 100.0), ("second", 39.0), ("elsewhere", 60.0)):
        told[name]["total"], told[name]["seconds"]["weights"] = total, 10.0
    told["second"]["compiled"]["cubin"] = 3
    seconds, compiled = start.tables(told)
    rows = {row[0]: row[1:] for row in seconds.rows}
    assert rows["process to first token"] == ["100", "39.0", "60.0", "0.39", "0.60"]
    assert rows["the same without making weights"] == ["90.0", "29.0", "50.0", "0.32", "0.56"]
    assert seconds.note.startswith("The second start takes 0.390 of") and seconds.note.endswith("at most 0.4.")
    told["second"]["total"] = 41.0
    assert start.tables(told)[0].note.endswith("more than 0.4.")
    assert compiled.rows[0] == ["Triton kernels compiled", "0", "3", "0"]


def test_kernels_that_were_made(tmp_path: Path) -> None:
    """New ones, and those made again."""
    (tmp_path / "a").mkdir()
    for name in ("a/x.cubin", "a/y.so", "z.py"):
        (tmp_path / name).write_text("")
    before = start._kernels(tmp_path)
    assert {file.name for file, _ in before} == {"x.cubin", "y.so"}
    (tmp_path / "a" / "x.cubin").unlink()
    (tmp_path / "a" / "x.cubin").write_text("again")
    assert len(start._kernels(tmp_path) - before) == 1


@pytest.mark.gpu
def test_a_second_start_on_a_gpu_compiles_nothing() -> None:
    """Neither Inductor's kernels nor those of ours, which Triton keeps by itself."""
    found = start.starts("tiny", "cuda", {"kv_tokens": 4096, "max_seqs": 4, "kernel": "general"}, warm_up=True, limit=300)
    first, second = found["first"], found["second"]
    assert first["compiled"]["cubin"] > 0 and first["counters"]["fxgraph_cache_miss"] == 1
    assert second["compiled"] == {"cubin": 0, "so": 0}
    assert second["counters"]["fxgraph_cache_hit"] == 1 and second["counters"]["fxgraph_cache_miss"] == 0
    assert second["of PagedLM"]["normalize (tracing to ATen)"] < first["of PagedLM"]["normalize (tracing to ATen)"] / 2

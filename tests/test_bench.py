"""Do the measuring scripts run, are their ratios the right way up, and do their tables have every row?"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from bench import attend, block_sparse, decode, direct, floor, memcheck, sampling, speeds, steady, workload
from bench.measuring import MISSING, Table, compare, number, percent, publish, ratio, stamp
from bench.naive_llama import SHAPES, random_llama
from bench.paged_case import MIXED, PAGE_SIZE, Case, Inputs, Pool, attend_layers, plain, prefill
from bench.paged_case import decode as decode_case
from bench.processes import Clock, Progress, keep_measuring
from bench.sides import llama_config
from compile_attn.kernels import measured
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.mask import BlockSparse
from compile_attn.kernels.speeds import PAGED, STATELESS, Point

CPU = torch.device("cpu")
SPEC = plain(16, heads=4, kv_heads=2)
CASES = [decode_case(3, 24), decode_case(1, 20), prefill(2, 33), Case("mixed", ((5, 6), (20, 1)))]


def test_numbers() -> None:
    assert [number(each) for each in (None, 0.1234, 1.024, 37.21, 12345.6)] == [MISSING, "0.12", "1.02", "37.2", "12,346"]
    assert (ratio(3.0, 2.0), ratio(None, 2.0), ratio(1.0, None)) == (1.5, None, None)
    assert (percent(0.704), percent(None)) == ("70 %", MISSING)


def test_comparing_keeps_names_apart() -> None:
    slow = torch.randn(200, 200)
    times = compare({"slow": lambda: slow @ slow @ slow, "fast": lambda: None}, CPU, 0.005)
    assert times["fast"] < times["slow"]


def test_floor() -> None:
    found = floor.measure(CPU, copied=1 << 16, side=32, seconds=0.001)
    assert found.bytes > 0 and found.operations > 0
    least = floor.Floor(bytes=100.0, operations=1000.0)
    assert (least.seconds(200, 1000), least.seconds(200, 5000)) == (2.0, 5.0)


def test_a_page_of_results(tmp_path: Path) -> None:
    table = Table("Numbers", ["a", "b|c"], [["1", "2"]], "Noted.")
    publish("page", "Results", [table], {"x": 1}, stamp(CPU), tmp_path)
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("# Results\n\n20") and f"torch {torch.__version__}" in text
    assert text.endswith("## Numbers\n\n| a | b\\|c |\n| --- | --- |\n| 1 | 2 |\n\nNoted.\n")
    assert json.loads((tmp_path / "page.json").read_text())["x"] == 1


def test_work_of_a_case() -> None:
    """One sequence of 5 keys, 2 of them new: 4 + 5 pairs; keys, values, queries, outputs once."""
    case, spec = Case("", ((3, 2),)), plain(16, heads=4, kv_heads=2)
    assert case.operations(spec) == 2 * 9 * 4 * 32
    assert case.bytes(spec) == (5 * 2 * 32 + 2 * 4 * 32) * 2
    assert MIXED.tokens == 2048 + 31 and MIXED.longest == 4096 and MIXED.pages == 32 * 256


def fake(inputs: Inputs, captured: bool) -> direct.Ways:
    """A library that answers as ours does, one that is wrong, and one that fails."""
    reference = attend_layers("reference", SPEC)

    def broken() -> Sequence[torch.Tensor]:
        raise RuntimeError("no kernel image")

    ways: dict[str, Callable[[], Sequence[torch.Tensor]]] = {
        "right": lambda: reference(inputs, None),
        "wrong": lambda: [-each for each in reference(inputs, None)],
    }
    return {**{name: (lambda call=call: call) for name, call in ways.items()}, "broken": broken}


def test_attend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(attend, "LIBRARIES", {"reference": fake, "flashinfer": direct.flashinfer})
    kernels = ["reference", "sdpa"]
    progress = Progress(tmp_path / "progress.json")
    progress.without[f"{CASES[0].name}, reference: wrong, eager"] = "ended its process"
    bench = attend.Bench(SPEC, kernels, CASES, CPU, progress, inner="eager")
    assert "does not serve paged calls" in bench.missing["sdpa"]
    found = [bench.run(case, seconds=0.0) for case in CASES]
    assert found[0]["errors"]["reference: wrong"] == "ended its process" and "reference: wrong" not in found[0]["eager"]
    for one in found[1:]:
        assert set(one["graph"]) == set(one["eager"]) == {"reference", "reference: right", "reference: wrong"}
        assert one["off"]["reference: right"] == 0 and one["off"]["reference: wrong"] == pytest.approx(2)
        assert "no kernel image" in one["errors"]["reference: broken"] and "flashinfer" in one["errors"]["flashinfer: direct"]
    made = attend.table(found, kernels, SPEC, floor.Floor(1e9, 1e12), CASES)
    assert [row[0] for row in made.rows] == [case.name for case in CASES]
    assert all(row[3] != MISSING and row[6:] == [MISSING] * 4 for row in made.rows)


def test_direct_is_the_fastest_way_of_the_library() -> None:
    times = {"flashinfer": 3.0, "flashinfer: a": 2.0, "flashinfer: b": 4.0, "flash_attn: c": 1.0, "general": 6.0}
    assert attend.direct(times, "flashinfer") == 2.0
    assert attend.direct(times, "general") == 1.0, "a kernel of ours alone is held against all"
    assert attend.direct({"general": 6.0}, "general") is None
    found = {"case": CASES[0].name, "graph": times, "eager": {"general": 1.0}}
    [row] = attend.table([found], ["flashinfer", "general"], SPEC, floor.Floor(1e30, 1e30), CASES).rows
    assert (row[3], row[4], row[7], row[8]) == ("1.50", MISSING, "6.00", MISSING)


def test_pages_of_a_pool_are_distinct_by_layer() -> None:
    pool = Pool(8, SPEC, CPU, torch.float32, apart=1 << 14)
    inputs = Inputs(decode_case(3, 24), pool)
    assert inputs.metadata.block_table.shape == (3, 16)
    assert sorted(page for table in inputs.tables for page in table) == list(range(6))
    assert not torch.equal(inputs.layers[0][0], inputs.layers[1][0])
    with pytest.raises(ValueError, match="needs 16 pages, the pool has 8"):
        Inputs(decode_case(8, 24), pool)


def test_speeds(tmp_path: Path) -> None:
    points = (Point("decode", 3, 24, 1), Point("prefill", 1, 20, 1), Point("stateless", 2, 9, 1), Point("mixed", 3, 24, 1))
    progress = Progress(tmp_path / "progress.json")
    progress.without["decode 16 2 3 24, reference"] = "ended its process"
    progress.add("prefill 16 2 1 20", {"times": {"reference": 1.0}, "against": {}})
    speeds.measure(SPEC, ["reference", "sdpa"], CPU, Clock(60), progress, points, seconds=0.0)
    found = {name: (set(each["times"]), set(each["against"])) for name, each in Progress(tmp_path / "progress.json").found.items()}
    assert found == {
        "prefill 16 2 1 20": ({"reference"}, set()),
        "decode 16 2 3 24": (set(), {"reference", "sdpa"}),
        "stateless 16 2 2 9": ({"reference", "sdpa"}, set()),
        "mixed 16 2 3 24": ({"reference"}, {"sdpa"}),
    }
    by_key = {speeds.key_of(name): each["times"] for name, each in progress.found.items()}
    made: dict[str, object] = {}
    text = speeds.as_module(by_key, "a device")
    exec(text, made)
    assert made["MICROSECONDS"] == {key: times for key, times in by_key.items() if times} and made["WHERE"] == "a device"
    assert [speeds.name_of(key) for key in by_key] == list(progress.found) and max(map(len, text.splitlines())) <= 132


BREAKING = """
import os, sys
from pathlib import Path
from bench.processes import Progress
progress = Progress(Path(sys.argv[1]))
for name in ("a", "b", "c"):
    if name not in progress.found and name not in progress.without:
        progress.trying(name)
        if name == "b":
            os.abort()
        progress.add(name, os.getpid())
if sys.argv[2:]:
    sys.exit(1)
"""


def test_measuring_goes_on_after_a_broken_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "progress.json"
    progress = keep_measuring([sys.executable, "-c", BREAKING, str(file)], file, 60)
    assert list(progress.found) == ["a", "c"] and progress.found["a"] != progress.found["c"]
    assert progress.without == {"b": "ended its process with status -6"}
    keep_measuring([sys.executable, "-c", BREAKING, str(file), "and fail"], file, 60)
    assert "the process itself ended with status 1" in capfd.readouterr().out
    keep_measuring([sys.executable, "-c", "import time; time.sleep(60)"], file, 0.1)
    assert "cut off after 0 s" in capfd.readouterr().out


def test_who_is_told_to_end_leaves_no_process_behind(tmp_path: Path) -> None:
    """`timeout` ends a script, but not what runs in a session of its own, such as an engine that holds a GPU's memory."""
    file = tmp_path / "number"
    child = f"import os, pathlib, time; pathlib.Path({str(file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import sys; from bench.processes import run_apart; run_apart([sys.executable, '-c', {child!r}], 60)"
    script = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    clock = Clock(30)
    while not (file.exists() and file.read_text()) and not clock.over:
        time.sleep(0.02)
    script.terminate()
    assert script.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_density_is_what_a_mask_shows() -> None:
    for slide, local, whole in itertools.product(((0,), (1,), (1, 2, 4)), (1, 3), (True, False)):
        case = block_sparse.Case(1, 512, whole, BlockSparse(block_sparse.BLOCK, local, 3, *slide))
        at = torch.arange(512)
        env = {
            "b": torch.tensor(0),
            "h": torch.arange(block_sparse.HEADS)[:, None, None],
            "i": at[:, None],
            "j": at,
            "captured": [],
        }
        seen = evaluator(case.mask.predicate())(env).expand(block_sparse.HEADS, 512, 512)
        if whole:
            density = seen.sum() / block_sparse.HEADS / (512 * 513 / 2)
        else:
            density = seen[:, -1].view(block_sparse.KV_HEADS, -1, 512).any(1).double().mean()
        assert case.density() == pytest.approx(float(density), rel=1e-6)


def test_the_table_of_speeds_names_what_auto_takes() -> None:
    found = {(p.phase, 64, 1, p.sequences, p.length): {"sdpa": 2.0, "general": 1.0} for p in STATELESS}
    assert speeds.table(found, ["sdpa", "general"]).rows == [["stateless", "64", "1", "2.00", "1.00", "1.00", "general", "all"]]
    paged = {(p.phase, 64, 1, p.sequences, p.length): {"a": 4.0, "b": 2.0 if p.sequences == 256 else 8.0} for p in PAGED}
    [row] = speeds.table(paged, ["a", "b"]).rows
    decodes = ", ".join(f"decodes of 256 sequences in tables of {room} tokens" for room in (256, 1024))
    steps = f"b where it measured faster: steps nearest to {decodes}; a in all others"
    assert row[3] == "4.00" and float(row[5]) < 4.0 and row[6:] == ["a|b", steps]


def test_a_table_of_some_sizes_keeps_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {(phase, dim, 4, 1, 1024): {"sdpa": 1.0} for phase in ("decode", "prefill", "stateless") for dim in (64, 128)}
    monkeypatch.setattr(measured, "MICROSECONDS", before)
    found = {("decode", 64, 4, 1, 1024): {"sdpa": 2.0}}
    assert {key[:2] for key in speeds.kept(found)} == {("decode", 128), ("prefill", 128), ("stateless", 128), ("stateless", 64)}


def test_a_size_that_time_cut_off_is_not_written() -> None:
    stateless = {(p.phase, 64, 4, p.sequences, p.length): {"sdpa": 1.0} for p in STATELESS}
    paged = {(p.phase, 64, 4, p.sequences, p.length): {} for p in PAGED[:-1]}
    assert speeds.whole(stateless | paged) == stateless
    last = {(p.phase, 64, 4, p.sequences, p.length): {"general": 1.0} for p in PAGED[-1:]}
    assert speeds.whole(stateless | paged | last) == stateless | paged | last


def test_what_a_run_would_cost() -> None:
    last = speeds.cost(PAGED, 9).splitlines()
    assert last[0] == "decode 1 x 1024, 1024 tokens a row" and len(last) == len(PAGED) + 1
    assert last[-1].startswith(f"{9 * len(PAGED)} points, for 9 head sizes and groups: about ")
    assert len(PAGED + STATELESS) * 9 * speeds.SECONDS_A_POINT < 150


@pytest.mark.parametrize("point", PAGED, ids=str)
def test_a_case_has_the_shapes_of_its_point(point: Point) -> None:
    """And a table as wide as a cache would give it, by which a step is compared with it."""
    case = speeds._case(point)
    width = table_width(-(-case.longest // PAGE_SIZE), PAGE_SIZE)
    assert (case.tokens, len(case.rows), width * PAGE_SIZE) == point.shape and case.longest == point.length


def test_work_of_llama() -> None:
    """The 8B shape reads 15.0 GB of weights and 128 KiB a token; the 1B shape 2.5 GB."""
    large, small = SHAPES["llama-3.1-8b"], SHAPES["llama-3.2-1b"]
    assert workload.decode_work(large, 1, 0)[0] == pytest.approx(15.0e9, rel=5e-3)
    assert workload.decode_work(large, 1, 1)[0] - workload.decode_work(large, 1, 0)[0] == 128 << 10
    assert workload.decode_work(small, 1, 0)[0] == pytest.approx(2.5e9, rel=2e-2)
    assert workload.prefill_work(large, 1, 8000)[1] == pytest.approx(2 * 8000 * 6.98e9 + 2 * 0.525e9 + 1.68e13, rel=1e-2)


def test_the_models_are_what_their_names_say() -> None:
    model = random_llama(SHAPES["tiny"], CPU, torch.float32)
    matrices = sum(each.numel() for each in model.blocks.parameters() if each.dim() == 2)
    assert matrices == SHAPES["tiny"].layers * SHAPES["tiny"].layer_weights
    assert SHAPES["llama-3.2-1b"].tied and llama_config(SHAPES["llama-3.2-1b"])["tie_word_embeddings"]


def test_the_workload_is_the_same_for_all_and_checked() -> None:
    asked: list[tuple[int, int]] = []
    saved: dict[str, dict[str, float]] = {}

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
        asked.append((len(prompts), lengths[0]))
        assert all(10 <= token < 50 for prompt in prompts for token in prompt)
        return lengths

    workload.measure(generate, 50, saved.__setitem__, rows=[(2, 5)], requests=3, new=4)
    assert asked[:5] == [(4, 8), (2, 1), (2, 1), (2, 5), (2, 5)] and asked[5][0] == 3
    assert list(saved) == ["first_run", "b2_ctx5", "mixed"]
    assert workload.Prompts(50).of(2, 3) == workload.Prompts(50).of(2, 3)
    with pytest.raises(RuntimeError, match="asked for 32 new tokens in 4 answers, got 0 in 0"):
        workload.measure(lambda prompts, lengths: [], 50, saved.__setitem__, rows=[])


def test_decode_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "ROWS", [(1, 8), (2, 4)])
    monkeypatch.setattr(decode, "NEW", 3)
    options = {"inner": "eager", "kv_tokens": 2048, "kernel": "reference"}
    chosen = argparse.Namespace(device="cpu", options=options, rows=["b2_ctx4"], requests=0, quick=True)
    found = decode.run_side("ours", SHAPES["tiny"], chosen, tmp_path / "decode_tiny_ours.json")
    assert list(found["rows"]) == ["first_run", "b2_ctx4"] and found["start"]["PagedLM"] > 0
    theirs = {**found, "floor": {"bytes": 1e9, "operations": 1e15}, "rows": {"b2_ctx4": {"decode_ms_per_step": 1e9}}}
    (tmp_path / "decode_tiny_vllm.json").write_text(json.dumps(theirs))
    decode.merge(["tiny", "llama-3.2-1b"], tmp_path)
    page = (tmp_path / "decode.md").read_text()
    assert "## tiny" in page and "llama-3.2-1b" not in page
    rows = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")}
    assert rows["| 1, 8"][2:] == [MISSING] * 5
    steps = decode.tables(SHAPES["tiny"], {"ours": found, "vllm": theirs}, floor.Floor(1e9, 1e15))[0].rows[1]
    assert steps[0] == "2, 4" and float(steps[4]) == 0 and steps[6] == "0 %"


def test_choosing_tokens() -> None:
    found = sampling.measure(CPU, rows=(2,), vocab=50)
    made = sampling.table(found, rate=100.0)
    assert [row[1] for row in made.rows] == list(sampling.KINDS) * 2 and [row[2] for row in made.rows] == ["sharp"] * 4 + [
        "flat"
    ] * 4
    assert all(row[3] != MISSING and row[6] == "2.00" for row in made.rows)
    assert [row[4] == MISSING for row in made.rows] == [False, False, True, True] * 2


STEP = [  # two steps: the host launches a graph and waits for an earlier one; the device multiplies and attends, with a gap
    {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 4},
    {"cat": "kernel", "name": "void nvjet_gemm(float)", "ts": 2, "dur": 6},
    {"cat": "kernel", "name": "attend", "ts": 6, "dur": 4},
    {"cat": "cuda_runtime", "name": "cudaEventSynchronize", "ts": 5, "dur": 2},
    {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 8, "dur": 1},
    {"cat": "cuda_runtime", "name": "cudaDeviceSynchronize", "ts": 9, "dur": 14},
    {"cat": "cpu_op", "name": "aten::copy_", "ts": 5, "dur": 2},
    {"cat": "kernel", "name": "triton_red_fused_attend", "ts": 20, "dur": 2},
    {"cat": "kernel", "name": "no length", "ts": 30},
]


def test_a_trace_is_read(tmp_path: Path) -> None:
    host, ran = steady.read_trace(STEP)
    assert [event.name for event in host] == ["cudaGraphLaunch", "cudaEventSynchronize", "cudaLaunchKernel"]
    assert [steady.kind_of(event.name) for event in ran] == ["matrix products", "attention", steady.OTHER]
    assert steady.busy(ran) == pytest.approx((8 + 2) / 20)
    rows = steady.kernels_of(ran, 2).rows
    assert rows[0] == ["all matrix products", "", "3.00", "50 %"] and rows[3] == ["nvjet_gemm", "0.50", "3.00", "50 %"]
    assert steady.waits(host, 2).rows[0] == ["cudaGraphLaunch", "0.50", "2.00"]


def test_a_trace_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steady.picture(*steady.read_trace(STEP), 2, "Two steps", tmp_path / "steady.png")
    assert (tmp_path / "steady.png").read_bytes().startswith(b"\x89PNG")


def test_steady_steps_and_churn() -> None:
    with steady.made(SHAPES["tiny"], CPU, 3, kv_tokens=1024, inner="eager", kernel="reference") as lm:
        samples = steady.churn(lm, CPU, steps=40, settle=10, most_new=9)
        assert [one["steps"] for one in samples] == [0, 20, 40]
        assert [row[0] for row in steady.memory_table(samples).rows] == ["0", "20", "40"]
        while lm.has_work:
            lm.step()
        steady.until_steady(lm, 3, 10, steps=30)
        assert steady.milliseconds(lm, CPU, 20) > 0
        host, ran = steady.traced(lm, CPU, 2)
        assert not host and not ran and lm.has_work, "no one has left"


@pytest.mark.parametrize(("planted", "found", "status"), [(1, 0, 0), (0, 0, 1), (1, 3, 1)])
def test_memory_errors_are_counted(planted: int, found: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for compute-sanitizer that writes a log a process; one that sees no planted error proves nothing."""
    tool = tmp_path / "tool"
    tool.write_text(
        "#!/bin/sh\nwhile [ $1 != --log-file ]; do shift; done\n"
        f"case $4 in *planted*) n={planted};; *) n={found}; esac\n"
        'for p in 1 2; do echo "========= ERROR SUMMARY: $n errors, of $p" > $(dirname $2)/$p.log; done\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(memcheck, "PLACES", (None, str(tool)))
    out = tmp_path / "out"
    assert memcheck.main(["--out", str(out), "tests/test_write_kv.py"]) == status
    said = (out / "memcheck.md").read_text()
    assert f"| a planted write behind a tensor | 2 | {2 * planted} | {'yes' if planted else 'NO'} |" in said
    assert (f"| {2 * found} | {'yes' if found == 0 else 'NO'} |" in said and "gpu tests of" in said) == bool(planted)
    kept = {"memcheck.log"} if found else set()
    assert {file.name for file in out.iterdir()} == {"memcheck.md", "memcheck.json", *kept}
    if found:
        assert [line[-4:] for line in (out / "memcheck.log").read_text().split("\n") if line] == ["of 1", "of 2"]


def test_what_a_sanitizer_complains_of() -> None:
    found = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at write+0xf0 in planted.py:5
========= Invalid __global__ write of size 4 bytes
========= Program hit cudaErrorMemoryAllocation (error 2)
========= ERROR SUMMARY: 3 errors
"""
    expected = {"Invalid __global__ write of size 4 bytes": 2, "Program hit cudaErrorMemoryAllocation (error 2)": 1}
    assert memcheck.headlines(found) == expected


def test_no_sanitizer_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memcheck, "PLACES", (None, "nowhere"))
    with pytest.raises(FileNotFoundError, match="comes with the CUDA toolkit"):
        memcheck.main(["--out", str(tmp_path)])

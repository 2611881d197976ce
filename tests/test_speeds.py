"""Does the faster kernel serve a site, by what was measured for the nearest sizes, and only where that says something?"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from compile_attn.kernels import mask as m
from compile_attn.kernels import measured, speeds
from compile_attn.kernels.backend import Request
from compile_attn.kernels.select import choose, known_kernels
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.speeds import PAGED, STATELESS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16
SPEC = AttentionSpec(32, 8, 128, 128)


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everywhere reference before general; for head size 64 the other way round, and at group 1 general was not measured."""
    table: dict[tuple[str, int, int, int, int], dict[str, float]] = {}
    for each in PAGED + STATELESS:
        at = (each.sequences, each.length)
        table[each.phase, 128, 4, *at] = {"general": 20.0, "reference": 10.0, "sdpa": 40.0}
        table[each.phase, 64, 4, *at] = {"general": 5.0, "reference": 15.0}
        table[each.phase, 64, 1, *at] = {"reference": 15.0}
    monkeypatch.setattr(measured, "MICROSECONDS", table)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform")
def test_the_faster_kernel_is_taken() -> None:
    choice = choose(SPEC, CUDA, HALF, 16)
    assert choice.kernel == "reference"
    assert choice.passed_over["general"] == ("could; 'reference' measured 2.00x faster at head size 128, group 4",)
    assert set(choice.passed_over) == set(known_kernels()) - {"reference"}
    choice = choose(AttentionSpec(32, 8, 64, 64), CUDA, HALF, 16)
    assert choice.kernel == "general"
    assert choice.passed_over["reference"] == ("could; 'general' measured 3.00x faster at head size 64, group 4",)
    assert choose(SPEC, CUDA, HALF, 16, "general").kernel == "general", "a forced kernel is not asked how fast it is"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform")
def test_features_come_first() -> None:
    """The reference would be faster, but a kernel that cannot is passed over for what it cannot do."""
    for each in PAGED:
        measured.MICROSECONDS[each.phase, 128, 4, each.sequences, each.length]["sdpa"] = 1.0
    assert "does not serve paged calls" in choose(SPEC, CUDA, HALF, 16).passed_over["sdpa"][0]


def found(
    spec: AttentionSpec, page_size: int | None = 16, device: torch.device = CUDA, **given: torch.dtype
) -> speeds.Speeds | None:
    return speeds.speeds(Request(spec, device, given.get("dtype", HALF), page_size, given.get("kv_dtype")))


def test_where_nothing_is_said() -> None:
    assert found(SPEC) is not None
    assert found(SPEC, device=CPU) is None
    assert found(SPEC, dtype=torch.float32) is None
    assert found(SPEC, kv_dtype=torch.float8_e4m3fn) is None
    assert found(AttentionSpec(32, 8, 128, 128, m.Chunked(64))) is None
    window = AttentionSpec(32, 8, 128, 128, m.Window(64))
    assert found(window) is not None and found(window, page_size=None) is None
    measured.MICROSECONDS.clear()
    assert found(SPEC) is None


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        (AttentionSpec(32, 4, 256, 256), (128, 4)),
        (AttentionSpec(12, 12, 64, 64), (64, 1)),
        (AttentionSpec(32, 8, 80, 80), (64, 4)),
        (AttentionSpec(32, 8, 96, 96), (128, 4)),
    ],
)
def test_the_nearest_sizes(spec: AttentionSpec, nearest: tuple[int, int]) -> None:
    near = found(spec)
    assert near is not None and (near.head_dim, near.group) == nearest


def test_a_kernel_without_a_measurement_comes_last() -> None:
    near = found(AttentionSpec(8, 8, 64, 64))
    assert near is not None
    assert near.best(["sdpa", "general", "reference"]) == "reference"
    assert near.best(["sdpa", "general"]) == "sdpa", "in order, where none was measured"
    assert near.against("general", "reference") is None


def test_as_good_as_the_fastest() -> None:
    near = speeds.Speeds(64, 4, {"sdpa": 103.0, "general": 104.0, "reference": 101.0})
    assert near.best(["general", "sdpa", "reference"]) == "general"
    assert near.against("reference", "general") == (
        "could; measured no faster than 'general' at head size 64, group 4, which comes first"
    )
    assert speeds.Speeds(64, 4, {"general": 105.0, "reference": 101.0}).best(["general", "reference"]) == "reference"


def test_the_mean_is_weighted_and_of_the_whole_mix() -> None:
    key = ("decode", 128, 4, 1, 1024)  # weight 1 of 10
    assert [each.weight for each in PAGED if each.phase == key[0] and (each.sequences, each.length) == key[3:]] == [1]
    measured.MICROSECONDS[key]["reference"] = 20.0
    near = found(SPEC)
    assert near is not None and near.means["reference"] == pytest.approx(10.0 * 2 ** (1 / sum(each.weight for each in PAGED)))
    assert "sdpa" in near.means and not math.isnan(near.means["sdpa"])
    del measured.MICROSECONDS[key]["sdpa"]
    near = found(SPEC)
    assert near is not None and "sdpa" not in near.means


def test_the_committed_table() -> None:
    """Every kernel that it names is known, and every point is one of the mix."""
    found = importlib.util.find_spec("compile_attn.kernels.measured")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    points = {(each.phase, each.sequences, each.length) for each in PAGED + STATELESS}
    for (phase, _, _, sequences, length), times in module.MICROSECONDS.items():
        assert (phase, sequences, length) in points and set(times) <= set(known_kernels())

"""Does the faster kernel serve a site, by what was measured for the nearest sizes, and only where that says something?"""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from compile_attn.kernels import mask as m
from compile_attn.kernels import measured, speeds
from compile_attn.kernels.backend import Request, Shape
from compile_attn.kernels.select import choose, known_kernels
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.speeds import PAGED, STATELESS, Point, Speeds

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
def test_several_are_named_where_steps_differ() -> None:
    measured.MICROSECONDS["decode", 128, 4, 128, 1024]["general"] = 8.0
    choice = choose(SPEC, CUDA, HALF, 16)
    assert choice.kernel == "reference|general" and set(choice.passed_over) == set(known_kernels()) - {"reference", "general"}
    words = "general where it measured faster: steps nearest to decodes of 128 sequences in tables of 1024 tokens"
    assert choice.steps == (words := f"{words}; reference in all others")
    window = choose(AttentionSpec(32, 8, 128, 128, m.Window(511)), CUDA, HALF, 16)
    assert window.steps == words + "; tables count for the 512 keys that a query sees"
    forced = choose(SPEC, CUDA, HALF, 16, "general|reference")
    assert forced.kernel == "general|reference" and "general in all others" in forced.steps
    assert set(forced.passed_over) == set(known_kernels()) - {"reference", "general"}
    assert choose(SPEC, CUDA, HALF, 16, "general").steps == ""
    assert choose(SPEC, CUDA, torch.float32, 16).kernel == "general", "nothing was measured in float32"
    assert choose(SPEC, CPU, HALF, 16).kernel == "reference"
    measured.MICROSECONDS.clear()
    assert choose(SPEC, CUDA, HALF, 16, "general|reference").steps == "general in all steps, as nothing was measured"


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


ONE = Point("decode", 1, 1024, 1)


def test_as_good_as_the_fastest() -> None:
    near = Speeds(64, 4, {ONE: {"sdpa": 103.0, "general": 104.0, "reference": 101.0}})
    assert near.best(["general", "sdpa", "reference"]) == "general"
    assert near.against("reference", "general") == (
        "could; measured no faster than 'general' at head size 64, group 4, which comes first"
    )
    assert Speeds(64, 4, {ONE: {"general": 105.0, "reference": 101.0}}).best(["general", "reference"]) == "reference"


def test_the_mean_is_weighted() -> None:
    [key] = [("decode", 128, 4, each.sequences, each.length) for each in PAGED if each == Point("decode", 1, 1024, 2)]
    measured.MICROSECONDS[key]["reference"] = 20.0
    near = found(SPEC)
    assert near is not None and near.mean("reference") == pytest.approx(10.0 * 2 ** (2 / sum(each.weight for each in PAGED)))


def test_what_was_not_measured() -> None:
    """A point without any time is left out of the mix; a kernel that lacks at one of the others is no candidate."""
    for length in (128, 1024):
        del measured.MICROSECONDS["decode", 128, 4, 32, length]
    near = found(SPEC)
    assert near is not None and near.mean("reference") == pytest.approx(10.0) and near.mean("sdpa") == pytest.approx(40.0)
    del measured.MICROSECONDS["decode", 128, 4, 1, 1024]["sdpa"]
    near = found(SPEC)
    assert near is not None and near.mean("sdpa") is None and near.mean("sdpa|general") is None
    assert near.best(["sdpa", "general"]) == "general"


# Which of several serves a step.

SHAPES = {
    Point("decode", 32, 128, 1): Shape(32, 32, 256),
    Point("decode", 8, 4096, 1): Shape(8, 8, 4096),
    Point("decode", 8, 4097, 1): Shape(8, 8, 16384),
    Point("prefill", 16, 128, 1): Shape(2048, 16, 256),
    Point("mixed", 32, 4096, 1): Shape(31 + 2048, 32, 4096),
}
STEPS = {  # a: nowhere the fastest by much; b: many short decodes; c: prompts; d: by 4 % at one point
    Point("decode", 1, 1024, 3): {"a": 10.0, "b": 13.0, "c": 15.0, "d": 10.0},
    Point("decode", 128, 512, 1): {"a": 40.0, "b": 30.0, "c": 44.0, "d": 40.0},
    Point("decode", 128, 1024, 1): {"a": 140.0, "b": 142.0, "c": 150.0, "d": 150.0},
    Point("decode", 32, 8192, 2): {"a": 240.0, "b": 260.0, "c": 250.0, "d": 230.0},
    Point("prefill", 1, 2048, 1): {"a": 100.0, "b": 130.0, "c": 80.0, "d": 100.0},
    Point("mixed", 32, 4096, 1): {"a": 100.0, "b": 130.0, "c": 120.0, "d": 130.0},
}
TABLE = Speeds(128, 4, STEPS)
SHARED = ("a", "c", "b")


@pytest.mark.parametrize("point", SHAPES, ids=str)
def test_the_shape_of_a_point(point: Point) -> None:
    assert point.shape == SHAPES[point]


@pytest.mark.parametrize(
    ("shape", "serving"),
    [
        (Shape(128, 128, 1024), "b"),  # by the mean of both lengths that such a table may hold
        (Shape(112, 112, 1024), "b"),
        (Shape(112, 112, 256), "b"),
        (Shape(512, 512, 1024), "b"),
        (Shape(2, 2, 1024), "a"),
        (Shape(128, 128, 16384), "a"),
        (Shape(128, 128, 4096), "b"),
        (Shape(1024, 1024, 4096), "b"),
        (Shape(2100, 32, 4096), "a"),
        (Shape(129, 128, 1024), "a"),  # no decode: one row has two tokens, as in a mixed batch
        (Shape(300, 2, 1024), "c"),
        (Shape(8192, 1, 65536), "c"),
    ],
)
def test_the_nearest_point_decides(shape: Shape, serving: str) -> None:
    assert TABLE.fastest(SHARED, shape) == serving


@pytest.mark.parametrize("sequences", [1, 2, 8, 48, 128, 256, 512])
def test_of_decodes_the_table_says_more_than_the_number(sequences: int) -> None:
    """In the mix: however many sequences there are, long ones are compared with long ones."""
    times = {each: {"long": 2.0, "short": 1.0} if each.shape.room <= 1024 else {"long": 1.0, "short": 2.0} for each in PAGED}
    for room, serving in ((256, "short"), (1024, "short"), (4096, "long"), (16384, "long"), (131_072, "long")):
        assert Speeds(128, 4, times).fastest(("long", "short"), Shape(sequences, sequences, room)) == serving


def test_a_step_like_none_that_was_measured() -> None:
    decodes = Speeds(128, 4, {point: times for point, times in STEPS.items() if point.phase == "decode"})
    assert decodes.fastest(("c", "b"), Shape(2048, 1, 4096)) == "c", "the first"
    assert TABLE.fastest(("e", "f"), Shape(1, 1, 1024)) == "e"
    assert TABLE.fastest(("e", "b"), Shape(1, 1, 1024)) == "b", "one without a measurement comes last"


def test_as_far_from_two() -> None:
    """In a table of 4096 tokens: both count."""
    one, other = Point("decode", 32, 1024, 1), Point("decode", 32, 8192, 1)
    for slow, wanted in ((130.0, "b"), (140.0, "a")):
        table = Speeds(64, 4, {one: {"a": 20.0, "b": 16.0}, other: {"a": 100.0, "b": slow}})
        mean = math.sqrt(16 * slow), math.sqrt(20 * 100)
        assert (mean[0] < mean[1] * speeds.AS_GOOD) == (slow == 130.0)
        assert table.fastest(("b", "a"), Shape(32, 32, 4096)) == wanted


def test_which_are_worth_keeping() -> None:
    assert TABLE.several(["a", "b", "c", "d"]) == SHARED, "the best of the mix, then by what they gain"
    assert TABLE.several(["d", "a", "c"]) == ("d", "a", "c"), "d is as good as a over the mix, and asked for first"
    assert TABLE.several(["a", "d"]) == ("a",), "4 % at one point are not worth a second kernel"
    assert TABLE.several(["x", "a"]) == ("a",) and TABLE.several(["x", "y"]) == ("x",)


def test_one_that_is_no_longer_the_fastest_anywhere() -> None:
    """The best over the mix, but each of its steps is served better by one of two others."""
    here, there = Point("decode", 1, 1024, 1), Point("decode", 32, 8192, 1)
    table = Speeds(64, 4, {here: {"a": 12.0, "b": 10.0, "c": 20.0}, there: {"a": 120.0, "b": 200.0, "c": 100.0}})
    assert table.best(["a", "b", "c"]) == "a" and set(table.several(["a", "b", "c"])) == {"b", "c"}


def test_the_mean_of_several_counts_each_where_it_serves() -> None:
    several = TABLE.mean("a|c|b")
    expected = {
        point: times["b" if point.sequences == 128 else "c" if point.phase == "prefill" else "a"] for point, times in STEPS.items()
    }
    logs = sum(point.weight * math.log(time) for point, time in expected.items())
    assert several == pytest.approx(math.exp(logs / sum(point.weight for point in STEPS)))
    alone = TABLE.mean("a")
    assert alone is not None and several is not None
    assert TABLE.against("a", "a|c|b") == f"could; 'a|c|b' measured {alone / several:.2f}x faster at head size 128, group 4"


def test_which_steps_in_words() -> None:
    assert TABLE.words(SHARED) == (
        "c where it measured faster: steps nearest to 2048 new tokens in 1 sequence in tables of 4096 tokens; "
        "b where it measured faster: steps nearest to decodes of 128 sequences in tables of 1024 tokens; a in all others"
    )
    assert TABLE.words(("b", "a")) == (
        "a where it measured faster: steps nearest to decodes of 1 sequence in tables of 1024 tokens, "
        "2048 new tokens in 1 sequence in tables of 4096 tokens, 2079 new tokens in 32 sequences in tables of 4096 tokens, "
        "decodes of 32 sequences in tables of 16384 tokens; b in all others"
    )
    assert (
        TABLE.words(("a", "d"))
        == "d where it measured faster: steps nearest to decodes of 32 sequences in tables of 16384 tokens; a in all others"
    )
    assert TABLE.words(("d", "x")) == "x in no step; d in all others"


def test_the_committed_table() -> None:
    """Every kernel that it names is known, and every point is one of the mix."""
    found = importlib.util.find_spec("compile_attn.kernels.measured")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    points = {(each.phase, each.sequences, each.length) for each in PAGED + STATELESS}
    for (phase, _, _, sequences, length), times in module.MICROSECONDS.items():
        assert (phase, sequences, length) in points and set(times) <= set(known_kernels())

"""Is the kernel for Hopper right, and is it taken where it can serve?

On a CPU its partitions of warps are threads over Triton's interpreter (tests/gluon_threads.py), against float64 loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compile_attn.kernels import hopper, triton_launch
from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import H
from compile_attn.kernels.spec import AttentionSpec
from tests.hopper import SPECIAL
from tests.oracle import CAPTURED, SPECS
from tests.paged import PagedBatch, paged_batch
from tests.test_general import BIASES, NO_TRITON, SCORES, compile_for_an_h200, fp8, interpreted
from tests.test_general import MASKS as ANY_MASK

# Rows of a tile behind its last token hold what stands there: another sequence's tokens, or pads, which are NaN.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN")
HALF = {"atol": 2e-3, "rtol": 2e-3}
MASKS = [m.Causal(), m.Bidirectional(), m.Window(20), m.BlockSparse(16, 1, 3), m.BlockSparse(32, 1, 2, head_step=1), m.Chunked(24)]


def switch_on(patch: pytest.MonkeyPatch) -> list[hopper.Prepared]:
    """Each launch leaves what was prepared for it."""
    launched: list[hopper.Prepared] = []
    real = hopper.Prepared.args

    def args(self: hopper.Prepared, *given: Any) -> tuple[Any, ...]:
        launched.append(self)
        return real(self, *given)

    patch.setattr(hopper, "ON", True)
    patch.setattr(hopper.Prepared, "args", args)
    triton_launch.forget()
    return launched


def modules() -> tuple[Any, ...]:
    """Which tile comes when, and the kernel."""
    from tests.gluon_threads import interpreted

    return interpreted("compile_attn.kernels.hopper_tiles_triton", "compile_attn.kernels.hopper_triton")


def in_threads(patch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with small tiles."""
    patch.setattr(hopper, "CUT", replace(hopper.CUT, rows=16, keys=16))
    patch.setattr(hopper, "kernel", lambda: modules()[1])
    patch.setattr(hopper, "gluon", str)
    patch.setattr(hopper, "available", lambda device: True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[hopper.Prepared]]:
    yield switch_on(monkeypatch)
    triton_launch.forget()


@pytest.fixture
def threads(counted: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> list[hopper.Prepared]:
    in_threads(monkeypatch)
    return counted


def check(batch: PagedBatch, kernel: str = "general") -> None:
    torch.testing.assert_close(batch.attend(CAPTURED, kernel).double(), batch.expected(CAPTURED), **HALF)


def long(spec: AttentionSpec, sequences: Sequence[tuple[int, int]], page_size: int = 16, pad_tokens: int = 3) -> None:
    """Against the reference, which is faster than loops; both in the same numbers."""
    batch = paged_batch(spec, sequences, page_size=page_size, pad_tokens=pad_tokens, dtype=torch.float16)
    exact = replace(batch, q=batch.q.float(), k_pages=batch.k_pages.float(), v_pages=batch.v_pages.float())
    torch.testing.assert_close(batch.attend(CAPTURED, "general").float(), exact.attend(CAPTURED, "reference"), **HALF)


@interpreted
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str, threads: list[hopper.Prepared]) -> None:
    """Pages that are owned in part, whose other slots are NaN; pad tokens; a sequence without new tokens."""
    spec = replace(SPECS[name], head_dim=64, head_dim_v=64)
    check(paged_batch(spec, [(0, 31), (9, 1), (0, 0), (12, 19)], page_size=16, pad_tokens=5, dtype=torch.float16))
    assert len(threads) == 1


@interpreted
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_prompts_and_chunks(mask: m.Mask, threads: list[hopper.Prepared]) -> None:
    long(AttentionSpec(4, 2, 64, 64, mask, scale=0.3, sinks=0.25 * H), [(0, 1), (61, 40), (0, 0), (7, 33)])
    long(AttentionSpec(4, 1, 64, 64, mask, scale=0.3, softcap=3.0), [(13, 70)], pad_tokens=0)
    assert len(threads) == 2


@interpreted
@pytest.mark.parametrize(("page_size", "group", "dim"), [(8, 1, 64), (16, 2, 128), (32, 16, 64), (128, 1, 128)])
def test_pages_smaller_and_larger_than_a_block(page_size: int, group: int, dim: int, threads: list[hopper.Prepared]) -> None:
    long(AttentionSpec(group, 1, dim, dim, m.Window(50), scale=0.2), [(0, 70), (129, 31)], page_size)
    assert len(threads) == 1


@interpreted
def test_decodes_beside_prompts_go_to_the_other_kernel(threads: list[hopper.Prepared]) -> None:
    long(AttentionSpec(4, 2, 64, 64, m.Window(60), scale=0.3), [(50, 1), (3, 1), (0, 60), (70, 1), (71, 45), (0, 2)])
    assert len(threads) == 1


@interpreted
@pytest.mark.parametrize("programs", [1, 2, 5])
def test_any_number_of_programs(programs: int, threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns that not every program has, and those of reverse order."""
    monkeypatch.setattr(triton_launch, "_device", lambda device: (227 << 10, programs))
    triton_launch.forget()
    long(AttentionSpec(4, 2, 64, 64, m.BlockSparse(16, 1, 3, 1), scale=0.3), [(0, 75), (20, 50)])
    assert len(threads) == 1


@interpreted
def test_more_sequences_than_are_looked_through_at_once(threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    monkeypatch.setattr(modules()[0], "SEQUENCES", tl.constexpr(4))
    many = [(0, 20), (0, 0), (40, 1), (2, 1), (0, 0), (0, 25), (7, 4), (1, 1), (30, 25), (0, 0), (0, 9)]
    long(AttentionSpec(4, 2, 64, 64, scale=0.3), many)
    assert len(threads) == 1


@interpreted
def test_tiles_of_a_gpu(threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "CUT", hopper.Cut())
    for mask in (m.Causal(), m.BlockSparse(64, 1, 3)):
        long(AttentionSpec(8, 2, 128, 128, mask, scale=0.09), [(0, 190), (133, 60)])
    assert len(threads) == 2


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1)]),
    mask=ANY_MASK,
    bias=BIASES,
    score=SCORES,
    softcap=st.sampled_from([None, 2.0]),
    sinks=st.sampled_from([None, 0.25 * H + 0.1]),
    sequences=st.lists(st.tuples(st.integers(0, 18), st.integers(0, 20)), max_size=3),
    page_size=st.sampled_from([8, 16, 32]),
    programs=st.integers(1, 3),
)
def test_any_spec(
    heads: tuple[int, int],
    mask: m.Mask,
    bias: sympy.Expr | None,
    score: sympy.Expr | None,
    softcap: float | None,
    sinks: sympy.Expr | None,
    sequences: list[tuple[int, int]],
    page_size: int,
    programs: int,
) -> None:
    assume(mask.predicate() != sympy.false)
    parts = {"scale": 0.35, "softcap": softcap, "bias": bias} if score is None else {"score": score}
    with pytest.MonkeyPatch.context() as patch:
        launched = switch_on(patch)
        in_threads(patch)
        patch.setattr(triton_launch, "_device", lambda device: (227 << 10, programs))
        long(AttentionSpec(*heads, 64, 64, mask, sinks=sinks, **parts), [*sequences, (7, 37)], page_size)
    triton_launch.forget()
    assert len(launched) == 1


# What it cannot serve, the other kernel does.

CAUSAL = AttentionSpec(4, 2, 64, 64, scale=0.3)
PROMPTS = [(0, 60), (20, 40)]


@interpreted
@pytest.mark.parametrize(
    ("spec", "more"),
    [
        (CAUSAL, {"dtype": torch.float32}),
        (CAUSAL, {"page_size": 4}),
        (CAUSAL, {"page_size": 24}),
        (replace(CAUSAL, head_dim=80, head_dim_v=80), {}),
        (replace(CAUSAL, head_dim_v=128), {}),
        (replace(CAUSAL, num_q_heads=6), {}),
        (replace(CAUSAL, num_q_heads=64), {}),
        (replace(CAUSAL, mask=m.BlockSparse(5, 1, 3)), {}),
    ],
    ids=["float32", "small pages", "odd pages", "head size", "two head sizes", "odd group", "large group", "odd blocks"],
)
def test_other_cases_fall_back(spec: AttentionSpec, more: dict[str, Any], threads: list[hopper.Prepared]) -> None:
    served = spec.mask == m.BlockSparse(5, 1, 3)  # what has no blocks is masked in blocks of any size
    check(paged_batch(spec, PROMPTS, **{"page_size": 16, "dtype": torch.float16, **more}))
    assert len(threads) == served


@interpreted
@pytest.mark.parametrize("sequences", [[(50, 1), (3, 1)], [(9, 4)]], ids=["decode", "few tokens"])
def test_steps_of_few_tokens_fall_back(sequences: list[tuple[int, int]], threads: list[hopper.Prepared]) -> None:
    check(paged_batch(CAUSAL, sequences, page_size=16, dtype=torch.float16))
    assert len(threads) == 0


@interpreted
@pytest.mark.parametrize(("dim", "each", "served"), [(64, 44, 0), (64, 45, 1), (128, 44, 1)])
def test_long_prompts_of_small_heads_fall_back(
    dim: int, each: int, served: int, threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hopper, "_LONG", each)
    spec = replace(CAUSAL, head_dim=dim, head_dim_v=dim)
    check(paged_batch(spec, [(0, 40), (3, 50)], page_size=16, dtype=torch.float16))
    assert len(threads) == served


@interpreted
def test_tensors_that_tma_cannot_describe_fall_back(threads: list[hopper.Prepared]) -> None:
    batch = paged_batch(CAUSAL, PROMPTS, page_size=16, dtype=torch.float16)
    expected = batch.attend([], "general")
    assert len(threads) == 1

    def other(**tensors: torch.Tensor) -> None:
        torch.testing.assert_close(replace(batch, **tensors).attend([], "general"), expected, **HALF)

    fused = torch.zeros(batch.q.shape[0], 9, 64, dtype=torch.float16)
    fused[:, 2:6] = batch.q
    other(q=fused[:, 2:6])
    assert len(threads) == 2  # a slice of a joined product is described
    padded = torch.zeros(*batch.q.shape[:2], 67, dtype=torch.float16)
    padded[..., :64] = batch.q
    other(q=padded[..., :64])
    shifted = torch.empty(batch.q.numel() + 1, dtype=torch.float16)[1:].view(batch.q.shape).copy_(batch.q)
    other(q=shifted)
    both = torch.stack([batch.k_pages, batch.v_pages], 2).flatten(2, 3)
    other(k_pages=both[:, :, :2], v_pages=both[:, :, 2:])
    assert len(threads) == 2
    assert not threads[0].takes(batch.q[:, :1].expand(-1, 4, -1), batch.k_pages, batch.v_pages)


@interpreted
def test_fp8_pages_fall_back(threads: list[hopper.Prepared]) -> None:
    batch = paged_batch(CAUSAL, PROMPTS, page_size=16, dtype=torch.float16)
    scales = torch.tensor(0.02), torch.tensor([0.03, 0.01])
    found, expected = (fp8(batch, torch.float8_e4m3fn, *scales, kernel) for kernel in ("general", "reference"))
    torch.testing.assert_close(found, expected, **HALF)
    assert len(threads) == 0


@pytest.mark.skipif(NO_TRITON, reason="there is no Triton for this platform")
@pytest.mark.parametrize("which", ["by default", pytest.param("others", marks=pytest.mark.every_form)])
def test_compiles_for_an_h200(which: str, tmp_path: Path) -> None:
    default = {"special, dense", "special, by head"}
    compile_for_an_h200(tmp_path, *(name for name in SPECIAL if (name in default) == (which == "by default")))


# The threads show what they are for.


@interpreted
@pytest.mark.parametrize(
    ("word", "message"), [("arrive", "wait for each other"), ("wait", "a product reads it|nobody waits for|more arrivals")]
)
def test_barriers_are_needed(word: str, message: str, threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gluon_threads import nothing

    monkeypatch.setattr(modules()[1].mbarrier, word, nothing)
    with pytest.raises(Exception, match=message):
        check(paged_batch(CAUSAL, [(0, 120), (9, 100)], page_size=16, dtype=torch.float16))


@interpreted
def test_values_that_are_not_owned_are_needed_zero(threads: list[hopper.Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.gluon_threads import nothing

    monkeypatch.setattr(modules()[1], "clear_behind", nothing)
    found = paged_batch(CAUSAL, PROMPTS, page_size=16, dtype=torch.float16).attend([], "general")
    assert found.isnan().any()

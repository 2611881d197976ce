"""Is the Triton backend right? In Triton's interpreter against float64 loops; on a GPU against the reference in float64.

Without a CUDA device conftest.py turns the interpreter on before anything imports Triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compile_attn.kernels import mask as m
from compile_attn.kernels import tiles, triton_launch
from compile_attn.kernels.backend import Paged, Request
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S
from compile_attn.kernels.select import backend, choose
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from tests.oracle import CAPTURED, SLOPE, SPECS, attend_row
from tests.paged import PagedBatch, paged_batch
from tests.test_reference import EXPRESSIONS, FLOAT32, MIXED
from tests.tiny import alone, prompts_of, tiny

# Only where no Triton exists may its tests be missing: on Linux the extra `test` installs it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = not HAS_TRITON and sys.platform != "linux"
# What torch 2.11 brings, on a GPU machine: its interpreter fails on a 0-dim result of numpy 2.4.
OLD_TRITON = HAS_TRITON and tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or NO_TRITON or OLD_TRITON,
    reason="no Triton for this platform, one whose interpreter does not work, or a GPU, where the gpu tests run instead",
)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def stateless(spec: AttentionSpec, tq: int, tk: int, seed: int = 0, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k and v of two sequences, laid out by token, as models have them."""
    make = torch.Generator().manual_seed(seed)
    sizes = (
        (tq, spec.num_q_heads, spec.head_dim),
        (tk, spec.num_kv_heads, spec.head_dim),
        (tk, spec.num_kv_heads, spec.head_dim_v),
    )
    return tuple(torch.randn(2, *size, generator=make).transpose(1, 2).to(device) for size in sizes)


# In the interpreter, against the oracle.


@interpreted
@pytest.mark.parametrize("name", SPECS)
def test_paged_equals_oracle(name: str) -> None:
    batch = paged_batch(SPECS[name], MIXED, pad_tokens=3)
    torch.testing.assert_close(batch.attend(CAPTURED, "general").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("name", SPECS)
def test_stateless_equals_oracle(name: str) -> None:
    spec = SPECS[name]
    q, k, v = stateless(spec, 12, 12)
    out = torch.ops.paged_attn.attention(q, k, v, list(CAPTURED), spec.encode(), "general")
    for b, i in ((0, 0), (0, 11), (1, 5), (1, 11)):
        expected = attend_row(spec, q[b, :, i], k[b].transpose(0, 1), v[b].transpose(0, 1), b, i, CAPTURED)
        torch.testing.assert_close(out[b, :, i].double(), expected, atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("sequences", [[(40, 1), (3, 1), (0, 1)], [(70, 1), (0, 0)], [(0, 9), (37, 30)]], ids=str)
@pytest.mark.parametrize("name", ["gqa", "sinks", "everything", "bidirectional", "rounded"])
def test_keys_shared_by_several_programs(name: str, sequences: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of keys without a mask, at both edges of a window, and parts that see no key at all."""
    monkeypatch.setattr(tiles, "_KEYS_A_PROGRAM", 8)
    monkeypatch.setattr(tiles, "_KEYS_ALONE", 0)
    triton_launch.forget()
    batch = paged_batch(SPECS[name], sequences, page_size=16, pad_tokens=1)
    torch.testing.assert_close(batch.attend(CAPTURED, "general").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_hidden_blocks_are_not_visited() -> None:
    """NaN where no query of a tile can see: a visit would spread it through 0 * NaN."""
    batch = paged_batch(AttentionSpec(2, 1, 16, 16, m.Window(5), scale=0.3), [(199, 1), (150, 3)], page_size=16)
    expected = batch.attend([], "general")
    for row, pages in enumerate(batch.metadata.block_table.tolist()):
        for page in pages[: (batch.metadata.seq_lens[row].item() - 8) // 64 * 4]:  # a tile has 64 keys at most
            batch.k_pages[page] = batch.v_pages[page] = torch.nan
    assert torch.equal(batch.attend([], "general"), expected)

    spec = AttentionSpec(1, 1, 16, 16, scale=0.3)
    q, k, v = stateless(spec, 256, 256)
    expected = backend("general").attention(q, k, v, [], spec)
    k[:, :, 192:] = v[:, :, 192:] = torch.nan
    found = backend("general").attention(q, k, v, [], spec)
    assert torch.equal(found[:, :, :128], expected[:, :, :128])
    assert found[:, :, 192:].isnan().all()


@interpreted
def test_blocks_within_a_wide_window_are_taken_unmasked() -> None:
    """Unless an edge of the window crosses them between the first and the last query of a tile, as at key 32, and at key 96."""
    batch = paged_batch(AttentionSpec(4, 2, 8, 8, m.Window(70), scale=0.9), [(150, 1), (98, 12), (90, 12)], page_size=16)
    torch.testing.assert_close(batch.attend([], "general").double(), batch.expected([]), atol=FLOAT32, rtol=0)


@interpreted
def test_queries_of_any_strides() -> None:
    batch = paged_batch(SPECS["gqa"], MIXED, pad_tokens=3)
    expected = batch.attend([], "general")
    fused = torch.full((batch.q.shape[0], 8, 20), torch.nan)
    fused[:, 2:6, 1:17:2] = batch.q
    batch.q = fused[:, 2:6, 1:17:2]
    assert torch.equal(batch.attend([], "general"), expected)


@interpreted
@pytest.mark.parametrize(("kv_heads", "group", "dims"), [(1, 1, (16, 16)), (2, 3, (24, 8)), (1, 7, (5, 33)), (1, 40, (16, 16))])
def test_groups_and_head_sizes(kv_heads: int, group: int, dims: tuple[int, int]) -> None:
    spec = AttentionSpec(kv_heads * group, kv_heads, *dims, m.Window(6), scale=0.3)
    for sequences in ([(5, 1), (9, 1)], [(2, 9), (0, 3)]):
        batch = paged_batch(spec, sequences, page_size=3)
        torch.testing.assert_close(batch.attend([], "general").double(), batch.expected([]), atol=FLOAT32, rtol=0)


@interpreted
def test_a_large_group_is_cut_into_tiles() -> None:
    spec = AttentionSpec(80, 1, 16, 16, scale=0.3)
    assert tiles.tiles_of(spec, torch.float32, 1, 227 << 10).group < 80
    batch = paged_batch(spec, [(5, 1), (2, 2)])
    torch.testing.assert_close(batch.attend([], "general").double(), batch.expected([]), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch = paged_batch(SPECS["everything"], MIXED, dtype=dtype)
    out = batch.attend(CAPTURED, "general")
    assert out.dtype == dtype
    # Weights, in bfloat16 only on a GPU, and the output are rounded; the interpreter rounds bfloat16 towards zero.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), batch.expected(CAPTURED), atol=unit, rtol=unit)


def fp8(batch: PagedBatch, dtype: torch.dtype, k_scale: torch.Tensor, v_scale: torch.Tensor, kernel: str) -> torch.Tensor:
    """What `kernel` gives over pages that hold the batch's keys and values by their scales."""
    slots = torch.arange(batch.k_pages.shape[0] * batch.k_pages.shape[1], device=batch.q.device)
    k_pages, v_pages = (torch.empty_like(pages, dtype=dtype) for pages in (batch.k_pages, batch.v_pages))
    flat = batch.k_pages.flatten(0, 1), batch.v_pages.flatten(0, 1)
    torch.ops.paged_attn.write_kv(*flat, k_pages, v_pages, slots, k_scale, v_scale)
    at = batch.metadata
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    out: torch.Tensor = torch.ops.paged_attn.attend(
        batch.q, k_pages, v_pages, *where, [], batch.spec.encode(), kernel, k_scale, v_scale
    )
    return out


@interpreted
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_pages_with_scales(dtype: torch.dtype) -> None:
    batch = paged_batch(SPECS["gqa"], [(5, 2), (8, 1)])
    for scales in ((torch.tensor(0.02), torch.tensor([0.03, 0.01])), (torch.tensor([0.01, 0.03]), torch.tensor([0.05]))):
        found, expected = (fp8(batch, dtype, *scales, kernel) for kernel in ("general", "reference"))
        torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_printed_arithmetic_equals_evaluation(expr: sympy.Basic) -> None:
    """The values are the unit matrix, so that the output is every probability."""
    mask, score = (m.Causal(), S / 3 + expr / 7) if isinstance(expr, sympy.Expr) else (m.General(expr), None)
    spec = AttentionSpec(4, 2, 8, 16, mask, score=score)
    q, k, _ = stateless(spec, 16, 16)
    v = torch.eye(16).expand(2, 2, 16, 16)
    found, expected = (backend(name).attention(q, k, v, CAPTURED, spec) for name in ("general", "reference"))
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


@interpreted
def test_products_of_positions_beyond_int32() -> None:
    distance = (I + 60_000) ** 2 - (J + 60_000) ** 2  # each square is above 2^31, the difference is small
    spec = AttentionSpec(2, 1, 16, 16, m.General(sympy.Lt(distance, 600_000) & sympy.Le(J, I)), scale=0.3)
    q, k, v = stateless(spec, 12, 12)
    found, expected = (backend(name).attention(q, k, v, [], spec) for name in ("general", "reference"))
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


@interpreted
def test_a_captured_bias_as_low_as_float32_goes() -> None:
    """A row of padding, hidden as a whole by finfo.min: every key has the same weight, as in eager."""
    bias = torch.zeros(2, 6, 6)
    bias[0, :, 4:] = torch.finfo(torch.float32).min
    bias[1, 3] = torch.finfo(torch.float32).min
    spec = AttentionSpec(2, 2, 16, 16, m.Bidirectional(), scale=0.25, bias=Load(0, B, I, J))
    q, k, v = stateless(spec, 6, 6)
    found, expected = (backend(name).attention(q, k, v, [bias], spec) for name in ("general", "reference"))
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)
    torch.testing.assert_close(found[1, :, 3], v[1].mean(1), atol=FLOAT32, rtol=0)


@interpreted
def test_a_row_without_keys_is_zero() -> None:
    spec = AttentionSpec(2, 2, 4, 4, m.General(sympy.Lt(J, I)))
    q = torch.randn(1, 2, 3, 4)
    for each in (spec, AttentionSpec(2, 2, 4, 4, spec.mask, sinks=0.5 * H)):
        out = torch.ops.paged_attn.attention(q, q, q, [], each.encode(), "general")
        assert not out[:, :, 0].any()
        assert out[:, :, 1:].isfinite().all()


@interpreted
def test_nothing_to_do() -> None:
    spec = SPECS["gqa"]
    batch = paged_batch(spec, [(0, 0), (0, 0)], pad_tokens=2)
    assert torch.equal(batch.attend([], "general"), torch.zeros(2, 4, 8))
    q, k, v = stateless(spec, 0, 5)
    assert backend("general").attention(q, k, v, [], spec).shape == (2, 4, 0, 8)
    q, k, v = stateless(spec, 3, 0)
    assert not backend("general").attention(q, k, v, [], spec).any()


@interpreted
def test_a_captured_tensor_of_another_rank_is_refused() -> None:
    q, k, v = stateless(SPECS["sinks"], 3, 3)
    with pytest.raises(ValueError, match=r"captured tensor 2 has shape \[4, 1\]; the spec reads it with 1 indices"):
        backend("general").attention(q, k, v, [*CAPTURED[:2], CAPTURED[2][:, None]], SPECS["sinks"])


@interpreted
def test_a_model_generates_through_it() -> None:
    check_generation("cpu")


def check_generation(device: str) -> None:
    prompts = prompts_of([5, 23, 1])
    with PagedLM(tiny().to(device), kv_tokens=256, page_size=4, max_seqs=2, kernel="general", inner="eager", poison=True) as lm:
        found = lm.generate(prompts, max_new_tokens=5)
        assert {site.kernel for site in lm.report.sites} == {"general"}
    assert found == [alone(tiny(), prompt, Sampling(max_new_tokens=5)) for prompt in prompts]


# Any spec of the grammar, against the reference.

WHOLE = st.deferred(
    lambda: (
        st.sampled_from([I, J, H, I - J, B, sympy.Integer(3), sympy.Mod(I, 4), sympy.floor((J - I) / 3)])
        | st.builds(lambda a, b: a + b, WHOLE, WHOLE)
        | st.builds(lambda a, b: sympy.Min(a, b), WHOLE, WHOLE)
        | st.builds(lambda a, b: sympy.Piecewise((a, I > J + 2), (b, True)), WHOLE, WHOLE)
        | st.builds(lambda a, c: sympy.Mod(a, c), WHOLE, st.integers(2, 7))
        | st.builds(lambda a, c: sympy.floor(a / c), WHOLE, st.integers(2, 7))
        | st.builds(lambda a: sympy.Abs(a), WHOLE)
    )
)
MASKS = st.deferred(
    lambda: (
        st.sampled_from([m.Causal(), m.Bidirectional(), m.All(m.Causal(), m.SameDocument(0))])
        | st.builds(m.Window, st.integers(0, 9))
        | st.builds(m.Chunked, st.integers(1, 9))
        | st.builds(m.Prefix, st.integers(0, 9))
        | st.builds(m.BlockSparse, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(0, 2))
        | st.builds(lambda a, b: m.General((a < b) | sympy.Eq(I, J)), WHOLE, WHOLE)
        | st.builds(m.Any, MASKS, MASKS)
        | st.builds(lambda a: m.All(a, m.Causal()), MASKS)
    )
)
BIASES = st.sampled_from([None, SLOPE * (J - I), Load(1, H, sympy.Mod(I - J, 9)), Round(7, 0.3 * J)]) | st.builds(
    lambda a: 0.1 * a, WHOLE
)
SCORES = st.none() | st.builds(lambda a: 2.0 * sympy.tanh((0.4 * S + 0.05 * a) / 2.0), WHOLE)


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 2)]))
    parts = {"scale": 0.35, "softcap": draw(st.sampled_from([None, 2.0])), "bias": draw(BIASES)}
    score = draw(SCORES)
    if score is not None:
        parts = {"score": score}
    sinks = draw(st.sampled_from([None, Load(2, H), 0.25 * H + 0.1]))
    dims = draw(st.sampled_from([(8, 8), (16, 5)]))
    return AttentionSpec(kv_heads * group, kv_heads, *dims, draw(MASKS), sinks=sinks, **parts)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    spec=specs(),
    sequences=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), min_size=1, max_size=4),
    page_size=st.sampled_from([1, 3, 16]),
    pad_tokens=st.integers(0, 2),
)
def test_any_spec_equals_the_reference(
    spec: AttentionSpec, sequences: list[tuple[int, int]], page_size: int, pad_tokens: int
) -> None:
    assume(spec.mask.predicate() != sympy.false)
    batch = paged_batch(spec, sequences, page_size=page_size, pad_tokens=pad_tokens)
    at = batch.metadata
    kv = Paged(batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    found, expected = (backend(name).attend(batch.q, kv, CAPTURED, spec) for name in ("general", "reference"))
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


# When may it be chosen?


def test_on_a_cpu_only_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Request(SPECS["gqa"], CPU, torch.float32, 16)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "runs on a CPU only in Triton's interpreter; set TRITON_INTERPRET=1 for tests, or choose kernel='auto'"
    assert reason in backend("general").reasons(asked)
    assert choose(SPECS["gqa"], CPU, torch.float32, 16).kernel == "reference"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reason not in backend("general").reasons(asked)


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    general_, plain = backend("general"), AttentionSpec(8, 2, 64, 64)
    if importlib.util.find_spec("triton") is not None:
        for spec in SPECS.values():
            assert general_.reasons(Request(spec, CUDA, torch.bfloat16, 16)) == ()
    assert "computes in bfloat16, float16, float32, not in float64" in general_.reasons(Request(plain, CUDA, torch.float64, 16))[0]
    large = general_.reasons(Request(AttentionSpec(8, 2, 1000, 64), CUDA, torch.float32, None))
    assert "has tiles for head sizes up to 512 in float32, not 1000; choose kernel='auto'" in large
    strange = general_.reasons(Request(AttentionSpec(8, 2, 64, 64, score=S + sympy.gamma(I + 1)), CUDA, torch.float32, None))
    assert any(each.startswith("cannot print the score and mask: no Triton text for gamma") for each in strange)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = "needs triton, which is not installed; pip install triton, or choose kernel='auto'"
    assert general_.reasons(Request(plain, CUDA, torch.float16, 16)) == (missing,)


@pytest.mark.skipif(NO_TRITON, reason="there is no Triton for this platform")
def test_compiles_for_an_h200(tmp_path: Path) -> None:
    compile_for_an_h200(tmp_path, "decode", "everything")


def compile_for_an_h200(tmp_path: Path, *cases: str) -> None:
    """The interpreter accepts what the compiler refuses; see tests/hopper.py."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.hopper", *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bytes of shared memory") == len(cases)


# On a GPU, against the reference in float64.

PHASES = {
    "decode": [(1000, 1), (36, 1), (4095, 1), (0, 1), (0, 0)],
    "prefill": [(0, 700), (0, 33)],
    "mixed": [(513, 1), (0, 300), (1000, 65), (0, 0), (15, 1)],
}
# Weights and output are rounded to the dtype; float32 is multiplied as three products of tf32 halves.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}
BY_PAIR = Load(1, H % 4, (I + J) % 9)


def close(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype] / 4}


def on_gpu(
    spec: AttentionSpec, sequences: Sequence[tuple[int, int]], dtype: torch.dtype, page_size: int = 16, pad_tokens: int = 3
) -> PagedBatch:
    return paged_batch(spec, sequences, page_size=page_size, pad_tokens=pad_tokens, dtype=dtype, device="cuda")


def captured_on_gpu() -> list[torch.Tensor]:
    return [each.cuda() for each in CAPTURED]


def paged(batch: PagedBatch, dtype: torch.dtype | None = None) -> Paged:
    at = batch.metadata
    pools = (pages.to(dtype or pages.dtype) for pages in (batch.k_pages, batch.v_pages))
    return Paged(*pools, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)


def check_on_gpu(batch: PagedBatch) -> None:
    captured, dtype = captured_on_gpu(), batch.q.dtype
    found = backend("general").attend(batch.q, paged(batch), captured, batch.spec)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), batch.reference(captured), **close(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check_on_gpu(on_gpu(SPECS[name], MIXED, dtype))
    q, k, v = (each.to(dtype) for each in stateless(SPECS[name], 31, 31, device="cuda"))
    captured = captured_on_gpu()
    found = backend("general").attention(q, k, v, captured, SPECS[name])
    exact = [each.double() if each.is_floating_point() else each for each in captured]
    expected = backend("reference").attention(q.double(), k.double(), v.double(), exact, SPECS[name])
    torch.testing.assert_close(found.double(), expected, **close(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (128, 128), (192, 128), (256, 256)], ids=str)
def test_head_sizes_on_a_gpu(dims: tuple[int, int], dtype: torch.dtype, phase: str) -> None:
    check_on_gpu(on_gpu(AttentionSpec(8, 2, *dims, scale=dims[0] ** -0.5), PHASES[phase], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16, 71])
def test_groups_on_a_gpu(group: int, phase: str) -> None:
    check_on_gpu(on_gpu(AttentionSpec(2 * group, 2, 64, 64, scale=0.125), PHASES[phase], torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize(
    "more",
    [
        {"mask": m.Window(127)},
        {"mask": m.Window(0), "sinks": Load(2, H % 4)},
        {"mask": m.Bidirectional()},
        {"mask": m.Chunked(200), "softcap": 30.0},
        {"mask": m.Window(300), "softcap": 20.0, "bias": SLOPE * (J - I), "sinks": 0.5 * H},
        {"mask": m.All(m.Causal(), m.SameDocument(0)), "bias": BY_PAIR},
    ],
    ids=lambda more: "-".join(sorted(more)) + "-" + type(more["mask"]).__name__,
)
def test_scores_and_masks_on_a_gpu(more: dict[str, object], page_size: int, phase: str) -> None:
    spec = AttentionSpec(8, 2, 128, 128, scale=0.09, **more)  # type: ignore[arg-type]
    check_on_gpu(on_gpu(spec, PHASES[phase], torch.bfloat16, page_size))


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(512, 512), (576, 512), (40, 24), (33, 17), (72, 20), (56, 72)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_unusual_head_sizes_on_a_gpu(dims: tuple[int, int], dtype: torch.dtype) -> None:
    for sequences in PHASES.values():
        check_on_gpu(on_gpu(AttentionSpec(16, 1, *dims, scale=dims[0] ** -0.5), sequences, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_pages_on_a_gpu(dtype: torch.dtype) -> None:
    for sequences in PHASES.values():
        batch = on_gpu(AttentionSpec(8, 2, 128, 128, scale=0.09), sequences, torch.bfloat16)
        scales = torch.tensor(0.02, device="cuda"), torch.tensor([0.03, 0.01], device="cuda")
        found, expected = (fp8(batch, dtype, *scales, kernel) for kernel in ("general", "reference"))
        torch.testing.assert_close(found, expected, **close(torch.bfloat16))


@pytest.mark.gpu
def test_a_model_generates_through_it_on_a_gpu() -> None:
    check_generation("cuda")


@pytest.mark.gpu
def test_pages_beyond_int32_on_a_gpu() -> None:
    batch = on_gpu(AttentionSpec(8, 8, 128, 128, scale=0.09), [(500, 1), (0, 90), (77, 3)], torch.bfloat16)
    pages, used = 140_000, batch.k_pages.shape[0]  # 2.3e9 elements
    for name in ("k_pages", "v_pages"):
        pool = torch.empty((pages, *batch.k_pages.shape[1:]), dtype=torch.bfloat16, device="cuda")
        pool[-used:] = getattr(batch, name)
        setattr(batch, name, pool)
    small = on_gpu(batch.spec, [(500, 1), (0, 90), (77, 3)], torch.bfloat16)
    batch.metadata.block_table.add_(pages - used)
    found, expected = (backend("general").attend(each.q, paged(each), [], each.spec) for each in (batch, small))
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([(9, 1), (700, 1), (0, 1), (33, 1)], [(1500, 1), (0, 1), (0, 0), (64, 1)]),
        ([(0, 40), (7, 1), (0, 0), (300, 20)], [(900, 1), (0, 0), (20, 59), (3, 1)]),
    ],
    ids=["decode", "mixed"],
)
def test_a_cuda_graph_holds_any_lengths(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> None:
    spec = AttentionSpec(8, 2, 128, 128, m.Window(1000), 0.09, 30.0, sinks=Load(2, H % 4))
    batches, captured, run = [on_gpu(spec, each, torch.bfloat16) for each in (before, after)], captured_on_gpu(), backend("general")
    tokens = max(batch.q.shape[0] for batch in batches)
    static = {
        "q": torch.full((tokens, 8, 128), torch.nan, dtype=torch.bfloat16, device="cuda"),
        "k_pages": torch.full((160, 16, 2, 128), torch.nan, dtype=torch.bfloat16, device="cuda"),
        "v_pages": torch.full((160, 16, 2, 128), torch.nan, dtype=torch.bfloat16, device="cuda"),
        "table": torch.zeros((4, 120), dtype=torch.int32, device="cuda"),
        "seq_lens": torch.zeros(4, dtype=torch.int32, device="cuda"),
        "query_lens": torch.zeros(4, dtype=torch.int32, device="cuda"),
    }

    def fill(batch: PagedBatch) -> None:
        at = batch.metadata
        given = (batch.q, batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.query_lens)
        for (name, buffer), value in zip(static.items(), given, strict=True):
            buffer.fill_(159 if name == "table" else 0 if buffer.dtype == torch.int32 else torch.nan)
            buffer[tuple(slice(0, size) for size in value.shape)] = value

    def step() -> torch.Tensor:
        at = (static["table"], static["seq_lens"], static["query_lens"])
        starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(*at, tokens, 16)
        kv = Paged(static["k_pages"], static["v_pages"], static["table"], static["seq_lens"], starts, positions, token_seq)
        return run.attend(static["q"], kv, captured, spec)

    fill(batches[0])
    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for batch in (batches[1], batches[0], batches[1]):
        fill(batch)
        graph.replay()
        expected = run.attend(batch.q, paged(batch), captured, spec)
        torch.testing.assert_close(out[: batch.q.shape[0]], expected, **close(torch.bfloat16))
        assert not out[batch.q.shape[0] :].any()

"""Is the reference right? Against scalar float64 loops, with every slot that no sequence owns filled with NaN."""

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compile_attn.kernels.ops  # noqa: F401
from compile_attn.kernels import mask as m
from compile_attn.kernels import reference
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import CAPTURED, SPECS, attend_row, scalar
from tests.paged import PagedBatch, paged_batch

MIXED = [(0, 7), (9, 1), (3, 5), (21, 1), (0, 1), (0, 0), (4, 2)]

# 64 products of numbers of size 1 in float32 (2^-24 each), the oracle is exact to 1e-15: seen up to 6e-7.
FLOAT32 = 5e-6
FLOAT64 = 1e-12


def without_host(batch: PagedBatch) -> torch.Tensor:
    """What a CUDA device computes, run here."""
    at = batch.metadata
    kv = Paged(batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    return reference._attend_without_host(batch.q, kv, CAPTURED, batch.spec)


@pytest.mark.parametrize("name", SPECS)
def test_paged_equals_oracle(name: str) -> None:
    batch = paged_batch(SPECS[name], MIXED, pad_tokens=3)
    expected = batch.expected(CAPTURED)
    torch.testing.assert_close(batch.attend(CAPTURED).double(), expected, atol=FLOAT32, rtol=0)
    torch.testing.assert_close(without_host(batch).double(), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("name", SPECS)
def test_stateless_equals_oracle(name: str) -> None:
    spec, make = SPECS[name], torch.Generator().manual_seed(1)
    q = torch.randn(2, 12, spec.num_q_heads, spec.head_dim, generator=make).transpose(1, 2)
    k = torch.randn(2, 12, spec.num_kv_heads, spec.head_dim, generator=make).transpose(1, 2)
    v = torch.randn(2, 12, spec.num_kv_heads, spec.head_dim_v, generator=make).transpose(1, 2)
    out = torch.ops.paged_attn.attention(q, k, v, list(CAPTURED), spec.encode(), "reference")
    assert out.is_contiguous()
    for b, i in ((0, 0), (0, 11), (1, 5), (1, 11)):
        keys, values = k[b].transpose(0, 1), v[b].transpose(0, 1)
        expected = attend_row(spec, q[b, :, i], keys, values, b, i, CAPTURED)
        torch.testing.assert_close(out[b, :, i].double(), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("name", [name for name in SPECS if name != "rounded"])  # the oracle rounds float64, once
def test_float64_stays_float64(name: str) -> None:
    batch = paged_batch(SPECS[name], [(2, 3), (6, 1)], dtype=torch.float64)
    captured = [each.double() if each.is_floating_point() else each for each in CAPTURED]
    out = batch.attend(captured)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, batch.expected(captured), atol=FLOAT64, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    batch = paged_batch(SPECS["everything"], MIXED, dtype=dtype)
    out = batch.attend(CAPTURED)
    assert out.dtype == dtype
    torch.testing.assert_close(out, batch.expected(CAPTURED).to(dtype))  # torch's own tolerance for the dtype: one rounding


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    sequences=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), min_size=1, max_size=5),
    page_size=st.integers(1, 6),
    pad_tokens=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_batch_equals_oracle(name: str, sequences: list[tuple[int, int]], page_size: int, pad_tokens: int, seed: int) -> None:
    batch = paged_batch(SPECS[name], sequences, page_size=page_size, pad_tokens=pad_tokens, seed=seed)
    expected = batch.expected(CAPTURED)
    torch.testing.assert_close(batch.attend(CAPTURED).double(), expected, atol=FLOAT32, rtol=0)
    torch.testing.assert_close(without_host(batch).double(), expected, atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("name", ["causal", "window", "prefix", "everything"])
def test_long_rows_are_cut_into_blocks_of_queries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_QUERIES", 2)
    monkeypatch.setattr(reference, "_MAX_GATHERED_CPU", 1)
    batch = paged_batch(SPECS[name], MIXED)
    torch.testing.assert_close(batch.attend(CAPTURED).double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


def test_a_row_without_keys_is_zero() -> None:
    spec = AttentionSpec(2, 2, 4, 4, m.General(sympy.Lt(J, I)))
    q = torch.randn(1, 2, 3, 4)
    out = torch.ops.paged_attn.attention(q, q, q, [], spec.encode(), "reference")
    assert not out[:, :, 0].any()
    assert out[:, :, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_pages_with_scales(dtype: torch.dtype) -> None:
    batch = paged_batch(SPECS["gqa"], [(5, 2), (8, 1)])
    slots = torch.arange(batch.k_pages.shape[0] * batch.k_pages.shape[1])
    k_scale, v_scale = torch.tensor(0.02), torch.tensor([0.03, 0.01])
    k_pages, v_pages = (torch.empty_like(pages, dtype=dtype) for pages in (batch.k_pages, batch.v_pages))
    flat_k, flat_v = batch.k_pages.flatten(0, 1), batch.v_pages.flatten(0, 1)
    torch.ops.paged_attn.write_kv(flat_k, flat_v, k_pages, v_pages, slots, k_scale, v_scale)
    at = batch.metadata
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    spec = batch.spec.encode()
    out = torch.ops.paged_attn.attend(batch.q, k_pages, v_pages, *where, [], spec, "reference", k_scale, v_scale)
    error = (out - batch.attend([])).abs().max()
    assert error < (0.2 if dtype == torch.float8_e4m3fn else 0.4)  # half a unit of 3 (2) mantissa bits of values up to 3


EXPRESSIONS = [
    sympy.floor((I - J) / 4),
    sympy.ceiling(I / 4) - J,
    sympy.Mod(I - J, 5),
    sympy.Min(I, J, 4) + sympy.Max(I - 2, J),
    sympy.Piecewise((I - J, I > J), (sympy.Float(-0.5) * J, J > 4), (7, True)),
    sympy.tanh(S / 3) + sympy.exp(-S) + sympy.erf(S) + sympy.sin(S) * sympy.cos(S) + sympy.sign(I - J),
    sympy.sqrt(I + 1) / sympy.sqrt(J + 2) + (J + 1) ** 2 + 1 / (I + 1) + sympy.log(J + 1),
    2 ** (-(H + 1) * sympy.Rational(8, 12)),
    sympy.Rational(1, 3) * I + sympy.pi * J + sympy.sqrt(2),
    Round(10, S * 0.1) + Trunc((I - J) / 2) + Trunc(S),
    Load(0, B, I) * Load(2, sympy.Mod(J, 4)) + Load(3, B, J),
    sympy.Xor(I < J, J < 4),
    sympy.Not(sympy.Eq(sympy.Mod(I, 2), 0)) & sympy.Ne(I, J),
    sympy.ITE(I < J, I < 3, J < 5),
    sympy.true,
]


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_equals_scalars(expr: sympy.Basic, dtype: torch.dtype) -> None:
    captured = [each.to(dtype) if each.is_floating_point() else each for each in CAPTURED]
    b, h = torch.arange(2)[:, None, None, None], torch.arange(4)[:, None, None]
    i, j = torch.arange(9)[:, None], torch.arange(9)
    s = torch.linspace(-2, 2, 2 * 4 * 9 * 9, dtype=dtype).view(2, 4, 9, 9)
    value = evaluator(expr)({"s": s, "b": b, "h": h, "i": i, "j": j, "captured": captured, "dtype": dtype})
    value = torch.as_tensor(value).expand(2, 4, 9, 9)
    one = scalar(expr, captured)
    index = [(b, h, i, j) for b in range(2) for h in (0, 3) for i in range(9) for j in range(9)]
    expected = torch.tensor([float(one(s[at].item(), *at)) for at in index], dtype=torch.float64)
    found = torch.stack([value[at] for at in index]).double()
    if value.is_floating_point():
        assert value.dtype == dtype
        torch.testing.assert_close(
            found,
            expected,
            rtol=1e-12 if dtype == torch.float64 else 1e-6,
            atol=2e-6 if dtype == torch.float32 else 1e-12,
        )
    else:
        assert torch.equal(found, expected)


def test_floors_of_whole_numbers_are_exact() -> None:
    i, j = torch.arange(200)[:, None] + 2**40, torch.arange(200)
    assert torch.equal(evaluator(sympy.floor((I - J) / 3))({"i": i, "j": j}), (i - j) // 3)


def test_loads_out_of_range_do_not_crash() -> None:
    value = evaluator(Load(2, I - J))({"i": torch.arange(9)[:, None], "j": torch.arange(9), "captured": CAPTURED})
    assert value.shape == (9, 9)


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no value for gamma in gamma\(i \+ 1\); supported are"):
        evaluator(sympy.gamma(I + 1))

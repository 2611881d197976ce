"""Does a score mean in CUDA C++ what it means everywhere? Compiled here as C++, which shares its arithmetic."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import sympy
import torch

from compile_attn.kernels import flashinfer as fi
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Request
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import B, I, J, Load, Round, S
from compile_attn.kernels.flashinfer_plans import Problem
from compile_attn.kernels.flashinfer_score import HELPERS, real, text, variant
from compile_attn.kernels.select import UnsupportedError, choose
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import SLOPE
from tests.scores import SCORES
from tests.test_reference import EXPRESSIONS

CUDA = torch.device("cuda")
PRINTED = [expr for expr in EXPRESSIONS if expr is not sympy.true and not expr.has(Load, Round)]
PRINTED += [spec.expression() for spec in SCORES.values()]
PRINTED += [sympy.Abs(J - I) * SLOPE, sympy.floor(S * 2.5) - J, (J - I) ** 3, sympy.floor((J - I) / 3 + sympy.Rational(1, 2))]
_PROGRAM = r"""
#include <cmath>
#include <cstdint>
#define PAGED_ATTN_INLINE static inline
%s
extern "C" void run(const float* all_s, const int64_t* all_h, const int64_t* all_i, const int64_t* all_j, float* out, int count) {
  for (int at = 0; at < count; ++at) {
    const float s = all_s[at];
    const int64_t h = all_h[at], i = all_i[at], j = all_j[at];
    out[at] = %s;
  }
}
"""


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize("expr", PRINTED, ids=str)
def test_printed_arithmetic_equals_evaluation(expr: sympy.Basic, tmp_path: Path) -> None:
    printed = real(expr) if isinstance(expr, sympy.Expr) else f"float({text(expr)})"
    (tmp_path / "score.cpp").write_text(_PROGRAM % (HELPERS, printed))
    # Products and sums are not joined here, as they may be on a GPU: the difference is in the last bit.
    subprocess.run(["c++", "-shared", "-fPIC", "-O1", "-o", "score.so", "score.cpp"], cwd=tmp_path, check=True)
    h, i, j = (each.flatten() for each in torch.meshgrid(torch.arange(4), torch.arange(9), torch.arange(9), indexing="ij"))
    s = torch.linspace(-2, 2, len(h))
    out = torch.empty(len(h))
    pointers = [ctypes.c_void_p(each.data_ptr()) for each in (s, h, i, j, out)]
    ctypes.CDLL(str(tmp_path / "score.so")).run(*pointers, len(h))
    expected = torch.as_tensor(evaluator(expr)({"s": s, "h": h, "i": i, "j": j, "captured": (), "dtype": torch.float32}))
    torch.testing.assert_close(out, expected.float(), rtol=2e-6, atol=2e-6)


def test_whole_numbers_stay_whole() -> None:
    assert text((I + 60_000) ** 2 - (J + 60_000) ** 2).count("int64_t(60000)") == 2
    assert "float(" in real(0.5 * I) and real(sympy.Integer(3)) == "(3.0f)" and real(sympy.Float(1e-7)) == "(1e-07f)"


def test_variants() -> None:
    """Every score its own module; sinks as a tensor; a name for each."""
    name, source = variant(SCORES["cap after bias"])
    assert f"struct {name} : AttentionVariantBase" in source and "tanhf" in source and "params.sink" not in source
    other, source = variant(SCORES["window, cap, bias, sinks"])
    assert other != name and "params.sink[qo_head_idx]" in source
    problem = Problem.of(SCORES["window, cap, bias, sinks"], torch.bfloat16, torch.float8_e4m3fn, 16, True)
    assert (problem.scale, problem.softcap, problem.window, problem.sinks, problem.alibi) == (1.0, 0.0, 127, True, False)
    assert problem.for_single(2, 99) == problem.for_many(9999, CUDA) == "fa2"
    arguments, options = problem.variant()
    assert arguments[0] == f"paged_attn_{other}_bf16_f8_e4m3fn_128_swa_True" and arguments[7:9] == [["sink"], ["float"]]
    assert options == {"use_sliding_window": True, "paged_kv_stride_mode": "equal"}


def test_what_it_serves_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fi, "_library", lambda: ())
    run = fi.FlashInferJitBackend()

    def reasons(**more: object) -> tuple[str, ...]:
        return run.reasons(Request(AttentionSpec(8, 2, 128, 128, **more), CUDA, torch.bfloat16, 16))  # type: ignore[arg-type]

    for spec in SCORES.values():
        assert run.reasons(Request(spec, CUDA, torch.bfloat16, 16)) == ()
    assert reasons(bias=SLOPE * (J - I), softcap=3.0) == reasons() == ()
    (why,) = reasons(bias=B * J)
    assert why == (
        "cannot print the score: no text for the symbol b: FlashInfer's variants know the score, the head and both positions; "
        "choose kernel='auto'"
    )
    assert any("does not compute captured tensors" in each for each in reasons(bias=Load(0, I) * J))
    assert any("does not compute the mask 'causal inside chunks" in each for each in reasons(mask=m.Chunked(4)))
    spec = SCORES["cap after bias"]
    assert choose(spec, CUDA, torch.bfloat16, 16).kernel not in ("flashinfer", "flashinfer_jit")
    assert choose(spec, CUDA, torch.bfloat16, 16, "flashinfer_jit").kernel == "flashinfer_jit"
    with pytest.raises(UnsupportedError, match="does not compute the score"):
        choose(spec, CUDA, torch.bfloat16, 16, "flashinfer")
    with pytest.raises(UnsupportedError, match="does not serve stateless calls"):
        choose(spec, CUDA, torch.bfloat16, None, "flashinfer_jit")

"""Is a score printed as the Triton that a person would write? Without Triton: what the text computes is in test_general."""

from __future__ import annotations

import ast
import math

import pytest
import sympy

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.triton_print import binary, factor, fits_int32, loads, print_score
from tests.oracle import SLOPE, SPECS
from tests.test_reference import EXPRESSIONS

WHOLE = (True, False, False, True)  # of CAPTURED

WINDOW = """
@triton.jit
def per_row(b, h, i, captured):
    r0 = tl.exp2(-0.5 - 0.5 * h)
    return b, h, i, r0


@triton.jit
def score(s, j, row, captured, MASKED: tl.constexpr):
    b, h, i, r0 = row
    value = 2.0 * capped(0.45 * s) + r0 * (j - i)
    if MASKED:
        value = tl.where((j <= i) & (i - j <= 9), value, float("-inf"))
    return value
"""

DOCUMENTS = """
@triton.jit
def per_row(b, h, i, captured):
    t0, t0_size0, t0_stride0, t0_size1, t0_stride1 = captured
    r0 = tl.load(t0 + place(b, t0_size0, t0_stride0) + place(i, t0_size1, t0_stride1)).to(tl.int64)
    return b, h, i, r0


@triton.jit
def score(s, j, row, captured, MASKED: tl.constexpr):
    t0, t0_size0, t0_stride0, t0_size1, t0_stride1 = captured
    b, h, i, r0 = row
    value = s
    if MASKED:
        x0 = tl.load(t0 + place(b, t0_size0, t0_stride0) + place(j, t0_size1, t0_stride1)).to(tl.int64)
        value = tl.where((r0 == x0) | ((j <= i) & (x0 < 2)), value, float("-inf"))
    return value
"""

SINKS = """

@triton.jit
def sink(b, h, i, captured):
    return 0.1 + 0.25 * h
"""


def functions(spec: AttentionSpec) -> str:
    """The text after its imports."""
    return print_score(spec, WHOLE).split("whole_power\n\n", 1)[1]


def score_line(score: sympy.Expr, *, whole: tuple[bool, ...] = WHOLE) -> str:
    """What is printed for a score beside a captured value, r0, so that nothing is scaled for exp2."""
    text = print_score(AttentionSpec(4, 2, 8, 8, score=score + Load(2, 0)), whole)
    line = next(line for line in text.splitlines() if line.startswith("    value = "))
    return line.removeprefix("    value = ")


def test_what_holds_for_a_row_is_printed_outside_the_loop() -> None:
    assert functions(SPECS["softcap, window, bias"]) == WINDOW


def test_what_occurs_twice_has_a_name() -> None:
    document = Load(0, B, J)
    predicate = sympy.Eq(Load(0, B, I), document) | (sympy.Le(J, I) & (document < 2))
    assert functions(AttentionSpec(4, 2, 8, 8, m.General(predicate))) == DOCUMENTS


def test_sinks_are_a_function_of_their_own() -> None:
    assert print_score(SPECS["everything"], WHOLE).endswith(SINKS)


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_of_the_oracle_has_a_text(name: str) -> None:
    tree = ast.parse(print_score(SPECS[name], WHOLE))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert names == ["per_row", "score"] + (["sink"] if SPECS[name].sinks is not None else [])


@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_every_expression_of_the_reference_has_a_text(expr: sympy.Basic) -> None:
    mask, score = (m.Causal(), S + expr) if isinstance(expr, sympy.Expr) else (m.General(expr), None)
    ast.parse(print_score(AttentionSpec(4, 2, 8, 8, mask, score=score), WHOLE))


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (S * sympy.floor((I - J) / 4), "r0 + s * floor_divide(i - j, 4)"),  # i - j may be negative: C's division is not ours
        (S * sympy.floor(J / 4), "r0 + s * (j // 4)"),
        (S * sympy.Mod(J, 4), "r0 + s * (j % 4)"),
        (S * sympy.Mod(I - J, 4), "r0 + s * modulo(i - j, 4)"),
        (Round(7, S), "r0 + round_bfloat16(s)"),
        (Round(10, S), "r0 + (s).to(tl.float16).to(tl.float32)"),
        (sympy.Piecewise((S, I > J), (2 * S, True)), "r0 + tl.where(i > j, s, 2 * s)"),
        (S**-2, "r0 + (1.0 / whole_power(s, 2))"),
        (sympy.Float(1e-40) * S, "r0 + tl.full((), 1e-40, tl.float32) * s"),  # the bare literal would be a float64
        (S * Trunc(S), "r0 + s * s.to(tl.int64)"),
    ],
    ids=str,
)
def test_arithmetic(score: sympy.Expr, text: str) -> None:
    assert score_line(score) == text


def test_a_score_without_products_still_has_their_shape() -> None:
    assert score_line(0.5 * H).startswith("tl.zeros_like(s) + ")


def test_units_of_log2_only_where_nothing_overflows() -> None:
    assert binary(SPECS["softcap"])
    assert binary(SPECS["documents"])  # the mask may load: it is no term of the score
    assert not binary(SPECS["buckets"])  # a captured bias may hold finfo.min, and 1.44 times that is -inf
    assert not binary(AttentionSpec(4, 2, 8, 8, bias=sympy.Piecewise((0, J < 4), (-3.4e38, True))))


def test_tanh_is_exact_where_it_is_no_small_cap() -> None:
    def line(**parts: object) -> str:
        text = print_score(AttentionSpec(4, 2, 8, 8, **parts), ())
        return next(line for line in text.splitlines() if line.startswith("    value = "))

    assert "capped(" in line(softcap=50.0)
    assert "= tanh(" in line(softcap=1e6)
    assert "= tanh(" in line(score=1e6 * sympy.tanh(S / 1e6))
    assert "capped(" not in line(softcap=50.0, bias=1e6 * sympy.tanh(0.1 * J))


def test_a_positive_factor_of_the_score_is_taken_out() -> None:
    plain = AttentionSpec(4, 2, 8, 8, scale=0.5, sinks=0.25 * H)
    assert "    value = s\n" in print_score(plain, ())
    assert print_score(plain, ()).endswith("    return 0.5 * h\n")  # a sink in the units of a score
    assert factor(plain) == 0.5 * math.log2(math.e)
    assert factor(SPECS["softcap"]) == SPECS["softcap"].softcap * math.log2(math.e)
    negative = AttentionSpec(4, 2, 8, 8, score=-2.0 * S)  # the highest score would be the lowest
    assert "    value = -2.0 * s\n" in print_score(negative, ())
    assert factor(negative) == math.log2(math.e)
    assert factor(SPECS["buckets"]) == 1


def test_int32_only_where_no_product_of_positions_overflows() -> None:
    assert fits_int32(SPECS["everything"], (), 1 << 20)
    square = AttentionSpec(4, 2, 8, 8, m.General(sympy.Le(J * J, I * I)))
    assert fits_int32(square, (), 1 << 10)
    assert not fits_int32(square, (), 1 << 20)
    loaded = AttentionSpec(4, 2, 8, 8, bias=Load(0, (I - J) * 40_000))
    assert not fits_int32(loaded, (False,), 1 << 20)


def test_loads_say_which_tensors_are_read_and_with_how_many_axes() -> None:
    assert loads(SPECS["padding"]) == ((3, 2),)
    assert loads(SPECS["sinks"]) == ((2, 1),)
    assert loads(SPECS["causal"]) == ()
    with pytest.raises(ValueError, match=r"different numbers of axes: \[\(0, 1\), \(0, 2\)\]"):
        loads(AttentionSpec(4, 2, 8, 8, bias=Load(0, I) + Load(0, B, J)))


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (S + sympy.gamma(I + 1), "no Triton text for gamma"),
        (Round(4, S), "no Triton text for rounding to 4 bits"),
        (S + sympy.Symbol("k"), "no Triton text for the symbol k"),
    ],
)
def test_what_has_no_text_is_refused(score: sympy.Expr, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        print_score(AttentionSpec(4, 2, 8, 8, score=score), ())


def test_the_slope_of_alibi_is_read_once_a_row() -> None:
    text = print_score(AttentionSpec(4, 4, 8, 8, bias=SLOPE * (J - I) + 0.5 * I), ())
    rows, loop = text.split("def score")
    assert "exp2" in rows
    assert "exp2" not in loop

"""Is a score read for what softmax makes of it: mask, scale, softcap, bias, or the whole expression?"""

from __future__ import annotations

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Float, Piecewise, log, tanh
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import B, H, I, J, Load, S
from compile_attn.passes.proof import same
from compile_attn.passes.score import Score, ScoreError, read_score

T = sympy.Symbol("T", integer=True, positive=True)
MIN = Float(-3.4e38)
CAUSAL = sympy.Le(J, I)
SLOPE = Load(0, H)


def mask(seen: Boolean, fill: object = MIN) -> sympy.Expr:
    return Piecewise((0, seen), (fill, True))


def read(expr: sympy.Expr, visible: Boolean = CAUSAL) -> Score:
    score = read_score(expr, T)
    assert same(score.visible, visible)
    return score


@pytest.mark.parametrize(
    "expr",
    [
        S / 8 + mask(CAUSAL),
        S / 8 + mask(CAUSAL, -sympy.oo),
        S / 8 + mask(CAUSAL, -10000),
        Piecewise((S / 8, CAUSAL), (MIN, True)),
        Piecewise((MIN, sympy.Gt(J, I)), (S / 8, True)),
        (S + mask(CAUSAL)) / 8,
        (S + mask(CAUSAL)) * Float(0.125),
        S / 8 - 10000 * (1 - Piecewise((1, CAUSAL), (0, True))),
        S / 8 + mask(CAUSAL & (J < T)),
        S / 8 + mask(CAUSAL) + mask(CAUSAL),
        Piecewise((S / 8 + mask(CAUSAL), sympy.Gt(I, 4)), (S / 8 + mask(CAUSAL, -1e9), True)),
        S / 8 - sympy.Function("RowMax")(I) + mask(CAUSAL),
        S / 8 + log(I + 2) + mask(CAUSAL),
    ],
    ids=str,
)
def test_spellings_of_a_causal_mask(expr: sympy.Expr) -> None:
    assert read(expr) == Score(read_score(expr, T).visible, 0.125)


@pytest.mark.parametrize("part", [sympy.zoo, sympy.nan, sympy.sqrt(-2)], ids=str)
def test_what_is_no_number_is_refused(part: sympy.Expr) -> None:
    with pytest.raises(ScoreError, match="not a number"):
        read_score(Piecewise((S, CAUSAL), (S * 2 + part, True)), T)


def test_two_masks_are_both_kept() -> None:
    window = sympy.Lt(I - J, 5)
    assert read(S + mask(CAUSAL) + mask(window, -1e9), CAUSAL & window).scale == 1.0


@pytest.mark.parametrize(
    ("term", "bias"),
    [
        (SLOPE * (J - I), SLOPE * (J - I)),
        (SLOPE * (J - T + 1), SLOPE * (J - I)),
        (SLOPE * J, SLOPE * (J - I)),
        (sympy.Rational(1, 2) ** (H + 1) * J, sympy.Rational(1, 2) ** (H + 1) * (J - I)),
        (Load(0, H, I, J), Load(0, H, I, J)),
        (Load(0, H, I), None),
        (Piecewise((5, I - J < 3), (0, True)), Piecewise((5, I - J < 3), (0, True))),
        (Piecewise((2.0, J < 4), (1.0, True)), Piecewise((2.0, J < 4), (1.0, True))),
    ],
)
def test_bias(term: sympy.Expr, bias: sympy.Expr | None) -> None:
    """What only some keys of a row get is a bias, however constant; what all get alike is nothing."""
    score = read(S / 8 + term + mask(CAUSAL))
    assert score.scale == 0.125 and score.score is None
    assert (score.bias is None) == (bias is None)
    for i in range(9):
        for j in range(i + 1) if bias is not None else ():
            at = {I: i, J: j}
            assert sympy.simplify(score.bias.subs(at) - bias.subs(at)) == 0  # type: ignore[union-attr]


def test_bias_inside_the_scale() -> None:
    score = read((S + SLOPE * J + mask(CAUSAL)) * Float(0.125))
    assert score.scale == 0.125
    assert score.bias is not None and sympy.expand(score.bias - Float(0.125) * SLOPE * (J - I)) == 0


@pytest.mark.parametrize("expr", [50 * tanh(S / 8 / 50), -50 * tanh(-S / 400), Float(50.0) * tanh(S * Float(0.0025))], ids=str)
def test_softcap(expr: sympy.Expr) -> None:
    score = read(expr + mask(CAUSAL))
    assert (score.scale, score.softcap, score.score) == (pytest.approx(0.125), 50.0, None)


@pytest.mark.parametrize(
    "expr", [50 * tanh((S + SLOPE * J) / 50), S * log(I + 2), S / (1 + sympy.exp(-S)), sympy.Max(S, 0)], ids=str
)
def test_other_orders_keep_the_whole_expression(expr: sympy.Expr) -> None:
    score = read(expr + mask(CAUSAL))
    assert score.score == expr and (score.scale, score.softcap, score.bias) == (1.0, None, None)


@pytest.mark.parametrize("fill", [MIN, -sympy.oo, Float(-1e9)])
def test_softcap_after_the_mask_is_no_mask(fill: sympy.Expr) -> None:
    score = read(50 * tanh((S / 8 + mask(CAUSAL, fill)) / 50), sympy.true)
    assert score.score is not None
    hidden = score.score.subs({I: 3, J: 5, S: 2.0})
    assert float(hidden) == pytest.approx(-50.0)


@pytest.mark.parametrize("fill", [-100, -9999, 0, 10000])
def test_a_small_fill_is_a_score(fill: int) -> None:
    score = read(Piecewise((S, CAUSAL), (fill, True)), sympy.true)
    assert score.score is not None and score.score.subs({I: 3, J: 5}) == fill


@pytest.mark.parametrize(
    ("expr", "reason"),
    [
        (S + J * T + mask(CAUSAL), "sequence length"),
        (S + mask(CAUSAL & (J >= T - 5)), "sequence length"),
        (S * log(T) + mask(CAUSAL), "sequence length"),
        (S - 20000, "every key is masked"),
        (Piecewise((S, S > 0), (MIN, True)), "depends on their scores"),
    ],
    ids=str,
)
def test_refused(expr: sympy.Expr, reason: str) -> None:
    with pytest.raises(ScoreError, match=reason):
        read_score(expr, T)


numbers = st.sampled_from((-3, -1, 0.5, 1, 2, 7))
conditions = st.sampled_from((CAUSAL, J < 4, I - J < 3, I < 5, sympy.Eq(sympy.Mod(I - J, 2), 0)))
pieces = st.one_of(
    numbers.map(sympy.sympify),
    st.builds(lambda a, b, c: Piecewise((a, c), (b, True)), numbers, numbers, conditions),
    st.builds(lambda a, t: a * t, numbers, st.sampled_from((I, J, I - J, I * J, S))),
    st.builds(lambda c, f: mask(c, f), conditions, st.sampled_from((MIN, Float(-1e9), -sympy.oo))),
    st.builds(lambda a, c: Piecewise((a * S, c), (S, True)), numbers, conditions),
)


def softmax(expr: sympy.Expr, visible: Boolean, s: np.ndarray) -> np.ndarray:
    n = len(s)
    value = np.full((n, n), -np.inf)
    run = sympy.lambdify((S, I, J, B, H), Piecewise((expr, visible), (-sympy.oo, True)), "math")
    for i in range(n):
        for j in range(n):
            value[i, j] = run(float(s[i, j]), i, j, 0, 0)
    weights = np.exp(value - value.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, min_size=1, max_size=3), st.sampled_from((1, 0.5)))
def test_softmax_is_the_same(terms: list[sympy.Expr], scale: float) -> None:
    """Whatever is read gives the same probabilities as the expression itself, in rows that see a key."""
    expr = (S + sympy.Add(*terms)) * scale
    try:
        score = read_score(expr, None)
    except ScoreError:
        return
    read_as = score.score
    if read_as is None:
        inner = score.scale * S
        read_as = (score.softcap * tanh(inner / score.softcap) if score.softcap else inner) + (score.bias or 0)
    s = np.random.default_rng(0).normal(size=(9, 9))
    rows = np.array([any(bool(score.visible.subs({I: i, J: j})) for j in range(9)) for i in range(9)])
    with np.errstate(invalid="ignore"):
        wanted, found = softmax(expr, sympy.true, s), softmax(read_as, score.visible, s)
    np.testing.assert_allclose(found[rows], wanted[rows], atol=1e-9)

"""Does a spec say what it asks for, and does its text read back exactly?"""

import math

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.mask import Mask
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.text import parse, print_expr
from tests.oracle import SPECS

PLAIN = AttentionSpec(4, 4, 64, 64)
SLOPE = 2 ** (-(H + 1) / 2)


def biased(bias: sympy.Expr, mask: Mask | None = None, sinks: sympy.Expr | None = None) -> AttentionSpec:
    return AttentionSpec(4, 4, 64, 64, mask or m.Causal(), bias=bias, sinks=sinks)


@pytest.mark.parametrize(
    ("spec", "features"),
    [
        (PLAIN, ""),
        (AttentionSpec(4, 2, 64, 32), "GQA UNEQUAL_HEAD_DIMS"),
        (AttentionSpec(4, 4, 64, 64, m.Window(9), softcap=50.0), "WINDOW SOFTCAP"),
        (AttentionSpec(4, 4, 64, 64, m.SameDocument(0)), "DOCUMENTS CAPTURED BIDIRECTIONAL"),
        (AttentionSpec(4, 4, 64, 64, score=S + Load(0, I, J)), "SCORE CAPTURED"),
        (AttentionSpec(4, 4, 64, 64, sinks=Load(0, H)), "SINKS"),
        (biased(SLOPE * (J - I)), "ALIBI"),
        (biased(Load(0, H) * J), "ALIBI"),
        (biased(Load(0, H, I - J)), "BIAS CAPTURED"),
    ],
)
def test_features(spec: AttentionSpec, features: str) -> None:
    assert {feature.name for feature in spec.features()} == set(features.split())


@pytest.mark.parametrize(
    ("spec", "slope"),
    [
        (biased(SLOPE * (J - I)), SLOPE),
        (biased(SLOPE * J), SLOPE),
        (biased(-SLOPE * sympy.Abs(I - J)), SLOPE),
        (biased(sympy.expand(SLOPE * (J - I) + I * H)), SLOPE),
        (biased(-SLOPE * sympy.Abs(I - J), m.Bidirectional()), None),  # not linear in j to the right of i
        (biased(SLOPE * (J - I), sinks=H), SLOPE),
        (biased(SLOPE * J, sinks=H), None),  # a shift of the row moves it against the sink
        (biased(SLOPE * J**2), None),
        (biased(I * J), None),
        (biased(Load(0, B) * J), None),
        (biased(Round(7, SLOPE * J)), None),
        (biased(sympy.Piecewise((SLOPE * J, J < 4), (0, True))), None),
        (biased(Load(0, J)), None),
        (biased(H + I), None),
        (PLAIN, None),
    ],
)
def test_alibi(spec: AttentionSpec, slope: sympy.Expr | None) -> None:
    found = spec.alibi_slope()
    assert found == slope if slope is None else sympy.simplify(found - slope) == 0


def test_expression_is_the_score_in_order() -> None:
    spec = AttentionSpec(4, 4, 64, 64, scale=0.125, softcap=50.0, bias=J - I)
    assert spec.expression() == 50.0 * sympy.tanh(0.0025 * S) + J - I
    assert AttentionSpec(4, 4, 64, 64, score=S**2).expression() == S**2


def test_words() -> None:
    spec = AttentionSpec(32, 8, 128, 128, m.Window(4095), scale=128**-0.5, softcap=50.0)
    assert spec.words() == "causal, window of 4096 keys, 32 heads, 8 KV heads, head size 128, scale 0.0883883, softcap 50"


def test_text_can_be_read_by_a_person() -> None:
    spec = AttentionSpec(32, 8, 128, 96, m.All(m.Window(7), m.SameDocument(0)), 0.1, 50.0, SLOPE * (J - I), sinks=Load(1, H))
    assert spec.encode() == (
        "AttentionSpec(num_q_heads=32, num_kv_heads=8, head_dim=128, head_dim_v=96, "
        "mask=All(Window(left=7), SameDocument(tensor=0)), scale=0.1, softcap=50.0, "
        "bias=2**(-1/2 - h/2)*(j - i), sinks=Load(1, h))"
    )


@pytest.mark.parametrize("name", SPECS)
def test_text_round_trip(name: str) -> None:
    spec = SPECS[name]
    assert AttentionSpec.decode(spec.encode()) == spec
    assert AttentionSpec.decode(spec.encode()) is AttentionSpec.decode(spec.encode())  # read once


FORMS = [
    sympy.Mul(2, I + J, evaluate=False),
    sympy.Mul(-1, I - J, evaluate=False),
    sympy.Add(I, sympy.Add(H, J), evaluate=False),
    sympy.Pow(sympy.Pow(I, 2, evaluate=False), 3, evaluate=False),
    sympy.Not(sympy.Lt(I, J), evaluate=False),
    sympy.Piecewise((0, J <= I), (-sympy.oo, True)),
    sympy.ITE(I < J, J < 3, I < 4),
    sympy.Xor(I < J, J < 4),
    sympy.pi * S + sympy.E,
    sympy.Float(math.nextafter(0.1, 1)) * S + sympy.Float(5e-324),
    sympy.true,
    sympy.Rational(-1, 4) * 2 ** (-2 * H) * (J - I),
    sympy.Mul(sympy.Rational(-1, 4), 2 ** (-2 * H), J - I),
]


@pytest.mark.parametrize("expr", FORMS, ids=str)
def test_odd_forms_round_trip(expr: sympy.Basic) -> None:
    assert parse(print_expr(expr)) == expr


WHOLE = st.recursive(
    st.sampled_from([B, H, I, J]) | st.integers(-20, 20).map(sympy.Integer),
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: p[0] + p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
        | st.tuples(inner, st.integers(1, 9)).map(lambda p: sympy.floor(p[0] / p[1]))
        | st.tuples(inner, st.integers(1, 9)).map(lambda p: sympy.Mod(p[0], p[1]))
        | st.tuples(inner, inner).map(lambda p: sympy.Max(*p))
        | inner.map(sympy.Abs)
    ),
    max_leaves=6,
)
CONDITION = st.recursive(
    st.tuples(st.sampled_from([sympy.Lt, sympy.Le, sympy.Eq, sympy.Ne, sympy.Ge]), WHOLE, WHOLE).map(lambda p: p[0](p[1], p[2])),
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: sympy.And(*p))
        | st.tuples(inner, inner).map(lambda p: sympy.Or(*p))
        | inner.map(sympy.Not)
    ),
    max_leaves=4,
)
REAL = st.recursive(
    st.just(S) | WHOLE | st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-30).map(sympy.Float),  # products: doubles too
    lambda inner: (
        st.tuples(inner, inner).map(lambda p: p[0] + p[1])
        | st.tuples(inner, inner).map(lambda p: p[0] * p[1])
        | st.tuples(CONDITION, inner, inner).map(lambda p: sympy.Piecewise((p[1], p[0]), (p[2], True)))
        | inner.map(lambda x: 30.0 * sympy.tanh(x / 30.0))
        | inner.map(lambda x: Round(7, x))
        | WHOLE.map(lambda x: Load(0, H, x))
        | inner.map(Trunc)
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(condition=CONDITION, real=REAL, scale=st.floats(1e-9, 1e9))
def test_any_spec_round_trips(condition: sympy.Basic, real: sympy.Expr, scale: float) -> None:
    spec = AttentionSpec(4, 2, 64, 64, m.General(sympy.sympify(condition)), scale, bias=real, sinks=real)
    assert AttentionSpec.decode(spec.encode()) == spec


def test_numbers_are_doubles() -> None:
    tiny = sympy.Float(2.2250738585072014e-308) / 30  # more digits than a double has so near to zero
    spec = AttentionSpec(4, 2, 64, 64, m.Causal(), 1.0, bias=30.0 * sympy.tanh(S / 30.0 + tiny))
    read = AttentionSpec.decode(spec.encode())
    assert float(tiny) in {float(each) for each in read.bias.atoms(sympy.Float)}
    assert AttentionSpec.decode(read.encode()) == read


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "AttentionSpec(num_q_heads=4)",
        "AttentionSpec(4, 4, 64, 64, mask=Nothing())",
        "AttentionSpec(num_q_heads=4, num_kv_heads=4, head_dim=64, head_dim_v=64, mask=Causal().words)",
        "s + x",
        "1 +",
        "s",
        "(1).real",
    ],
)
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not the text of a spec"):
        AttentionSpec.decode(text)


def test_a_foreign_symbol_is_refused_when_written() -> None:
    with pytest.raises(ValueError, match=r"written in s, b, h, i, j, not in T: T \+ j"):
        biased(J + sympy.Symbol("T")).encode()


def test_every_mask_feature_is_a_feature() -> None:
    for spec in SPECS.values():
        assert all(name in Feature.__members__ for name in spec.mask.features())
        assert all(spec.asks(feature) for feature in Feature)

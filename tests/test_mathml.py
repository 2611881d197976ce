"""Is the mathematics of a page what the kernels compute?

A formula is read back: its markup becomes Python, by the precedence that a reader would apply, and is compared number by number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import pytest
import sympy
import torch
from sympy.logic.boolalg import ITE

from compile_attn.kernels import mask as m
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.mathml import formula
from tests.scores import SCORES

SIGNS = {"·": "*", "−": "-", "=": "==", "≤": "<=", "≥": ">=", "≠": "!=", "∧": " and ", "∨": " or ", "¬": " not ", "⊕": "^"}
SIGNS |= {"⌊": "floor(", "⌋": ")", "⌈": "ceil(", "⌉": ")", "mod": "%", "\u2061": "", ":": "@", "{": "", "}": ""}
NAMES = {
    name: getattr(math, name) for name in ("floor", "ceil", "trunc", "exp", "log", "tanh", "sin", "cos", "erf", "sqrt", "e", "inf")
}
NAMES |= {"min": min, "max": max, "abs": abs, "sign": lambda x: (x > 0) - (x < 0), "π": math.pi, "always": True, "never": False}
NAMES |= {"bf16": lambda x: torch.tensor(x).bfloat16().double().item()}
TABLE = torch.arange(8000.0).reshape(20, 20, 20).sin()  # whatever is captured holds parts of it


def _python(node: ElementTree.Element) -> str:
    parts = [_python(child) for child in node]
    text = node.text or ""
    match node.tag:
        case "mfrac":
            return f"(({parts[0]}) / ({parts[1]}))"
        case "msqrt":
            return f"sqrt({''.join(parts)})"
        case "msup":
            return f"(({parts[0]}) ** ({parts[1]}))"
        case "msub":
            return f"captured{parts[1]}" if parts[0] == "t" else "_".join(parts)
        case "mtable" if len(node[0]) == 2:  # the cases of a value
            cases = [(_python(value), _python(met)) for value, met in node]
            return f"choose({', '.join(f'(lambda: {value}, lambda: {met})' for value, met in cases)})"
        case "mo" if text == "|":
            return "abs(" if node.get("form") == "prefix" else ")"
        case "mo":
            return SIGNS.get(text, text)
        case "mtext":
            return {"otherwise": "True", "all\xa0keys": "@True"}.get(text, text.replace("if", "").replace("\xa0", ""))
    return text + "".join(parts)


def _choose(*cases: tuple[Callable[[], Any], Callable[[], Any]]) -> Any:
    return next(value() for value, met in cases if met())


def values(line: str, captured: dict[int, torch.Tensor]) -> Callable[..., Any]:
    """The right side of a formula, or the condition of a set, as a function of s, b, h, i and j."""
    text = _python(ElementTree.fromstring(line))
    text = text.partition("==" if "@" not in text else "@")[2].replace("q_i*k_j", "s")
    known = {**NAMES, "choose": _choose}
    known |= {f"captured{number}": _Readable(tensor) for number, tensor in captured.items()}
    code = compile(text.strip(), text, "eval")
    return lambda **env: eval(code, {**known, **env})


class _Readable:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, place: Any) -> float:
        return self.tensor[tuple(map(int, place)) if isinstance(place, tuple) else int(place)].item()


def check(spec: AttentionSpec) -> None:
    """Both formulas, at some places, are what the evaluator computes in float64."""
    score, visible = spec.expression(), spec.mask.predicate()
    loads = score.atoms(Load) | visible.atoms(Load)
    captured = {int(load.args[0]): TABLE[(0,) * (4 - len(load.args))] for load in loads}
    tensors = [captured.get(number, TABLE) for number in range(max(captured, default=-1) + 1)]
    shown = [values(line, captured) for line in formula(spec).lines[1:]]
    for s, b, h, i, j in itertools.product((-2.5, 0.75, 3.0), (0, 1), (0, 3), (0, 5, 16), (0, 4, 5, 17)):
        numbers = {"s": s, "b": b, "h": h, "i": i, "j": j}
        env = {name: torch.tensor(number) for name, number in numbers.items()} | {"captured": tensors, "dtype": torch.float64}
        wanted = float(evaluator(score)({**env, "s": torch.tensor(s, dtype=torch.float64)}))
        exact = {name: Fraction(number) for name, number in numbers.items()}  # or floor(5/7 - 12/7) would be -2
        assert float(shown[0](**exact)) == pytest.approx(wanted, rel=1e-4, abs=1e-4), numbers
        assert bool(shown[1](**exact)) == bool(evaluator(visible)(env)), numbers


_DISTANCE = sympy.Max(0, I - J)
BIASES = {
    "alibi": (Load(0, H, 0) - Load(0, H, 1)) * (J - I),
    "buckets": sympy.Piecewise(
        (Load(0, _DISTANCE, H), _DISTANCE < 8), (Load(0, sympy.Min(15, 8 + Trunc(3.8 * sympy.log(1e-6 + _DISTANCE))), H), True)
    ),
    "powers": 2 ** (-H - 1) * (J - I) ** 2 / (3 + H),
    "a quotient of quotients": (I + 1) / ((J + 2) / (H + 3)) - (I - J) / 7,
    "nested signs": -(I - (J - 2 * (H - 1))) * -0.5 - sympy.Abs(I - J),
    "roots": sympy.sqrt(I + 1) / sympy.sqrt(J + 2) - sympy.ceiling(I / 3) * sympy.floor((J + 1) / 2),
    "remainders": sympy.Mod(3 * I + J, 2 * H + 5) * 0.25 - 2 * sympy.Mod(I, 4),
    "rounded": Round(7, 0.1 * (I - J) + 0.03) - 0.001 * sympy.sin(I) * sympy.cos(J) + sympy.erf(0.1 * (J - I)) + sympy.sign(I - J),
    "large and small": 1e-12 * I - 2.5e7 * J + sympy.exp(-0.1 * I) * sympy.pi,
    "either": sympy.Piecewise((1.5, sympy.Xor(I < J, H < 2) | ~(sympy.Eq(I, J) & (J > 3))), (-0.5 * I, True)),
}
MASKS = {
    "bidirectional": m.Bidirectional(),
    "window": m.Window(4),
    "chunked": m.Chunked(3),
    "prefix": m.Prefix(6),
    "documents": m.All(m.Causal(), m.SameDocument(0)),
    "sparse": m.BlockSparse(2, 2, 3, head_step=1),
    "many": m.General(
        (J <= I) & (J >= 1) & (sympy.Eq(sympy.Mod(I - J, 3), 0) | (J < 2)) & sympy.Ne(I - J, 6) & ((I > 3) | (B < 1)) & (H + J < 20)
    ),
    "chosen": m.General(ITE(H < 2, J <= I, I - J < 3)),
    "never": m.General(sympy.Not(sympy.Xor(J <= I, sympy.Eq(Load(0, B, J), 0)))),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_a_score_reads_back(bias: sympy.Expr) -> None:
    check(AttentionSpec(4, 2, 8, 8, scale=8**-0.5, bias=bias))
    check(AttentionSpec(4, 2, 8, 8, scale=0.25, softcap=3.0, bias=bias))
    check(AttentionSpec(4, 2, 8, 8, score=2.0 * sympy.tanh((0.5 * S + bias) / 2.0) - S / (H + 1)))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_reads_back(mask: m.Mask) -> None:
    check(AttentionSpec(4, 2, 8, 8, mask))


@pytest.mark.parametrize("spec", SCORES.values(), ids=SCORES)
def test_odd_scores_read_back(spec: AttentionSpec) -> None:
    check(spec)


def told(spec: AttentionSpec, at: int) -> str:
    """A formula as plain text."""
    return "".join(ElementTree.fromstring(formula(spec).lines[at]).itertext())


def test_a_scale_is_told_as_what_it_is() -> None:
    assert "<mfrac>" in formula(AttentionSpec(1, 1, 8, 8, scale=8**-0.5)).lines[1]
    assert told(AttentionSpec(1, 1, 8, 8, scale=8**-0.5), 1) == "zij=qi·kj8", "over a root of 8"
    assert told(AttentionSpec(1, 1, 16, 8, scale=8**-0.5), 1) == "zij=0.353553·qi·kj", "not of this head"
    assert told(AttentionSpec(1, 1, 8, 8), 1) == "zij=qi·kj"


def test_indices_are_those_that_matter() -> None:
    sinks = AttentionSpec(4, 2, 8, 8, sinks=Load(0, H))
    assert told(sinks, 0).startswith("ohi=") and told(sinks, 1).startswith("zij=")
    assert "exp\u2061(t0[h])+∑" in told(sinks, 0)
    letters = dict(formula(sinks).letters)
    assert set(letters.values()) >= {"the query head, from 0", "captured tensor 0 of the site"}
    assert told(AttentionSpec(1, 1, 8, 8, m.SameDocument(0)), 2).startswith("Vbi=")


def test_names_are_escaped() -> None:
    odd = sympy.Function("<b>")(J)
    assert "<mi>&lt;b&gt;</mi>" in formula(AttentionSpec(1, 1, 8, 8, bias=odd)).lines[1]

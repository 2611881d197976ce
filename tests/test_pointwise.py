"""Is every elementwise op read as the function that it is? The oracle is the op itself."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import I
from compile_attn.passes.graph import output_node, placeholders
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.values import number

X = torch.tensor([-30.0, -7.25, -2.5, -1.0, -0.3, -0.0, 0.2, 0.5, 1.0, 1.7, 3.0, 5.5, 19.0, 40.0])
UNIT = torch.linspace(0.05, 0.95, 14)
Op = Callable[..., Tensor]


def _value(op: Op, *tensors: Tensor) -> Tensor:
    """What the reader says, evaluated: the last op of the graph must have been read, not taken for a leaf."""
    module = make_fx(lambda *parts: op(*parts), tracing_mode="fake", pre_dispatch=True)(*tensors)
    (result,) = output_node(module.graph).args
    reader = Reader({})
    reader.captured.extend(placeholders(module.graph))
    expr = number(reader.at(result, (I,)))
    assert len(reader.captured) == len(tensors), f"{reader.captured} is not read"
    out = evaluator(expr)({"i": torch.arange(len(X)), "captured": list(tensors)})
    return out if isinstance(out, Tensor) else torch.full((len(X),), out)


UNARY: dict[str, Op] = {
    **{name: getattr(torch, name) for name in ("abs", "neg", "exp", "exp2", "expm1", "sin", "cos", "tan")},
    **{name: getattr(torch, name) for name in ("tanh", "sinh", "cosh")},
    **{
        name: getattr(torch, name) for name in ("erf", "erfc", "sigmoid", "square", "relu", "floor", "ceil", "trunc", "fix", "frac")
    },
    **{name: getattr(torch, name) for name in ("sign", "sgn", "reciprocal", "deg2rad", "rad2deg")},
    **{name: getattr(F, name) for name in ("silu", "mish", "softplus", "logsigmoid", "gelu")},
    **{name: getattr(F, name) for name in ("elu", "selu", "celu", "leaky_relu")},
    **{name: getattr(F, name) for name in ("hardtanh", "relu6", "hardsigmoid", "hardswish", "softsign", "tanhshrink")},
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus_beta": lambda x: F.softplus(x, beta=2.0, threshold=5.0),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "elu_alpha": lambda x: F.elu(x, 0.7),
    "threshold": lambda x: F.threshold(x, 0.5, -3.0),
    "clamp": lambda x: x.clamp(-1.0, 2.0),
    "clamp_min": lambda x: x.clamp_min(-1.0),
    "clamp_max": lambda x: x.clamp(max=2.0),
    "clip": lambda x: torch.clip(x, -0.4),
    "rsub": lambda x: 1.0 - x,
    "rsub_alpha": lambda x: torch.rsub(x, 3.0, alpha=2),
    "pow": lambda x: x**3,
    "float_power": lambda x: torch.float_power(x.abs() + 1, 1.5).float(),
    "power_of": lambda x: torch.pow(2.0, x),
    "remainder": lambda x: torch.remainder(x, 3.0),
    "fmod": lambda x: torch.fmod(x, 3.0),
    "floor_divide": lambda x: torch.floor_divide(x, 3.0),
    "lerp_number": lambda x: torch.lerp(x, x * 2 + 1, 0.3),
    "isinf": lambda x: torch.isinf(torch.where(x > 0, 0.0, -torch.inf)).float(),
    "bool_sum": lambda x: ((x > 0) + (x > 1)).float(),
    "bool_product": lambda x: ((x > 0) * (x < 3)).float(),
}
POSITIVE: dict[str, Op] = {name: getattr(torch, name) for name in ("log", "log2", "log10", "log1p", "sqrt", "rsqrt")}
BINARY: dict[str, Op] = {
    **{name: getattr(torch, name) for name in ("add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "max", "min")},
    **{name: getattr(torch, name) for name in ("hypot", "logaddexp", "true_divide")},
    "add_alpha": lambda a, b: torch.add(a, b, alpha=0.3),
    "sub_alpha": lambda a, b: torch.sub(a, b, alpha=2),
    "rsub_tensor": lambda a, b: torch.rsub(a, b, alpha=0.5),
    "addcmul": lambda a, b: torch.addcmul(a, b, a, value=0.4),
    "addcmul_plain": lambda a, b: torch.addcmul(a, b, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=-2.0),
    "lerp": lambda a, b: torch.lerp(a, b, b),
    "clamp_tensor": lambda a, b: torch.clamp(a, min=-b, max=b),
    "div_floor": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "div_trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "where_numbers": lambda a, b: torch.where(a > b, 1.0, -2.0),
    "where_left": lambda a, b: torch.where(a > b, a, 0.0),
    "masked_fill": lambda a, b: a.masked_fill(a > b, -5.0),
}


def _assert_same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-6, rtol=2e-6)


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    _assert_same(_value(UNARY[name], X), UNARY[name](X))


@pytest.mark.parametrize("name", POSITIVE)
def test_positive(name: str) -> None:
    _assert_same(_value(POSITIVE[name], UNIT), POSITIVE[name](UNIT))


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    _assert_same(_value(BINARY[name], X, UNIT), BINARY[name](X, UNIT))


def test_what_is_not_in_the_language_is_a_leaf() -> None:
    """An arctangent has no name in a spec: it must stay a tensor, never become something else."""
    with pytest.raises(AssertionError, match="is not read"):
        _value(torch.atan, X)


def test_whether_a_tensor_is_infinite_is_not_guessed() -> None:
    with pytest.raises(AssertionError, match="is not read"):
        _value(lambda x: torch.isinf(x).float(), X)


def test_overflow_stays_away() -> None:
    for op in (F.softplus, F.logsigmoid, F.silu):
        assert math.isfinite(float(_value(op, torch.full_like(X, 500.0))[0]))
        assert math.isfinite(float(_value(op, torch.full_like(X, -500.0))[0]))

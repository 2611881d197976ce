"""What is the value of a score or mask expression on tensors of indices?

Sympy is walked once per expression and becomes a tree of closures; evaluating it does no symbolic work.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from compile_attn.kernels.expr import Load, Round, Trunc

Env = Mapping[str, Any]  # symbol name -> tensor, and "captured" -> the captured tensors
Evaluate = Callable[[Env], Any]
_DTYPES = {7: torch.bfloat16, 10: torch.float16, 23: torch.float32}


@functools.lru_cache(maxsize=4096)
def evaluator(expr: sympy.Basic) -> Evaluate:
    """A function from index tensors, which broadcast against each other, to the value of `expr`: a tensor or a number."""
    if isinstance(expr, sympy.Symbol):
        return operator.itemgetter(expr.name)
    if expr is sympy.true or expr is sympy.false:
        return _constant(bool(expr))
    if isinstance(expr, sympy.Integer):
        return _constant(int(expr))
    if expr.is_number and not expr.args:
        return _constant(float(expr))
    if isinstance(expr, Load):
        return _load(int(expr.args[0]), [evaluator(index) for index in expr.args[1:]])
    if isinstance(expr, Round):
        return _round(_DTYPES[int(expr.args[0])], evaluator(expr.args[1]))
    if isinstance(expr, sympy.Piecewise):
        return _piecewise([(evaluator(value), evaluator(condition)) for value, condition in expr.args])
    if isinstance(expr, sympy.Pow):
        return _power(evaluator(expr.base), evaluator(expr.exp), expr.exp)
    return _apply(expr, [evaluator(part) for part in expr.args])


def _constant(value: float | bool) -> Evaluate:
    return lambda env: value


def _load(number: int, index: Sequence[Evaluate]) -> Evaluate:
    def load(env: Env) -> Any:
        tensor = env["captured"][number]
        places = [torch.as_tensor(place(env), device=tensor.device).long() for place in index]
        # Out of range only where a mask or a Piecewise discards the value; clamped so that the read itself is legal.
        value = tensor[tuple(place.clamp(0, size - 1) for place, size in zip(places, tensor.shape, strict=True))]
        return value.long() if value.dtype == torch.bool else value

    return load


def _round(dtype: torch.dtype, inner: Evaluate) -> Evaluate:
    def rounded(env: Env) -> Any:
        value = torch.as_tensor(inner(env))
        kept = value.dtype if value.is_floating_point() else torch.float32
        return value.to(dtype).to(kept)

    return rounded


def _piecewise(cases: Sequence[tuple[Evaluate, Evaluate]]) -> Evaluate:
    def choose(env: Env) -> Any:
        result: Any = float("nan")
        for value, condition in reversed(cases):
            met = condition(env)
            if isinstance(met, bool):
                result = value(env) if met else result
            else:
                result = torch.where(met, value(env), result)
        return result

    return choose


def _power(base: Evaluate, exponent: Evaluate, constant: sympy.Expr) -> Evaluate:
    if constant == -1:
        return lambda env: 1.0 / base(env)
    if constant == sympy.Rational(1, 2):
        return lambda env: _float(base(env)).sqrt()
    return lambda env: _float(base(env)) ** exponent(env)


def _float(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.float()


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda value: getattr(torch, name)(_float(value))


def _extreme(name: str) -> Callable[[Any, Any], Any]:
    def pick(a: Any, b: Any) -> Any:
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return max(a, b) if name == "maximum" else min(a, b)
        like = a if isinstance(a, torch.Tensor) else b
        return getattr(torch, name)(torch.as_tensor(a, device=like.device), torch.as_tensor(b, device=like.device))

    return pick


def _floor(value: Any) -> Any:
    return torch.floor(_float(value)).long() if isinstance(value, torch.Tensor) else int(value // 1)


_UNARY: dict[type, Callable[[Any], Any]] = {
    sympy.floor: _floor,
    sympy.ceiling: lambda value: -_floor(-value),
    sympy.Abs: abs,
    sympy.Not: lambda value: not value if isinstance(value, bool) else ~value,
    Trunc: lambda value: torch.trunc(_float(value)).long(),
    **{getattr(sympy, name): _unary(name) for name in "tanh exp log sin cos sign erf".split()},
}
_FOLD: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Xor: operator.xor,
    sympy.Mod: operator.mod,
    sympy.Max: _extreme("maximum"),
    sympy.Min: _extreme("minimum"),
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}


def _apply(expr: sympy.Basic, parts: Sequence[Evaluate]) -> Evaluate:
    if isinstance(expr, sympy.floor) and (exact := _floor_div(expr)) is not None:
        return exact
    unary = _UNARY.get(expr.func)
    if unary is not None:
        (inner,) = parts
        return lambda env: unary(inner(env))
    fold = _FOLD.get(expr.func)
    if fold is None:
        raise ValueError(f"no value for {expr.func.__name__} in {expr}; supported are {sorted(f.__name__ for f in _FOLD | _UNARY)}")
    return lambda env: functools.reduce(fold, (part(env) for part in parts))


def _floor_div(expr: sympy.floor) -> Evaluate | None:
    """floor(p / q) with integer p and constant q, in integer arithmetic: exact for every position."""
    numerator, denominator = sympy.fraction(sympy.together(expr.args[0]))
    if not (isinstance(denominator, sympy.Integer) and numerator.is_integer):
        return None
    inner, divisor = evaluator(numerator), int(denominator)
    return lambda env: inner(env) // divisor

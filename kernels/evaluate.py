"""What is the value of a score or mask expression on tensors of indices?

Sympy is walked once per expression and becomes a tree of closures; evaluating it does no symbolic work. Integers stay
exact int64; anything else is computed in `env["dtype"]`, float32 unless told otherwise, as eager PyTorch would.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import ITE

from compile_attn.kernels.expr import Load, Round, Trunc

Env = Mapping[str, Any]  # symbol name -> tensor; "captured" -> the captured tensors; "dtype" -> of real values (optional)
Evaluate = Callable[[Env], Any]
_DTYPES = {7: torch.bfloat16, 10: torch.float16, 23: torch.float32, 52: torch.float64}  # by explicit mantissa bits


@functools.lru_cache(maxsize=4096)
def evaluator(expr: sympy.Basic) -> Evaluate:
    """A function from index tensors, which broadcast against each other, to the value of `expr`, tensor or number."""
    if isinstance(expr, sympy.Symbol):
        return operator.itemgetter(expr.name)
    if expr is sympy.true or expr is sympy.false:
        return _constant(bool(expr))
    if isinstance(expr, sympy.Integer):
        return _constant(int(expr))
    if expr.is_number and not expr.has(Load, Round, Trunc):
        return _constant(float(expr))
    if isinstance(expr, Load):
        return _load(int(expr.args[0]), [evaluator(index) for index in expr.args[1:]])
    if isinstance(expr, Round):
        return _round(_DTYPES[int(expr.args[0])], evaluator(expr.args[1]))
    if isinstance(expr, sympy.Piecewise):
        return _piecewise([(evaluator(value), evaluator(condition)) for value, condition in expr.args])
    if isinstance(expr, ITE):
        condition, then, other = map(evaluator, expr.args)
        return _piecewise([(then, condition), (other, _constant(True))])
    if isinstance(expr, sympy.Pow):
        return _power(evaluator(expr.base), evaluator(expr.exp), expr.exp)
    if isinstance(expr, sympy.floor):
        return _floor_of(expr.args[0])
    if isinstance(expr, sympy.ceiling):
        below = _floor_of(-expr.args[0])
        return lambda env: -below(env)
    return _apply(expr, [evaluator(part) for part in expr.args])


def _constant(value: float | bool) -> Evaluate:
    return lambda env: value


def _real(value: Any, env: Env) -> Any:
    """The value in the dtype of real numbers; Python numbers stay as they are and take part in any dtype."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.promote_types(env.get("dtype", torch.float32), value.dtype))


def constant(value: Any, device: torch.device | None, real: torch.dtype = torch.float32) -> torch.Tensor:
    """An expression's value as a tensor, filled on its device: no CUDA graph can hold a copy from the host."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=real if isinstance(value, float) else None, device=device)


def _tensor(value: Any, env: Env) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    like = next((each for each in env.values() if isinstance(each, torch.Tensor)), None)
    return constant(value, None if like is None else like.device, env.get("dtype", torch.float32))


def _whole(value: Any) -> bool:
    """Is this an integer, or a tensor of integers?"""
    return not value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, int)


def _alike(values: Sequence[Any], env: Env) -> list[Any]:
    """All whole, or all real."""
    return list(values) if all(map(_whole, values)) else [_real(value, env) for value in values]


def _load(number: int, index: Sequence[Evaluate]) -> Evaluate:
    def load(env: Env) -> Any:
        tensor = env["captured"][number]
        places = [constant(place(env), tensor.device).long() for place in index]
        # Out of range only where a mask or a Piecewise discards the value; clamped so that the read itself is legal.
        value = tensor[tuple(place.clamp(0, size - 1) for place, size in zip(places, tensor.shape, strict=True))]
        return _real(value, env) if value.is_floating_point() else value.long()

    return load


def _round(dtype: torch.dtype, inner: Evaluate) -> Evaluate:
    def rounded(env: Env) -> Any:
        value = _real(_tensor(inner(env), env), env)
        return value.to(dtype).to(value.dtype)

    return rounded


def _piecewise(cases: Sequence[tuple[Evaluate, Evaluate]]) -> Evaluate:
    def choose(env: Env) -> Any:
        result: Any = math.nan
        for value, condition in reversed(cases):
            met = condition(env)
            if isinstance(met, bool):
                result = value(env) if met else result
            else:
                this, other = _alike([value(env), result], env)
                result = torch.where(met, _tensor(this, env), _tensor(other, env))
        return result

    return choose


def _power(base: Evaluate, exponent: Evaluate, constant: sympy.Expr) -> Evaluate:
    if constant == -1:
        return lambda env: _real(_tensor(base(env), env), env).reciprocal()
    if constant == sympy.Rational(1, 2):
        return lambda env: _real(_tensor(base(env), env), env).sqrt()
    if constant == sympy.Rational(-1, 2):
        return lambda env: _real(_tensor(base(env), env), env).rsqrt()
    if isinstance(constant, sympy.Integer) and constant > 0:  # whole stays whole
        return lambda env: base(env) ** int(constant)
    return lambda env: _real(_tensor(base(env), env), env) ** _real(exponent(env), env)


def _floor_of(inner: sympy.Expr) -> Evaluate:
    """floor(p / q) with a constant q is integer division wherever p is whole: exact for every position."""
    numerator, denominator = sympy.fraction(sympy.together(inner))
    exact = isinstance(denominator, sympy.Integer)
    top, whole = evaluator(numerator if exact else inner), int(denominator) if exact else 1

    def floor(env: Env) -> Any:
        value = top(env)
        if _whole(value):
            return value // whole
        value = _real(_tensor(value, env), env)
        return torch.floor(value if whole == 1 else value / whole).long()

    return floor


def _apply(expr: sympy.Basic, parts: Sequence[Evaluate]) -> Evaluate:
    unary, fold = _UNARY.get(expr.func), _FOLD.get(expr.func)
    if unary is not None:
        (inner,) = parts
        return lambda env: unary(_real(_tensor(inner(env), env), env))
    if expr.func in _SAME:
        same, (inner,) = _SAME[expr.func], parts
        return lambda env: same(inner(env))
    if fold is None:
        known = sorted(f.__name__ for f in (*_FOLD, *_UNARY, *_SAME))
        raise ValueError(f"no value for {expr.func.__name__} in {expr}; supported are {', '.join(known)}")
    if expr.func in (sympy.And, sympy.Or, sympy.Xor):
        return lambda env: functools.reduce(fold, (part(env) for part in parts))
    if expr.func in (sympy.Max, sympy.Min):
        return lambda env: functools.reduce(fold, (_tensor(v, env) for v in _alike([part(env) for part in parts], env)))
    return lambda env: functools.reduce(fold, _alike([part(env) for part in parts], env))


_UNARY: dict[type, Callable[[torch.Tensor], torch.Tensor]] = {
    sympy.tanh: torch.tanh,
    sympy.exp: torch.exp,
    sympy.log: torch.log,
    sympy.sin: torch.sin,
    sympy.cos: torch.cos,
    sympy.erf: torch.erf,
}
_SAME: dict[type, Callable[[Any], Any]] = {
    sympy.Abs: abs,
    Trunc: lambda value: value if _whole(value) else torch.trunc(constant(value, None)).long(),
    sympy.sign: lambda value: torch.sign(value) if isinstance(value, torch.Tensor) else (value > 0) - (value < 0),
    sympy.Not: lambda value: not value if isinstance(value, bool) else ~value,
}
_FOLD: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.And: operator.and_,
    sympy.Or: operator.or_,
    sympy.Xor: operator.xor,
    sympy.Mod: operator.mod,
    sympy.Max: torch.maximum,
    sympy.Min: torch.minimum,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    sympy.Lt: operator.lt,
    sympy.Le: operator.le,
    sympy.Gt: operator.gt,
    sympy.Ge: operator.ge,
}

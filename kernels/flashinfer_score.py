"""How does a score read as a FlashInfer attention variant, in CUDA C++?

Numbers are those of `evaluate`: whole numbers exact, as int64, everything else float32. Positions are the sequence's own:
the library counts queries from the first new one. Captured tensors and the number of the sequence have no text here.
"""

from __future__ import annotations

import functools
import hashlib

import sympy
from sympy.logic.boolalg import ITE

from compile_attn.kernels.expr import H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec

_REAL = {sympy.exp: "expf", sympy.log: "logf", sympy.sin: "sinf", sympy.cos: "cosf", sympy.tanh: "tanhf", sympy.erf: "erff"}
_COMPARISONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
_LOGIC = {sympy.And: " && ", sympy.Or: " || ", sympy.Xor: " != "}

HELPERS = r"""
PAGED_ATTN_INLINE int64_t paged_attn_floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
PAGED_ATTN_INLINE int64_t paged_attn_modulo(int64_t a, int64_t b) { return a - paged_attn_floor_divide(a, b) * b; }
PAGED_ATTN_INLINE int64_t paged_attn_power(int64_t a, int n) { int64_t p = 1; while (n-- > 0) p *= a; return p; }
"""

_VARIANT = r"""
#define PAGED_ATTN_INLINE __device__ __forceinline__
%(helpers)s
struct %(name)s : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t window_left, qo_len, kv_len;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ %(name)s(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = (params.window_left >= 0) ? params.window_left : kv_len;
    sm_scale_log2 = math::log2e;
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    const int64_t i = int64_t(kv_len) - int64_t(qo_len) + int64_t(qo_idx);
    const int64_t j = kv_idx;
    const int64_t h = qo_head_idx;
    const float s = float(logits);
    return T(%(score)s);
  })

  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return (kv_idx + qo_len + window_left >= kv_len + qo_idx);
  })
%(sinks)s};
"""

# As the library's own variant with sinks: they join the normaliser with the first part of the keys.
_SINKS = r"""
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    const bool here = kv_tile_idx == 0 && qo_head_idx < params.num_qo_heads;
    const float sink = here ? params.sink[qo_head_idx] * math::log2e : -math::inf;
    const float highest = (sink > m) ? sink : m;
    scale = math::ptx_exp2(max(m - highest, -math::inf));
    d = math::ptx_exp2(max(sink - highest, -math::inf)) + d * scale;
    m = highest;
  })

  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * scale * ((m != -math::inf) ? math::ptx_rcp(d) : 0.f);
  });
"""


@functools.lru_cache(maxsize=1024)
def variant(spec: AttentionSpec) -> tuple[str, str]:
    """Name and declaration of a variant for the spec's score and sinks. ValueError for what has no text."""
    score = real(spec.expression())
    body = {"helpers": HELPERS, "score": score, "sinks": "" if spec.sinks is None else _SINKS}
    digest = hashlib.sha256((_VARIANT % {**body, "name": ""}).encode()).hexdigest()[:16]
    name = f"PagedAttnScore{digest}"
    return name, _VARIANT % {**body, "name": name}


def real(expr: sympy.Basic) -> str:
    """As float32."""
    if expr.is_number and not expr.has(Load, Round, Trunc):
        return _number(float(expr))
    return f"float({text(expr)})" if _whole(expr) else text(expr)


def text(expr: sympy.Basic) -> str:
    """In its own type: bool, int64 or float32. Bound as tightly as a call."""
    if expr in (sympy.true, sympy.false):
        return str(bool(expr)).lower()
    if isinstance(expr, sympy.Integer):
        return f"int64_t({int(expr)})"
    if isinstance(expr, sympy.Symbol):
        if expr not in (S, H, I, J):
            raise ValueError(f"no text for the symbol {expr}: FlashInfer's variants know the score, the head and both positions")
        return str(expr.name)
    if expr.is_number and not expr.has(Load, Round, Trunc):
        return _number(float(expr))
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        sign = " + " if isinstance(expr, sympy.Add) else " * "
        return f"({sign.join(text(part) if _whole(expr) else real(part) for part in expr.args)})"
    if expr.func in _LOGIC:
        return f"({_LOGIC[expr.func].join(text(part) for part in expr.args)})"
    if expr.func in _COMPARISONS:
        left, right = (text(part) if all(map(_whole, expr.args)) else real(part) for part in expr.args)
        return f"({left} {_COMPARISONS[expr.func]} {right})"
    return _call(expr)


def _call(expr: sympy.Basic) -> str:
    if expr.func in _REAL:
        return f"{_REAL[expr.func]}({real(expr.args[0])})"
    match expr:
        case sympy.Not():
            return f"(!{text(expr.args[0])})"
        case sympy.floor():
            return _floor(expr.args[0])
        case sympy.ceiling():
            return f"(-{_floor(-expr.args[0])})"
        case sympy.Piecewise() | ITE():
            return _choice(expr)
        case sympy.Pow():
            return _power(expr)
        case sympy.Mod() if _whole(expr) and isinstance(expr.args[1], sympy.Integer) and expr.args[1] != 0:
            return f"paged_attn_modulo({text(expr.args[0])}, {text(expr.args[1])})"
        case sympy.Max() | sympy.Min():
            sign = ">" if isinstance(expr, sympy.Max) else "<"
            parts = [text(part) if _whole(expr) else real(part) for part in expr.args]
            return functools.reduce(lambda a, b: f"({a} {sign} {b} ? {a} : {b})", parts)
        case sympy.Abs():
            inner = text(expr.args[0])
            return f"({inner} < 0 ? -{inner} : {inner})" if _whole(expr) else f"fabsf({inner})"
        case sympy.sign():
            inner = text(expr.args[0])
            return f"{'int64_t' if _whole(expr) else 'float'}(({inner} > 0) - ({inner} < 0))"
    raise ValueError(f"no text for {expr.func.__name__} in a variant of FlashInfer: {expr}")


def _whole(expr: sympy.Basic) -> bool:
    """Is the value an integer, as `evaluate` has it?"""
    match expr:
        case sympy.Symbol():
            return bool(expr != S)
        case sympy.floor() | sympy.ceiling():
            return True
        case sympy.Piecewise():
            return expr.args[-1][1] == sympy.true and all(_whole(value) for value, _ in expr.args)
        case sympy.Pow():
            return isinstance(expr.exp, sympy.Integer) and expr.exp > 0 and _whole(expr.base)
        case sympy.Add() | sympy.Mul() | sympy.Mod() | sympy.Max() | sympy.Min() | sympy.Abs() | sympy.sign():
            return all(map(_whole, expr.args))
    return isinstance(expr, sympy.Integer)


def _floor(inner: sympy.Expr) -> str:
    """floor(p / q) with a constant q divides whole numbers where p is whole."""
    top, bottom = inner.as_numer_denom()
    if isinstance(bottom, sympy.Integer) and _whole(top):
        return text(top) if bottom == 1 else f"paged_attn_floor_divide({text(top)}, {text(bottom)})"
    return f"int64_t(floorf({real(inner)}))"


def _choice(expr: sympy.Basic) -> str:
    if isinstance(expr, ITE):
        condition, then, other = map(text, expr.args)
        return f"({condition} ? {then} : {other})"
    alike = text if all(_whole(value) for value, _ in expr.args) else real
    *cases, (last, condition) = expr.args
    if condition != sympy.true:
        cases, found = list(expr.args), "NAN"
    else:
        found = alike(last)
    for value, condition in reversed(cases):
        found = f"({text(condition)} ? {alike(value)} : {found})"
    return found


def _power(expr: sympy.Pow) -> str:
    base, exponent = expr.args
    if _whole(expr):
        return f"paged_attn_power({text(base)}, {int(exponent)})"
    if exponent == sympy.Rational(1, 2):
        return f"sqrtf({real(base)})"
    if exponent == -1:
        return f"(1.0f / {real(base)})"
    return f"powf({real(base)}, {real(exponent)})"


def _number(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"no text for the number {value} in a variant of FlashInfer")
    return f"({value!r}f)" if any(sign in repr(value) for sign in ".e") else f"({value!r}.0f)"

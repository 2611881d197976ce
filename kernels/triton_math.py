"""Which arithmetic do printed expressions need that Triton has not, or has with another meaning?

Integers divide as in Python and torch, towards minus infinity; Triton's own `//` and `%` truncate, as in C. All of it also
runs in Triton's interpreter, which knows no libdevice.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(index, size, stride):  # type: ignore[no-untyped-def]
    """The offset of an index. Out of range only where a mask or a Piecewise discards the value; clamped, so legal."""
    return tl.minimum(tl.maximum(index, 0), size - 1).to(tl.int64) * stride


@triton.jit
def modulo(a, b):  # type: ignore[no-untyped-def]
    """The remainder with the sign of b, for whole and real numbers."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_divide(a, b):  # type: ignore[no-untyped-def]
    """a / b of whole numbers, rounded down."""
    rest = a % b
    return a // b - tl.where((rest != 0) & ((rest < 0) != (b < 0)), 1, 0)


@triton.jit
def sign(a):  # type: ignore[no-untyped-def]
    return tl.where(a > 0, 1, 0) - tl.where(a < 0, 1, 0)


@triton.jit  # type: ignore[untyped-decorator]
def whole_power(a, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """a ** N for N >= 1; whole stays whole."""
    result = a
    for _ in tl.static_range(N - 1):
        result = result * a
    return result


@triton.jit
def power(a, b):  # type: ignore[no-untyped-def]
    """a ** b of reals: NaN for a < 0, unless b is whole."""
    size = tl.where(b == 0, 1.0, tl.exp2(b * tl.log2(tl.abs(a))))
    odd = tl.abs(modulo(b, 2.0)) == 1
    signed = tl.where(odd, -size, size)
    return tl.where(a < 0, tl.where(tl.floor(b) == b, signed, float("nan")), size)


@triton.jit
def tanh(a):  # type: ignore[no-untyped-def]
    """Within 2e-7 of a relative error: the series where 1 - 2 / (1 + exp(2a)) would cancel."""
    square = a * a
    series = a * (1 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    return tl.where(tl.abs(a) < 0.25, series, 1 - 2 / (1 + tl.exp(2 * a)))


@triton.jit
def capped(a):  # type: ignore[no-untyped-def]
    """tanh, within 2e-7 of 1 instead of itself: enough where it is multiplied by a cap of at most a hundred."""
    return 1 - 2 / (1 + tl.exp2(a * 2.8853900817779268))


@triton.jit
def round_bfloat16(a):  # type: ignore[no-untyped-def]
    """The nearest bfloat16, ties to even, by bits: the interpreter's cast truncates."""
    bits = a.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(a == a, rounded.to(tl.float32, bitcast=True), a)

"""What is the language in which scores and masks are written?

Sympy expressions over five symbols and three functions. Everything that reads, proves, prints or evaluates attention shares
this one vocabulary, and nothing else may occur in an `AttentionSpec`.
"""

from __future__ import annotations

import sympy

S = sympy.Symbol("s", real=True)  # the raw product q.k, before any scale
B = sympy.Symbol("b", integer=True, nonnegative=True)  # sequence
H = sympy.Symbol("h", integer=True, nonnegative=True)  # query head
I = sympy.Symbol("i", integer=True, nonnegative=True)  # noqa: E741  position of the query, counted from the sequence's start
J = sympy.Symbol("j", integer=True, nonnegative=True)  # position of the key


class Load(sympy.Function):  # type: ignore[misc]  # sympy ships no types
    """`Load(k, *index)`: an element of the k-th captured tensor of the site. Bool tensors read as 0 or 1."""

    is_real = True


class Round(sympy.Function):  # type: ignore[misc]
    """`Round(mantissa_bits, x)`: x rounded to a float with that many explicit mantissa bits (bf16 7, fp16 10, fp32 23)."""

    nargs = 2
    is_real = True


class Trunc(sympy.Function):  # type: ignore[misc]
    """`Trunc(x)`: x rounded towards zero, as a cast from float to integer does."""

    nargs = 1
    is_integer = True

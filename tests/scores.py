"""Scores that FlashInfer has no kernel for, whose variants tests compile for a GPU."""

from __future__ import annotations

import sympy

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import H, I, J, Load, S
from compile_attn.kernels.spec import AttentionSpec

_CAPPED = 4.0 * sympy.tanh((0.09 * S + 2 ** (-H - 1) * (J - I)) / 4.0)
_BUCKETS = sympy.Piecewise((0.5 * sympy.floor((I - J) / 7), I - J < 50), (sympy.Mod(I, 3) - 0.25 * H, True))
SCORES = {
    "cap after bias": AttentionSpec(8, 2, 128, 128, score=_CAPPED),
    "window, cap, bias, sinks": AttentionSpec(8, 2, 128, 128, m.Window(127), 0.09, 5.0, bias=_BUCKETS, sinks=Load(0, H)),
}

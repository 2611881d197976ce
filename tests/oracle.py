"""What should attention over pages give? Scalar float64 loops over the spec's expressions, through lambdify."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec

SLOPE = 2 ** (-(H + 1) * sympy.Rational(1, 2))
_BUCKET = sympy.Piecewise((I - J, I - J < 4), (4 + Trunc(sympy.log(sympy.Max(I - J, 1) / 4.0) / math.log(8) * 4), True))

# What the specs below read: documents, a bias a head and bucket, sinks a head, a padding mask. 64 tokens at most.
CAPTURED = (
    torch.arange(64).div(7, rounding_mode="floor").expand(8, 64),
    torch.linspace(-2, 2, 4 * 9).view(4, 9),
    torch.tensor([0.5, -1.0, 2.0, 0.0]),
    torch.arange(8 * 64).view(8, 64) % 5 != 3,
)
SPECS = {
    "causal": AttentionSpec(4, 4, 8, 8, scale=0.35),
    "gqa": AttentionSpec(4, 2, 8, 8, scale=0.35),
    "one head": AttentionSpec(1, 1, 8, 8, scale=0.35),
    "mqa, D != Dv": AttentionSpec(4, 1, 8, 6, scale=0.35),
    "window": AttentionSpec(4, 2, 8, 8, m.Window(4), scale=0.35),
    "chunked": AttentionSpec(4, 2, 8, 8, m.Chunked(5), scale=0.35),
    "prefix": AttentionSpec(4, 2, 8, 8, m.Prefix(6), scale=0.35),
    "bidirectional": AttentionSpec(4, 2, 8, 8, m.Bidirectional(), scale=0.35),
    "documents": AttentionSpec(4, 2, 8, 8, m.All(m.Causal(), m.SameDocument(0)), scale=0.35),
    "block-sparse": AttentionSpec(4, 2, 8, 8, m.BlockSparse(3, 1, 3, head_step=1), scale=0.35),
    "either": AttentionSpec(4, 2, 8, 8, m.Any(m.Window(2), m.All(m.Causal(), m.General(sympy.Lt(J, 2)))), scale=0.35),
    "padding": AttentionSpec(4, 2, 8, 8, m.General(sympy.Le(J, I) & (sympy.Eq(I, J) | sympy.Ne(Load(3, B, J), 0)))),
    "softcap": AttentionSpec(4, 2, 8, 8, scale=0.9, softcap=1.5),
    "softcap, window, bias": AttentionSpec(4, 2, 8, 8, m.Window(9), scale=0.9, softcap=2.0, bias=SLOPE * (J - I)),
    "alibi of distance": AttentionSpec(4, 4, 8, 8, scale=0.35, bias=-SLOPE * sympy.Abs(I - J)),
    "buckets": AttentionSpec(4, 2, 8, 8, bias=Load(1, H, sympy.Min(_BUCKET, 8))),
    "cap after bias": AttentionSpec(4, 2, 8, 8, score=3.0 * sympy.tanh((0.4 * S + SLOPE * (J - I)) / 3.0)),
    "sinks": AttentionSpec(4, 2, 8, 8, m.Window(5), scale=0.35, sinks=Load(2, H)),
    "rounded": AttentionSpec(4, 2, 8, 8, scale=0.35, bias=Round(7, SLOPE * J)),
    "everything": AttentionSpec(
        4, 2, 8, 6, m.All(m.Window(11), m.BlockSparse(2, 2, 3)), 0.6, 2.5, -SLOPE * (I - J), sinks=0.25 * H + 0.1
    ),
}


def scalar(expr: sympy.Basic, captured: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """expr as a Python function of (s, b, h, i, j)."""

    def load(number: int, *index: int) -> float:
        value = captured[number][tuple(int(place) for place in index)].item()
        return int(value) if isinstance(value, bool) else value

    def rounded(bits: int, value: float) -> float:
        return torch.tensor(value).to({7: torch.bfloat16, 10: torch.float16, 23: torch.float32}[bits]).item()

    names = {"Load": load, "Round": rounded, "Trunc": math.trunc}
    function: Callable[..., Any] = sympy.lambdify((S, B, H, I, J), expr, modules=[names, "math"], cse=False)
    return function


def attend_row(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: int,
    i: int,
    captured: Sequence[torch.Tensor],
) -> torch.Tensor:
    """One query [Hq, D] at position i of sequence b, over k [L, Hkv, D] and v [L, Hkv, Dv] -> [Hq, Dv] float64."""
    q, k, v = q.double(), k.double(), v.double()
    score, visible = scalar(spec.expression(), captured), scalar(spec.mask.predicate(), captured)
    sink = None if spec.sinks is None else scalar(spec.sinks, captured)
    group = spec.num_q_heads // spec.num_kv_heads
    out = torch.zeros(spec.num_q_heads, v.shape[2], dtype=torch.float64)
    for h in range(spec.num_q_heads):
        keys = [j for j in range(k.shape[0]) if visible(0.0, b, h, i, j)]
        weights = [math.exp(score(float(q[h] @ k[j, h // group]), b, h, i, j)) for j in keys]
        total = sum(weights) + (0.0 if sink is None else math.exp(sink(0.0, b, h, i, 0)))
        for j, weight in zip(keys, weights, strict=True):
            out[h] += weight / total * v[j, h // group]
    return out

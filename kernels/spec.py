"""What does one attention compute, and what must a kernel be able to do for it?

`AttentionSpec` is the meaning of an attention site: no torch, no graph, no kernel. Spellings end here and machines begin here.

Shape legend, used by every file of the project:
    B  sequences in the batch          P   pages in the pool
    T  new tokens in the batch         PS  tokens in a page (page_size)
    Hq / Hkv  query / key-value heads  D / Dv  head sizes of q,k / of v
    KV pages are two tensors a layer, K [P, PS, Hkv, D] and V [P, PS, Hkv, Dv]. Query head h reads KV head h // (Hq // Hkv).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import sympy

from compile_attn.kernels.mask import Causal, Mask


class Feature(Enum):
    """What a spec may ask of a backend beyond plain attention. A backend that does not declare one refuses it."""

    GQA = auto()
    SOFTCAP = auto()
    ALIBI = auto()  # bias is slope(h) * (j - i), up to terms constant in j
    BIAS = auto()  # any other bias
    SCORE = auto()  # a score that is not scale, softcap, bias in this order
    SINKS = auto()
    CAPTURED = auto()  # reads captured tensors
    BIDIRECTIONAL = auto()
    WINDOW = auto()
    CHUNKED = auto()
    PREFIX = auto()
    DOCUMENTS = auto()
    BLOCK_SPARSE = auto()
    GENERAL_MASK = auto()
    UNEQUAL_HEAD_DIMS = auto()  # D != Dv


@dataclass(frozen=True)
class AttentionSpec:
    """out[i] = sum_j softmax_j(score(s, b, h, i, j) where mask) v[j], with s = q[i].k[j].

    The order is fixed: score = bias(b,h,i,j) + softcap * tanh(scale * s / softcap); then the mask; then `sinks(h)` joins the
    normaliser as exp(sinks(h)). Where a model uses another order, `score` holds the whole expression and scale, softcap and
    bias keep their defaults. Every row is proven to see at least one key.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    mask: Mask = field(default_factory=Causal)
    scale: float = 1.0
    softcap: float | None = None
    bias: sympy.Expr | None = None
    score: sympy.Expr | None = None
    sinks: sympy.Expr | None = None

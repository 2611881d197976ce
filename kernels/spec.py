"""What does one attention compute, and what must a kernel be able to do for it?

`AttentionSpec` is the meaning of an attention site: no torch, no graph, no kernel. Spellings end here,
machines begin here.

Shape legend, used by every file of the project:
    B  sequences in the batch          P   pages in the pool
    T  new tokens in the batch         PS  tokens in a page (page_size)
    Hq / Hkv  query / key-value heads  D / Dv  head sizes of q,k / of v
    KV pages are two tensors a layer, K [P, PS, Hkv, D] and V [P, PS, Hkv, Dv].
    Query head h reads KV head h // (Hq // Hkv).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from enum import Enum, auto

import sympy

from compile_attn.kernels import mask as masks
from compile_attn.kernels.expr import H, I, J, Load, S
from compile_attn.kernels.mask import Causal, Mask
from compile_attn.kernels.text import parse, print_expr


class Feature(Enum):
    """What a spec may ask of a backend beyond plain attention. A backend that does not declare one refuses it."""

    GQA = auto()
    SOFTCAP = auto()
    ALIBI = auto()  # bias is slope(h) * (j - i), up to terms constant in j
    BIAS = auto()  # any other bias
    SCORE = auto()  # a score that is not scale, softcap, bias in this order
    SINKS = auto()
    CAPTURED = auto()  # reads captured tensors per query or key; values per head (sinks, ALiBi slopes) are plain vectors
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

    The order is fixed: score = bias(b,h,i,j) + softcap * tanh(scale * s / softcap); then the mask; then `sinks(h)`
    joins the normaliser as exp(sinks(h)). Where a model uses another order, `score` holds the whole expression and
    scale, softcap and bias keep their defaults. Every row is proven to see at least one key. Sizes below 1 are a ValueError, and
    so are query heads that do not share KV heads evenly.
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

    def __post_init__(self) -> None:
        heads, shared = self.num_q_heads, self.num_kv_heads
        if min(heads, shared, self.head_dim, self.head_dim_v) < 1 or heads % shared:
            raise ValueError(
                f"{heads} query heads on {shared} KV heads, of sizes {self.head_dim} and {self.head_dim_v}; "
                "each is at least 1, and query heads are a multiple of KV heads"
            )

    def expression(self) -> sympy.Expr:
        """The whole score before the mask, as one expression of s, b, h, i, j."""
        if self.score is not None:
            return self.score
        score = sympy.Float(self.scale) * S
        if self.softcap is not None:
            score = self.softcap * sympy.tanh(score / self.softcap)
        return score if self.bias is None else score + self.bias

    def alibi_slope(self) -> sympy.Expr | None:
        """slope(h), where the bias is slope(h) * (j - i) up to terms constant in j; else None.

        With sinks nothing is constant: they join the normaliser unshifted. Under a causal mask |i - j| is i - j.
        """
        if self.bias is None:
            return None
        bias = self.bias
        if self.mask.causal():
            bias = bias.replace(sympy.Abs(I - J), I - J)
        bias = sympy.expand(bias)
        slope, rest = bias.coeff(J, 1), bias.coeff(J, 0)
        if not slope.free_symbols <= {H} or slope == 0 or rest.has(J) or sympy.expand(bias - slope * J - rest) != 0:
            return None
        return None if self.sinks is not None and sympy.expand(rest + slope * I) != 0 else slope

    def features(self) -> frozenset[Feature]:
        """What a backend must have to serve this spec."""
        asked = {Feature[name] for name in self.mask.features()}
        slope = self.alibi_slope()
        pairs = [part for part in (None if slope is not None else self.bias, self.score, self.mask.predicate()) if part is not None]
        asked |= {Feature.GQA} if self.num_q_heads != self.num_kv_heads else set()
        asked |= {Feature.SOFTCAP} if self.softcap is not None else set()
        asked |= {Feature.SCORE} if self.score is not None else set()
        asked |= {Feature.SINKS} if self.sinks is not None else set()
        asked |= {Feature.CAPTURED} if any(part.has(Load) for part in pairs) else set()
        asked |= {Feature.UNEQUAL_HEAD_DIMS} if self.head_dim != self.head_dim_v else set()
        if self.bias is not None:
            asked.add(Feature.BIAS if slope is None else Feature.ALIBI)
        return frozenset(asked)

    def asks(self, feature: Feature) -> str:
        """What of this spec needs that feature, as a phrase with its numbers."""
        phrases = {
            Feature.GQA: f"{self.num_q_heads} query heads on {self.num_kv_heads} KV heads",
            Feature.SOFTCAP: f"softcap {self.softcap}",
            Feature.ALIBI: "an ALiBi bias",
            Feature.BIAS: f"the bias {print_expr(self.bias or sympy.S.Zero)}",
            Feature.SCORE: f"the score {print_expr(self.score or sympy.S.Zero)}",
            Feature.SINKS: "attention sinks",
            Feature.CAPTURED: "captured tensors",
            Feature.UNEQUAL_HEAD_DIMS: f"head size {self.head_dim} for queries and keys, {self.head_dim_v} for values",
        }
        return phrases.get(feature, f"the mask '{self.mask.words()}'")

    def words(self) -> str:
        """One line of English."""
        parts = [self.mask.words(), f"{self.num_q_heads} heads"]
        if self.num_kv_heads != self.num_q_heads:
            parts.append(f"{self.num_kv_heads} KV heads")
        size = str(self.head_dim) if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        parts += [f"head size {size}", f"scale {self.scale:.6g}"]
        parts += [f"softcap {self.softcap:g}"] if self.softcap is not None else []
        if self.bias is not None:
            slope = self.alibi_slope()
            parts.append(f"bias {print_expr(self.bias)}" if slope is None else f"ALiBi slope {print_expr(slope)}")
        parts += [f"score {print_expr(self.score)}"] if self.score is not None else []
        parts += [f"sinks {print_expr(self.sinks)}"] if self.sinks is not None else []
        return ", ".join(parts)

    def encode(self) -> str:
        """The spec as text that names every value that differs from its default; `decode` reads it back exactly."""
        parts = [f"{name}={getattr(self, name)}" for name in ("num_q_heads", "num_kv_heads", "head_dim", "head_dim_v")]
        parts += [f"mask={_mask_text(self.mask)}", f"scale={float(self.scale)!r}"]
        parts += [f"softcap={float(self.softcap)!r}"] if self.softcap is not None else []
        for name in ("bias", "score", "sinks"):
            value = getattr(self, name)
            parts += [f"{name}={print_expr(value)}"] if value is not None else []
        return f"AttentionSpec({', '.join(parts)})"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def decode(text: str) -> AttentionSpec:
        """Read what `encode` wrote. ValueError for any other text."""
        spec = parse(text, {"AttentionSpec": _build, **{name: functools.partial(_build_mask, name) for name in _MASKS}})
        if not isinstance(spec, AttentionSpec):
            raise ValueError(f"not the text of a spec: {text[:200]!r}")
        return spec


_MASKS = tuple(["Causal", "Bidirectional", "Window", "Chunked", "Prefix", "SameDocument", "BlockSparse", "General", "All", "Any"])


def _build(**parts: object) -> AttentionSpec:
    numbers = {k: int(v) for k, v in parts.items() if k.startswith(("num_", "head_"))}  # type: ignore[call-overload]
    floats = {k: float(v) for k, v in parts.items() if k in ("scale", "softcap")}  # type: ignore[arg-type]
    rest = {k: v for k, v in parts.items() if k in ("mask", "bias", "score", "sinks")}
    return AttentionSpec(**numbers, **floats, **rest)  # type: ignore[arg-type]


def _build_mask(name: str, *parts: object, **fields: object) -> Mask:
    def plain(value: object) -> object:
        return int(value) if isinstance(value, sympy.Integer) else value

    mask: Mask = getattr(masks, name)(*parts, **{key: plain(value) for key, value in fields.items()})
    return mask


def _mask_text(mask: Mask) -> str:
    def text(value: object) -> str:
        return print_expr(value) if isinstance(value, sympy.Basic) else repr(value)

    if isinstance(mask, (masks.All, masks.Any)):
        return f"{type(mask).__name__}({', '.join(map(_mask_text, mask.masks))})"
    return f"{type(mask).__name__}({', '.join(f'{f.name}={text(getattr(mask, f.name))}' for f in fields(mask))})"  # type: ignore[arg-type]

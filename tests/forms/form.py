"""What is a form: one naive attention, what it means, and what is almost it but must not be taken for it?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compile_attn.kernels.mask import Causal, Mask
from compile_attn.kernels.spec import AttentionSpec

Attention = Callable[..., object]
Check = Callable[[AttentionSpec], bool]
BATCH, HEADS, DIM, TOKENS = 2, 4, 8, 9
SCALE = DIM**-0.5


@dataclass(frozen=True)
class NearMiss:
    """`run` resembles a form; `reason` is a regular expression that the refusal must match.

    `paged`: it is refused in paged mode only. `readable`: a reader may also take it for what it is, if the numbers agree.
    """

    run: Attention
    reason: str
    paged: bool = False
    readable: bool = False


@dataclass(frozen=True)
class Form:
    """An attention of q [B, Hq, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] (or token-major) and its meaning.

    `check`   what else must hold of the spec, for parts that have no one value (captured tensors)
    `tensors` parameters that `run` takes by name; `inputs` the same for data of a call, made from (B, T)
    `paged`   None: the same spec when paged; else a regular expression of the reason why it is refused
    """

    run: Attention
    spec: AttentionSpec
    check: Check = lambda spec: True
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Callable[[int, int], Tensor]] = field(default_factory=dict)
    token_major: bool = False
    paged: str | None = None
    near: tuple[NearMiss, ...] = ()

    def module(self, run: Attention | None = None) -> nn.Module:
        return Site(self, run or self.run)

    def arguments(self, batch: int = BATCH, tokens: int = TOKENS) -> tuple[Tensor, ...]:
        """The packed queries, keys and values [B, T, C], and the further inputs of one call."""
        width = sum(heads * dim for heads, dim in self.sizes)
        packed = torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(tokens))
        return (packed, *(make(batch, tokens) for make in self.inputs.values()))

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Heads and head size of q, k and v."""
        s = self.spec
        return ((s.num_q_heads, s.head_dim), (s.num_kv_heads, s.head_dim), (s.num_kv_heads, s.head_dim_v))


class Site(nn.Module):
    """A module around one attention function: splits a packed projection into q, k, v, and holds the parameters."""

    def __init__(self, form: Form, run: Attention) -> None:
        super().__init__()
        self.run, self.sizes, self.token_major, self.names = run, form.sizes, form.token_major, tuple(form.tensors)
        for name, tensor in form.tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, packed: Tensor, *more: Tensor) -> object:
        parts = packed.split([heads * dim for heads, dim in self.sizes], dim=-1)
        qkv = [x.unflatten(-1, size) for x, size in zip(parts, self.sizes, strict=True)]
        if not self.token_major:
            qkv = [x.transpose(1, 2) for x in qkv]
        return self.run(*qkv, *more, **{name: getattr(self, name) for name in self.names})


def spec(mask: Mask | None = None, kv: int = HEADS, scale: float = SCALE, dim_v: int = DIM, **more: object) -> AttentionSpec:
    """Four heads of 8, causal, scaled by 1/sqrt(8), unless said otherwise."""
    return AttentionSpec(HEADS, kv, DIM, dim_v, mask=mask or Causal(), scale=scale, **more)  # type: ignore[arg-type]


def additive(n: int, value: float = torch.finfo(torch.float32).min) -> Tensor:
    """transformers' additive causal mask."""
    return torch.full((n, n), value).triu(1)[None, None]


def seen(n: int) -> Tensor:
    """A causal mask of bools, [T, T]."""
    return torch.ones(n, n, dtype=torch.bool).tril()


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """transformers' repeat_kv."""
    b, h, n, d = x.shape
    return x if times == 1 else x[:, :, None].expand(b, h, times, n, d).reshape(b, h * times, n, d)

"""Are ops on q and on k joined where they are the same, and only there?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compile_attn as ca
from tests.models.families import enliven
from tests.models.harness import recomputed

WIDTH, HEADS, KV_HEADS, DIM, VOCAB = 32, 4, 2, 8, 31
PROMPTS = [[5, 3, 8, 1, 9], [7], list(range(20))]
Rotate = Callable[[Any, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sliced(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it."""
    turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)
    return (x * cos) + (turned * sin)


def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of the channels only, as in GPT-NeoX."""
    turned, kept = x[..., : DIM // 2], x[..., DIM // 2 :]
    return torch.cat([half(turned, cos[..., : DIM // 2], sin[..., : DIM // 2]), kept], -1)


def both(rotate: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Rotate:
    return lambda _, q, k, cos, sin: (rotate(q, cos, sin), rotate(k, cos, sin))


def pairs(_: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Even and odd channels, stacked."""

    def turn(x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        c, s = cos[..., : DIM // 2], sin[..., : DIM // 2]
        return torch.cat([even * c - odd * s, odd * c + even * s], -1)

    return turn(q), turn(k)


def squashed(_: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return half(q, cos, sin).tanh(), half(k, cos, sin)


def scaled(_: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The factors belong to the attention's scale, so what is left is the same."""
    return half(q, cos, sin) * 0.7, half(k, cos, sin) * 1.1


def other_angles(_: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return half(q, cos, sin), half(k, sin, cos)


def normed(m: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w for x, w in ((q, m.q_norm), (k, m.k_norm)))
    return half(q, cos, sin), half(k, cos, sin)


def by_head(m: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A factor of each head's own."""
    return q * m.heads[:, None, None], k * m.heads[:KV_HEADS, None, None]


def unlike(_: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q.tanh(), k.sin()


class Layer(nn.Module):
    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, heads * DIM, bias=False) for heads in (HEADS, KV_HEADS, KV_HEADS))
        self.out = nn.Linear(HEADS * DIM, WIDTH)
        self.q_norm, self.k_norm, self.heads = (nn.Parameter(torch.ones(size)) for size in (DIM, DIM, HEADS))
        self.rotate = rotate

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (linear(x).view(b, t, -1, DIM).transpose(1, 2) for linear in (self.q, self.k, self.v))
        q, k = self.rotate(self, q, k, cos, sin)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        scores = (q @ k.mT) / 3.0 + torch.full((t, t), float("-inf")).triu(1)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, -1))


class Model(nn.Module):
    def __init__(self, rotate: Rotate) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.layers = nn.ModuleList(Layer(rotate) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        frequency = 100.0 ** (-torch.arange(0, DIM, 2) / DIM)
        angle = torch.cat([torch.arange(input_ids.shape[1])[:, None] * frequency] * 2, -1)
        for layer in self.layers:
            x = x + layer(F.layer_norm(x, (WIDTH,)), angle.cos(), angle.sin())
        return self.head(x)


def detail_of(rotate: Rotate, inner: Any = "eager") -> str:
    """What the report says of q, k and v, after the tokens have been compared."""
    model = Model(rotate).eval()
    enliven(model)
    with ca.PagedLM(model, kv_tokens=128, max_seqs=4, inner=inner) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=6) == [recomputed(model, prompt, 6) for prompt in PROMPTS]
        assert lm.report is not None
        one, two = lm.report.linears
    assert one.detail == two.detail and one.kind == "merged"
    return one.detail


@pytest.mark.parametrize(
    ("rotate", "saved"),
    [(both(half), 4), (both(sliced), 4), (both(partial), 4), (pairs, 6)],
    ids=["half", "sliced", "partial", "pairs"],
)
def test_joined(rotate: Rotate, saved: int) -> None:
    assert detail_of(rotate).endswith(f"32 + 16 + 16 columns, and {saved} ops on its slices done once")


def test_joined_by_inductor() -> None:
    assert detail_of(both(half), "inductor").endswith("4 ops on its slices done once")


@pytest.mark.parametrize("rotate", [squashed, other_angles, normed, by_head, unlike], ids=lambda one: one.__name__)
def test_near_misses(rotate: Rotate) -> None:
    """What differs somewhere stays apart as a whole: else a compiler would make three kernels of two."""
    assert detail_of(rotate).endswith("32 + 16 + 16 columns")

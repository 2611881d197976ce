"""Is what all layers share computed once, and nothing else kept?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_attn as ca
from tests.models.families import enliven
from tests.models.harness import recomputed
from tests.tiny import tiny

WIDTH, HEADS, VOCAB = 16, 2, 31
PROMPTS = [[5, 3, 8, 1, 9], [7], list(range(20))]


def angles(positions: Tensor, dim: int) -> Tensor:
    frequency = 100.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([positions[:, None] * frequency] * 2, -1)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-second, first], -1) * angle.sin()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.randn(64, WIDTH // HEADS))

    def forward(self, x: Tensor, how: str) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, -1).transpose(1, 2) for y in self.qkv(x).split(c, -1))
        if how == "rotary":  # every layer makes its own angles
            angle = angles(torch.arange(t), c // HEADS)
            q, k = rotate(q, angle), rotate(k, angle)
        elif how == "own tables":
            q, k = q + self.table[torch.arange(t)], k * 1.5
        scores = (q @ k.mT) / 3.0 + torch.full((t, t), float("-inf")).triu(1)
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, c))


class Rotary(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.embed = how, nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(nn.functional.layer_norm(x, (WIDTH,)), self.how)
        return self.head(x)


def lines(report: Any, op: str) -> int:
    return sum(f" = {op}(" in line for line in report.after.splitlines())


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_angles_of_all_layers(inner: Any) -> None:
    model = Rotary("rotary").eval()
    enliven(model)
    with ca.PagedLM(model, kv_tokens=128, max_seqs=4, inner=inner) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=6) == [recomputed(model, prompt, 6) for prompt in PROMPTS]
        report = lm.report
    assert report is not None and report.before.count("aten.cos.default") == 6
    assert [lines(report, op) for op in ("aten.cos.default", "aten.sin.default", "paged_attn.once.default")] == [1, 1, 2]


def test_what_one_place_uses_is_not_kept() -> None:
    """A table of a layer's own, learned positions: one reader each, which may compute it as it likes."""
    for model in (Rotary("own tables").eval(), tiny()):
        enliven(model)
        with ca.PagedLM(model, kv_tokens=128, max_seqs=4, inner="eager") as lm:
            assert lm.generate(PROMPTS, max_new_tokens=4) == [recomputed(model, prompt, 4) for prompt in PROMPTS]
            assert lm.report is not None and lines(lm.report, "paged_attn.once.default") == 0

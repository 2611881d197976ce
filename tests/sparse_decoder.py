"""A small decoder whose attention may be block-sparse, written as a person would write it, for the tests of block-sparse masks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.tiny import VOCAB

HEADS, KV_HEADS, DIM, POSITIONS = 4, 2, 8, 256
WIDTH = HEADS * DIM


class Sparse(nn.Module):
    """Which blocks of keys a query sees, by comparisons of positions: heads slide one by one, or KV head by KV head."""

    def __init__(self, block: int, local: int, stride: int, step: int = 0, first: int = 0, together: int = 1) -> None:
        super().__init__()
        self.block, self.local, self.stride = block, local, stride
        self.step, self.first, self.together = step, first, together

    def forward(self, row: Tensor, column: Tensor) -> Tensor:
        row, column = row // self.block, column // self.block
        head = torch.arange(HEADS, device=row.device)[:, None, None] + self.first
        return (row - column < self.local) | ((column + head // self.together * self.step + 1) % self.stride == 0)


class Attention(nn.Module):
    def __init__(self, sparse: Sparse | None, window: int | None) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.sparse, self.window = sparse, window

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (y.unflatten(-1, (-1, DIM)).transpose(1, 2) for y in self.qkv(x).split([WIDTH, *[KV_HEADS * DIM] * 2], dim=2))
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, 1) for y in (k, v))
        row, column = torch.arange(t, device=x.device)[:, None], torch.arange(t, device=x.device)
        seen = column <= row
        if self.window is not None:
            seen = seen & (row - column < self.window)
        if self.sparse is not None:
            seen = seen & self.sparse(row, column)
        scores = (q @ k.mT / math.sqrt(DIM)).masked_fill(~seen, -math.inf)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, WIDTH))


class Decoder(nn.Module):
    """A layer for each of `sparse`; None is a dense one. The weights are those of any other decoder of as many layers."""

    def __init__(self, sparse: Sequence[Sparse | None], window: int | None = None) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        self.tok, self.pos = nn.Embedding(VOCAB, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.layers = nn.ModuleList(Attention(each, window) for each in sparse)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            for weight in self.parameters():  # gains above 1: another set of keys is another token
                weight.copy_(torch.randn(weight.shape, generator=make) * (1.5 / math.sqrt(WIDTH) if weight.dim() == 2 else 0.3))
            self.tok.weight.mul_(4)
            self.pos.weight.mul_(4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for attention in self.layers:
            x = x + 2 * attention(nn.functional.layer_norm(x, (WIDTH,)))
        return self.head(self.norm(x))


def decoder(*sparse: Sparse | None, window: int | None = None) -> Decoder:
    return Decoder(sparse, window).eval().requires_grad_(False)

"""What does a Llama look like to somebody who has never heard of serving?

Full causal attention with a mask, grouped heads repeated, rotary angles computed from arange: the model of every benchmark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama. `tied`: the embedding is the output projection too."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    theta: float = 500_000.0
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return self.width * (2 * (self.heads + self.kv_heads) * self.head_dim + 3 * self.inner)


# https://huggingface.co/meta-llama/Llama-3.1-8B and Llama-3.2-1B: config.json
SHAPES = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "tiny-32-layers": Shape(256, 512, 32, 8, 2, 1024),
    "tiny": Shape(64, 128, 2, 4, 2, 256),
}


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = shape.heads, shape.kv_heads, shape.head_dim
        self.q_proj = nn.Linear(shape.width, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.width, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.width, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.dim)
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(x.dtype)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.before, self.after = RMSNorm(shape.width), RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.before(x), cos, sin)
        y = self.after(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class NaiveLlama(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        dim = self.shape.head_dim
        frequency = self.shape.theta ** (-torch.arange(0, dim, 2, device=x.device).float() / dim)
        angle = torch.arange(input_ids.shape[1], device=x.device).float()[:, None] * frequency
        cos, sin = (torch.cat([part, part], -1).to(x.dtype) for part in (angle.cos(), angle.sin()))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.lm_head(self.norm(x))


def random_llama(shape: Shape, device: torch.device, dtype: torch.dtype) -> NaiveLlama:
    """With weights as before any training, made where they will be used."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = NaiveLlama(shape)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, 0.02)
    return model.eval()

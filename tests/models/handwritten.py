"""How do people write decoders by hand?

One small decoder a class, each in another style, none of them aware of paging. All are called with token ids [B, T] and
return logits [B, T, VOCAB] (or what their docstring says); `HANDWRITTEN` maps a name to the class.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, WIDTH, HEADS, HEAD, LONGEST = 97, 32, 4, 8, 128


class Decoder(nn.Module):
    """Embedding, two blocks, head; `position` says which position embedding, subclasses bring the block."""

    learned = True

    def __init__(self, block: type[nn.Module], layers: int = 2) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)
        self.pos = nn.Embedding(LONGEST, WIDTH) if self.learned else None
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        if self.pos is not None:
            x = x + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def heads(x: Tensor) -> Tensor:
    """[B, T, C] as [B, H, T, D]."""
    return x.view(*x.shape[:2], HEADS, HEAD).transpose(1, 2)


class EinsumBlock(nn.Module):
    """Lucidrains' style: rearranged by einsum, triu mask of bools, finfo.min."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.ff = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            mlp(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.reshape(b, n, HEADS, HEAD) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        sim = torch.einsum("bihd,bjhd->bhij", q, k) * HEAD**-0.5
        future = torch.ones((n, n), dtype=torch.bool, device=x.device).triu(1)
        attn = sim.masked_fill(future, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        x = x + self.out(torch.einsum("bhij,bjhd->bihd", attn, v).reshape(b, n, WIDTH))
        return x + self.ff(x)


class Einsum(Decoder):
    def __init__(self) -> None:
        super().__init__(EinsumBlock)


class NanoBlock(nn.Module):
    """Karpathy's nanoGPT: a tril buffer, cut to [:T, :T]."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ln_2, self.mlp, self.dropout = nn.LayerNorm(WIDTH), mlp(), nn.Dropout(0.1)
        self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST)).view(1, 1, LONGEST, LONGEST))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        k = k.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        q = q.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        v = v.view(B, T, HEADS, C // HEADS).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = self.dropout(F.softmax(att, dim=-1))
        y = (att @ v).transpose(1, 2).contiguous().view(B, T, C)
        x = x + self.dropout(self.c_proj(y))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(Decoder):
    """Returns logits of the last token only, [B, 1, VOCAB], and the loss that it does not have."""

    def __init__(self) -> None:
        super().__init__(NanoBlock)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        _, t = input_ids.size()
        assert t <= LONGEST, f"Cannot forward sequence of length {t}"
        assert self.pos is not None
        pos = torch.arange(0, t, dtype=torch.long, device=input_ids.device)
        x = self.tok(input_ids) + self.pos(pos)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, [-1], :]), None


class OneHead(nn.Module):
    """The head of Karpathy's lecture."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, HEAD, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(LONGEST, LONGEST)))

    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class HeadListBlock(nn.Module):
    """The lecture's MultiHeadAttention: a list of heads, joined by cat. One attention site per head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(OneHead() for _ in range(HEADS))
        self.proj, self.ffwd = nn.Linear(WIDTH, WIDTH), mlp()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln1(x)
        x = x + self.proj(torch.cat([h(y) for h in self.heads], dim=-1))
        return x + self.ffwd(self.ln2(x))


class HeadList(Decoder):
    def __init__(self) -> None:
        super().__init__(HeadListBlock)


class TorchMhaBlock(nn.Module):
    """nn.MultiheadAttention with a float mask made by triu(-inf), as in the PyTorch tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(WIDTH), mlp()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, y = x.shape[1], self.norm(x)
        mask = torch.triu(torch.full((n, n), float("-inf"), device=x.device), diagonal=1)
        return x + self.ff(x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0])


class TorchMha(Decoder):
    def __init__(self) -> None:
        super().__init__(TorchMhaBlock)


class ExpSumBlock(nn.Module):
    """Softmax spelled out: exp of the score less its maximum, times the mask, over the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.ff = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            mlp(),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).split(c, dim=-1))
        score = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(HEAD)
        place = torch.arange(n, device=x.device)
        score = torch.where(place[:, None] >= place[None, :], score, float("-inf"))
        weight = torch.exp(score - score.amax(dim=-1, keepdim=True))
        weight = weight / weight.sum(dim=-1, keepdim=True)
        x = x + self.out(torch.matmul(weight, v).transpose(1, 2).reshape(b, n, c))
        return x + self.ff(x)


class ExpSum(Decoder):
    def __init__(self) -> None:
        super().__init__(ExpSumBlock)


class AlibiBlock(nn.Module):
    """MPT's ALiBi: a row of biases cut to the keys' length and added; no other positions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.ff = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            mlp(),
        )
        slopes = 2.0 ** (-8.0 * torch.arange(1, HEADS + 1) / HEADS)
        self.register_buffer("alibi", slopes.view(HEADS, 1, 1) * torch.arange(1 - LONGEST, 1).view(1, 1, LONGEST))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        score = q @ k.transpose(-1, -2) * HEAD**-0.5 + self.alibi[:, :, -n:]
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).tril()
        score = score.masked_fill(causal.logical_not()[None, None], torch.finfo(score.dtype).min)
        x = x + self.out((score.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(b, n, c))
        return x + self.ff(x)


class Alibi(Decoder):
    learned = False

    def __init__(self) -> None:
        super().__init__(AlibiBlock)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x[..., : HEAD // 2], x[..., HEAD // 2 :]
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class RopeGroupedBlock(nn.Module):
    """litgpt's rope table, made once and cut to [:T], with grouped queries as a 5-D einsum and RMS norm."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * groups * HEAD, bias=False)
        self.out, self.ff, self.gain = nn.Linear(WIDTH, WIDTH), mlp(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, n, c = x.shape
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain
        q = rotate(heads(self.q(y)), cos, sin).view(b, self.groups, HEADS // self.groups, n, HEAD)
        k, v = self.kv(y).view(b, n, 2, self.groups, HEAD).permute(2, 0, 3, 1, 4)
        score = torch.einsum("bgrqd,bgkd->bgrqk", q, rotate(k, cos, sin)) / math.sqrt(HEAD)
        score = score + torch.full((n, n), -1e4, device=x.device).triu(1)
        out = torch.einsum("bgrqk,bgkd->bgrqd", torch.softmax(score.float(), dim=-1).type_as(score), v)
        x = x + self.out(out.reshape(b, HEADS, n, HEAD).transpose(1, 2).reshape(b, n, c))
        return x + self.ff(x)


class RopeTable(Decoder):
    """Rotary positions from a table sliced by the length of the input."""

    learned = False

    def __init__(self) -> None:
        super().__init__(RopeGroupedBlock)
        turns = torch.outer(torch.arange(LONGEST).float(), 100.0 ** (-torch.arange(0, HEAD, 2).float() / HEAD))
        turns = torch.cat((turns, turns), dim=-1)
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.size(1)
        x, cos, sin = self.tok(input_ids), self.cos[:n], self.sin[:n]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))


class BmmParallelBlock(nn.Module):
    """Fairseq's bmm over B*H, scale on the query, in a parallel block (attention and MLP read the same norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ff, self.out = nn.LayerNorm(WIDTH), mlp(), nn.Linear(WIDTH, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.norm(x)
        q, k, v = (
            t.view(b, n, HEADS, HEAD).transpose(1, 2).contiguous().view(b * HEADS, n, HEAD)
            for t in (self.q(y) * HEAD**-0.5, self.k(y), self.v(y))
        )
        mask = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        weights = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n) + mask
        weights = F.softmax(weights.view(b * HEADS, n, n), dim=-1)
        out = torch.bmm(weights, v).view(b, HEADS, n, HEAD).transpose(1, 2).reshape(b, n, c)
        return x + self.out(out) + self.ff(y)


class BmmParallel(Decoder):
    """Sinusoidal positions, as fairseq's models have."""

    learned = False

    def __init__(self) -> None:
        super().__init__(BmmParallelBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device, dtype=torch.float32)
        rates = torch.exp(torch.arange(0, WIDTH, 2, device=input_ids.device) * (-math.log(1e4) / WIDTH))
        angles = places[:, None] * rates[None, :]
        x = self.tok(input_ids) + torch.cat((angles.sin(), angles.cos()), dim=-1)[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

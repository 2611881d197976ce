"""Which hand-written decoders have something unusual: experts, biases, sinks, odd masks and odd scores?"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.handwritten import HEAD, HEADS, LONGEST, VOCAB, WIDTH, Decoder, heads, mlp


class Block(nn.Module):
    """A pre-norm block whose `attend(q, k, v)` ([B, H, T, D] each) subclasses write."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out, self.ff = (
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
            mlp(),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.ff(x)


def causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


class MoeBlock(Block):
    """Top-1 experts chosen by one-hot and einsum; F.scaled_dot_product_attention(is_causal=True)."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.up, self.down = (nn.Parameter(torch.randn(experts, WIDTH, WIDTH) * 0.2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate = self.router(x).softmax(-1)
        chosen = F.one_hot(gate.argmax(-1), gate.shape[-1]).to(x.dtype) * gate
        inner = F.silu(torch.einsum("btc,ecd->bted", x, self.up))
        return x + torch.einsum("bted,edc,bte->btc", inner, self.down, chosen)


class SortedMoeBlock(Block):
    """Top-1 experts by sorting the tokens, as MegaBlocks-like code does: arange over tokens that are no positions."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, WIDTH) * 0.2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        flat = x.reshape(-1, WIDTH)
        gate, expert = self.router(flat).softmax(-1).max(-1)
        order = torch.argsort(expert, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        routed = flat[order]
        done = torch.bmm(routed.unsqueeze(1), self.up[expert[order]]).squeeze(1)
        return x + (done[back] * gate[:, None]).view_as(x)


class LoopedMoeBlock(Block):
    """Top-2 experts in a loop over them, each on the rows that torch.where finds: nanoMoE, and Mixtral as it was first written."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, experts)
        self.experts = nn.ModuleList(mlp() for _ in range(experts))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        flat = x.view(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows, nth = torch.where(chosen == number)
            out[rows] += weights[rows, nth, None] * expert(flat[rows])
        return x + out.view_as(x)


class T5Block(Block):
    """T5: no scale, and a bias looked up by the bucketed distance, logarithmic beyond 8."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        place = torch.arange(n)
        distance = (place[:, None] - place[None, :]).clamp(min=0)
        far = 8 + (torch.log(distance.float() / 8 + 1e-6) / math.log(64 / 8) * 8).long()
        bucket = torch.where(distance < 8, distance, far.clamp(max=15))
        score = q @ k.transpose(-1, -2) + self.table(bucket).permute(2, 0, 1)[None]
        score = score.masked_fill(~causal(n), torch.finfo(score.dtype).min)
        return F.softmax(score, -1) @ v


class DistanceBlock(Block):
    """Shaw-like clipped distances: table[h, clamp(i - j, 0, 15)]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        distance = (place[:, None] - place[None, :]).clamp(0, 15)
        score = q @ k.mT * HEAD**-0.5 + self.table[:, distance]
        return torch.where(place[:, None] >= place, score, -torch.inf).softmax(-1) @ v


class SinkBlock(Block):
    """gpt-oss: a learned logit per head joins the softmax and its weight is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        score = (q * HEAD**-0.5) @ k.transpose(2, 3) + torch.full((n, n), -torch.inf).triu(1)
        both = torch.cat([score, self.sink.view(1, -1, 1, 1).expand(q.shape[0], -1, n, 1)], dim=-1)
        return torch.softmax(both, dim=-1)[..., :-1] @ v


class PostNormBlock(Block):
    """GPT-1: post-norm, sqrt of the scale on q and on k, b = tril, score * b - 1e4 * (1 - b)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, dim=-1))
        b = torch.tril(torch.ones(q.shape[2], q.shape[2])).view(1, 1, q.shape[2], q.shape[2])
        w = torch.matmul(q * HEAD**-0.25, k.transpose(2, 3) * HEAD**-0.25)
        w = w * b + -1e4 * (1 - b)
        x = self.norm(x + self.out((w.softmax(-1) @ v).permute(0, 2, 1, 3).flatten(2)))
        return F.layer_norm(x + self.ff(x), (WIDTH,))


class WindowSoftcapBlock(Block):
    """Gemma-2 by hand: capped scores, a band of 6 keys made by tril and triu, q and k normalised."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
        band = ones.tril() & ones.triu(-5)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        score = 2.0 * torch.tanh(q @ k.transpose(-1, -2) * 4.0 / 2.0)
        return torch.softmax(score.masked_fill(~band, -torch.inf), dim=-1) @ v


class DilatedBlock(Block):
    """A mask that no library names: itself, and every third key back, and the first two."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i = torch.arange(q.shape[2]).unsqueeze(1)
        j = torch.arange(q.shape[2]).unsqueeze(0)
        seen = (i >= j) & (((i - j) % 3 == 0) | (j < 2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class LogDistanceBlock(Block):
    """A score that no library names: an fp32 softmax of s - log(1 + i - j), squared temper by head parity."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
        temper = 0.2 + 0.1 * torch.arange(HEADS).view(HEADS, 1, 1)
        score = (q @ k.mT) * temper - torch.log1p((i - j).clamp(min=0).float())
        return score.masked_fill(j > i, -1e9).softmax(-1, dtype=torch.float32) @ v


class BshdMqaBlock(nn.Module):
    """One key-value head, token-major einsum as JAX ports write it, bias-free, big negative number by subtraction."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.kv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * HEAD)
        self.out, self.ff = nn.Linear(WIDTH, WIDTH), mlp()

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.norm(x)
        q = self.q(y).reshape(b, n, HEADS, HEAD)
        k, v = self.kv(y).split(HEAD, dim=-1)
        logits = torch.einsum("bqhd,bkd->bhqk", q, k) / HEAD**0.5
        logits = logits - 1e10 * (1.0 - torch.ones(n, n).tril())
        probs = F.softmax(logits, dim=-1)
        x = x + self.out(torch.einsum("bhqk,bkd->bqhd", probs, v).reshape(b, n, c))
        return x + self.ff(x)


class Conv1dQkvBlock(nn.Module):
    """OpenAI's GPT-2: Conv1D (addmm on a flat view) for packed qkv, merge by permute, mask from a ones tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.ln, self.ff = nn.LayerNorm(WIDTH), mlp()
        self.w_qkv, self.b_qkv = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) * 0.2), nn.Parameter(torch.zeros(3 * WIDTH))
        self.w_out, self.b_out = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.shape[:-1], 3 * WIDTH)
        qkv = torch.addmm(self.b_qkv, self.ln(x).view(-1, WIDTH), self.w_qkv).view(size)
        q, k, v = qkv.split(WIDTH, dim=2)
        q = q.view(*q.size()[:-1], HEADS, HEAD).permute(0, 2, 1, 3)
        k = k.view(*k.size()[:-1], HEADS, HEAD).permute(0, 2, 3, 1)
        v = v.view(*v.size()[:-1], HEADS, HEAD).permute(0, 2, 1, 3)
        w = torch.matmul(q, k) / math.sqrt(v.size(-1))
        nd, ns = w.size(-2), w.size(-1)
        b = torch.ones(ns, ns).tril()[ns - nd : ns, :ns].view(1, 1, nd, ns)
        w = torch.where(b.bool(), w, torch.tensor(-1e4))
        a = torch.matmul(F.softmax(w, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        a = torch.addmm(self.b_out, a.view(-1, WIDTH), self.w_out).view(x.shape)
        return x + a + self.ff(x + a)


class LastRow(nn.Module):
    """Any decoder, narrowed to [B, VOCAB] of the last token before the head (`x[:, -1]`)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Decoder(DilatedBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.body.tok(input_ids) + self.body.pos.weight[: input_ids.shape[-1]]
        for block in self.body.blocks:
            x = block(x)
        x = self.body.norm(x)[:, -1]
        return F.linear(x, self.body.tok.weight)


MORE: dict[str, type[nn.Module]] = {
    "one_hot_moe": MoeBlock,
    "sorted_moe": SortedMoeBlock,
    "looped_moe": LoopedMoeBlock,
    "t5_bias": T5Block,
    "clipped_distance": DistanceBlock,
    "sinks": SinkBlock,
    "post_norm": PostNormBlock,
    "window_softcap_qknorm": WindowSoftcapBlock,
    "dilated": DilatedBlock,
    "log_distance": LogDistanceBlock,
    "bshd_mqa": BshdMqaBlock,
    "conv1d_qkv": Conv1dQkvBlock,
}


def decoder(name: str) -> nn.Module:
    """A decoder of the table, or one whose class is a decoder of its own."""
    from tests.models import handwritten
    from tests.models.handwritten_styles import STYLE_BLOCKS, STYLES

    whole: dict[str, type[nn.Module]] = {
        "einsum": handwritten.Einsum,
        "nanogpt": handwritten.NanoGPT,
        "head_list": handwritten.HeadList,
        "torch_mha": handwritten.TorchMha,
        "exp_sum": handwritten.ExpSum,
        "alibi": handwritten.Alibi,
        "rope_table_grouped": handwritten.RopeTable,
        "bmm_parallel": handwritten.BmmParallel,
        "last_row": LastRow,
    }
    if name in whole or name in STYLES:
        return {**whole, **STYLES}[name]()
    return Decoder({**MORE, **STYLE_BLOCKS}[name])


NAMES = (
    *("einsum", "nanogpt", "head_list", "torch_mha", "exp_sum", "alibi", "rope_table_grouped", "bmm_parallel", "last_row"),
    *MORE,
)
STYLE_NAMES = (
    *("time_major", "torch_encoder", "squeezed_batch", "shared_keys", "named_answer", "stacked_heads", "point_conv"),
    *("streaming_mask", "filled_mask", "flex", "float_buffer", "temperature", "learned_slope", "gated", "complex_rope"),
)
__all__ = ["LONGEST", "NAMES", "STYLE_NAMES", "VOCAB", "decoder"]

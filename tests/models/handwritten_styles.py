"""Which habits of plumbing do decoders have: time-major, loops over heads, squeezed batches, strange masks and positions?"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.handwritten import HEAD, HEADS, LONGEST, VOCAB, WIDTH, Decoder, heads, mlp
from tests.models.handwritten_more import Block, causal


class TimeMajor(nn.Module):
    """fairseq, PyTorch's default: [T, B, C] all the way, nn.MultiheadAttention without batch_first."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.attn, self.norm, self.ff = nn.MultiheadAttention(WIDTH, HEADS), nn.LayerNorm(WIDTH), mlp()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(0))
        y = self.norm(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return self.head(x + self.ff(x)).transpose(0, 1)


class TorchEncoder(nn.Module):
    """The PyTorch tutorial: nn.TransformerEncoder with a causal mask and a sinusoidal buffer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)  # True would warn: it cannot, with norm_first
        self.tok, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        place = torch.arange(LONGEST).unsqueeze(1) * torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(1e4) / WIDTH))
        self.register_buffer("pe", torch.stack([place.sin(), place.cos()], -1).reshape(1, LONGEST, WIDTH))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) * math.sqrt(WIDTH) + self.pe[:, : input_ids.size(1)]
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.size(1))
        return self.head(self.body(x, mask=mask, is_causal=True))


class Squeezed(nn.Module):
    """llama2.c-like: one sequence, no batch axis inside, a Python loop over heads, logits unsqueezed at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head, self.ff = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), mlp()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids[0])
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        outs = []
        for h in range(HEADS):
            part = slice(h * HEAD, (h + 1) * HEAD)
            score = q[:, part] @ k[:, part].T / HEAD**0.5
            score = score.masked_fill(~causal(x.shape[0]), float("-inf"))
            outs.append(F.softmax(score, dim=-1) @ v[:, part])
        x = x + self.wo(torch.cat(outs, dim=1))
        return self.head(x + self.ff(x)).unsqueeze(0)


class StackedHeads(Block):
    """Heads one by one, stacked along a new axis."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = ~causal(q.shape[2])
        outs = [(q[:, h] @ k[:, h].mT).masked_fill(hidden, -1e9).softmax(-1) @ v[:, h] for h in range(HEADS)]
        return torch.stack(outs, dim=1)


class PointConv(nn.Module):
    """Convolutions of kernel 1 in place of linears, channels ahead of tokens, as audio and vision people write."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x.transpose(1, 2)).reshape(b, 3, HEADS, HEAD, n).unbind(1)
        weights = torch.einsum("bhcq,bhck->bhqk", q, k).div(HEAD**0.5).masked_fill(~causal(n), -1e9).softmax(-1)
        y = torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(b, WIDTH, n)
        return x + self.out(y).transpose(1, 2)


class StreamingBlock(Block):
    """StreamingLLM's mask: a window of 6 and the first 3 tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & ((i - j < 6) | (j < 3)))


class FilledMaskBlock(Block):
    """A mask of zeros, filled in place; added as a float."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        mask = torch.zeros(n, n)
        mask.masked_fill_(torch.triu(torch.ones(n, n), 1) > 0, float("-inf"))
        return F.softmax(torch.addcmul(mask, q @ k.mT, torch.tensor(0.4)), -1) @ v


class FlexBlock(Block):
    """flex_attention: a window as a mask_mod, ALiBi as a score_mod with learned slopes."""

    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(0.1, 0.6, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        slopes = self.slopes

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < 6)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + slopes[h] * (j - i)

        blocks = create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, score_mod=score, block_mask=blocks)


class FloatBufferBlock(Block):
    """Meta's llama 1: a [1, 1, L, L] buffer of -inf above the diagonal, cut and added."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((1, 1, LONGEST, LONGEST), float("-inf")).triu(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.size(2)
        return torch.softmax(q @ k.mT / math.sqrt(HEAD) + self.mask[:, :, :n, :n], -1) @ v


class TemperatureBlock(Block):
    """Swin v2, NormFormer: cosine scores times a learned temperature per head, clamped."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = self.temperature.clamp(max=math.log(100)).exp()
        score = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * scale
        return score.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


class LearnedSlopeBlock(Block):
    """ALiBi with learned slopes, softplus, and a distance that is capped at 9."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        distance = torch.minimum(place[:, None] - place[None], torch.tensor(9))
        score = q @ k.mT - F.softplus(self.slope)[:, None, None] * distance
        return score.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v


class GatedBlock(Block):
    """Qwen3-Next, AFMoE: the output gated by the input, head by head; queries and keys by RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.q_norm = nn.Linear(WIDTH, HEADS), nn.RMSNorm(HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.q_norm(k), v, is_causal=True)
        y = y * torch.sigmoid(self.gate(x)).transpose(1, 2).unsqueeze(-1)
        return x + self.out(y.transpose(1, 2).flatten(2))


class ComplexRopeBlock(Block):
    """Meta's llama: rotary positions as complex numbers, made anew in every block."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rates = 1.0 / (100.0 ** (torch.arange(0, HEAD, 2)[: HEAD // 2].float() / HEAD))
        turn = torch.polar(torch.ones(1), torch.outer(torch.arange(q.shape[2]).float(), rates))
        q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(3) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class SharedKeys(Decoder):
    """Cross-layer attention: the second block reads keys and values of the first."""

    def __init__(self) -> None:
        super().__init__(_Shared)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, shared = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1])), None
        for block in self.blocks:
            x, shared = block(x, shared)
        return self.head(self.norm(x))


class _Shared(Block):
    def forward(self, x: Tensor, shared: Any = None) -> Any:  # type: ignore[override]
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        k, v = shared or (k, v)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2)), (k, v)


class Answer(NamedTuple):
    logits: Tensor
    hidden: Tensor


class NamedAnswer(Decoder):
    """Wrapped positions (arange % 50), embeddings tied to the head, logits capped, a named tuple."""

    def __init__(self) -> None:
        super().__init__(FloatBufferBlock)

    def forward(self, input_ids: Tensor) -> Answer:  # type: ignore[override]
        place = torch.arange(input_ids.size(-1)).remainder(50).unsqueeze(0).expand_as(input_ids)
        x = self.tok(input_ids) + self.pos(place)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Answer(30 * torch.tanh(x @ self.tok.weight.T / 30), x)


STYLES: dict[str, type[nn.Module]] = {
    "time_major": TimeMajor,
    "torch_encoder": TorchEncoder,
    "squeezed_batch": Squeezed,
    "shared_keys": SharedKeys,
    "named_answer": NamedAnswer,
}
STYLE_BLOCKS: dict[str, type[nn.Module]] = {
    "stacked_heads": StackedHeads,
    "point_conv": PointConv,
    "streaming_mask": StreamingBlock,
    "filled_mask": FilledMaskBlock,
    "flex": FlexBlock,
    "float_buffer": FloatBufferBlock,
    "temperature": TemperatureBlock,
    "learned_slope": LearnedSlopeBlock,
    "gated": GatedBlock,
    "complex_rope": ComplexRopeBlock,
}

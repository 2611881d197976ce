"""Which models must not be paged, and what must the refusal say?

Each mixes tokens outside attention, or has attention that a cache of past keys cannot serve. `REFUSED` maps a name to
(builder, a regular expression that the reason must match).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.handwritten import HEAD, HEADS, VOCAB, WIDTH, Decoder, heads, mlp
from tests.models.handwritten_more import Block, causal


class MixerBlock(Block):
    """Causal attention after a `mix` of tokens that subclasses write: only the mixing is at fault."""

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.mix(x))


class ConvBlock(MixerBlock):
    """Hyena, H3, Mamba: a causal depthwise convolution over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class CumulativeMeanBlock(MixerBlock):
    """The bag-of-words average of the past."""

    def mix(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


class CausalMatrixBlock(MixerBlock):
    """The same average as a product with a lower triangular matrix."""

    def mix(self, x: Tensor) -> Tensor:
        weights = torch.ones(x.shape[1], x.shape[1]).tril()
        return (weights / weights.sum(1, keepdim=True)) @ x


class TokenShiftBlock(MixerBlock):
    """RWKV: half of the channels come from the token before."""

    def mix(self, x: Tensor) -> Tensor:
        before = F.pad(x, (0, 0, 1, -1))
        return torch.cat([x[..., : WIDTH // 2], before[..., WIDTH // 2 :]], -1)


class RollBlock(MixerBlock):
    """Token shift by roll."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.roll(x, 1, dims=1)


class MeanPoolBlock(MixerBlock):
    """A global summary added to every token."""

    def mix(self, x: Tensor) -> Tensor:
        return x.mean(1, keepdim=True)


class SequenceNormBlock(MixerBlock):
    """Batch norm whose statistics run over the tokens."""

    def mix(self, x: Tensor) -> Tensor:
        return F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2)


class FourierBlock(MixerBlock):
    """FNet."""

    def mix(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real


class FlipBlock(MixerBlock):
    """Reads the sequence backwards."""

    def mix(self, x: Tensor) -> Tensor:
        return x.flip(1)


class FirstTokenBlock(MixerBlock):
    """A [CLS] summary: every token reads token 0."""

    def mix(self, x: Tensor) -> Tensor:
        return x[:, :1]


class SortBlock(MixerBlock):
    """Channels sorted over the tokens."""

    def mix(self, x: Tensor) -> Tensor:
        return x.sort(dim=1).values


class LinearAttentionBlock(MixerBlock):
    """The state of linear attention: a running sum of k v outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(WIDTH, 4)

    def mix(self, x: Tensor) -> Tensor:
        return torch.einsum("btk,btkc->btc", self.key(x), torch.einsum("btk,btc->btkc", self.key(x), x).cumsum(1))


class GruBlock(MixerBlock):
    """Recurrent."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class BidirectionalBlock(Block):
    """BERT."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * HEAD**-0.5).softmax(-1) @ v


class PrefixBlock(Block):
    """A prefix LM: the first 12 tokens see one another, which chunks of new tokens cannot."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        j = torch.arange(q.shape[2])
        seen = (j[None] <= j[:, None]) | (j[None] < 12)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class LookaheadBlock(Block):
    """One token of the future is visible."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class TalkingHeadsBlock(Block):
    """Scores mixed across heads before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Parameter(torch.randn(HEADS, HEADS))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = torch.einsum("gh,bhij->bgij", self.talk, q @ k.mT)
        return score.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


class TopKBlock(Block):
    """Only the two best keys of each query count."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = (q @ k.mT).masked_fill(~causal(q.shape[2]), -torch.inf)
        least = score.topk(2, dim=-1).values[..., -1:]
        return score.masked_fill(score < least, -torch.inf).softmax(-1) @ v


class MemoryKeysBlock(Block):
    """x-transformers' memory: four learned keys and values stand before the sequence's own, kv_len != q_len."""

    def __init__(self) -> None:
        super().__init__()
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, 4, HEAD)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = torch.cat([self.mem_k.expand(q.shape[0], -1, -1, -1), k], 2)
        v = torch.cat([self.mem_v.expand(q.shape[0], -1, -1, -1), v], 2)
        seen = F.pad(causal(q.shape[2]), (4, 0), value=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


class DoubleNormaliseBlock(Block):
    """Sinkhorn: the weights are normalised over the queries too."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1)
        return (weights / (1e-3 + weights.sum(-2, keepdim=True))) @ v


class BigBirdBlock(Block):
    """BigBird's blocks: keys gathered from the block before and from block 0, by view and cat."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, size = q.shape[2], 4
        room = (n + size - 1) // size * size
        q, k, v = (F.pad(t, (0, 0, 0, room - n)).unflatten(2, (-1, size)) for t in (q, k, v))
        before_k, before_v = (torch.cat([t[:, :, :1], t[:, :, :-1]], 2) for t in (k, v))
        near_k, near_v = torch.cat([before_k, k], 3), torch.cat([before_v, v], 3)
        weights = torch.softmax(q @ near_k.mT, -1)
        return (weights @ near_v).flatten(2, 3)[:, :, :n]


class ContentGateBlock(Block):
    """Forgetting transformer: the bias is a running sum of gates that the tokens themselves decide."""

    def __init__(self) -> None:
        super().__init__()
        self.forget = nn.Linear(HEAD, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        total = F.logsigmoid(self.forget(q)).squeeze(-1).cumsum(-1)
        score = q @ k.mT + total.unsqueeze(-1) - total.unsqueeze(-2)
        return score.masked_fill(~causal(q.shape[2]), -torch.inf).softmax(-1) @ v


class ReversedPositions(Decoder):
    """Positions counted from the end: they change with every new token."""

    def __init__(self) -> None:
        super().__init__(_PlainBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        n = input_ids.shape[1]
        x = self.tok(input_ids) + self.pos(torch.arange(n - 1, -1, -1))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LengthScaled(Decoder):
    """The stream is scaled by the length of the input."""

    def __init__(self) -> None:
        super().__init__(_PlainBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) / input_ids.shape[1] ** 0.5
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SelectiveScan(nn.Module):
    """Mamba by hand: h_t = a_t h_(t-1) + b_t x_t, as a closed form with cumulative sums."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.gate, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        decay = F.logsigmoid(self.gate(x)).cumsum(1)
        state = torch.exp(decay) * (x * torch.exp(-decay)).cumsum(1)
        return self.head(state)


class NextToken(nn.Module):
    """Reads the token after: [B, T] ids, ids[:, 1:]."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.head, self.ff = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), mlp()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        return self.head(self.ff(torch.cat([x[:, 1:], x[:, :1]], 1)))


class HeadMajorBug(nn.Module):
    """A person's bug: [B, T, C] viewed as [B, H, T, D] without a transpose mixes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.reshape(b, HEADS, n, HEAD) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c))


class MergeBug(nn.Module):
    """The other one: [B, H, T, D] reshaped to [B, T, C] without a transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))


class PackedBug(Block):
    """Queries packed into the rows of their key head, but the mask repeated row by row: rows see keys of other tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        scores = (q.reshape(b, h // 2, 2 * n, d) @ k[:, ::2].mT).view(b, h // 2, 2 * n, n)
        hidden = ~causal(n).repeat_interleave(2, dim=0)
        return (scores.masked_fill(hidden, -1e9).softmax(-1) @ v[:, ::2]).view(b, h, n, d)


class _PlainBlock(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


_BLOCKS: dict[str, tuple[type[nn.Module], str]] = {
    "causal_conv": (ConvBlock, "conv"),
    "cumulative_mean": (CumulativeMeanBlock, "cumsum"),
    "causal_matrix": (CausalMatrixBlock, "token|softmax"),
    "token_shift": (TokenShiftBlock, "token|pad"),
    "roll": (RollBlock, "token|roll"),
    "mean_pool": (MeanPoolBlock, "mean"),
    "sequence_norm": (SequenceNormBlock, "batch_norm"),
    "fourier": (FourierBlock, "fft"),
    "flip": (FlipBlock, "flip"),
    "first_token": (FirstTokenBlock, "token"),
    "sort": (SortBlock, "sort"),
    "linear_attention": (LinearAttentionBlock, "cumsum"),
    "bidirectional": (BidirectionalBlock, "keys after it"),
    "prefix_lm": (PrefixBlock, "keys after it"),
    "lookahead": (LookaheadBlock, "keys after it"),
    "talking_heads": (TalkingHeadsBlock, "head|not one product"),
    "top_k": (TopKBlock, "data of the call|depends on their scores"),
    "memory_keys": (MemoryKeysBlock, "key|length"),
    "double_normalise": (DoubleNormaliseBlock, "softmax|weight|probabilit"),
    "big_bird": (BigBirdBlock, "pad|token|block|view|key|length"),
    "content_gate": (ContentGateBlock, "cumsum|data|bias"),
    "gru": (GruBlock, "gru|token"),
    "head_major_bug": (HeadMajorBug, "token|axis|axes|layout|view|reshape"),
    "packed_bug": (PackedBug, "token|axis"),
    "merge_bug": (MergeBug, "token|axis|axes|layout|view|reshape"),
}
_WHOLE: dict[str, tuple[type[nn.Module], str]] = {
    "reversed_positions": (ReversedPositions, "arange|position|length"),
    "length_scaled": (LengthScaled, "length|size|token"),
    "selective_scan": (SelectiveScan, "cumsum"),
    "next_token": (NextToken, "token|slice|cat"),
}


def _decoder(block: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Decoder(block)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **{name: (_decoder(block), reason) for name, (block, reason) in _BLOCKS.items()},
    **_WHOLE,
}

"""Which models look pageable and are not? One small trespass each, in a decoder that is otherwise plain.

`MIXES` change the stream ahead of a causal attention, `ATTENTIONS` the attention, `TAILS` what follows the last block,
`IDS` what is made of the token ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.handwritten import HEAD, HEADS, WIDTH, Decoder
from tests.models.handwritten_more import Block, causal
from tests.models.refused import MixerBlock

Mix = Callable[[Tensor], Tensor]


def _places(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None, :, None].float()


def _expert_choice(x: Tensor) -> Tensor:
    """Experts choose their 2 best tokens."""
    best = x[..., 0].topk(2, dim=1).indices
    return torch.zeros_like(x).scatter(1, best[..., None].expand(-1, -1, WIDTH), 1.0)


def _capacity(x: Tensor) -> Tensor:
    """GShard: a token is dropped when 3 before it went the same way."""
    went = (x[..., 0] > 0).long()
    return x * (went.cumsum(1) <= 3).unsqueeze(-1)


def _last_flag(x: Tensor) -> Tensor:
    return (_places(x) == x.shape[1] - 1).float()


MIXES: dict[str, Mix] = {
    "position_fraction": lambda x: _places(x) / x.shape[1],
    "linspace": lambda x: torch.linspace(0, 1, x.shape[1])[None, :, None],
    "places_clamped_by_length": lambda x: _places(x).clamp(max=x.shape[1] // 2),
    "last_flag": _last_flag,
    "length_added": lambda x: x + x.shape[1],
    "length_full": lambda x: torch.full((1, 1, 1), 1.0) * x.size(1),
    "max_over_tokens": lambda x: x.amax(1, keepdim=True),
    "global_norm": lambda x: x / x.norm(),
    "normalize_tokens": lambda x: F.normalize(x, dim=1),
    "softmax_tokens": lambda x: x.softmax(1),
    "group_norm": lambda x: F.group_norm(x.transpose(1, 2), 4).transpose(1, 2),
    "instance_norm": lambda x: F.instance_norm(x.transpose(1, 2)).transpose(1, 2),
    "average_pool": lambda x: F.avg_pool1d(x.transpose(1, 2), 3, stride=1, padding=1).transpose(1, 2),
    "cummax": lambda x: x.cummax(1).values,
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "outer_tokens": lambda x: torch.einsum("btc,bsc->bts", x, x).mean(-1, keepdim=True),
    "any_token": lambda x: torch.where((x > 2).any(), x, -x),
    "expert_choice": _expert_choice,
    "capacity": _capacity,
    "last_broadcast": lambda x: x[:, -1:],
    "own_index": lambda x: x[:, torch.arange(x.shape[1]).clamp(min=1) - 1],
    "gather_before": lambda x: x.gather(1, (torch.arange(x.shape[1]) - 1).clamp(min=0)[None, :, None].expand_as(x)),
    "noise": lambda x: torch.rand_like(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "diff": lambda x: torch.diff(x, dim=1, prepend=x[:, :1]),
    "flat_fold": lambda x: x.reshape(1, WIDTH, -1).transpose(1, 2),
    "argmax_token": lambda x: F.one_hot(x[..., 0].argmax(1), 128)[:, : x.shape[1], None].float(),
    "std_all": lambda x: (x - x.mean()) / x.std(),
    "quantile": lambda x: x - x.median(1, keepdim=True).values,
}


def _softmax(score: Tensor) -> Tensor:
    return score.masked_fill(~causal(score.shape[-1]), -torch.inf).softmax(-1)


def _half_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (q @ k.mT).masked_fill((j > i) | (i - j > n // 2), -torch.inf).softmax(-1) @ v


def _log_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scale by the logarithm of the length of the input."""
    return _softmax(q @ k.mT * torch.log(torch.full((), 1.0) * q.shape[2])) @ v


def _rel_shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Transformer-XL's shift by padding and a view, of scores of the queries themselves."""
    score = q @ k.mT
    b, h, n, _ = score.shape
    shifted = F.pad(score, (1, 0)).view(b, h, n + 1, n)[:, :, 1:]
    return _softmax(shifted) @ v


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
ATTENTIONS: dict[str, Attention] = {
    "half_window": _half_window,
    "log_length": _log_length,
    "rel_shift": _rel_shift,
    "shifted_keys": lambda q, k, v: _softmax(q @ F.pad(k, (0, 0, 1, -1)).mT) @ v,
    "rolled_values": lambda q, k, v: _softmax(q @ k.mT) @ v.roll(1, 2),
    "mean_key": lambda q, k, v: _softmax(q @ (k - k.mean(2, keepdim=True)).mT) @ v,
    "max_score": lambda q, k, v: _softmax(q @ k.mT / (q @ k.mT).abs().amax((-1, -2), keepdim=True)) @ v,
    "query_norm_bias": lambda q, k, v: _softmax(q @ k.mT - k.square().sum(-1)[:, :, None]) @ v,
    "value_gate": lambda q, k, v: _softmax(q @ k.mT) @ (v * v.mean(2, keepdim=True)),
    "every_second_key": lambda q, k, v: (q @ k[:, :, ::2].mT).softmax(-1) @ v[:, :, ::2],
    "chunked_view": lambda q, k, v: _softmax(q @ k.mT).roll(1, -1) @ v,
    "entropy": lambda q, k, v: _softmax(q @ k.mT) @ v * _softmax(q @ k.mT).amax(-1, keepdim=True),
    "linear": lambda q, k, v: ((q @ k.mT).relu() * causal(q.shape[2])) @ v,
    "sigmoid": lambda q, k, v: ((q @ k.mT).sigmoid() * causal(q.shape[2])) @ v,
    "dropout": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True),
    "queries_of_keys": lambda q, k, v: _softmax(k @ q.mT).mT @ v,
}

TAILS: dict[str, Mix] = {
    "last_two": lambda x: x[:, -2:],
    "last_but_one": lambda x: x[:, -2],
    "all_but_last": lambda x: x[:, :-1],
    "first": lambda x: x[:, 0],
    "middle": lambda x: x[:, x.shape[1] // 2],
    "mean": lambda x: x.mean(1),
    "last_minus_first": lambda x: x[:, -1] - x[:, 0],
    "reversed": lambda x: x.flip(1),
    "halves": lambda x: x[:, ::2],
}
IDS: dict[str, Mix] = {
    "pad_count": lambda ids: ids.ne(0).cumsum(1) - 1,
    "ids_sorted": lambda ids: ids.sort(1).values,
    "previous_id": lambda ids: F.pad(ids, (1, -1)),
    "first_id": lambda ids: ids[:, :1].expand_as(ids),
    "ids_sum": lambda ids: ids.sum(1, keepdim=True).expand_as(ids) % 97,
    "new_document": lambda ids: ids.eq(2).cumsum(1),
    "unique_rank": lambda ids: (ids[:, :, None] == ids[:, None, :]).sum(-1),
}


class _Mixed(MixerBlock):
    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.how = mix

    def mix(self, x: Tensor) -> Tensor:
        return self.how(x)


class _Attended(Block):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.how = attention

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.how(q, k, v)


class _Plain(MixerBlock):
    def mix(self, x: Tensor) -> Tensor:
        return x


class _Tailed(Decoder):
    def __init__(self, tail: Mix) -> None:
        super().__init__(_Plain)
        self.tail = tail

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.tail(self.norm(x)))


class _OfIds(Decoder):
    def __init__(self, make: Mix) -> None:
        super().__init__(_Plain)
        self.make = make

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos(self.make(input_ids).clamp(0, 96))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PadMask(Decoder):
    """A padding mask made of the ids: keys of earlier calls are in the pages, their ids are not."""

    def __init__(self) -> None:
        super().__init__(_Plain)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        mask = causal(input_ids.shape[1])[None, None] & input_ids.ne(5)[:, None, None, :]
        mask = mask | torch.eye(input_ids.shape[1], dtype=torch.bool)
        q = x.view(*x.shape[:2], HEADS, HEAD).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
        return self.head(self.norm(x + y.transpose(1, 2).flatten(2)))


class Counter(Decoder):
    """A state of its own: a buffer that grows with every call."""

    def __init__(self) -> None:
        super().__init__(_Plain)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls.add_(1.0)
        return super().forward(input_ids) + self.calls


def _with_block(block: nn.Module) -> nn.Module:
    model = Decoder(_Plain)
    model.blocks = nn.ModuleList([block])
    return model


def subtle() -> dict[str, Callable[[], nn.Module]]:
    """Name -> builder."""
    made: dict[str, Callable[[], nn.Module]] = {"pad_mask": PadMask, "counter": Counter}
    made |= {f"mix_{name}": (lambda f=f: _with_block(_Mixed(f))) for name, f in MIXES.items()}
    made |= {f"attention_{name}": (lambda f=f: _with_block(_Attended(f))) for name, f in ATTENTIONS.items()}
    made |= {f"tail_{name}": (lambda f=f: _Tailed(f)) for name, f in TAILS.items()}
    return made | {f"ids_{name}": (lambda f=f: _OfIds(f)) for name, f in IDS.items()}

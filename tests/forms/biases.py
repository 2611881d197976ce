"""Forms 10, 11 and 14: ALiBi in its spellings, learned biases, softcap before the mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.expr import Load
from compile_attn.kernels.spec import AttentionSpec, Feature
from tests.forms.form import HEADS, SCALE, Form, NearMiss, additive, seen, spec

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def bloom(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """BLOOM: alibi = slopes * (cumsum of ones - 1), into baddbmm over merged heads."""
    b, h, n, d = q.shape
    ones = torch.ones(b, n)
    places = ((ones.cumsum(dim=-1) - 1) * ones)[:, None, :]
    alibi = (slopes[..., None] * places).reshape(b * h, 1, n)
    product = alibi.baddbmm(q.reshape(b * h, n, d), k.reshape(b * h, n, d).transpose(-1, -2), beta=1.0, alpha=SCALE)
    return F.softmax(product.view(b, h, n, n) + additive(n), dim=-1) @ v


def slice_and_add(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    """MPT: a row of biases built once for the longest input, cut to the keys' length."""
    n = q.shape[2]
    scores = q @ k.transpose(-1, -2) * SCALE + alibi[:, :, alibi.shape[2] - n :]
    return F.softmax(scores.masked_fill(~seen(n), torch.finfo(q.dtype).min), dim=-1) @ v


def slice_after_softmax(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
    n = q.shape[2]
    return (F.softmax(q @ k.mT * SCALE + additive(n), dim=-1) + alibi[:, :, alibi.shape[2] - n :]) @ v


def distances(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """ALiBi's paper code: slopes * -|i - j|."""
    place = torch.arange(q.shape[2])
    bias = -(place[None, :] - place[:, None]).abs() * slopes.view(-1, 1, 1)
    return F.softmax(q @ k.mT * SCALE + bias + additive(q.shape[2]), dim=-1) @ v


def bias_of_values(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = v.mean(-1)[:, :, None, :] * slopes.view(-1, 1, 1)
    return F.softmax(q @ k.mT * SCALE + bias + additive(q.shape[2]), dim=-1) @ v


def position_bias(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """T5 and 11 more: position_bias looked up by distance, with the mask already in it."""
    place = torch.arange(q.shape[2])
    bucket = (place[:, None] - place[None, :]).clamp(0, table.shape[0] - 1)
    bias = F.embedding(bucket, table).permute(2, 0, 1).unsqueeze(0) + additive(q.shape[2])
    return F.softmax(q @ k.transpose(3, 2) + bias, dim=-1) @ v


def position_bias_over_queries(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    bias = F.embedding((place[:, None] - place[None, :]).clamp(0, table.shape[0] - 1), table).permute(2, 0, 1).unsqueeze(0)
    return F.softmax(q @ k.transpose(3, 2) + bias + additive(q.shape[2]), dim=-2) @ v


def bias_square(q: Tensor, k: Tensor, v: Tensor, square: Tensor) -> Tensor:
    """BEiT-like: a learned [H, N, N] table cut to the length."""
    n = q.shape[2]
    return F.softmax(q @ k.mT * SCALE + square[:, :n, :n] + additive(n), dim=-1) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor, square: Tensor) -> Tensor:
    n = q.shape[2]
    return F.softmax(q @ k.mT * SCALE + q @ v.mT * 0.1 + square[:, :n, :n] + additive(n), dim=-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gemma 2 and 11 more: /c, tanh, *c, then the mask."""
    scores = torch.matmul(q, k.transpose(2, 3)) * SCALE
    scores = torch.tanh(scores / 1.5) * 1.5
    return F.softmax(scores + additive(q.shape[2]), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def softcap_after_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (torch.matmul(q, k.transpose(2, 3)) * SCALE).masked_fill(~seen(q.shape[2]), -torch.inf)
    return F.softmax(torch.tanh(scores / 1.5) * 1.5, dim=-1) @ v


def softcap_with_bias(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """No known model: a cap around score and bias together, its own expression."""
    place = torch.arange(q.shape[2])
    scores = q @ k.mT * SCALE + (place[None] - place[:, None]) * slopes.view(-1, 1, 1)
    return F.softmax((1.5 * torch.tanh(scores / 1.5)).masked_fill(~seen(q.shape[2]), -torch.inf), dim=-1) @ v


def softcap_of_weights(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    scores = q @ k.mT * SCALE + (place[None] - place[:, None]) * slopes.view(-1, 1, 1)
    return torch.tanh(F.softmax(scores.masked_fill(~seen(q.shape[2]), -torch.inf), dim=-1)) @ v


def _alibi(found: AttentionSpec) -> bool:
    return found.features() == {Feature.ALIBI}


def _row() -> Tensor:
    return SLOPES.view(1, HEADS, 1)[0, :, :, None] * torch.arange(1 - 64, 1).view(1, 1, 64)


_VALUES = NearMiss(bias_of_values, "reduction over tokens|computed from the tokens", paged=True)
_TABLES = {"square": torch.linspace(-2, 2, HEADS * 64 * 64).view(HEADS, 64, 64).sin()}
FORMS = (
    Form(bloom, spec(), _alibi, {"slopes": SLOPES}, near=(_VALUES,)),
    Form(slice_and_add, spec(), _alibi, {"alibi": _row()}, near=(NearMiss(slice_after_softmax, "go to add"),)),
    Form(distances, spec(), _alibi, {"slopes": SLOPES}, near=(_VALUES,)),
    Form(
        position_bias,
        spec(scale=1.0),
        lambda s: s.bias.has(Load),
        {"table": torch.linspace(-1, 1, 8 * HEADS).view(8, HEADS)},
        near=(NearMiss(position_bias_over_queries, "another axis|not the key axis"),),
    ),
    Form(bias_square, spec(), lambda s: s.bias.has(Load), _TABLES, near=(NearMiss(two_products, "product"),)),
    Form(
        softcap,
        spec(softcap=1.5),
        near=(NearMiss(softcap_after_mask, "bidirectional|future|causal|order|left", paged=True),),
    ),
    Form(
        softcap_with_bias,
        spec(),
        lambda s: s.score is not None,
        {"slopes": SLOPES},
        near=(NearMiss(softcap_of_weights, "go to tanh"),),
    ),
)

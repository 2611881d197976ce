"""Forms 1 to 6: softmax(q k^T * scale + mask) v, as most eager attention functions write it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.mask import Bidirectional
from tests.forms.form import SCALE, Form, NearMiss, additive, repeat_kv, spec


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers: llama, mistral, qwen2 and 166 more `eager_attention_forward`."""
    weights = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * SCALE + additive(q.shape[2])
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat_kv(v, 2)).transpose(1, 2).contiguous()


def probabilities_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.softmax(q @ repeat_kv(k, 2).mT * SCALE + additive(q.shape[2]), dim=-1)
    return weights @ repeat_kv(v, 2), weights


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ repeat_kv(k, 2).mT * SCALE + additive(q.shape[2]), dim=-1)
    return F.dropout(weights, p=0.5, training=True) @ repeat_kv(v, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers: bert, whisper, vit and 76 more, softmax in the working dtype."""
    weights = torch.matmul(q, k.transpose(2, 3)) * SCALE
    return torch.matmul(F.softmax(weights + additive(q.shape[2]), dim=-1), v)


def not_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return F.softmax(torch.matmul(q, k.reshape(*k.shape[:2], k.shape[3], n)) * SCALE + additive(n), dim=-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * SCALE + additive(q.shape[2]), dim=-2), v)


def over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(2, 3)) * SCALE, dim=1), v)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """timm's VisionTransformer and every encoder without padding."""
    return (q * SCALE @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def weights_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * SCALE @ k.transpose(-2, -1)).softmax(dim=-1).transpose(-1, -2) @ v


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2, BERT, ViT of older days: divided by sqrt(d)."""
    return F.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + additive(q.shape[2]), dim=-1) @ v


def mean_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.size(-1)) + additive(q.shape[2]), dim=-1)
    return weights.mean(1, keepdim=True) @ v


def cast_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2, GPT-NeoX: a tensor divisor, float() before the softmax, type(v.dtype) after."""
    weights = torch.matmul(q, k.transpose(-1, -2))
    weights = weights / torch.full([], v.size(-1) ** 0.5, dtype=weights.dtype) + additive(q.shape[2])
    return torch.matmul(F.softmax(weights.to(torch.float32), dim=-1).type(v.dtype), v)


def rounded_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(torch.matmul(q, k.transpose(-1, -2)) * SCALE + additive(q.shape[2]), dim=-1)
    return torch.matmul((weights * 16).round() / 16, v)


def floats(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-J, CodeGen: q.float(), k.float(), masked before the division."""
    weights = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / torch.sqrt(torch.tensor(8.0))
    return torch.matmul(F.softmax(weights + additive(q.shape[2]), dim=-1).to(v.dtype), v)


def squared_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2)) / 8.0**0.5
    return torch.matmul(F.softmax(weights + additive(q.shape[2]), dim=-1).square(), v)


_USED = "probabilities are also used"
FORMS = (
    Form(repeated, spec(kv=2), near=(NearMiss(probabilities_too, _USED), NearMiss(dropped, "dropout"))),
    Form(
        plain,
        spec(),
        near=(
            NearMiss(not_transposed, ".", readable=True),
            NearMiss(over_queries, "another axis|not the key axis"),
            NearMiss(over_heads, "over axis 1, which is not the key axis"),
        ),
    ),
    Form(
        unmasked,
        spec(Bidirectional()),
        paged="bidirectional|causal|future|left",
        near=(NearMiss(weights_transposed, "another axis"),),
    ),
    Form(divided, spec(), near=(NearMiss(mean_over_heads, "mean"),)),
    Form(cast_after, spec(), near=(NearMiss(rounded_weights, "not to a product with values"),)),
    Form(floats, spec(), near=(NearMiss(squared_weights, "go to square"),)),
)

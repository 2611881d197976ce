"""Which ops hide an attention, its product or its mask inside one op, and what do they compute?

They are taken apart while a graph is normalised. PyTorch's encoder layers are one op each in eval mode, and only then, if no
parameter asks for a gradient or gradients are off: taken apart, they are the same graph on either path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def _composite(op: Any) -> Callable[..., Any]:
    """Torch's own decomposition, into permute, view and bmm for one, reached through the composite kernel."""

    def decomposed(*args: Any, **kwargs: Any) -> Any:
        return op.decompose(*args, **kwargs)

    return decomposed


def _hidden(mask: Tensor | None, mask_type: int | None) -> Tensor | None:
    """Where the native ops see no key, to broadcast over [B, H, T, T]: 0 is a mask [T, T], 1 is padding [B, T], 2 is all four dims.

    They take any element that is not zero for masked, also in a mask of floats.
    """
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask != 0
    return mask[:, None, None, :] if mask_type == 1 else mask


def _native_mha(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor]:
    """nn.MultiheadAttention's fast path: batch first, self-attention in eval mode."""
    weights, biases = qkv_weight.chunk(3), qkv_bias.chunk(3)
    parts = zip((query, key, value), weights, biases, strict=True)
    q, k, v = (F.linear(x, w, b).view(*x.shape[:2], num_head, -1).transpose(1, 2) for x, w, b in parts)
    hidden = _hidden(mask, mask_type)
    if need_weights:
        scores = q @ k.transpose(-1, -2) * (embed_dim // num_head) ** -0.5
        probabilities = (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))).softmax(-1)
        out = probabilities @ v
        given = probabilities.mean(1) if average_attn_weights else probabilities
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if hidden is None else hidden.logical_not())
        given = query.new_empty(0)  # never read: the module returns None in its place
    return F.linear(out.transpose(1, 2).flatten(-2), proj_weight, proj_bias), given


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """nn.TransformerEncoderLayer's fast path."""

    def attend(x: Tensor) -> Tensor:
        state = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _native_mha(x, x, x, embed_dim, num_heads, *state, mask, need_weights=False, mask_type=mask_type)[0]

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else F.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = src + attend(first(src))
        return x + feed(second(x))
    x = first(src + attend(src))
    return second(x + feed(x))


def _write_where(x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    """`x[mask] = value`, and `x[:, :, mask] = value`: elementwise where the value is the same for every place."""
    first = next((place for place, index in enumerate(indices) if index is not None), 0)
    mask, *more = indices[first:]
    if accumulate or more or mask is None or mask.dtype != torch.bool:
        return NotImplemented
    after = x.dim() - first - mask.dim()
    one_value = all(isinstance(size, int) and size == 1 for size in values.shape)
    if not one_value and values.dim() > after:
        return NotImplemented
    value = values.reshape([]) if one_value else values
    return torch.where(mask.reshape(*mask.shape, *[1] * after), value.to(x.dtype), x)


DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = {
    **{
        op: _composite(op)
        for op in (_aten.einsum.default, _aten.inner.default, _aten.tensordot.default, _aten.linalg_vecdot.default)
    },
    _aten._native_multi_head_attention.default: _native_mha,
    _aten._transformer_encoder_layer_fwd.default: _encoder_layer,
    _aten.index_put.default: _write_where,
}

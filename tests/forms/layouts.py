"""Forms 17 to 19: MLA, grouped heads in five spellings, einsum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.forms.form import DIM, HEADS, SCALE, Form, NearMiss, additive, spec

KV, GROUP = 2, HEADS // 2


def _softmax(scores: Tensor) -> Tensor:
    return F.softmax(scores * SCALE + additive(scores.shape[-1]), dim=-1)


def mla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepSeek V2, V3: keys are a part of their own and a rotary part shared by all heads; values are narrower."""
    rope = k[:, :1, :, 5:].expand(-1, HEADS, -1, -1)
    return _softmax(q @ torch.cat((k[..., :5], rope), dim=-1).transpose(2, 3)) @ v


def mla_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeepSeek's own inference code: one product without position and one with it, added."""
    return _softmax(q[..., :5] @ k[..., :5].mT + q[..., 5:] @ k[:, :1, :, 5:].mT) @ v


def mla_weighed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax(q[..., :5] @ k[..., :5].mT + 0.5 * (q[..., 5:] @ k[:, :1, :, 5:].mT)) @ v


def interleaved(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """litgpt, torchtune: repeat_interleave of the key heads."""
    k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, 1)
    return _softmax(q @ k.mT) @ v


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat(1, GROUP, 1, 1), v.repeat(1, GROUP, 1, 1)
    return _softmax(q @ k.mT) @ v


def over_repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(GROUP, dim=1), v.repeat_interleave(GROUP, dim=1)
    return F.softmax(q @ k.mT * SCALE + additive(q.shape[2]), dim=1) @ v


def enable_gqa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own grouped SDPA."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def five_dims(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5X, Gemma's JAX code: q [B, G, R, T, D] against k [B, G, 1, T, D]."""
    b, _, n, d = q.shape
    weights = _softmax(q.view(b, KV, GROUP, n, d) @ k.unsqueeze(2).transpose(-1, -2))
    return (weights @ v.unsqueeze(2)).reshape(b, HEADS, n, d)


def expanded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Falcon, StarCoder: unsqueeze, expand, reshape."""
    b, _, n, d = q.shape
    k, v = (x.unsqueeze(2).expand(b, KV, GROUP, n, d).reshape(b, HEADS, n, d) for x in (k, v))
    return _softmax(torch.einsum("bhid,bhjd->bhij", q, k)) @ v


def packed_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashDecoding: the queries of a group stand as further rows of their key head."""
    b, _, n, d = q.shape
    scores = q.reshape(b, KV, GROUP * n, d) @ k.mT
    weights = _softmax(scores.view(b, KV, GROUP, n, n)).view(b, KV, GROUP * n, n)
    return (weights @ v).view(b, HEADS, n, d)


def packed_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query serving code: never unpacked before the end, the mask tiled over the rows."""
    b, _, n, d = q.shape
    scores = q.reshape(b * KV, GROUP * n, d) @ k.reshape(b * KV, n, d).mT * SCALE
    weights = F.softmax(scores + additive(n)[0].repeat(1, GROUP, 1), dim=-1)
    return torch.bmm(weights, v.reshape(b * KV, n, d)).view(b, HEADS, n, d)


def packed_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-BigCode: the rows of a key head are its queries token by token, the heads of a token side by side."""
    b, n, _, d = q.shape
    scores = torch.baddbmm(
        additive(n)[0].repeat_interleave(HEADS, dim=-2).expand(b, -1, -1), q.reshape(b, n * HEADS, d), k[:, :, 0].mT, alpha=SCALE
    )
    return torch.bmm(F.softmax(scores, dim=-1), v[:, :, 0]).view(b, n, HEADS * d)


def packed_over_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    weights = F.softmax(q.reshape(b, KV, GROUP * n, d) @ k.mT * SCALE + additive(n).repeat(1, 1, GROUP, 1), dim=-2)
    return (weights @ v).view(b, HEADS, n, d)


def packed_crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    scores = q.reshape(b, KV, GROUP * n, d) @ k.mT * SCALE + additive(n).repeat_interleave(GROUP, dim=-2)
    return (F.softmax(scores, dim=-1) @ v).view(b, HEADS, n, d)


def packed_unpacked_crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    scores = q.reshape(b, KV, GROUP * n, d) @ k.mT * SCALE + additive(n).repeat(1, 1, GROUP, 1)
    return (F.softmax(scores, dim=-1) @ v).view(b, KV, n, GROUP, d)


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Shazeer's multi-query attention, PaLM ports: one key head that has no axis of its own, token-major einsum."""
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0])
    return torch.einsum("bhqk,bkd->bqhd", _softmax(scores), v[:, :, 0])


def multi_query_crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0])
    return torch.einsum("bhqk,bqd->bkhd", _softmax(scores), v[:, :, 0])


def heads_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, _, n, d = q.shape
    weights = _softmax(q.view(b, KV, GROUP, n, d) @ k.unsqueeze(2).mT)
    return weights.transpose(1, 2) @ v.unsqueeze(1)


def crossed_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.repeat_interleave(GROUP, dim=1), v.repeat(1, GROUP, 1, 1)
    return _softmax(q @ k.mT) @ v.roll(1, 2)


def einsum_bhqd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """x-transformers, lucidrains: einsum over head-major tensors."""
    return torch.einsum("bhqk,bhkd->bhqd", _softmax(torch.einsum("bhqd,bhkd->bhqk", q, k)), v)


def einsum_swapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhqd->bhkd", _softmax(torch.einsum("bhqd,bhkd->bhqk", q, k)), v)


def einsum_bqhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flax ports, the FlashAttention tests' reference: einsum over token-major tensors."""
    return torch.einsum("bhqk,bkhd->bqhd", _softmax(torch.einsum("bqhd,bkhd->bhqk", q, k)), v)


def einsum_groups(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MaxText, torchtitan ports: grouped einsum, token-major."""
    b, n, _, d = q.shape
    scores = torch.einsum("btgrd,bsgd->bgrts", q.view(b, n, KV, GROUP, d), k)
    return torch.einsum("bgrts,bsgd->btgrd", _softmax(scores), v).reshape(b, n, HEADS * DIM)


def einsum_groups_crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _, d = q.shape
    scores = torch.einsum("btgrd,bsgd->bgrts", q.view(b, n, KV, GROUP, d), k)
    return torch.einsum("bgrts,btgd->bsgrd", _softmax(scores), v).reshape(b, n, HEADS * DIM)


def gqa_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True, enable_gqa=True)


def einsum_wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bqhd->bqhd", _softmax(torch.einsum("bqhd,bkhd->bhqk", q, k)), v)


_CROSSED = NearMiss(crossed_groups, ".", readable=True)
_TILED = NearMiss(tiled, "head", readable=True)
_REPEATED = NearMiss(over_repeated_heads, "over axis 1, which is not the key axis")
_WEIGHED = NearMiss(mla_weighed, "2 products of queries and keys that are not simply added")
_ROWS = NearMiss(packed_over_rows, "another axis|not the key axis")
_QUERY = NearMiss(multi_query_crossed, "another axis")
FORMS = (
    Form(mla, spec(dim_v=6), near=(_WEIGHED,)),
    Form(mla_added, spec(dim_v=6), near=(_WEIGHED,)),
    Form(interleaved, spec(kv=KV), near=(_CROSSED, _TILED, _REPEATED)),
    Form(packed_queries, spec(kv=KV), near=(NearMiss(packed_unpacked_crossed, ".", readable=True), _ROWS)),
    Form(packed_rows, spec(kv=KV), near=(NearMiss(packed_crossed, ".", readable=True), _ROWS)),
    Form(packed_by_token, spec(kv=1), token_major=True, near=(_QUERY,)),
    Form(multi_query, spec(kv=1), token_major=True, near=(_QUERY,)),
    Form(enable_gqa, spec(kv=KV), near=(_TILED, NearMiss(gqa_dropout, "dropout"))),
    Form(five_dims, spec(kv=KV), near=(_TILED, NearMiss(heads_swapped, "in another order"))),
    Form(expanded, spec(kv=KV), near=(_CROSSED, _REPEATED)),
    Form(einsum_bhqd, spec(), near=(NearMiss(einsum_swapped, "another axis"),)),
    Form(einsum_bqhd, spec(), token_major=True, near=(NearMiss(einsum_wrong, "not to a product with values"),)),
    Form(einsum_groups, spec(kv=KV), token_major=True, near=(NearMiss(einsum_groups_crossed, "another axis"),)),
)

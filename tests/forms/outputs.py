"""Forms 22 and 23: further outputs, and caches that the model keeps itself."""

from __future__ import annotations

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.expr import I, J
from compile_attn.kernels.mask import Causal, General
from tests.forms.form import BATCH, DIM, HEADS, SCALE, Form, NearMiss, additive, spec

PAST, ROOM = 3, 16


def keys_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GPT-2 of older days, use_cache=True: (output, (k, v))."""
    return F.softmax(q @ k.mT * SCALE + additive(q.shape[2]), dim=-1) @ v, k, v


def weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = F.softmax(q @ k.mT * SCALE + additive(q.shape[2]), dim=-1)
    return weights @ v, weights


def scores_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT * SCALE
    return F.softmax(scores + additive(q.shape[2]), dim=-1) @ v, scores.amax(-1)


def _past_mask(rows: int, keys: int) -> Tensor:
    return torch.full((rows, keys), -torch.inf).triu(keys - rows + 1)


def cat_past(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """transformers' DynamicCache: cat((past, k)), the mask shifted by the length of the past."""
    past = past[: q.shape[0]]
    k, v = torch.cat((past, k), dim=2), torch.cat((past * 0.5, v), dim=2)
    return F.softmax(q @ k.mT * SCALE + _past_mask(q.shape[2], k.shape[2]), dim=-1) @ v


def cat_past_wrong(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    past = past[: q.shape[0]]
    k, v = torch.cat((past, k), dim=2), torch.cat((v, past * 0.5), dim=2)
    weights = F.softmax(q @ k.mT * SCALE + _past_mask(q.shape[2], k.shape[2]), dim=-1)
    return weights[..., : q.shape[2]] @ v[:, :, : q.shape[2]]


def _over_room(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(ROOM)[None]
    return F.softmax((q @ keys.mT * SCALE).masked_fill(j > i, -torch.inf), dim=-1) @ values


def index_copy(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """transformers' StaticCache: index_copy_ into a buffer, attention over all of its room."""
    past, where = past[: q.shape[0]], torch.arange(q.shape[2])
    return _over_room(q, past.clone().index_copy_(2, where, k), torch.zeros_like(past).index_copy_(2, where, v))


def index_put(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """gpt-fast: cache[:, :, input_pos] = k."""
    past, where = past[: q.shape[0]], torch.arange(q.shape[2])
    keys, values = past.clone(), torch.zeros_like(past)
    keys[:, :, where], values[:, :, where] = k, v
    return _over_room(q, keys, values)


def slice_copy(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    """llama's reference code: cache[:, :, :T] = k, which is slice_scatter."""
    past = past[: q.shape[0]]
    keys, values = past.clone(), torch.zeros_like(past)
    keys[:, :, : q.shape[2]], values[:, :, : q.shape[2]] = k, v
    return _over_room(q, keys, values)


def room_cut(q: Tensor, k: Tensor, v: Tensor, past: Tensor) -> Tensor:
    n, past = q.shape[2], past[: q.shape[0]]
    keys, values = past.clone(), torch.zeros_like(past)
    keys[:, :, :n], values[:, :, :n] = k, v
    return F.softmax(q @ keys.mT * SCALE, dim=-1)[..., :n] @ values[:, :, :n]


_PAST = {"past": torch.linspace(-1, 1, BATCH * HEADS * PAST * DIM).view(BATCH, HEADS, PAST, DIM)}
_ROOM = {"past": torch.zeros(BATCH, HEADS, ROOM, DIM)}
_LENGTH = "key|length|past"
_CUT = NearMiss(room_cut, "of them meet a value")
FORMS = (
    Form(
        keys_too,
        spec(),
        near=(NearMiss(weights_too, "probabilities are also used"), NearMiss(scores_too, "scores are also used")),
    ),
    Form(
        cat_past,
        spec(General(sympy.Le(J, I + PAST))),
        tensors=_PAST,
        paged=_LENGTH,
        near=(NearMiss(cat_past_wrong, "of them meet a value"),),
    ),
    Form(index_copy, spec(Causal()), tensors=_ROOM, paged=_LENGTH, near=(_CUT,)),
    Form(index_put, spec(Causal()), tensors=_ROOM, paged=_LENGTH, near=(_CUT,)),
    Form(slice_copy, spec(Causal()), tensors=_ROOM, paged=_LENGTH, near=(_CUT,)),
)

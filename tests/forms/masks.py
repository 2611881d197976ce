"""Forms 12, 13 and 24: makers of masks, and how a mask meets the score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.mask import Bidirectional, Causal, Chunked, Window
from tests.forms.form import SCALE, Form, NearMiss, seen, spec


def tril_buffer(q: Tensor, k: Tensor, v: Tensor, tril: Tensor) -> Tensor:
    """nanoGPT: masked_fill(tril[:T, :T] == 0, -inf)."""
    n = q.shape[2]
    return (q @ k.mT * SCALE).masked_fill(tril[:, :, :n, :n] == 0, float("-inf")).softmax(-1) @ v


def tril_of_weights(q: Tensor, k: Tensor, v: Tensor, tril: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT * SCALE).softmax(-1).masked_fill(tril[:, :, :n, :n] == 0, 0.0) @ v


def view_expand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DistilBERT: (mask == 0).view(..).expand_as(scores) into masked_fill."""
    _, _, n, _ = q.shape
    scores = (q * SCALE) @ k.transpose(2, 3)
    hidden = (seen(n).int() == 0).view(1, 1, n, n).expand_as(scores)
    return F.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim=-1) @ v


def where_min(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2, GPT-NeoX, CodeGen: where(causal, scores, finfo.min), the value made a tensor."""
    scores = q @ k.transpose(-1, -2) * SCALE
    least = torch.full([], torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return F.softmax(torch.where(seen(q.shape[2]), scores, least), dim=-1) @ v


def where_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-Neo: the causal where, then an additive mask of a window."""
    n = q.shape[2]
    scores = torch.where(seen(n), q @ k.transpose(-1, -2) * SCALE, torch.finfo(q.dtype).min)
    window = torch.ones(n, n, dtype=torch.bool).triu(-3)
    return F.softmax(scores + torch.where(window, 0.0, -1e9), dim=-1) @ v


def triu_float(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's generate_square_subsequent_mask: triu of -inf, diagonal 1."""
    n = q.shape[2]
    return F.softmax(q @ k.mT * SCALE + torch.triu(torch.full((n, n), float("-inf")), diagonal=1), dim=-1) @ v


def arange_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mistral's reference and transformers' sliding overlay: j <= i and j > i - w."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    return F.softmax((q @ k.mT * SCALE).masked_fill(~((j <= i) & (j > i - 4)), -1e4), dim=-1) @ v


def arange_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Llama 4: causal and i // size == j // size."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    allowed = (j <= i) & (i // 4 == j // 4)
    return F.softmax(q @ k.mT * SCALE + torch.where(allowed, 0.0, float("-inf")), dim=-1) @ v


def bool_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tensor2Tensor: (1 - mask) * -1e4, with the mask as floats."""
    hidden = 1.0 - torch.ones(q.shape[2], q.shape[2]).tril()
    return F.softmax(q @ k.mT * SCALE + hidden * -1e4, dim=-1) @ v


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2]).tril()
    return F.softmax(q @ k.mT * SCALE, dim=-1) * hidden @ v


def soft_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE + (1.0 - torch.ones(q.shape[2], q.shape[2]).tril()) * -2.0, dim=-1) @ v


def strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(0)
    return F.softmax((q @ k.mT * SCALE).masked_fill(hidden, -1e9), dim=-1) @ v


def hidden_by_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return F.softmax(scores.masked_fill((scores < -1.0) | ~seen(q.shape[2]), torch.finfo(scores.dtype).min), dim=-1) @ v


def assigned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """NumPy habits: scores[..., mask] = -inf, the mask by meshgrid."""
    i, j = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(q.shape[2]), indexing="ij")
    scores = q @ k.mT * SCALE
    scores[:, :, j > i] = float("-inf")
    return F.softmax(scores, dim=-1) @ v


def assigned_strictly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    j, i = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(q.shape[2]), indexing="xy")
    scores = q @ k.mT * SCALE
    scores[:, :, j >= i] = -1e9
    return F.softmax(scores, dim=-1) @ v


def log_of_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tutorials: scores + log(mask), minus infinity where the mask is 0."""
    return F.softmax(q @ k.mT * SCALE + seen(q.shape[2]).float().log(), dim=-1) @ v


def log_of_soft_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.mT * SCALE + (seen(q.shape[2]).float() + 1.0).log(), dim=-1) @ v


def masked_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ESPnet, WeNet: the same mask before the softmax and, as zeros, after it."""
    hidden = ~seen(q.shape[2])[None, None]
    scores = (q @ k.mT * SCALE).masked_fill(hidden, torch.finfo(q.dtype).min)
    return F.dropout(F.softmax(scores, dim=-1).masked_fill(hidden, 0.0), 0.1, training=False) @ v


def masked_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """AlphaFold-like code, torchtune's older models: nan_to_num for rows that see nothing, here none."""
    scores = (q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), -torch.inf)
    return torch.nan_to_num(F.softmax(scores, dim=-1), 0.0) @ v


def masked_more_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    weights = F.softmax((q @ k.mT * SCALE).masked_fill(~seen(n), -1e9), dim=-1)
    return weights.masked_fill(~seen(n) | ~torch.ones(n, n, dtype=torch.bool).triu(-3), 0.0) @ v


def masked_nan_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(0), -torch.inf)
    return torch.nan_to_num(F.softmax(scores, dim=-1), 0.0) @ v


def window_of_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    weights = F.softmax(torch.where(seen(n), q @ k.transpose(-1, -2) * SCALE, torch.finfo(q.dtype).min), dim=-1)
    return torch.where(torch.ones(n, n, dtype=torch.bool).triu(-3), weights, 0.0) @ v


def window_without_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    return F.softmax((q @ k.mT * SCALE).masked_fill(~((j < i) & (j > i - 4)), -1e4), dim=-1) @ v


def chunk_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
    return F.softmax(q @ k.mT * SCALE + torch.where(i // 4 == j // 4 + 1, 0.0, -1e9), dim=-1) @ v


def padded_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.where(seen(q.shape[2]) & (mask[:, None, :, None] > 0), q @ k.mT * SCALE, torch.finfo(q.dtype).min)
    return F.softmax(scores, dim=-1) @ v


def other_positions(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    allowed = position[:, None, :, None] > position[:, None, None, :]
    return F.softmax((q @ k.mT * SCALE).masked_fill(~allowed, -1e9), dim=-1) @ v


def other_documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    allowed = seen(q.shape[2]) & (document[:, None, :, None] != document[:, None, None, :])
    return F.softmax((q @ k.mT * SCALE).masked_fill(~allowed, -1e9), dim=-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """BERT turned decoder, GPT-J: causal and a padding mask [B, T] of ones and zeros, as (1 - m) * finfo.min."""
    extra = (1.0 - mask[:, None, None, :]) * torch.finfo(q.dtype).min
    scores = torch.where(seen(q.shape[2]), q @ k.mT * SCALE, torch.finfo(q.dtype).min)
    return F.softmax(scores + extra, dim=-1) @ v


def position_ids(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """JAX ports: compares the position ids that the caller gives."""
    allowed = position[:, None, :, None] >= position[:, None, None, :]
    return F.softmax((q @ k.mT * SCALE).masked_fill(~allowed, -1e9), dim=-1) @ v


def packed(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """transformers' masking_utils: a new document wherever the position does not grow by one."""
    first = position.new_zeros((position.shape[0], 1))
    document = (torch.diff(position, prepend=first - 1, dim=-1) != 1).cumsum(-1)
    allowed = seen(q.shape[2])[None, None] & (document[:, None, :, None] == document[:, None, None, :])
    return F.softmax((q @ k.mT * SCALE).masked_fill(~allowed, torch.finfo(q.dtype).min), dim=-1) @ v


def documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """Packed training, attention-gym's document masking: ids of documents [B, T]."""
    allowed = seen(q.shape[2]) & (document[:, None, :, None] == document[:, None, None, :])
    return F.softmax(torch.where(allowed, q @ k.mT * SCALE, -torch.inf), dim=-1) @ v


def _padding(batch: int, tokens: int) -> Tensor:
    return torch.ones(batch, tokens)


def _positions(batch: int, tokens: int) -> Tensor:
    return torch.arange(tokens).repeat(batch, 1)


def _documents(batch: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) // 5).repeat(batch, 1)


_TRIL = {"tril": torch.ones(64, 64).tril().view(1, 1, 64, 64)}
_FUTURE = "bidirectional|future|causal|left"
_DATA = "data of the call|computed from the tokens"
_NO_KEY = "may see no key at all"
_SCORES = NearMiss(hidden_by_scores, "depends on their scores")
FORMS = (
    Form(tril_buffer, spec(), tensors=_TRIL, near=(NearMiss(tril_of_weights, "not all of them were masked before"),)),
    Form(view_expand, spec(), near=(_SCORES,)),
    Form(where_min, spec(), near=(_SCORES,)),
    Form(where_twice, spec(Window(3)), near=(NearMiss(window_of_weights, "go to where"),)),
    Form(triu_float, spec(), near=(NearMiss(strict, _NO_KEY),)),
    Form(arange_window, spec(Window(3)), near=(NearMiss(window_without_itself, _NO_KEY),)),
    Form(arange_chunks, spec(Chunked(4)), near=(NearMiss(chunk_before, _NO_KEY),)),
    Form(assigned, spec(), near=(NearMiss(assigned_strictly, _NO_KEY),)),
    Form(log_of_mask, spec(), near=(NearMiss(log_of_soft_mask, _FUTURE, paged=True),)),
    Form(masked_twice, spec(), near=(NearMiss(masked_more_after, "not all of them were masked before"),)),
    Form(masked_nan, spec(), near=(NearMiss(masked_nan_rows, _NO_KEY),)),
    Form(bool_product, spec(), near=(NearMiss(multiplied, "go to mul"), NearMiss(soft_mask, _FUTURE, paged=True))),
)
DATA_FORMS = (
    Form(padded, spec(), inputs={"mask": _padding}, paged=_DATA, near=(NearMiss(padded_rows, _NO_KEY),)),
    Form(
        position_ids,
        spec(Bidirectional()),
        inputs={"position": _positions},
        paged=_DATA,
        near=(NearMiss(other_positions, _NO_KEY),),
    ),
    Form(packed, spec(Causal()), inputs={"position": _positions}, paged=_DATA, near=(NearMiss(other_positions, _NO_KEY),)),
    Form(documents, spec(Causal()), inputs={"document": _documents}, paged=_DATA, near=(NearMiss(other_documents, _NO_KEY),)),
)

"""Forms 7 to 10: where the scale stands, how keys are turned, and products over merged heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.forms.form import DIM, HEADS, SCALE, Form, NearMiss, additive, spec


def scale_on_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """fairseq, BART, OPT: q is scaled by its projection."""
    return F.softmax((q * SCALE) @ k.transpose(2, 3) + additive(q.shape[2]), dim=-1) @ v


def scale_on_k(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Megatron's older core attention: keys scaled before the product."""
    return F.softmax(q @ (k * SCALE).transpose(2, 3) + additive(q.shape[2]), dim=-1) @ v


def scale_on_both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ATen's own decomposition of SDPA, OpenAI's whisper: sqrt of the scale on each side."""
    return F.softmax((q * DIM**-0.25) @ (k * DIM**-0.25).transpose(2, 3) + additive(q.shape[2]), dim=-1) @ v


def scale_of_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (F.softmax(q @ k.transpose(2, 3) + additive(q.shape[2]), dim=-1) * SCALE) @ v


def scale_of_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.transpose(2, 3) / q.shape[2] + additive(q.shape[2]), dim=-1) @ v


def scale_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax((q @ k.transpose(2, 3)) * (q @ v.transpose(2, 3)) + additive(q.shape[2]), dim=-1) @ v


def scale_over_heads(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return F.softmax((q @ k.transpose(2, 3)) * scale + additive(q.shape[2]), dim=-3) @ v


def scale_of_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = 1.0 / v.norm()
    return F.softmax((q @ k.transpose(2, 3)) * scale + additive(q.shape[2]), dim=-1) @ v


def scale_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """Swin v2, CLIP-like: a scale kept as a tensor of the module."""
    return F.softmax((q @ k.transpose(2, 3)) * scale + additive(q.shape[2]), dim=-1) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """T5, GPT-Neo: no scale at all."""
    return F.softmax(q @ k.transpose(3, 2) + additive(q.shape[2]), dim=-1) @ v


def scale_after_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = F.softmax(q @ k.transpose(3, 2) + additive(q.shape[2]), dim=-1)
    return (weights / weights.norm(dim=-1, keepdim=True)) @ v


def permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MPT-like: keys turned by permute(0, 1, 3, 2)."""
    return F.softmax(q @ k.permute(0, 1, 3, 2) * SCALE + additive(q.shape[2]), dim=-1) @ v


def weights_permuted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(q @ k.permute(0, 1, 3, 2) * SCALE + additive(q.shape[2]), dim=-1).permute(0, 1, 3, 2) @ v


def cross_covariance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    return (F.softmax(q.mT @ k * SCALE, dim=-1) @ v.mT).mT


def key_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """OpenAI's GPT-2 and ImageGPT: split_heads(k=True), view.permute(0, 2, 3, 1). Token-major inputs."""
    n = q.shape[1]
    q, v = (x.reshape(x.shape[0], n, HEADS * DIM).view(-1, n, HEADS, DIM).permute(0, 2, 1, 3) for x in (q, v))
    k = k.reshape(k.shape[0], n, HEADS * DIM).view(-1, n, HEADS, DIM).permute(0, 2, 3, 1)
    return F.softmax(q @ k * SCALE + additive(n), dim=-1) @ v


def key_mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[1]
    k = k.reshape(k.shape[0], HEADS, DIM, n)
    return F.softmax(q.permute(0, 2, 1, 3) @ k * SCALE + additive(n), dim=-1) @ v.permute(0, 2, 1, 3)


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MBart, Marian, fairseq: view(B * H), bmm, view for the mask, view, softmax, bmm."""
    b, h, n, d = q.shape
    q, k, v = ((x * s).reshape(b * h, n, d) for x, s in ((q, SCALE), (k, 1.0), (v, 1.0)))
    weights = torch.bmm(q, k.transpose(1, 2)).view(b, h, n, n) + additive(n)
    weights = F.softmax(weights.view(b * h, n, n), dim=-1)
    return torch.bmm(weights, v).view(b, h, n, d).transpose(1, 2).reshape(b, n, h * d)


def bmm_crossed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    q, k = (x.reshape(b * h, n, d) for x in (q * SCALE, k))
    weights = F.softmax((torch.bmm(q, k.transpose(1, 2)).view(b, h, n, n) + additive(n)).view(b * h, n, n), dim=-1)
    return torch.bmm(weights, v.transpose(0, 1).reshape(b * h, n, d)).view(b, h, n, d)


def bmm_weights_too(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    b, h, n, d = q.shape
    q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
    weights = F.softmax(torch.bmm(q, k.transpose(1, 2)) + additive(n)[0], dim=-1)
    return torch.bmm(weights, v).view(b, h, n, d), weights.view(b, h, n, n)


def baddbmm_upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """GPT-2 with reorder_and_upcast_attn: baddbmm into an empty tensor with beta 0."""
    b, h, n, d = q.shape
    weights = torch.empty(b * h, n, n, dtype=torch.float32)
    q, k = q.reshape(-1, n, d), k.transpose(-1, -2).reshape(-1, d, n)
    weights = torch.baddbmm(weights, q.float(), k.float(), beta=0, alpha=SCALE).reshape(b, h, n, n)
    return torch.matmul(F.softmax(weights + additive(n), dim=-1).type(v.dtype), v)


def baddbmm_dirty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    base = torch.bmm(v.reshape(-1, n, d), v.transpose(-1, -2).reshape(-1, d, n))
    weights = torch.baddbmm(base, q.reshape(-1, n, d), k.transpose(-1, -2).reshape(-1, d, n), beta=1, alpha=SCALE)
    return torch.matmul(F.softmax(weights.reshape(b, h, n, n) + additive(n), dim=-1), v)


_DATA = NearMiss(scale_of_data, ".", readable=True)
FORMS = (
    Form(scale_on_q, spec(), near=(_DATA, NearMiss(scale_of_weights, "go to mul"))),
    Form(scale_on_k, spec(), near=(_DATA, NearMiss(scale_of_length, "sequence length"))),
    Form(scale_on_both, spec(), near=(_DATA, NearMiss(scale_of_scores, "2 products"))),
    Form(
        scale_tensor,
        spec(scale=0.5),
        tensors={"scale": torch.tensor(0.5)},
        near=(NearMiss(scale_over_heads, "over axis 1, which is not the key axis"),),
    ),
    Form(no_scale, spec(scale=1.0), near=(NearMiss(scale_after_softmax, "not to a product with values"),)),
    Form(permuted, spec(), near=(NearMiss(weights_permuted, "another axis"),)),
    Form(
        key_turned,
        spec(),
        token_major=True,
        near=(NearMiss(key_mixed, ".", readable=True), NearMiss(cross_covariance, "head sizes are not constants")),
    ),
    Form(bmm, spec(), near=(NearMiss(bmm_crossed, ".", readable=True), NearMiss(bmm_weights_too, "also used by"))),
    Form(baddbmm_upcast, spec(), near=(NearMiss(baddbmm_dirty, "product"),)),
)

"""Forms 15, 16 and 21: sinks, and softmax spelled out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.spec import AttentionSpec
from tests.forms.form import HEADS, SCALE, Form, NearMiss, additive, seen, spec

SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])


def _with_sink(q: Tensor, k: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3) * SCALE + additive(q.shape[2])
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)


def sink_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """gpt-oss in transformers: cat, minus the maximum, softmax, the last column dropped."""
    combined = _with_sink(q, k, sinks)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1] @ v


def sink_plain(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """OpenAI's own gpt-oss: no maximum, float softmax, cast back."""
    return F.softmax(_with_sink(q, k, sinks).float(), dim=-1)[..., :-1].to(v.dtype) @ v


def sink_first(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """StreamingLLM-like: the extra column stands first."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    both = torch.cat([sinks.view(1, HEADS, 1, 1).expand(q.shape[0], HEADS, q.shape[2], 1), scores], dim=-1)
    return both.softmax(-1)[..., 1:] @ v


def sink_wrong_column(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return F.softmax(_with_sink(q, k, sinks), dim=-1)[..., 1:] @ v


def sink_valued(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return F.softmax(_with_sink(q, k, sinks), dim=-1) @ F.pad(v, (0, 0, 0, 1), value=1.0)


def _gated(q: Tensor, k: Tensor, v: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
    """The output times a function of the logsumexp of the scores."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    return (F.softmax(scores, dim=-1) @ v) * gate(torch.logsumexp(scores, dim=-1, keepdim=True))


def sink_gate(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """granite_swa: the output times sigmoid(logsumexp - sink)."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    scale = (torch.logsumexp(scores, dim=-1) - sinks.view(1, -1, 1)).to(torch.float32).sigmoid()
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v) * scale.unsqueeze(-1).to(q.dtype)


def sink_gate_sum(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """FlashAttention users without sinks: out / (1 + exp(sink - lse)), after the heads have been moved."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    rest = 1 + torch.exp(sinks - torch.logsumexp(scores, -1).transpose(1, 2))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous() / rest[..., None]


def gate_reversed(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return _gated(q, k, v, lambda total: torch.sigmoid(sinks.view(1, -1, 1, 1) - total))


def gate_halved(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return _gated(q, k, v, lambda total: torch.sigmoid(0.5 * total - sinks.view(1, -1, 1, 1)))


def gate_of_token(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return _gated(q, k, v, lambda total: torch.sigmoid(total - q.sum(-1, keepdim=True) * sinks.view(1, -1, 1, 1)))


def gate_of_other_scores(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    total = torch.logsumexp(scores, dim=-1, keepdim=True)
    return (F.softmax(scores + additive(q.shape[2]), dim=-1) @ v) * torch.sigmoid(total - sinks.view(1, -1, 1, 1))


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Evan Miller's softmax1: exp / (1 + sum exp)."""
    weights = torch.exp(q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), 0.0)
    return (weights / (1.0 + weights.sum(-1, keepdim=True))) @ v


def small_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Hand-written code that fears a division by zero: exp / (sum exp + eps)."""
    weights = torch.exp(q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), 0.0)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def off_by_one_shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), -torch.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / (1.0 + weights.sum(-1, keepdim=True))) @ v


def exp_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CLIP-like code, tutorials, x-transformers' older masks: exp(x - max) / sum."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def exp_sum_late(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's shape in plain code: the division after the product with v."""
    scores = (q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def exp_sum_of_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~seen(q.shape[2]), -torch.inf)
    return (scores.exp() @ v) / (q @ k.mT * SCALE).exp().sum(-1, keepdim=True)


def log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The exponential of log_softmax."""
    return F.log_softmax(q @ k.mT * SCALE + additive(q.shape[2]), dim=-1).exp() @ v


def log_softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(q @ k.mT * SCALE + additive(q.shape[2]), dim=-2).exp() @ v


def powers_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention's arithmetic in plain code: exp2 of scores in units of log2."""
    scores = (q @ k.mT * (SCALE * 1.4426950408889634)).masked_fill(~seen(q.shape[2]), -torch.inf)
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def log_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ring-attention tutorials: exp(scores - logsumexp(scores))."""
    scores = q @ k.mT * SCALE + additive(q.shape[2])
    return torch.exp(scores - torch.logsumexp(scores, dim=-1).unsqueeze(-1)) @ v


def log_sum_of_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * SCALE
    return torch.exp(scores + additive(q.shape[2]) - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v


def exp_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(q @ k.mT * SCALE + additive(q.shape[2]))
    return (weights / weights.sum(dim=-2, keepdim=True)) @ v


def exp_unnormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.exp(q @ k.mT * SCALE + additive(q.shape[2])) @ v


def _sunk(found: AttentionSpec) -> bool:
    return found.sinks is not None


_S = {"sinks": SINKS}
_GATES = (
    NearMiss(gate_reversed, "no sink"),
    NearMiss(gate_halved, "no sink"),
    NearMiss(gate_of_token, "number per head|no sink"),
    NearMiss(gate_of_other_scores, "other scores"),
)
_COLUMNS = (NearMiss(sink_wrong_column, "another axis"), NearMiss(sink_valued, "of them meet a value"))
FORMS = (
    Form(sink_column, spec(), _sunk, _S, near=_COLUMNS),
    Form(sink_plain, spec(), _sunk, _S, near=_COLUMNS),
    Form(sink_first, spec(), _sunk, _S, near=_COLUMNS),
    Form(sink_gate, spec(), _sunk, _S, near=_GATES),
    Form(sink_gate_sum, spec(), _sunk, _S, near=_GATES),
    Form(off_by_one, spec(), _sunk, near=(NearMiss(off_by_one_shifted, "adds 1.0 after the maximum"),)),
    Form(small_number, spec(), _sunk, near=(NearMiss(off_by_one_shifted, "adds 1.0 after the maximum"),)),
    Form(exp_sum, spec(), near=(NearMiss(exp_over_queries, "another axis"), NearMiss(exp_unnormalised, "never divided"))),
    Form(powers_of_two, spec(), near=(NearMiss(exp_unnormalised, "never divided"),)),
    Form(log_sum, spec(), near=(NearMiss(log_sum_of_others, "never divided"),)),
    Form(exp_sum_late, spec(), near=(NearMiss(exp_sum_of_others, "never divided"),)),
    Form(log_softmax, spec(), near=(NearMiss(log_softmax_over_queries, "another axis|not the key axis"),)),
)

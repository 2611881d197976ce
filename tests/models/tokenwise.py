"""Small models without pages: which must be proven to treat each token by itself, and which not?

Each is a function of (parameters, x or ids, positions); `PROVEN` and `MIXING` are what the tests run over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from compile_attn.kernels.spec import AttentionSpec

V, D, N, E, K = 29, 16, 64, 4, 2  # vocabulary, width, longest table, experts, experts a token
SPEC = AttentionSpec(2, 2, 8, 8, scale=0.35).encode()


def attend(x: torch.Tensor) -> torch.Tensor:
    """Causal attention as the recogniser leaves it: [1, T, D] to [1, T, D], two heads of 8."""
    q = x.view(1, -1, 2, 8).transpose(1, 2)
    out: torch.Tensor = torch.ops.paged_attn.attention(q, q * 0.5, q + 1, [], SPEC, "reference")
    return out.transpose(1, 2).reshape(1, -1, D)


class Model(nn.Module):
    """Embedding, a body, a head; the body may use what parameters and buffers it likes from here."""

    def __init__(self, body: Callable[..., torch.Tensor], *, head: bool = True) -> None:
        super().__init__()
        self.body, self.has_head = body, head
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.wpe, self.a, self.b = nn.Embedding(N, D), nn.Linear(D, D), nn.Linear(D, D)
        self.norm, self.rms = nn.LayerNorm(D), nn.RMSNorm(D)
        self.router = nn.Linear(D, E)
        self.experts = nn.Parameter(torch.randn(E, D, D) / 4)
        self.batch_norm, self.group_norm, self.dropout = nn.BatchNorm1d(D), nn.GroupNorm(4, D), nn.Dropout(0.5)
        self.conv, self.conv1 = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 1)
        self.depthwise = nn.Conv1d(D, D, 3, padding=2, groups=D)
        self.gru = nn.GRU(D, D, batch_first=True)
        angle = torch.outer(torch.arange(N).float(), torch.rand(D))
        self.register_buffer("cos", angle.cos())
        self.register_buffer("wide", angle.sin()[None, None])
        self.register_buffer("places", torch.arange(N)[None])
        self.register_buffer("minus", torch.tensor([-1]))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(input_ids)
        x = self.body(self, x) if position_ids is None else self.body(self, x, position_ids)
        return self.head(x) if self.has_head else x


Body = Callable[..., torch.Tensor]
PROVEN: dict[str, Body] = {}
LAST: dict[str, Body] = {}
GIVEN: dict[str, Body] = {}  # with position_ids
MIXING: dict[str, tuple[Body, str]] = {}


def proven(body: Body) -> Body:
    PROVEN[body.__name__] = body
    return body


def last(body: Body) -> Body:
    LAST[body.__name__] = body
    return body


def given(body: Body) -> Body:
    GIVEN[body.__name__] = body
    return body


def mixing(reason: str) -> Callable[[Body], Body]:
    def register(body: Body) -> Body:
        MIXING[body.__name__] = (body, reason)
        return body

    return register


def _time(m: Model, t: torch.Tensor) -> torch.Tensor:
    return (t.float()[:, None] * m.cos[1]).sin()


@proven
def norms_and_mlp(m: Model, x: torch.Tensor) -> torch.Tensor:
    x = x + m.b(F.gelu(m.a(m.norm(x))))
    x = x + F.silu(m.a(m.rms(x))) * F.softplus(m.b(x)).clamp(max=3)
    gate, up = m.a(x).chunk(2, -1)
    return torch.cat([gate.tanh() * up, up], -1) * x.softmax(-1) + x / x.norm(dim=-1, keepdim=True)


@proven
def heads_and_views(m: Model, x: torch.Tensor) -> torch.Tensor:
    heads = x.view(1, x.shape[1], 4, 4).transpose(1, 2)
    heads = torch.stack([heads[..., :2], heads[..., 2:].flip(-1)], -1).flatten(-2)
    scores = (heads.transpose(1, 2) @ heads.permute(0, 2, 3, 1)).softmax(-1)  # heads of one token with each other
    mixed = (scores @ heads.transpose(1, 2)).reshape(-1, D)
    return torch.einsum("td,de->te", mixed, m.a.weight)[None] + F.pad(x, (1, 0))[..., :-1]


@proven
def pointwise_convolution(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.conv1(x.transpose(1, 2)).transpose(1, 2) + m.dropout(m.batch_norm(x.reshape(-1, D))).unsqueeze(0)


@proven
def group_norm_of_flat_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.group_norm(x.view(-1, D)).view_as(x)


@proven
def learned_positions_by_arange(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.wpe(torch.arange(x.shape[1]).unsqueeze(0))


@proven
def learned_positions_by_slice(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.wpe.weight[: x.shape[1]] + m.wide[:, 0, 3 : 3 + x.shape[1]]


@proven
def learned_positions_by_buffer(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.wpe(m.places[:, : x.shape[1]])


@proven
def learned_positions_by_cumsum(m: Model, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(1, x.shape[1])
    place = (torch.cumsum(mask, 1) * mask - 1).long()
    return x + m.wpe(place + 2)


@proven
def learned_positions_by_masked_cumsum(m: Model, x: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(x[..., 0], dtype=torch.long)
    place = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    return x + m.wpe(place)


@proven
def rope_of_table(m: Model, x: torch.Tensor) -> torch.Tensor:
    cos = m.cos[: x.shape[1]]
    sin = torch.index_select(m.wide[0, 0], 0, torch.arange(x.shape[1]))
    return x * cos[None] + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin


@proven
def rope_table_made_and_indexed_by_rows(m: Model, x: torch.Tensor) -> torch.Tensor:
    t = torch.arange(x.shape[1])
    table = _time(m, t)  # one row a token
    return x * table[t] + x * table.gather(0, t[:, None].expand(-1, D))


@proven
def complex_rope(m: Model, x: torch.Tensor) -> torch.Tensor:
    turn = torch.polar(torch.ones_like(m.cos[:, :8]), m.cos[:, :8])[: x.shape[1]]
    pairs = torch.view_as_complex(x.float().reshape(1, -1, 8, 2))
    return torch.view_as_real(pairs * turn).flatten(2)


@proven
def scaling_by_position(m: Model, x: torch.Tensor) -> torch.Tensor:
    t = torch.arange(x.shape[1], dtype=torch.float32)
    scale = torch.log(torch.floor((t + 1) / 4) + 1) * 0.1 + 1
    return torch.where(torch.arange(1, x.shape[1] + 1)[:, None] > 3, x * scale[:, None], x)


@proven
def positions_in_steps(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.a(_time(m, torch.arange(5, 5 + 2 * x.shape[1], 2)))[None]


@proven
def dense_experts(m: Model, x: torch.Tensor) -> torch.Tensor:
    weights, ids = m.router(x[0]).softmax(-1).topk(K)
    gates = torch.zeros(x.shape[1], E).scatter(1, ids, weights)
    each = torch.einsum("td,edf->etf", x[0], m.experts)
    return x + (each * gates.t()[..., None]).sum(0)


@proven
def masked_experts(m: Model, x: torch.Tensor) -> torch.Tensor:
    weights, ids = m.router(x).topk(K)
    chosen = F.one_hot(ids, E) * weights.softmax(-1)[..., None]
    return x + sum(chosen[..., e].sum(-1, keepdim=True) * (x @ m.experts[e]) for e in range(E))


@proven
def gathered_experts(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, D)
    weights, ids = m.router(flat).topk(K)
    rows = torch.bmm(flat.repeat_interleave(K, 0)[:, None], m.experts[ids.flatten()])[:, 0]
    return x + (rows * weights.reshape(-1, 1)).view(-1, K, D).sum(1)


def _grouped(rows: torch.Tensor, experts: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return torch.ops.transformers.grouped_mm_fallback(rows, experts, offsets)  # type: ignore[no-any-return]


def _counts(ids: torch.Tensor) -> torch.Tensor:
    return F.one_hot(ids, E).sum(0).cumsum(0).to(torch.int32)


@proven
def sorted_experts_inverse_by_argsort(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, D)
    weights, ids = m.router(flat).topk(K)
    order = ids.flatten().argsort()
    rows = _grouped(flat[order // K], m.experts, _counts(ids.flatten()))
    rows = F.silu(rows) * weights.flatten()[order][:, None]
    return x + rows[order.argsort()].view(-1, K, D).sum(1)


@proven
def sorted_experts_added_back(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, D)
    weights, ids = m.router(flat).topk(K)
    token = torch.arange(flat.shape[0]).repeat_interleave(K)
    ordered, order = ids.flatten().sort(stable=True)
    offsets = (ordered[:, None] == torch.arange(E)).sum(0).cumsum(0)
    rows = _grouped(flat[token[order]], m.experts, offsets.int()) * weights.flatten()[order].unsqueeze(1)
    return x + torch.zeros_like(flat).index_add(0, token[order], rows)


@proven
def sorted_experts_scattered_back(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, D)
    weights, ids = m.router(flat).topk(K)
    ids, weights = ids.t().reshape(-1), weights.t().reshape(-1)  # [K * T]: token is the fast axis
    order = ids.argsort()
    token = order % flat.shape[0]
    rows = _grouped(flat[token], m.experts, _counts(ids)) * weights[order][:, None]
    return x + torch.zeros_like(flat).scatter_add(0, token[:, None].expand(-1, D), rows)


@proven
def one_expert_a_token(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x[0]
    weight, ids = m.router(flat).softmax(-1).max(-1)
    order = torch.argsort(ids)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])  # row numbers, though as many as there are tokens
    rows = _grouped(flat[order // 1], m.experts, _counts(ids))
    return x + rows[back] * weight[:, None] + m.wpe(torch.arange(order.shape[0]))


@proven
def experts_put_back_by_index(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x[0]
    weight, ids = m.router(flat).softmax(-1).max(-1)
    order = torch.argsort(ids)
    out = torch.zeros_like(flat)
    out[order] = _grouped(flat[order], m.experts, _counts(ids)) * weight[order].unsqueeze(-1)
    return x + out


@given
def given_positions(m: Model, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    return x + m.wpe(position_ids) + m.cos[position_ids] * m.cos[: x.shape[1]]


@given
def given_positions_as_rows(m: Model, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    table = _time(m, torch.arange(x.shape[1]))
    return x + table[position_ids] + table[position_ids.squeeze(0)]


@last
def last_by_number(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.a(x))[:, -1]


@last
def last_by_slice(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.a(x)[:, -1:]) + m.wpe.weight[0]


@last
def last_by_list(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.a(x)[:, [-1], :])


@last
def last_by_length(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.a(x)[:, x.shape[1] - 1 :, :])


@last
def last_squeezed_and_viewed(m: Model, x: torch.Tensor) -> torch.Tensor:
    x = m.a(x)[:, -1:].squeeze(1)
    return m.b(x.view(1, 2, 8).expand(1, 2, 8).reshape(1, D))


@last
def last_with_a_new_axis(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.a(x[:, -1].unsqueeze(1)) + m.wpe(torch.arange(x.shape[1])[None])[:, -1:].transpose(0, 1)


@last
def last_after_attention(m: Model, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(m.norm(x + m.wpe.weight[: x.shape[1]]))
    return (x + m.a(m.norm(x)))[:, -1:, :]


@mixing("convolves over tokens")
def convolution(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x.transpose(1, 2)).transpose(1, 2)


@mixing("convolves over tokens")
def causal_depthwise_convolution(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.depthwise(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


@mixing("works along the token axis")
def running_sum(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x.cumsum(1)


@mixing("along the token axis")
def running_mean(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


@mixing("reduces over the token axis")
def mean_pooling(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x.mean(1, keepdim=True)


@mixing("reduces over the token axis")
def centred(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(1)


@mixing("reduces over the token axis")
def scaled_by_all(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x / x.abs().max()


@mixing("statistics over tokens")
def batch_norm_in_training(m: Model, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x[0], None, None, training=True)[None]


@mixing("sums over the token axis")
def group_norm_over_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.group_norm(x.transpose(1, 2)).transpose(1, 2)


@mixing("depends on the length")
def norm_over_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)


@mixing("keeps only some of the tokens")
def token_shift_by_cat(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@mixing("pads")
def token_shift_by_pad(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + F.pad(x, (0, 0, 1, -1))


@mixing("along the token axis")
def token_shift_by_roll(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x.roll(1, 1)


@mixing("along the token axis")
def reversed_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x.flip(1)


@mixing("sorts each channel")
def sorted_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x.sort(1).values


@mixing("different orders")
def tokens_in_another_order(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x[:, m.router(x)[0, :, 0].argsort()]


@mixing("along the token axis")
def fourier_mixing(m: Model, x: torch.Tensor) -> torch.Tensor:
    return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=1).real


@mixing("pairs tokens")
def attention_left_over(m: Model, x: torch.Tensor) -> torch.Tensor:
    return (x @ x.transpose(1, 2)).softmax(-1) @ x


@mixing("attends over tokens")
def sdpa_left_over(m: Model, x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], is_causal=True)[:, 0]


@mixing("token axis")
def softmax_over_tokens(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x * x.softmax(1)


@mixing("token axis")
def linear_attention(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x @ (x.transpose(1, 2) @ x)


@mixing("picks token 0")
def first_token(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x[:, 0]


@mixing("only some of the tokens")
def first_token_kept(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x[:, :1]


@mixing("only some of the tokens")
def last_three(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x[:, -3:]


@mixing("combines the last token with the others")
def last_with_all(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x[:, -1:]


@mixing("depends on the length")
def positions_from_the_end(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.wpe(torch.arange(x.shape[1] - 1, -1, -1))


@mixing("length of the sequence")
def divided_by_length(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x / x.shape[1]


@mixing("length of the sequence")
def divided_by_a_power_of_length(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x / x.shape[1] ** 0.5


@mixing("holds only where T")
def another_branch_for_short_inputs(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) if x.shape[1] > 8 else m.b(x)


@mixing("holds only where T")
def lengths_in_blocks(m: Model, x: torch.Tensor) -> torch.Tensor:
    return m.a(x) if x.shape[1] % 2 else m.b(x)


@mixing("length of the sequence")
def table_from_the_end(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + m.cos[N - x.shape[1] :]


@mixing("pairs tokens")
def relative_table(m: Model, x: torch.Tensor) -> torch.Tensor:
    t = torch.arange(x.shape[1])
    return x + m.cos[(t[:, None] - t[None]).abs()].sum(1)


@mixing("cuts the token axis")
def whole_input_as_channels(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, 2, -1)[..., :D] * 2


@mixing("random")
def noise(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


@mixing("other ids")
def offsets_of_other_ids(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x[0]
    ids = m.router(flat).argmax(-1)
    others = m.router(-flat).argmax(-1)
    order = ids.argsort()
    return x + _grouped(flat[order], m.experts, _counts(others))[order.argsort()]


@mixing("other ids")
def offsets_of_falling_order(m: Model, x: torch.Tensor) -> torch.Tensor:
    ids = m.router(x[0]).argmax(-1)
    order = ids.argsort(descending=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return x + _grouped(x[0][order], m.experts, _counts(ids))[back]


@mixing("not sorted by group")
def groups_of_unsorted_rows(m: Model, x: torch.Tensor) -> torch.Tensor:
    ids = m.router(x[0]).argmax(-1)
    return x + _grouped(x[0], m.experts, _counts(ids))


@mixing("not a running count")
def fixed_offsets(m: Model, x: torch.Tensor) -> torch.Tensor:
    order = m.router(x[0]).argmax(-1).argsort()
    return x + _grouped(x[0][order], m.experts, torch.tensor([1, 2, 3, 4]).int())[order.argsort()]


@mixing("different orders")
def experts_never_put_back(m: Model, x: torch.Tensor) -> torch.Tensor:
    ids = m.router(x[0]).argmax(-1)
    order = ids.argsort()
    return x + _grouped(x[0][order], m.experts, _counts(ids))


@mixing("one place")
def rows_overwritten(m: Model, x: torch.Tensor) -> torch.Tensor:
    ids = m.router(x[0]).topk(K).indices
    token = ids.flatten().argsort() // K
    out = torch.zeros_like(x[0])
    out[token] = x[0][token] * 2
    return x + out


@mixing("along the token axis")
def capacity_by_cumsum(m: Model, x: torch.Tensor) -> torch.Tensor:
    chosen = F.one_hot(m.router(x[0]).argmax(-1), E)
    return x * ((chosen.cumsum(0) * chosen).sum(-1) < 3)[:, None]


@mixing("at every call")
def state_between_calls(m: Model, x: torch.Tensor) -> torch.Tensor:
    m.cos.add_(x.mean())
    return x + m.cos[0]

"""Small models that take some of the tokens, by a condition: which keep each token by itself, and which do not?

Registered with those of `tokenwise`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.models.tokenwise import D, E, K, Model, mixing, proven


def _where_experts(m: Model, x: torch.Tensor, put: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A loop over experts; each takes the rows that chose it."""
    flat = x.view(-1, D)
    weights, ids = m.router(flat).softmax(-1).topk(K)
    out = torch.zeros_like(flat)
    for e in range(E):
        rows, nth = torch.where(ids == e)
        out = put(out, rows, weights[rows, nth, None] * (flat[rows] @ m.experts[e]))
    return x + out.view(x.shape)


def _add(out: torch.Tensor, rows: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    out[rows] += made
    return out


@proven
def experts_of_where(m: Model, x: torch.Tensor) -> torch.Tensor:
    return _where_experts(m, x, _add)


@proven
def experts_of_where_added(m: Model, x: torch.Tensor) -> torch.Tensor:
    return _where_experts(m, x, lambda out, rows, made: out.index_add(0, rows, made))


@proven
def experts_of_one_hot(m: Model, x: torch.Tensor) -> torch.Tensor:
    """transformers' Mixtral: experts first, then which of the k, then tokens."""
    flat = x.view(-1, D)
    weights, ids = m.router(flat).softmax(-1).topk(K)
    out, chosen = torch.zeros_like(flat), F.one_hot(ids, E).permute(2, 1, 0)
    for e in range(E):
        nth, rows = torch.where(chosen[e])
        out.index_add_(0, rows, (flat[rows] @ m.experts[e]) * weights[rows, nth, None])
    return x + out.view(x.shape)


@proven
def rows_by_mask(m: Model, x: torch.Tensor) -> torch.Tensor:
    hot = m.router(x)[..., 0] > 0
    out = m.a(x)
    out[hot] = m.norm(x[hot]) @ m.experts[0] + m.experts[1, 0]
    return x + out


@proven
def rows_by_nonzero(m: Model, x: torch.Tensor) -> torch.Tensor:
    rows = (m.router(x[0])[:, 0] > 0).nonzero().squeeze(-1)
    return x + m.a(x).index_copy(1, rows, m.b(x[:, rows]))


@mixing("several rows to one place")
def written_twice(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x[0]
    rows, channels = torch.where(flat > 0)
    out = torch.zeros_like(flat)
    out[rows] = flat[rows] * flat[rows, channels, None]
    return x + out


@mixing("several rows to one place")
def written_twice_by_places_in_rows(m: Model, x: torch.Tensor) -> torch.Tensor:
    flat = x.view(-1, D)
    kinds = (m.router(flat) > 0)[:, :K]  # a token may be of both kinds, and then its two rows go to one place
    places = torch.where(kinds.flatten())[0]
    out = torch.zeros_like(flat)
    out[places // K] = flat[places // K] * kinds.flatten()[places].to(x.dtype)[:, None] + (places % K)[:, None]
    return x + out


@mixing("stand in different orders")
def sorted_on_the_way(m: Model, x: torch.Tensor) -> torch.Tensor:
    key = m.router(x[0])[:, 0]
    rows = torch.where(key > 0)[0]
    return x + torch.zeros_like(x[0]).index_add(0, rows, x[0, rows][key[rows].argsort()])


@mixing("outside attention every op")
def turned_on_the_way(m: Model, x: torch.Tensor) -> torch.Tensor:
    rows = torch.where(m.router(x[0])[:, 0] > 0)[0]
    return x + torch.zeros_like(x[0]).index_add(0, rows, x[0, rows].flip(0))


@mixing("that another condition chose")
def masked_by_one_written_by_another(m: Model, x: torch.Tensor) -> torch.Tensor:
    first = m.router(x)[..., 0] > 0
    second = first.logical_not().logical_not()  # the same rows, which is not looked into
    out = m.a(x)
    out[first] = x[second]
    return out


@mixing("outside attention every op")
def chosen_rows_averaged(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x + x[m.router(x)[..., 0] > 0].mean(0)


@mixing("outside attention every op")
def chosen_rows_summed_up(m: Model, x: torch.Tensor) -> torch.Tensor:
    rows = torch.where(m.router(x[0])[:, 0] > 0)[0]
    return x.index_add(1, rows, x[:, rows].cumsum(1))


@mixing("depends on the length|reads a number")
def scaled_by_how_many(m: Model, x: torch.Tensor) -> torch.Tensor:
    return x * (m.router(x[0])[:, 0] > 0).nonzero().shape[0]


@mixing("mask of other rows")
def mask_of_the_next(m: Model, x: torch.Tensor) -> torch.Tensor:
    order = m.router(x[0])[:, 0].argsort()
    out = m.a(x[0])
    return x + out[order][m.router(x[0])[:, 1] > 0].sum()


@mixing("keeps only some of the tokens")
def experts_of_a_capacity(m: Model, x: torch.Tensor) -> torch.Tensor:
    """Whoever comes fourth to an expert is left out: what a token gets depends on those before it."""
    flat = x.view(-1, D)
    rows = torch.where(m.router(flat).argmax(-1) == 0)[0][:3]
    return x + torch.zeros_like(flat).index_add(0, rows, flat[rows] @ m.experts[0]).view(x.shape)

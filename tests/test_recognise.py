"""What does the recogniser make of single graphs: ops of other devices, strange products, sizes that it cannot know?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from compile_attn.kernels.expr import I, J
from compile_attn.kernels.mask import Bidirectional, Causal
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.recognise import AttentionSite, recognise
from compile_attn.passes.report import Rejected
from compile_attn.passes.spelled import is_whole_attention
from tests.capture import Call, captured
from tests.forms.form import SCALE, additive

_aten = torch.ops.aten
B, H, T, D = 2, 4, 16, 8
pytestmark = pytest.mark.usefixtures("no_grad")


def read(
    run: Callable[..., object], *inputs: Tensor, paged: bool = False, every_size: bool | None = None
) -> tuple[list[AttentionSite], list[Rejected]]:
    """Sites and rejections; lengths (dim 2 of rank 4) are dynamic unless every size is, or is not, told otherwise."""
    dynamic = [(x, 2) for x in inputs if x.dim() == 4 and every_size is None]
    return recognise(captured(Call(run), *inputs, dynamic=dynamic, every_size=every_size), paged=paged, positions=frozenset())


def qkv(batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, H, T, D, generator=generator) for _ in range(3))
    return q, k, v


def refused(run: Callable[..., object], *inputs: Tensor, paged: bool = False, every_size: bool | None = None) -> Rejected:
    sites, rejected = read(run, *inputs, paged=paged, every_size=every_size)
    assert sites == [] and len(rejected) == 1, sites
    assert rejected[0].cure
    return rejected[0]


def _on_cuda(run: Callable[..., object], queries: int = T) -> tuple[list[AttentionSite], list[Rejected]]:
    """The graph that a GPU would see, traced without one."""
    with FakeTensorMode():
        inputs = [torch.empty(B, H, n, D, device="cuda", dtype=torch.float16) for n in (queries, T, T)]
        module = make_fx(run)(*inputs)
    module.graph.eliminate_dead_code()
    return recognise(Normalized(module, {}, {}), paged=False, positions=frozenset())


def _upper(q: Tensor) -> Tensor:
    return q.new_full((B, H, T, T), -torch.inf).triu(1)


_ON_CUDA: dict[str, Callable[..., object]] = {
    "flash": lambda q, k, v: _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.5)[0],
    "efficient": lambda q, k, v: _aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, True, scale=0.5)[0],
    "efficient_bias": lambda q, k, v: _aten._scaled_dot_product_efficient_attention(q, k, v, _upper(q), False, scale=0.5)[0],
    "cudnn": lambda q, k, v: _aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, scale=0.5)[0],
    "other": lambda q, k, v: _aten._scaled_dot_product_fused_attention_overrideable(q, k, v, None, 0.0, True, scale=0.5)[0],
}


@pytest.mark.parametrize("name", _ON_CUDA)
def test_ops_that_sdpa_becomes_on_a_gpu(name: str) -> None:
    sites, rejected = _on_cuda(_ON_CUDA[name])
    assert rejected == [] and len(sites) == 1
    spec = sites[0].spec
    assert (spec.mask, spec.scale, spec.num_q_heads, spec.head_dim) == (Causal(), 0.5, H, D)


@pytest.mark.parametrize(
    "run, reason",
    [
        (lambda q, k, v: _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2], "statistics"),
        (lambda q, k, v: _aten._scaled_dot_product_flash_attention(q, k, v, 0.2, True)[0], "dropout is on"),
        (lambda q, k, v: _aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, True)[0], "9 queries"),
        (lambda q, k, v: _aten._flash_attention_forward(q, k, v, None, None, T, T, 0.0, True, False)[0], "cannot be read"),
    ],
)
def test_ops_of_a_gpu_that_are_left_alone(run: Callable[..., object], reason: str) -> None:
    sites, rejected = _on_cuda(run, queries=9 if "9" in reason else T)
    assert sites == [] and reason in rejected[0].reason and rejected[0].cure


def test_every_op_of_aten_that_is_an_attention_is_known_for_one() -> None:
    """A new one must be refused by name rather than be overlooked."""
    with FakeTensorMode():
        module = make_fx(_ON_CUDA["flash"])(*(torch.empty(B, H, T, D, device="cuda", dtype=torch.float16) for _ in range(3)))
    assert sum(is_whole_attention(node) for node in module.graph.nodes) == 1


def _outer(q: Tensor, k: Tensor) -> Tensor:
    return (q[:, :, :, None] * k[:, :, None]).sum(-1)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "multiply_and_sum": lambda q, k, v: F.softmax(_outer(q, k) * SCALE + additive(T), -1) @ v,
    "sum_over_keys": lambda q, k, v: (F.softmax(q @ k.mT * SCALE + additive(T), -1)[..., None] * v[:, :, None]).sum(-2),
    "both": lambda q, k, v: (F.softmax(_outer(q, k) * SCALE + additive(T), -1)[..., None] * v[:, :, None]).sum(3),
    "grouped": lambda q, k, v: (
        F.softmax((q.view(B, 2, 2, T, 1, D) * k[:, :2, None, None]).sum(-1) * SCALE + additive(T), -1) @ v[:, :2, None]
    ).view(B, H, T, D),
    "linear": lambda q, k, v: F.softmax(F.linear(q[0, 0], k[0, 0]) * SCALE + additive(T)[0, 0], -1) @ v[0, 0],
    "vecdot": lambda q, k, v: F.softmax(torch.linalg.vecdot(q[:, :, :, None], k[:, :, None]) * SCALE + additive(T), -1) @ v,
    "addmm": lambda q, k, v: F.softmax(torch.addmm(additive(T)[0, 0], q[0, 0], k[0, 0].T, alpha=SCALE), -1) @ v[0, 0],
    "inner": lambda q, k, v: F.softmax(torch.inner(q[0, 0], k[0, 0]) * SCALE + additive(T)[0, 0], -1) @ v[0, 0],
    "tensordot": lambda q, k, v: (
        F.softmax(torch.tensordot(q[0, 0], k[0, 0], dims=([1], [1])) * SCALE + additive(T)[0, 0], -1) @ v[0, 0]
    ),
}


@pytest.mark.parametrize("name", _PRODUCTS)
def test_products_in_every_op(name: str) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _PRODUCTS[name](q, k, v)

    sites, rejected = read(run, *qkv(), every_size=False)
    assert rejected == [] and len(sites) == 1, rejected
    assert sites[0].spec.mask == Causal() and sites[0].spec.scale == pytest.approx(SCALE)
    if name == "grouped":
        assert sites[0].spec.num_kv_heads == 2


def test_a_sum_of_squares_is_no_product_of_queries_and_keys() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax((k * k).sum(-1)[:, :, None] + additive(k.shape[2]), -1) @ v

    assert "not one product" in refused(run, *qkv()).reason


@pytest.mark.parametrize("merged", [False, True])
def test_heads_of_unknown_number_are_refused(merged: bool) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v)) if merged else (q, k, v)
        return F.softmax(q @ k.mT + additive(n)[0], -1) @ v

    assert "unknown size" in (found := refused(run, *qkv(), every_size=True)).reason or "head sizes" in found.reason


def test_views_that_multiply_lengths_are_refused() -> None:
    """Talking heads: a linear layer over the heads of all pairs, whose shape is a product of lengths."""
    mix = nn.Linear(H, H, bias=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        scores = mix((q @ k.mT).view(B, H, n * n).transpose(1, 2)).transpose(1, 2).reshape(B, H, n, n)
        return F.softmax(scores + additive(n), -1) @ v

    assert "not one product" in refused(run, *qkv()).reason


def test_the_op_that_stops_the_reader_is_named() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(torch.atan(q @ k.mT) + additive(q.shape[2]), -1) @ v

    assert "atan" in (why := refused(run, *qkv()).reason) and "an op that cannot be read" in why


@torch.library.custom_op("tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_OVER_HEADS, _BY_CONV = nn.Linear(H, H, bias=False), nn.Conv2d(H, H, 1)
_UNREAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "atan": (torch.atan, "atan"),
    "special": (torch.special.i0e, "special_i0e"),
    "custom": (twice, "tests::twice"),
    "two outputs": (lambda s: torch.frexp(s).mantissa, "frexp"),
    "sorted": (lambda s: s.sort(-1).values, "sort"),
    "summed on": (lambda s: s.cumsum(-1), "cumsum"),
    "best": (lambda s: s.topk(3, -1).values, "topk"),
    "normalised": (lambda s: F.layer_norm(s, (s.shape[-1],)), "layer_norm"),
    "heads by linear": (lambda s: _OVER_HEADS(s.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), "linear"),
    "heads by conv": (_BY_CONV, "conv2d"),
    "masked before": (lambda s: twice(torch.where(s.new_ones(s.shape[-2:]).tril() > 0, s, -9.0)), "tests::twice"),
}


@pytest.mark.parametrize("every_size", [False, None], ids=["constants", "a symbol"])
@pytest.mark.parametrize("name", _UNREAD)
def test_an_unread_op_is_named_whether_lengths_are_constants_or_not(name: str, every_size: bool | None) -> None:
    """As constants, which they are at a first call, they looked like a router's, and the site was passed over in silence."""
    op, called = _UNREAD[name]

    def run(x: Tensor) -> Tensor:
        weights = F.softmax(op(x @ x.mT), -1)
        return weights @ x[:, :, : weights.shape[-1]]

    assert f"({called}), an op that cannot be read" in refused(run, qkv()[0], every_size=every_size).reason


def test_an_exponential_of_an_unread_score_is_no_secret() -> None:
    for every_size in (False, None):
        why = refused(lambda q, k, v: twice(q @ k.mT).exp() @ v, *qkv(), every_size=every_size).reason
        assert "never divided by its sum" in why


@pytest.mark.parametrize("experts", [5, T])
def test_a_router_behind_an_attention_is_none(experts: int) -> None:
    """Weights stand between the two, so what its softmax is over are no keys, however many experts there are."""
    out, gate = nn.Linear(H * D, H * D), nn.Linear(H * D, experts)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = F.softmax(q @ k.mT * SCALE + additive(T), -1) @ v
        x = out(x.transpose(1, 2).reshape(B, T, H * D))
        shares = F.softmax(torch.atan(gate(x)), -1)
        every = x[:, :, None] * torch.arange(1, experts + 1)[:, None]
        return (shares[..., None] * torch.atan(every)).sum(2) + gate(x).exp().sum(-1, True)

    sites, rejected = read(run, *qkv(), every_size=False)
    assert rejected == [] and [site.spec.mask for site in sites] == [Causal()]


def test_an_unread_op_of_positions_is_not_called_data() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        bias = torch.atan((torch.arange(n)[:, None] - torch.arange(n)).float())
        return F.softmax(q @ k.mT + bias + additive(n), -1) @ v

    why = refused(run, *qkv(1), paged=True).reason
    assert "atan" in why and why.endswith("an op that cannot be read")


def test_functions_of_the_distance_are_read() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        far = (torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])).abs().float()
        bias = torch.log1p(far) + F.softplus(far - 3) * torch.rsqrt(far + 1) - torch.cos(far / 8)
        return F.softmax(q @ k.mT - bias + additive(q.shape[2]), -1) @ v

    sites, rejected = read(run, *qkv(1), paged=True)
    assert rejected == [] and sites[0].captured == () and sites[0].spec.bias.free_symbols == {I, J}


def test_a_floor_under_the_scores_changes_nothing() -> None:
    """XGLM: max(scores + mask, finfo.min); a floor that is not the least float is kept."""

    def run(q: Tensor, k: Tensor, v: Tensor, floor: float = torch.finfo(torch.float32).min) -> Tensor:
        scores = q @ k.mT * SCALE + additive(q.shape[2])
        return F.softmax(torch.max(scores, torch.tensor(floor)), -1) @ v

    sites, rejected = read(run, *qkv())
    assert rejected == [] and (sites[0].spec.mask, sites[0].spec.score) == (Causal(), None)
    sites, _ = read(lambda q, k, v: run(q, k, v, -3.0), *qkv())
    assert all(site.spec.mask == Bidirectional() and site.spec.score is not None for site in sites)

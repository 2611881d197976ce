"""Does torch.compile find the backend, and get a faithful graph or an error that names the site?"""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.kernels import mask as m
from tests.tiny import TinyAttention, tiny

X = torch.randn(2, 5, 16)
TOLERANCE = 1e-4  # the bound of the project's promise; the tiny model amplifies differences by design


class Leaking(TinyAttention):
    """Attention that gives its probabilities away as well."""

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).chunk(3, -1)
        seen = (q @ k.mT).softmax(-1)
        return seen @ v, seen


def _compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="paged_attn", options={"inner": "eager", **options})


def test_found_without_an_import() -> None:
    code = "import torch, torch._dynamo as d; assert 'paged_attn' in d.list_backends(), d.list_backends()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_same_call_same_result(inner: str) -> None:
    model = tiny()
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(_compiled(model, inner=inner)(ids), model(ids), atol=TOLERANCE, rtol=0)


def test_gradients_go_through_sdpa() -> None:
    attention = TinyAttention()
    x = X.clone().requires_grad_()
    wanted = torch.autograd.grad(attention(x).square().sum(), [x, *attention.parameters()])
    fast = _compiled(attention, on_rejected="error", inner="inductor")
    found = torch.autograd.grad(fast(x).square().sum(), [x, *attention.parameters()])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_gradients_are_refused_where_the_kernel_has_none() -> None:
    with pytest.raises(ca.RefusedError, match=r"kernel 'reference' has no backward, and gradients are asked for.*torch.no_grad"):
        _compiled(TinyAttention(), kernel="reference", on_rejected="error")(X)


def test_a_rejected_site_is_told_once() -> None:
    model = Leaking().requires_grad_(False)
    fast = _compiled(model)
    with pytest.warns(
        UserWarning, match=r"left 1 attention site\(s\) as they were:\n  softmax, .*softmax\(-1\): .*also used"
    ) as told:
        out = fast(X)
    assert len(told) == 1
    torch.testing.assert_close(out, model(X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X)
        torch._dynamo.reset()
        _compiled(model, on_rejected="keep")(X)


def test_a_rejected_site_as_an_error() -> None:
    fast = _compiled(Leaking(), on_rejected="error")
    for _ in range(2):
        with pytest.raises(ca.RefusedError, match="also used") as refused:
            fast(X)
        [rejected] = refused.value.report.rejected
        assert rejected.where.source.endswith("seen = (q @ k.mT).softmax(-1)")


def test_attention_that_cannot_be_read_is_told_of_at_the_first_call() -> None:
    """At which torch.compile takes all sizes for constants."""

    class Unread(TinyAttention):
        def forward(self, x: Tensor) -> Tensor:
            return torch.atan(x @ x.mT).softmax(-1) @ x

    with pytest.warns(
        UserWarning, match=r"left 1 attention site.*\n  softmax, .*: .*stands atan \(atan\), an op that cannot be read"
    ):
        found = _compiled(Unread())(X)
    torch.testing.assert_close(found, Unread()(X))
    torch._dynamo.reset()
    with pytest.raises(ca.RefusedError, match=r"stands atan \(atan\)"):
        _compiled(Unread(), on_rejected="error")(X)


def test_wrong_options_reach_the_user_as_they_are() -> None:
    with pytest.raises(ValueError, match=r"^paged_attn: unknown option 'kernle'"):
        _compiled(tiny(), kernle="auto")(torch.arange(4)[None])


def test_a_graph_break_cannot_be_paged() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(ids)
            torch._dynamo.graph_break()
            return logits * 2

    cache = ca.PagedKVCache(kv_tokens=32, page_size=4, max_seqs=2)
    batch = cache.batch([ca.Chunk(cache.add(), [1, 2, 3])])
    with torch.no_grad(), pytest.raises(ca.RefusedError, match=r"not compile as one graph: Call to .*graph_break\(\)`; remove the"):
        _compiled(Broken(), cache=cache)(batch.input_ids)


def test_the_cache_keeps_the_report() -> None:
    cache = ca.PagedKVCache(kv_tokens=32, page_size=4, max_seqs=2)
    batch = cache.batch([ca.Chunk(cache.add(), [1, 2, 3])])
    with torch.no_grad():
        _compiled(tiny(), cache=cache)(batch.input_ids)
    assert cache.report is not None
    assert [site.spec.mask for site in cache.report.sites] == [m.Causal(), m.Causal()]

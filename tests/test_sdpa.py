"""Does torch's scaled_dot_product_attention say what a spec says, where its kernels are less exact than its name?"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import compile_attn.backend  # noqa: F401  registers the backend
from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import H, I, J
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from tests.paged import paged_batch

MASKS = {"causal": m.Causal(), "bidirectional": m.Bidirectional(), "window": m.Window(5)}


def both(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Through SDPA, and by the reference in float64."""
    exact = backend("reference").attention(q.double(), k.double(), v.double(), [], spec)
    return backend("sdpa").attention(q, k, v, [], spec).double(), exact


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [-0.125, 0.0, 0.125])
def test_any_scale(mask: str, bias: bool, scale: float) -> None:
    """Kernels hide keys before they multiply by the scale: of a negative one the hidden keys would be infinitely heavy."""
    q, k, v = (torch.randn(2, heads, 40, 16) for heads in (4, 2, 2))
    spec = AttentionSpec(4, 2, 16, 16, MASKS[mask], scale, bias=(J - I) / (1 + H) if bias else None)
    found, expected = both(spec, q, k, v)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
@pytest.mark.parametrize("causal", [True, False])
def test_any_scale_of_a_model(scale: float, causal: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2)) * scale
        if causal:
            scores = scores.masked_fill(~torch.ones(33, 33, dtype=torch.bool).tril(), float("-inf"))
        return scores.softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    compiled = torch.compile(attend, backend="paged_attn", options={"inner": "eager", "kernel": "sdpa"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v), attend(q, k, v), atol=2e-6, rtol=0)


@pytest.mark.parametrize("scale", [-0.125, 0.0])
@pytest.mark.parametrize("kernel", ["general", "block_sparse"])
def test_any_scale_in_other_kernels(kernel: str, scale: float) -> None:
    pytest.importorskip("triton")
    for sequences in ([(0, 20), (30, 3)], [(40, 1), (17, 1)]):
        batch = paged_batch(AttentionSpec(4, 2, 16, 16, m.Window(9), scale), sequences)
        torch.testing.assert_close(batch.attend([], kernel).double(), batch.expected([]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("mask", "bias"),
    [(m.Bidirectional(), J / 2 + 70_000), (m.All(m.Causal(), m.General(J < 20)), -3 * (I - J)), (m.Causal(), (I - J) * 2)],
    ids=["far beyond the numbers of half precision", "only keys far away are seen", "the farthest key is the heaviest"],
)
def test_a_large_bias_keeps_its_differences(mask: m.Mask, bias: object, dtype: torch.dtype) -> None:
    """It is given in the dtype of the queries, of which neighbours lie 2 apart at 512."""
    q, k, v = (torch.randn(1, 2, 600, 16).to(dtype) for _ in range(3))
    found, expected = both(AttentionSpec(2, 2, 16, 16, mask, 0.25, bias=bias), q, k, v)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, atol=2**-5, rtol=0)


def test_a_bias_still_has_gradients() -> None:
    from compile_attn.kernels.expr import Load

    slope = torch.tensor([0.3, -0.2], requires_grad=True)
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    spec = AttentionSpec(2, 2, 8, 8, m.Causal(), 0.3, bias=Load(0, H) * (J - I))
    backend("sdpa").attention(q, k, v, [slope], spec).square().sum().backward()
    found, slope.grad = slope.grad, None
    at = torch.arange(9)
    scores = q @ k.transpose(-1, -2) * 0.3 + slope[:, None, None] * (at - at[:, None])
    (scores.masked_fill(at > at[:, None], -torch.inf).softmax(-1) @ v).square().sum().backward()
    torch.testing.assert_close(found, slope.grad)

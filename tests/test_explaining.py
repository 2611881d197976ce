"""Does explain say what a compilation would do, and leave everything else alone?"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.kernels.mask import Causal
from tests.tiny import TinyAttention, tiny

IDS = torch.arange(9)[None]


def test_stateless() -> None:
    report = ca.explain(tiny(), IDS)
    assert [(site.where.module, site.spec.mask, site.kernel) for site in report.sites] == [
        ("attention.0", Causal(), "sdpa"),
        ("attention.1", Causal(), "sdpa"),
    ]
    assert report.mode == "stateless" and report.rejected == () and "+scaled_dot_product_attention" in report.diff()
    assert all(site.passed_over and site.nodes_removed > site.nodes_added > 0 for site in report.sites)


def test_the_lines_of_a_site() -> None:
    """Those of the score, the mask and the values, in their order; the projections around them stay."""
    for report in (ca.explain(tiny(), IDS), ca.explain(tiny(), paged=True)):
        for site in report.sites:
            places, codes = zip(*(re.fullmatch(r"(.*?):\d+: (.*)", line).groups() for line in site.lines), strict=True)
            assert {Path(place).name for place in places} == {"tiny.py"}
            assert [code.split(" = ")[0] for code in codes[:2]] == ["scores", "scores"] and len(codes) == 3
            assert "k.transpose" in codes[0] and "masked_fill" in codes[1] and "softmax(dim=-1) @ v" in codes[2]


def test_a_kernel_for_every_site() -> None:
    assert {site.kernel for site in ca.explain(tiny(), IDS, kernel="reference").sites} == {"reference"}


def test_what_cannot_be_read() -> None:
    class Leaking(TinyAttention):
        def forward(self, x: Tensor) -> Any:
            q, k, v = self.qkv(x).chunk(3, -1)
            seen = (q @ k.mT).softmax(-1)
            return seen @ v, seen

    report = ca.explain(Leaking(), torch.randn(1, 5, 16))
    assert report.sites == () and report.diff() == ""
    [rejected] = report.rejected
    assert "also used" in rejected.reason and "seen = (q @ k.mT).softmax(-1)" in rejected.where.source


def test_paged_needs_no_inputs() -> None:
    report = ca.explain(tiny(), paged=True)
    assert report.mode == "paged" and len(report.sites) == 2 and report.tokens
    assert "+attend_default" in report.diff()


def test_what_cannot_be_paged_is_no_error() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, ids: Tensor) -> Tensor:
            logits: Tensor = self.inner(ids)
            return logits - logits.mean(1, keepdim=True)

    report = ca.explain(Mean(), paged=True)
    assert report.sites == () and "mean" in report.rejected[0].reason
    assert "logits.mean(1, keepdim=True)" in report.rejected[0].where.source


def test_a_model_with_a_graph_break() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = TinyAttention(), TinyAttention()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            torch._dynamo.graph_break()
            result: Tensor = self.second(x)
            return result

    report = ca.explain(Broken(), torch.randn(1, 5, 16))
    assert [site.where.module for site in report.sites] == ["first", "second"]
    assert report.diff().count("+scaled_dot_product_attention") == 2


def test_nothing_to_explain() -> None:
    with pytest.raises(RuntimeError, match=r"captured no graph of this call.*torch.compiler.set_stance, @torch.compiler.disable"):
        ca.explain(torch.compiler.disable(lambda x: x), IDS)  # type: ignore[no-untyped-call]


def test_a_model_that_is_compiled_already() -> None:
    assert len(ca.explain(torch.compile(tiny(), backend="eager"), IDS).sites) == 2

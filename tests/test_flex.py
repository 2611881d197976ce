"""Which calls of flex_attention are spelled out, and is every other left as it was, with the reason?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

from compile_attn.kernels.mask import Causal, Chunked, Mask
from compile_attn.passes.pipeline import Rewriting, rewrite_stateless
from tests.capture import Call

B, H, T, D = 2, 4, 9, 8
pytestmark = [pytest.mark.filterwarnings("ignore:flex_attention called without"), pytest.mark.usefixtures("no_grad")]


def compiled(run: Callable[..., Tensor], dynamic: bool = True) -> tuple[Rewriting, bool]:
    """What became of one call, and whether Dynamo's own graph was kept. The numbers are always those of the eager call."""
    found: list[tuple[Rewriting, bool]] = []

    def backend(gm: fx.GraphModule, examples: list[Tensor]) -> Callable[..., object]:
        before = str(gm.graph)
        rewriting = rewrite_stateless(gm, examples, kernel="auto")
        found.append((rewriting, rewriting.module is gm and str(gm.graph) == before))
        return rewriting.module.forward

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(B, H, T, D, generator=generator) for _ in range(3)]
    wanted = run(*inputs)
    for x in inputs if dynamic else ():
        torch._dynamo.mark_dynamic(x, 2)
    torch.testing.assert_close(torch.compile(Call(run), backend=backend, fullgraph=True)(*inputs), wanted, atol=1e-5, rtol=1e-5)
    return found[0]


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i - j < 4


def first(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j < 3


def chunks(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i // 4 == j // 4)


def by_head(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & ((h < 2) | (i - j < 3))


def reversed_operators(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & ~(1 - h % 2 > 4 + j)


def blocks(mask: Callable[..., Tensor], q: Tensor, heads: int | None = None, size: int = 128) -> BlockMask:
    return create_block_mask(mask, None, heads, q.shape[2], q.shape[2], device="cpu", BLOCK_SIZE=size)


def masked(mask: Callable[..., Tensor], heads: int | None = None, size: int = 128) -> Callable[..., Tensor]:
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks(mask, q, heads, size))


def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = blocks(causal, q)
    return flex_attention(flex_attention(q, k, v, block_mask=mask), k, v, block_mask=mask)


@pytest.mark.parametrize(
    "run, mask",
    [
        (masked(causal), Causal()),
        (masked(causal, size=4), Causal()),
        (masked(chunks), Chunked(4)),
        (masked(by_head, heads=H), None),
        (masked(reversed_operators, heads=H), Causal()),
        (masked(or_masks(first, and_masks(causal, near))), None),
        (layers, Causal()),
    ],
    ids=["causal", "small_blocks", "chunks", "by_head", "reversed_operators", "combined", "two_layers"],
)
def test_masks_of_functions(run: Callable[..., Tensor], mask: Mask | None) -> None:
    rewriting, _ = compiled(run)
    report = rewriting.report
    assert report.sites and not report.rejected, report.rejected
    assert mask is None or {site.spec.mask == mask for site in report.sites} == {True}
    assert not any("flex" in str(node.target) or "vmap" in str(node.target) for node in rewriting.module.graph.nodes)


def other_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made = blocks(near, q, size=4)
    tables = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    lengths = (q.shape[2], q.shape[2])
    return flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=4, mask_mod=causal, seq_lengths=lengths))


def swapped_tables(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    made, other = blocks(causal, q, size=4), blocks(near, q, size=4)
    tables = (made.kv_num_blocks, other.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    lengths = (q.shape[2], q.shape[2])
    return flex_attention(q, k, v, block_mask=BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=4, mask_mod=causal, seq_lengths=lengths))


def scored(score: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: flex_attention(q, k, v, score_mod=score)


def beside_another(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention(q, k, v, block_mask=blocks(causal, q)) + (q @ k.mT).softmax(-2) @ v


OUTSIDE = create_block_mask(causal, None, None, T, T, device="cpu")


@pytest.mark.parametrize(
    "run, reason",
    [
        (other_function, "not the function that its blocks were made from"),
        (swapped_tables, "was not made by create_block_mask"),
        (lambda q, k, v: flex_attention(q, k, v, block_mask=OUTSIDE), "was not made by create_block_mask in the model"),
        (masked(by_head), "is made for 1 where the call has 4"),
        (scored(lambda s, b, h, i, j: s + s.max()), "max in score_mod_0"),
        (scored(lambda s, b, h, i, j: s.add(1.0).mul_(2.0)), "mul_ in score_mod_0"),
        (beside_another, "another axis"),
    ],
    ids=["other_function", "swapped_tables", "outside", "heads_forgotten", "reduction", "in_place", "beside_another"],
)
def test_what_is_left_as_it_was(run: Callable[..., Tensor], reason: str) -> None:
    rewriting, kept = compiled(run, dynamic="OUTSIDE" not in run.__code__.co_names)
    assert kept and rewriting.report.sites == ()
    (rejected,) = rewriting.report.rejected
    assert reason in rejected.reason and rejected.cure and rejected.where.source

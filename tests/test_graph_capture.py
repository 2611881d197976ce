"""Does a step written by hand run in a CUDA graph, and do kernels that plan on the host hear of each replay?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.kernels.backend import Backend, HostStep, Paged, PlannedSite, Request
from compile_attn.kernels.by_step import ByStep
from compile_attn.kernels.flashinfer import FlashInferBackend
from compile_attn.kernels.graph_capture import graph_capture
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from tests import fake_flashinfer
from tests.test_general import interpreted

SPEC = AttentionSpec(4, 2, 8, 8, scale=0.35)
SITE = PlannedSite(SPEC, torch.float32, torch.float32)
STEPS = [[(5, 1), (9, 1), (3, 1)], [(6, 1), (1, 1)], [(16, 1)] * 4, [(7, 1), (0, 0), (2, 1)]]


def decodes(lengths: Sequence[tuple[int, int]], page_size: int = 4, pages: int = 4) -> AttentionMetadata:
    """Each row in pages of its own, page 0 being nobody's."""
    builder = AttentionMetadataBuilder(page_size, pages)
    for row, (length, new) in enumerate(lengths):
        builder.add([1 + row * pages + page for page in range(pages)], length, new)
    return builder.build()


def paged(pools: Sequence[torch.Tensor], at: AttentionMetadata) -> Paged:
    return Paged(*pools, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)


class Heard(Backend):
    """Plans on the host, and keeps what it was told."""

    name, features = "heard", frozenset()

    def __init__(self) -> None:
        self.steps: list[HostStep] = []
        self.dropped: list[torch.Tensor] = []

    def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
        assert list(sites) == [SITE]
        self.steps.append(step)

    def drop_plans(self, block_table: torch.Tensor) -> None:
        self.dropped.append(block_table)


def test_every_replay_is_told() -> None:
    heard, buffers = Heard(), AttentionMetadata.pads(4, 4, 4, 4)
    with graph_capture(buffers, [(heard, SITE), (backend("reference"), SITE)]) as load:
        assert heard.steps == []
        for lengths in STEPS:
            at = load(decodes(lengths))
            step, padded = heard.steps[-1], [*lengths, *[(0, 0)] * (4 - len(lengths))]
            assert step.captured and step.block_table is buffers.block_table is at.block_table
            assert (step.num_tokens, step.page_size) == (4, 4)
            assert list(zip(step.seq_lens.tolist(), step.query_lens.tolist(), strict=True)) == padded == list(at.lengths or ())
            assert step.seq_lens.dtype == torch.int32 and step.seq_lens.is_contiguous() and step.seq_lens.device.type == "cpu"
            assert at.seq_lens.tolist() == [length for length, _ in padded]
        assert len(heard.steps) == len(STEPS) and not heard.dropped
    assert len(heard.dropped) == 1 and heard.dropped[0] is buffers.block_table


def test_plans_are_dropped_after_an_error() -> None:
    heard, buffers = Heard(), AttentionMetadata.pads(4, 4, 4, 4)
    with pytest.raises(RuntimeError, match="the step failed"), graph_capture(buffers, [(ByStep([heard]), SITE)]) as load:
        load(decodes(STEPS[0]))
        raise RuntimeError("the step failed")
    assert len(heard.steps) == len(heard.dropped) == 1
    ByStep([heard]).drop_plans(buffers.block_table)
    assert len(heard.dropped) == 2


def test_a_batch_that_cannot_be_planned_changes_nothing() -> None:
    heard, buffers = Heard(), AttentionMetadata.pads(4, 4, 4, 4)
    built = decodes(STEPS[0])
    unknown = AttentionMetadata.build(built.block_table, built.seq_lens, built.query_lens, 3, 4)
    with graph_capture(buffers, [(heard, SITE)]) as load:
        with pytest.raises(ValueError, match="heard plans on the host, where the batch's lengths are unknown; use Attention"):
            load(unknown)
        with pytest.raises(ValueError, match="does not fit into the buffers"):
            load(decodes([(5, 1)] * 5))
        assert heard.steps == [] and not buffers.seq_lens.any() and not buffers.block_table.any()
    with graph_capture(buffers, [(backend("reference"), SITE)]) as load:
        assert load(unknown).seq_lens.tolist() == [5, 9, 3, 0]


@interpreted
@pytest.mark.parametrize("fails", [False, True])
def test_a_library_that_plans(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's wrappers keep their buffers while the graph lives; behind it, the same table is planned for what it holds."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    run, buffers = FlashInferBackend(), AttentionMetadata.pads(4, 4, 4, 4)
    pools, q = [torch.randn(17, 4, 2, 8) for _ in range(2)], torch.randn(4, 4, 8)

    def check(at: AttentionMetadata) -> None:
        expected = backend("reference").attend(q, paged(pools, at), [], SPEC)
        torch.testing.assert_close(run.attend(q, paged(pools, at), [], SPEC), expected, atol=1e-5, rtol=0)

    try:
        with graph_capture(buffers, [(run, SITE)]) as load:
            for lengths in STEPS:
                check(load(decodes(lengths)))
            assert len(fake_flashinfer.Wrapper.made) == 1
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    check(buffers.copy_(decodes(STEPS[0])))
    kept = vars(run._paged)
    assert [kept[name] for name in ("_under_way", "_graphs", "_rooms")] == [{}, {}, {}]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["general", "flash_attn", "flashinfer", "flash_attn|flashinfer"])
def test_decoding_in_a_cuda_graph(kernel: str) -> None:
    """A decode recorded once, replayed for rows that come, grow and go."""
    spec, dtype, run = AttentionSpec(8, 2, 128, 128, scale=0.1), torch.bfloat16, backend(kernel)
    reasons = run.reasons(Request(spec, torch.device("cuda"), dtype, 16))
    if reasons:
        pytest.skip("; ".join(reasons))
    buffers = AttentionMetadata.pads(6, 6, 4, 16, "cuda")
    pools = [torch.randn(25, 16, 2, 128, dtype=dtype, device="cuda") for _ in range(2)]
    q = torch.zeros(6, 8, 128, dtype=dtype, device="cuda")

    def step(at: AttentionMetadata) -> torch.Tensor:
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        out: torch.Tensor = torch.ops.paged_attn.attend(q, *pools, *where, [], spec.encode(), kernel)
        return out

    with graph_capture(buffers, [(run, PlannedSite(spec, dtype, dtype))]) as load:
        step(load(decodes([(5, 1)], 16)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(buffers)
        for lengths in ([(5, 1), (16, 1), (1, 1), (30, 1), (0, 0), (17, 1)], [(61, 1)] * 6, [(9, 1), (33, 1)]):
            batch = decodes(lengths, 16)
            for _ in range(3):
                q.copy_(torch.randn(q.shape))
                at = load(batch)
                graph.replay()
                expected = backend("reference").attend(q.float(), paged([pool.float() for pool in pools], at), [], spec)
                torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
                assert not out[len(lengths) :].any()
                batch = batch.advance_step()

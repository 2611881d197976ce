"""Is the kernel for Hopper right on a GPU? Against the reference in float64; slots that no sequence owns are NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from compile_attn.kernels import hopper, triton_launch
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.triton_print import loads
from compile_attn.kernels.visible import bounded
from tests.oracle import SLOPE, SPECS
from tests.paged import PagedBatch, paged_batch
from tests.test_block_sparse import check_replays, hide
from tests.test_general import captured_on_gpu, close, on_gpu, paged
from tests.test_hopper import counted

__all__ = ["counted"]
Launched = list[hopper.Prepared]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("counted"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="a GPU that is no Hopper"
    ),
]
MASKS = {
    "causal": m.Causal(),
    "bidirectional": m.Bidirectional(),
    "window": m.Window(500),
    "chunks": m.Chunked(300),
    "heads alike": m.BlockSparse(64, 1, 4),
    "each head its own": m.BlockSparse(64, 2, 5, head_step=1),
    "small blocks": m.BlockSparse(16, 1, 7, head_step=1),
    "in a window": m.All(m.Window(900), m.BlockSparse(64, 1, 3)),
    "prefix": m.Prefix(200),
}
STEPS = {
    "a prompt": [(0, 2100)],
    "prompts": [(0, 700), (0, 33), (0, 1), (0, 1290)],
    "chunks": [(1000, 65), (0, 0), (37, 600), (4000, 450)],
    "mixed": [(513, 1), (0, 900), (1000, 165), (0, 0), (15, 1), (70, 3)],
}


def programs(number: int, patch: pytest.MonkeyPatch) -> None:
    """So many, which few tiles are enough for."""
    patch.setattr(triton_launch, "_device", lambda device: (227 << 10, number))
    triton_launch.forget()


def check(batch: PagedBatch, kernel: str = "general") -> torch.Tensor:
    captured = captured_on_gpu() if loads(batch.spec) else []
    found = backend(kernel).attend(batch.q, paged(batch), captured, batch.spec)
    torch.testing.assert_close(found.double(), batch.reference(captured), **close(batch.q.dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str, dtype: torch.dtype, counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(3, monkeypatch)
    spec = replace(SPECS[name], head_dim=64, head_dim_v=64)
    check(on_gpu(spec, [(0, 31), (9, 1), (0, 0), (12, 19)], dtype, pad_tokens=5))
    check(on_gpu(replace(SPECS[name], head_dim=128, head_dim_v=128), [(0, 30), (9, 22)], dtype, page_size=64))
    assert len(counted) == 2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, step: str, counted: Launched) -> None:
    kernels = ("general", "block_sparse") if bounded(MASKS[name]) else ("general",)
    for kernel in kernels:
        check(on_gpu(AttentionSpec(32, 8, 128, 128, MASKS[name], 0.09), STEPS[step], torch.bfloat16), kernel)
        check(on_gpu(AttentionSpec(32, 8, 64, 64, MASKS[name], 0.13, softcap=5.0), STEPS[step], torch.float16), kernel)
    assert len(counted) == 2 * len(kernels)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128])
def test_pages(dim: int, page_size: int, counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(7, monkeypatch)
    for dtype in (torch.float16, torch.bfloat16):
        check(on_gpu(AttentionSpec(8, 2, dim, dim, scale=0.1), [(0, 333), (129, 431), (700, 65)], dtype, page_size))
    assert len(counted) == 2


@pytest.mark.parametrize("group", [1, 2, 8, 16, 64])
def test_groups(group: int, counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(5, monkeypatch)
    bias = SLOPE * (J - I) if group < 8 else None
    check(on_gpu(AttentionSpec(2 * group, 2, 128, 128, m.Window(150), 0.1, bias=bias), [(0, 333), (129, 131)], torch.bfloat16))
    assert len(counted) == 1


def test_captured_tensors_and_sinks(counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(5, monkeypatch)
    mask = m.All(m.Window(40), m.SameDocument(0))
    spec = AttentionSpec(8, 2, 128, 128, mask, 0.1, 3.0, SLOPE * (J - I) + Load(1, H % 4, J % 9), sinks=Load(2, H % 4))
    check(on_gpu(spec, [(0, 60), (20, 44), (0, 0), (5, 50)], torch.float16))
    check(on_gpu(AttentionSpec(8, 2, 64, 64, bias=Load(1, (B + H) % 4, (I + J) % 9)), [(0, 600), (20, 444)], torch.float16))
    assert len(counted) == 2


@pytest.mark.parametrize("number", [1, 2, 131])
def test_programs(number: int, counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(number, monkeypatch)
    check(on_gpu(AttentionSpec(16, 8, 128, 128, m.Window(300), 0.1), [(0, 900), (129, 731)], torch.bfloat16))
    assert len(counted) == 1


def test_more_sequences_than_are_looked_through_at_once(counted: Launched) -> None:
    check(on_gpu(AttentionSpec(8, 4, 64, 64, scale=0.1), [(n % 7, n % 31) for n in range(600)], torch.float16))
    check(on_gpu(AttentionSpec(8, 4, 64, 64, scale=0.1), [(30, 1)] * 300 + [(0, 1800)] + [(5, 1)] * 9, torch.float16))
    assert len(counted) == 2


def test_the_same_every_time(counted: Launched) -> None:
    """Nothing depends on which warp comes first."""
    for mask in (m.Causal(), m.BlockSparse(64, 1, 16, 1)):
        batch = on_gpu(AttentionSpec(32, 8, 128, 128, mask, 0.09), [(0, 3000), (77, 1111)], torch.bfloat16)
        first = check(batch)
        for _ in range(200):
            assert torch.equal(backend("general").attend(batch.q, paged(batch), [], batch.spec), first)
    assert len(counted) == 402


def test_tensors_that_lie_otherwise(counted: Launched) -> None:
    """A slice of a joined product is described; what TMA cannot describe goes to the other kernel."""
    spec = AttentionSpec(32, 8, 128, 128, scale=0.09)
    for lengths in ([(0, 2000)], [(0, 1500), (20, 500)]):
        counted.clear()
        batch = on_gpu(spec, lengths, torch.bfloat16)
        fused = torch.zeros(batch.q.shape[0], 48, 128, dtype=torch.bfloat16, device="cuda")
        fused[:, :32] = batch.q
        check(replace(batch, q=fused[:, :32]))
        check(batch)
        assert len(counted) == 2
        shifted = torch.empty(*batch.q.shape[:2], 131, dtype=torch.bfloat16, device="cuda")[..., 3:]
        check(replace(batch, q=shifted.copy_(batch.q)))
        assert len(counted) == 2


@pytest.mark.parametrize(("heads", "dims"), [((8, 2), (80, 80)), ((12, 4), (64, 64)), ((8, 2), (192, 128))], ids=str)
def test_what_it_has_no_tiles_for(
    heads: tuple[int, int], dims: tuple[int, int], counted: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(3, monkeypatch)
    check(on_gpu(AttentionSpec(*heads, *dims), [(0, 300)], torch.bfloat16))
    check(on_gpu(AttentionSpec(8, 2, 64, 64), [(0, 300)], torch.bfloat16, page_size=24))
    check(on_gpu(AttentionSpec(8, 2, 64, 64), [(0, 300)], torch.float32))
    assert not counted


def test_what_no_query_sees_is_never_used(counted: Launched, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(3, monkeypatch)
    for name in ("heads alike", "each head its own"):
        batch = paged_batch(AttentionSpec(8, 2, 128, 128, MASKS[name], 0.09), [(1984, 64)], page_size=64, dtype=torch.bfloat16)
        assert hide(batch) > 10
        at = batch.metadata
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        kv = Paged(*(each.cuda() for each in (batch.k_pages, batch.v_pages, *where)))
        assert backend("block_sparse").attend(batch.q.cuda(), kv, [], batch.spec).isfinite().all()
    assert len(counted) == 2


@pytest.mark.parametrize("lengths", [[(0, 900), (300, 1100)], [(9, 1), (0, 1640), (0, 0), (330, 60)]], ids=["prompts", "mixed"])
def test_a_cuda_graph_holds_any_lengths(lengths: Sequence[tuple[int, int]], counted: Launched) -> None:
    """Recorded with one batch, replayed with other lengths, and other numbers of tokens each, in the same buffers."""
    spec = AttentionSpec(32, 8, 128, 128, MASKS["heads alike"], 0.09)
    longer = [(context + 40 * row, new) for row, (context, new) in enumerate(lengths)]
    orders = [[*longer, (1200, 100)], [*lengths[1:], lengths[0], (300, 100)]]
    batches = [on_gpu(spec, each, torch.bfloat16) for each in orders]
    check_replays(spec, batches, [check(batch, "block_sparse") for batch in batches])
    assert len(counted) == 3

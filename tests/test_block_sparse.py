"""Is attention over some blocks of keys right, and are the others never read?

In Triton's interpreter against float64 loops; on a GPU against the reference in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_attn.kernels import mask as m
from compile_attn.kernels import tiles, triton_launch
from compile_attn.kernels.backend import Paged, Request
from compile_attn.kernels.block_sparse import CUTS, FOR_MANY, MANY, BlocksparseFlashAttentionBackend
from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.select import UnsupportedError, backend, choose
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.visible import unit_of
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from tests.oracle import CAPTURED, SLOPE, attend_row
from tests.paged import PagedBatch, paged_batch
from tests.test_general import (
    CPU,
    CUDA,
    NO_TRITON,
    captured_on_gpu,
    close,
    compile_for_an_h200,
    fp8,
    interpreted,
    on_gpu,
    paged,
    stateless,
)
from tests.test_reference import FLOAT32
from tests.tiny import alone, prompts_of, tiny

MASKS = {
    "heads alike": m.BlockSparse(16, 1, 3),
    "each head its own": m.BlockSparse(16, 2, 4, head_step=1),
    "larger blocks": m.BlockSparse(32, 1, 2, head_step=1),
    "blocks of any size": m.BlockSparse(5, 1, 3, head_step=2),
    "no local block": m.BlockSparse(16, 0, 2),
    "in a window": m.All(m.Window(40), m.BlockSparse(16, 1, 3)),
    "window": m.Window(20),
    "chunks": m.Chunked(24),
    "prefix": m.Prefix(20),
    "sinks and window": m.All(m.Causal(), m.General((J < 3) | (I - J < 18))),
    "dilated": m.All(m.Causal(), m.General(sympy.Eq(sympy.Mod(sympy.floor(I / 16) - sympy.floor(J / 16), 3), 0))),
    "one of two": m.Any(m.Window(9), m.Chunked(20)),
    "documents": m.All(m.Causal(), m.SameDocument(0)),
}
DECODE = [(62, 1), (33, 1), (0, 1), (0, 0), (47, 1)]
MIXED = [(0, 37), (29, 1), (0, 0), (16, 20), (31, 33)]


def spec_of(name: str, heads: int = 4, kv_heads: int = 2, **more: object) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, 16, 16, MASKS[name], scale=0.3, **more)  # type: ignore[arg-type]


@interpreted
@pytest.mark.parametrize("sequences", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("name", MASKS)
def test_paged_equals_oracle(name: str, sequences: list[tuple[int, int]]) -> None:
    batch = paged_batch(spec_of(name), sequences, page_size=16, pad_tokens=2)
    torch.testing.assert_close(batch.attend(CAPTURED, "block_sparse").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("name", MASKS)
def test_stateless_equals_oracle(name: str) -> None:
    spec = spec_of(name)
    q, k, v = stateless(spec, 61, 61)
    out = torch.ops.paged_attn.attention(q, k, v, list(CAPTURED), spec.encode(), "block_sparse")
    for b, i in ((0, 0), (0, 31), (0, 60), (1, 16), (1, 47)):
        expected = attend_row(spec, q[b, :, i], k[b].transpose(0, 1), v[b].transpose(0, 1), b, i, CAPTURED)
        torch.testing.assert_close(out[b, :, i].double(), expected, atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(4, 4, 32), (4, 1, 3), (6, 2, 3), (6, 2, 32)])
def test_groups_and_page_sizes(heads: int, kv_heads: int, page_size: int) -> None:
    for sequences in (DECODE, MIXED):
        spec = spec_of("each head its own", heads, kv_heads, softcap=2.0, bias=SLOPE * (J - I), sinks=Load(2, H % 4))
        batch = paged_batch(spec, sequences, page_size=page_size)
        torch.testing.assert_close(batch.attend(CAPTURED, "block_sparse").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
def test_visible_blocks_shared_by_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_KEYS_A_PROGRAM", 16)
    monkeypatch.setattr(tiles, "_KEYS_ALONE", 0)
    triton_launch.forget()
    for name in ("heads alike", "each head its own", "sinks and window"):
        batch = paged_batch(spec_of(name), [(150, 1), (97, 2), (1, 1)], page_size=16, pad_tokens=1)
        torch.testing.assert_close(batch.attend([], "block_sparse").double(), batch.expected([]), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("heads alike", 64),
        ("each head its own", 80),
        ("each head its own", 136),
        ("larger blocks", 136),
        ("in a window", 80),
        ("sinks and window", 64),
    ],
)
def test_tiles_of_16_bits(name: str, dim: int) -> None:
    """The tiles of a GPU: those of float32 are smaller. Several of each sequence, and of them some with no key to see."""
    spec = AttentionSpec(4, 2, dim, dim, MASKS[name], scale=0.1, softcap=3.0)
    batch = paged_batch(spec, [(0, 150), (70, 1), (0, 0), (61, 140)], page_size=16, pad_tokens=3, dtype=torch.float16)
    unit = torch.finfo(torch.float16).eps
    found = batch.attend([], "block_sparse")
    torch.testing.assert_close(found.double(), batch.expected([]), atol=unit, rtol=unit)


@interpreted
@settings(max_examples=20, deadline=None)
@given(
    mask=st.builds(m.BlockSparse, st.sampled_from([16, 32, 48, 7]), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2))
    | st.builds(lambda window, size: m.All(m.Window(window), m.BlockSparse(16, 1, size)), st.integers(0, 90), st.integers(2, 4))
    | st.builds(lambda size, window: m.Any(m.Chunked(size), m.Window(window)), st.integers(8, 50), st.integers(0, 30)),
    sequences=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 40)), min_size=1, max_size=4),
    softcap=st.sampled_from([None, 2.0]),
    bias=st.sampled_from([None, SLOPE * (J - I)]),
    programs=st.sampled_from([0, 2]),
)
def test_any_blocks_in_one_loop(
    mask: m.Mask, sequences: list[tuple[int, int]], softcap: float | None, bias: sympy.Expr | None, programs: int
) -> None:
    """Whether a program has all blocks of a tile, or shares of several."""
    spec = AttentionSpec(4, 2, 16, 16, mask, 0.3, softcap, bias, sinks=Load(2, H % 4))
    batch = paged_batch(spec, sequences, page_size=16, pad_tokens=1)
    at = batch.metadata
    kv = Paged(batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    with pytest.MonkeyPatch.context() as patch:
        if programs:
            patch.setattr(tiles, "_KEYS_ALONE", 0)
            patch.setattr(tiles, "_KEYS_A_PROGRAM", 16)
            patch.setattr(tiles, "_KEYS_A_SPLIT", 32)
        triton_launch.forget()
        found, expected = (backend(name).attend(batch.q, kv, CAPTURED, spec) for name in ("block_sparse", "reference"))
    triton_launch.forget()
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


def hide(batch: PagedBatch) -> int:
    """NaN in every page, of the size of a block, that no new token sees through any head of a KV head; how many there are."""
    spec, at = batch.spec, batch.metadata
    group, size, found = spec.num_q_heads // spec.num_kv_heads, batch.k_pages.shape[1], 0
    visible = evaluator(spec.mask.predicate())
    for row, (length, new) in enumerate(zip(at.seq_lens.tolist(), at.query_lens.tolist(), strict=True)):
        pages = -(-length // size)
        for head in range(spec.num_kv_heads):
            heads = torch.arange(head * group, (head + 1) * group)[:, None, None]
            axes = {"h": heads, "i": torch.arange(length - new, length)[:, None], "j": torch.arange(pages * size)}
            seen = visible(axes).expand(group, new, -1).reshape(group * new, pages, size).any(2).any(0)
            for page in at.block_table[row, :pages][~seen].tolist():
                batch.k_pages[page, :, head] = batch.v_pages[page, :, head] = torch.nan
                found += 1
    return found


@interpreted
@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(
    "name", ["heads alike", "each head its own", "in a window", "window", "chunks", "sinks and window", "dilated"]
)
def test_what_no_query_sees_is_never_read(name: str) -> None:
    """NaN there would spread through 0 * NaN. New tokens of one block, so that their tile sees what they see."""
    cells = unit_of(MASKS[name]) or 32  # where the mask has none, blocks of float32 keys have 32
    batch = paged_batch(spec_of(name), [(230, 1), (160, 16), (171, 1)], page_size=cells)
    expected = batch.attend([], "block_sparse")
    assert hide(batch) > 10
    assert torch.equal(batch.attend([], "block_sparse"), expected)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_pages_with_scales(dtype: torch.dtype) -> None:
    batch = paged_batch(spec_of("each head its own"), [(40, 2), (50, 1)], page_size=16)
    scales = torch.tensor(0.02), torch.tensor([0.03, 0.01])
    found, expected = (fp8(batch, dtype, *scales, kernel) for kernel in ("block_sparse", "reference"))
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)


@interpreted
def test_a_model_generates_through_it() -> None:
    check_generation("cpu")


def check_generation(device: str) -> None:
    prompts = prompts_of([5, 23, 1])
    with PagedLM(
        tiny().to(device), kv_tokens=256, page_size=4, max_seqs=2, kernel="block_sparse", inner="eager", poison=True
    ) as lm:
        found = lm.generate(prompts, max_new_tokens=5)
        assert {site.kernel for site in lm.report.sites} == {"block_sparse"}
    assert found == [alone(tiny(), prompt, Sampling(max_new_tokens=5)) for prompt in prompts]


# When may it be chosen, and with which tiles?


def test_tiles_follow_the_mask() -> None:
    def sizes(mask: m.Mask, tokens: int) -> tuple[int, int, int]:
        found = BlocksparseFlashAttentionBackend().tiles(AttentionSpec(32, 8, 128, 128, mask), torch.bfloat16, tokens, 227 << 10, 0)
        return found.group, found.block_q, found.block_n

    assert sizes(m.BlockSparse(64, 1, 16), 1) == sizes(m.BlockSparse(64, 1, 16, 1), 1) == (4, 1, 64)
    rows, keys = CUTS[128, False][:2]
    assert sizes(m.BlockSparse(64, 1, 16), 4096) == (4, rows // 4, keys)
    rows, keys = CUTS[128, True][:2]
    assert sizes(m.BlockSparse(64, 1, 16, 1), 4096) == (1, rows, keys)
    assert [sizes(m.BlockSparse(size, 1, 16), 1)[2] for size in (16, 32, 48, 96, 128, 5)] == [16, 32, 16, 32, 64, 64]
    assert sizes(m.BlockSparse(16, 1, 16), 4096)[2] == 16
    rows, keys = FOR_MANY[128][:2]
    assert sizes(m.BlockSparse(64, 1, 16), 16 * MANY) == (4, rows // 4, keys)
    assert sizes(m.BlockSparse(64, 1, 2, 1), 2 * MANY) == (1, rows, keys)
    by_row = m.All(m.Causal(), m.General(sympy.Eq(sympy.Mod(sympy.floor(I / 64) - sympy.floor(J / 64) + H, 4), 0)))
    assert sizes(by_row, 4096) == (1, 64, 64)  # twice the tokens would see twice the cells, each row half of them


@pytest.mark.parametrize("shared", [48 << 10, 64 << 10, 90 << 10, 99 << 10, 227 << 10])
def test_tiles_fit_what_shared_memory_there_is(shared: int) -> None:
    for dim, step, tokens in ((64, 0, 4096), (128, 0, 4096), (128, 1, 4096), (256, 1, 4096), (128, 1, 1)):
        spec = AttentionSpec(32, 8, dim, dim, m.BlockSparse(64, 1, 16, step))
        found = BlocksparseFlashAttentionBackend().tiles(spec, torch.bfloat16, tokens, shared, 0)
        assert (found.block_m + 2 * found.stages * found.block_n) * dim * 2 <= shared


def test_one_loop_unless_keys_have_captured_tensors() -> None:
    def together(spec: AttentionSpec, tokens: int) -> bool:
        return BlocksparseFlashAttentionBackend().tiles(spec, torch.bfloat16, tokens, 227 << 10, 0).together

    for tokens in (1, 4096):
        assert together(spec_of("in a window", sinks=Load(2, H % 4)), tokens)
        assert not together(spec_of("in a window", bias=Load(1, H, J % 9)), tokens)
        assert not together(spec_of("documents"), tokens)


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = backend("block_sparse")
    for name, mask in MASKS.items():
        assert sparse.reasons(Request(spec_of(name), CUDA, torch.bfloat16, 16)) == (), mask
    for mask in (m.Bidirectional(), m.SameDocument(0), m.General(sympy.Ne(Load(3, B, J), 0))):
        (reason,) = sparse.reasons(Request(AttentionSpec(4, 2, 16, 16, mask), CUDA, torch.bfloat16, 16))
        assert reason == f"finds no blocks of keys to skip in the mask '{mask.words()}'; choose kernel='auto'"
    with pytest.raises(UnsupportedError, match="finds no blocks of keys to skip in the mask 'bidirectional'"):
        choose(AttentionSpec(4, 2, 16, 16, m.Bidirectional()), CUDA, torch.bfloat16, 16, "block_sparse")
    assert (
        "computes in bfloat16, float16, float32, not in float64"
        in sparse.reasons(Request(spec_of("window"), CUDA, torch.float64, 16))[0]
    )
    assert choose(AttentionSpec(4, 2, 16, 16, m.BlockSparse(64, 1, 8)), CUDA, torch.bfloat16, 16).kernel == "block_sparse"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (reason,) = sparse.reasons(Request(spec_of("window"), CPU, torch.float32, 16))
    assert reason.startswith("runs on a CPU only in Triton's interpreter")
    assert choose(spec_of("heads alike"), CUDA, torch.bfloat16, 16, "block_sparse").kernel == "block_sparse"


@pytest.mark.skipif(NO_TRITON, reason="there is no Triton for this platform")
@pytest.mark.parametrize(
    "cases",
    [
        ("block sparse", "sparse decode"),
        pytest.param(
            ("sparse, heads alike", "sparse, small heads", "sparse, fp8 pages", "sparse, float32"), marks=pytest.mark.every_form
        ),
        pytest.param(
            ("sparse, many blocks", "long window", "sparse with a bias", "sparse, large heads", "sparse, two head sizes"),
            marks=pytest.mark.every_form,
        ),
    ],
    ids=str,
)
def test_compiles_for_an_h200(cases: tuple[str, ...], tmp_path: Path) -> None:
    compile_for_an_h200(tmp_path, *cases)


# On a GPU, against the reference in float64.

SPARSE = {
    "heads alike": m.BlockSparse(64, 2, 5),
    "each head its own": m.BlockSparse(64, 1, 8, head_step=1),
    "small blocks": m.BlockSparse(16, 3, 7, head_step=2),
    "large blocks": m.BlockSparse(128, 1, 4, head_step=1),
    "in a window": m.All(m.Window(900), m.BlockSparse(64, 1, 3)),
    "sinks and window": m.All(m.Causal(), m.General((J < 4) | (I - J < 300))),
    "dilated": m.All(m.Causal(), m.General(sympy.Eq(sympy.Mod(sympy.floor(I / 64) - sympy.floor(J / 64), 4), 0))),
    "prefix": m.Prefix(200),
}
PHASES = {
    "decode": [(1000, 1), (36, 1), (4095, 1), (0, 1), (0, 0)],
    "mixed": [(513, 1), (0, 300), (1000, 165), (0, 0), (15, 1)],
}


def check_on_gpu(batch: PagedBatch) -> None:
    captured = captured_on_gpu()
    found = backend("block_sparse").attend(batch.q, paged(batch), captured, batch.spec)
    torch.testing.assert_close(found.double(), batch.reference(captured), **close(batch.q.dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SPARSE)
def test_masks_on_a_gpu(name: str, phase: str) -> None:
    for pads in (3, 0):  # with a token more than sequences, single tokens have a launch of their own
        batch = on_gpu(AttentionSpec(8, 2, 128, 128, SPARSE[name], 0.09), PHASES[phase], torch.bfloat16, pad_tokens=pads)
        check_on_gpu(batch)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (192, 128), (72, 72), (40, 24)], ids=str)
@pytest.mark.parametrize("name", ["heads alike", "each head its own"])
def test_head_sizes_on_a_gpu(name: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    spec = AttentionSpec(6, 2, *dims, SPARSE[name], 0.09, 30.0, sinks=Load(2, H % 4))
    check_on_gpu(on_gpu(spec, PHASES["mixed"], dtype, page_size=48))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["heads alike", "each head its own"])
def test_long_context_on_a_gpu(name: str) -> None:
    for sequences in ([(32767, 1), (20000, 1)], [(32640, 128)]):
        check_on_gpu(on_gpu(AttentionSpec(8, 2, 128, 128, SPARSE[name], 0.09), sequences, torch.bfloat16, page_size=256))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_pages_on_a_gpu(dtype: torch.dtype) -> None:
    for sequences in PHASES.values():
        batch = on_gpu(AttentionSpec(8, 2, 128, 128, SPARSE["each head its own"], 0.09), sequences, torch.bfloat16)
        scales = torch.tensor(0.02, device="cuda"), torch.tensor([0.03, 0.01], device="cuda")
        found, expected = (fp8(batch, dtype, *scales, kernel) for kernel in ("block_sparse", "reference"))
        torch.testing.assert_close(found, expected, **close(torch.bfloat16))


@pytest.mark.gpu
def test_what_no_query_sees_is_never_read_on_a_gpu() -> None:
    for name in ("heads alike", "each head its own"):
        batch = paged_batch(
            AttentionSpec(8, 2, 128, 128, SPARSE[name], 0.09), [(3000, 1), (1984, 64)], page_size=64, dtype=torch.bfloat16
        )
        at = batch.metadata
        assert hide(batch) > 20
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        kv = Paged(*(each.cuda() for each in (batch.k_pages, batch.v_pages, *where)))
        assert backend("block_sparse").attend(batch.q.cuda(), kv, [], batch.spec).isfinite().all()


@pytest.mark.gpu
def test_a_model_generates_through_it_on_a_gpu() -> None:
    check_generation("cuda")


def check_replays(spec: AttentionSpec, batches: Sequence[PagedBatch], expected: Sequence[torch.Tensor]) -> None:
    """One graph, recorded with the first batch, which is the largest; then it holds the second and the first."""
    first = paged(batches[0])
    static = Paged(*(None if value is None else value.clone() for value in first))
    q, run = batches[0].q.clone(), backend("block_sparse")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run.attend(q, static, [], spec)
    for turn in (1, 0, 1):
        q.copy_(batches[turn].q)
        for name, value in paged(batches[turn])._asdict().items():
            if value is not None:
                buffer = getattr(static, name)
                buffer[tuple(slice(0, size) for size in value.shape)] = value
        graph.replay()
        torch.testing.assert_close(out, expected[turn], **close(torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[(9, 1), (700, 1), (0, 1), (33, 1)], [(0, 40), (7, 1), (0, 0), (300, 20)]], ids=["decode", "mixed"]
)
def test_a_cuda_graph_holds_any_lengths(lengths: Sequence[tuple[int, int]]) -> None:
    """Recorded with one batch, replayed with other lengths in the same buffers."""
    spec = AttentionSpec(8, 2, 128, 128, SPARSE["each head its own"], 0.09)
    longer = [(context + 40 * row, new) for row, (context, new) in enumerate(lengths)]
    batches = [on_gpu(spec, [*each, (1200, 1)], torch.bfloat16) for each in (longer, lengths)]  # the first has the most pages
    run = backend("block_sparse")
    check_replays(spec, batches, [run.attend(batch.q, paged(batch), [], spec) for batch in batches])

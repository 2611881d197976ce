"""Does the FlashInfer backend ask the library for the right thing? On a CPU, with tests/fake_flashinfer.py in its place.

The library itself runs in tests/test_flashinfer_gpu.py.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import random
import sys
import types
from importlib import metadata

import pytest
import sympy
import torch

from compile_attn.kernels import flashinfer as fi
from compile_attn.kernels import flashinfer_plans as plans
from compile_attn.kernels import mask as m
from compile_attn.kernels import measured, speeds
from compile_attn.kernels.backend import HostStep, Paged, PlannedSite, Request
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.expr import H, I, J, Load, S
from compile_attn.kernels.select import UnsupportedError, backend, choose
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.lm import PagedLM
from tests import fake_flashinfer
from tests.fake_flashinfer import Wrapper
from tests.oracle import CAPTURED, attend_row
from tests.paged import PagedBatch, paged_batch
from tests.test_fuzz import play
from tests.test_general import interpreted, stateless
from tests.test_reference import FLOAT32, MIXED
from tests.tiny import as_on_a_gpu, tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLOPE = 2 ** (-2 * (H + 1))  # the standard slopes of 4 heads
DECODE = [(5, 1), (0, 0), (3, 1), (0, 1), (11, 1)]  # a row without tokens among them
SPECS = {
    "causal": AttentionSpec(4, 4, 8, 8, scale=0.35),
    "gqa": AttentionSpec(8, 2, 8, 8, scale=0.35),
    "one head": AttentionSpec(1, 1, 8, 8, scale=0.35),
    "window": AttentionSpec(4, 2, 8, 8, m.Window(4), scale=0.35),
    "no window": AttentionSpec(4, 2, 8, 8, m.Window(0), scale=0.35),
    "bidirectional": AttentionSpec(4, 2, 8, 8, m.Bidirectional(), scale=0.35),
    "softcap": AttentionSpec(4, 2, 8, 8, m.Window(6), scale=0.9, softcap=1.5),
    "alibi": AttentionSpec(4, 4, 8, 8, scale=0.35, bias=SLOPE * (J - I)),
    "sinks": AttentionSpec(4, 2, 8, 8, m.Window(5), scale=0.35, sinks=Load(2, H)),
    "sinks of an expression": AttentionSpec(4, 2, 8, 8, scale=0.35, sinks=0.25 * H + 0.1),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> fi.FlashInferBackend:
    """A fresh backend on the fake library."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    variants = types.ModuleType("flashinfer.jit.attention.variants")
    variants.attention_sink_decl = {"fa2": "struct AttentionSink"}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer.jit.attention.variants", variants)
    return fi.FlashInferBackend()


def paged(batch: PagedBatch, **changed: torch.Tensor) -> Paged:
    at = batch.metadata
    parts = {
        "k_pages": batch.k_pages,
        "v_pages": batch.v_pages,
        "block_table": at.block_table,
        "seq_lens": at.seq_lens,
        "cu_seqlens_q": at.cu_seqlens_q,
        "positions": at.positions,
        "token_seq": at.token_seq,
    }
    return Paged(**parts | changed)


def host(batch: PagedBatch, captured: bool = False) -> HostStep:
    at = batch.metadata
    lengths = at.seq_lens.cpu(), at.query_lens.cpu()
    return HostStep(at.block_table, *lengths, batch.q.shape[0], batch.k_pages.shape[1], captured)


def site(spec: AttentionSpec, dtype: torch.dtype = torch.float32) -> PlannedSite:
    return PlannedSite(spec, dtype, dtype)


def check(run: fi.FlashInferBackend, batch: PagedBatch, spec: AttentionSpec | None = None) -> None:
    """Lengths on the device are of no use: all that is known of them was said by plan_on_host."""
    batch.spec = spec or batch.spec
    nothing = torch.full_like(batch.metadata.seq_lens, -99)
    found = run.attend(batch.q, paged(batch, seq_lens=nothing), CAPTURED, batch.spec)
    torch.testing.assert_close(found.double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


# Paged calls.


@interpreted
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("name", SPECS)
def test_a_direct_call_plans_on_the_spot(
    run: fi.FlashInferBackend, name: str, sequences: list[tuple[int, int]], page_size: int
) -> None:
    batch = paged_batch(SPECS[name], sequences, pad_tokens=3, page_size=page_size)
    found = run.attend(batch.q, paged(batch), CAPTURED, batch.spec)
    torch.testing.assert_close(found.double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sequences", [MIXED, DECODE, [(0, 2), (0, 0)], [(3, 1), (0, 1)]], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_a_planned_step_reads_no_lengths(
    run: fi.FlashInferBackend, name: str, sequences: list[tuple[int, int]], captured: bool
) -> None:
    pad_tokens = len(sequences) - sum(new for _, new in sequences) if sequences is DECODE else 0
    batch = paged_batch(SPECS[name], sequences, pad_tokens=pad_tokens)
    run.plan_on_host(host(batch, captured), [site(batch.spec)])
    check(run, batch)
    assert len(Wrapper.made) == 1 and len(Wrapper.made[0].plans) == 1


@interpreted
def test_one_plan_for_each_distinct_problem(run: fi.FlashInferBackend) -> None:
    """Sinks are read when they are used: two sites that differ only in which they read share a plan."""
    sinks = [AttentionSpec(4, 2, 8, 8, scale=0.35, sinks=each) for each in (Load(2, H), 0.25 * H + 0.1)]
    specs = [SPECS["window"], SPECS["no window"], SPECS["softcap"], *sinks]
    batch = paged_batch(SPECS["window"], MIXED, pad_tokens=1)
    for step in range(3):
        run.plan_on_host(host(batch), [site(each) for each in specs])
        for spec in [*specs, *specs]:
            check(run, batch, spec)
        assert len(Wrapper.made) == 2 * 4  # rows of several tokens, and pads
        assert [len(each.plans) for each in Wrapper.made] == [step + 1] * 8


@interpreted
def test_prompts_and_decodes_have_kernels_of_their_own(run: fi.FlashInferBackend) -> None:
    batch = paged_batch(SPECS["gqa"], [(0, 5), (3, 1), (4, 9), (7, 1), (0, 0), (12, 1)], pad_tokens=2)
    run.plan_on_host(host(batch), [site(batch.spec)])
    check(run, batch)
    prompts, decodes = Wrapper.made
    assert prompts.arrays["qo_indptr"].tolist() == [0, 5, 6, 15] and prompts.arrays["last_page_len"].tolist() == [1, 4, 1]
    assert decodes.arrays["kv_indptr"].tolist() == [0, 2, 6, 7, 8] and decodes.arrays["last_page_len"].tolist() == [4, 1, 0, 0]


@interpreted
def test_what_the_library_is_told(run: fi.FlashInferBackend) -> None:
    spec = AttentionSpec(8, 2, 64, 64, m.Window(4), scale=0.5, softcap=30.0)
    batch = paged_batch(spec, [(5, 1), (8, 1)], page_size=16, dtype=torch.bfloat16)
    run.plan_on_host(host(batch), [site(spec, torch.bfloat16)])
    batch = paged_batch(AttentionSpec(2, 2, 64, 64), [(5, 1), (8, 1)])
    run.plan_on_host(host(batch), [site(batch.spec, torch.float16)])
    batch = paged_batch(SPECS["sinks"], [(5, 1), (8, 7)])
    run.plan_on_host(host(batch), [site(batch.spec, torch.bfloat16)])
    tensor_cores, cuda_cores, sinks = Wrapper.made
    assert tensor_cores.options == {"use_tensor_cores": True} and tensor_cores.backend == "fa2"
    assert tensor_cores.plans == [
        {
            "sizes": (8, 2, 64, 16),
            "pos_encoding_mode": "NONE",
            "sm_scale": 0.5,
            "window_left": 4,
            "logits_soft_cap": 30.0,
            "q_data_type": torch.bfloat16,
            "kv_data_type": torch.bfloat16,
        }
    ]
    assert cuda_cores.options == {"use_tensor_cores": False} and cuda_cores.plans[0]["window_left"] == -1
    assert sinks.plans[0]["causal"] and sinks.plans[0]["uniform_q_len"] is None
    uri, *dtypes = sinks.options["jit_args"][:5]
    assert uri == "paged_attn_sink_bf16_bf16_8_swa_True" and dtypes == [torch.bfloat16] * 3 + [torch.int32]
    assert sinks.options["jit_kwargs"]["use_sliding_window"] is True


@pytest.mark.parametrize(
    ("heads", "dim", "more", "rows", "longest", "kernel"),
    [
        ((8, 8), 128, {}, 8, 99_999, "cuda cores"),
        ((8, 8), 128, {"mask": m.Window(9)}, 8, 99, "tensor cores"),
        ((32, 8), 128, {}, 128, 128, "cuda cores"),
        ((32, 8), 128, {}, 127, 128, "tensor cores"),
        ((32, 8), 128, {}, 128, 1024, "tensor cores"),
        ((32, 8), 64, {}, 2, 1024, "cuda cores"),
        ((32, 8), 64, {}, 32, 1024, "tensor cores"),
        ((32, 8), 64, {}, 32, 256, "cuda cores"),
        ((32, 8), 256, {}, 512, 16, "tensor cores"),
        ((64, 8), 64, {}, 2, 16, "tensor cores"),
        ((32, 8), 64, {"sinks": Load(0, H)}, 2, 16, "fa2"),
    ],
)
def test_the_kernel_for_decodes(
    heads: tuple[int, int], dim: int, more: dict[str, object], rows: int, longest: int, kernel: str
) -> None:
    spec = AttentionSpec(*heads, dim, dim, **more)  # type: ignore[arg-type]
    assert plans.Problem.of(spec, torch.bfloat16, torch.bfloat16, 16).for_single(rows, longest) == kernel
    assert plans.Problem.of(spec, torch.bfloat16, torch.float8_e5m2, 16).for_single(rows, longest) != "cuda cores"


@interpreted
@pytest.mark.parametrize(("pages", "cores"), [(16, False), (17, True)], ids=["256 tokens", "257 tokens"])
def test_short_tables_say_that_there_is_little_to_read(run: fi.FlashInferBackend, pages: int, cores: bool) -> None:
    """As a cache makes them for a graph, which holds the kernel for all lengths that fit."""
    table = torch.zeros((17, table_width(pages, 16)), dtype=torch.int32)
    lengths = torch.full((17,), 9, dtype=torch.int32), torch.ones(17, dtype=torch.int32)
    run.plan_on_host(HostStep(table, *lengths, 17, 16, True), [site(AttentionSpec(32, 8, 64, 64), torch.bfloat16)])
    assert [made.options["use_tensor_cores"] for made in Wrapper.made] == [cores]


class MissingJITCacheError(RuntimeError):
    pass


@interpreted
def test_without_fa3_prompts_take_fa2(monkeypatch: pytest.MonkeyPatch, run: fi.FlashInferBackend) -> None:
    """Where the library may not compile. Of other kernels it is an error."""
    monkeypatch.setattr(plans, "capability", lambda device: (9, 0))
    monkeypatch.setattr(plans, "_LONG", 4)
    monkeypatch.setattr(plans, "_without_fa3", set())
    taken = Wrapper.take

    def take(self: Wrapper, *given: object) -> None:
        if self.backend == "fa3":
            raise MissingJITCacheError("the required module is not found in the JIT cache")
        taken(self, *given)  # type: ignore[arg-type]

    batch = paged_batch(SPECS["gqa"], [(0, 7), (9, 8)])
    run.plan_on_host(host(batch), [site(batch.spec)])
    check(run, batch)
    assert [each.backend for each in Wrapper.made] == ["fa3"]
    monkeypatch.setattr(Wrapper, "take", take)
    with pytest.warns(UserWarning, match="flashinfer has no FA3 kernel for head size 8 in torch.float32 and may not compile one"):
        run.plan_on_host(host(batch), [site(batch.spec)])
    check(run, batch)
    run.plan_on_host(host(batch), [site(batch.spec)])
    assert [each.backend for each in Wrapper.made] == ["fa3", "fa2"]
    monkeypatch.setattr(Wrapper, "take", lambda self, *given: (_ for _ in ()).throw(MissingJITCacheError("for fa2")))
    with pytest.raises(MissingJITCacheError, match="for fa2"):
        run.plan_on_host(host(batch), [site(batch.spec)])


# Steps of a CUDA graph: fixed addresses, other lengths.


@interpreted
@pytest.mark.parametrize("name", ["causal", "gqa", "window", "sinks"])
def test_steps_of_a_graph_share_buffers(run: fi.FlashInferBackend, name: str) -> None:
    """Rows join, grow over a page's end, and leave; what the kernel reads stays where it was."""
    spec, places = SPECS[name], set()
    specs = spec, dataclasses.replace(spec, mask=m.Window(2))
    table = paged_batch(spec, [(9, 1)] * 3).metadata.block_table
    steps: list[list[tuple[int, int]]] = [
        [(5, 1), (0, 0), (3, 1)],  # 2 pages and 1, and a pad row
        [(7, 1), (2, 1), (0, 0)],  # as many pages, of other rows: the plan is right as it is
        [(6, 1), (0, 0), (4, 1)],
        [(8, 1), (3, 1), (0, 0)],
        [(9, 1), (0, 1), (4, 1)],
        [(0, 0)] * 3,
    ]
    for sequences in steps:
        batch = paged_batch(spec, sequences, pad_tokens=sum(new == 0 for _, new in sequences))
        table.zero_()[:, : batch.metadata.block_table.shape[1]] = batch.metadata.block_table
        object.__setattr__(batch.metadata, "block_table", table)
        run.plan_on_host(host(batch, captured=True), [site(each) for each in specs])
        for each in (*specs, spec):
            check(run, batch, each)
        assert len(Wrapper.made) == 2
        places |= {tuple(each.data_ptr() for each in wrapper.arrays.values()) for wrapper in Wrapper.made}
    assert len(places) == 1
    for wrapper in Wrapper.made:
        assert len(wrapper.plans) == 5
        assert len(set(wrapper.pinned[::2])) == len(set(wrapper.pinned[1::2])) == 1 and wrapper.pinned[0] != wrapper.pinned[1]


@interpreted
def test_shapes_and_tables_have_graphs_of_their_own(run: fi.FlashInferBackend) -> None:
    batches = [paged_batch(SPECS["gqa"], [(5, 1)] * rows) for rows in (2, 4, 4)]
    for _ in range(2):
        for batch in batches:
            run.plan_on_host(host(batch, captured=True), [site(batch.spec)])
            check(run, batch)
    assert len(Wrapper.made) == 3 and all(len(each.plans) == 1 for each in Wrapper.made)


@interpreted
def test_graphs_of_one_table_share_room(run: fi.FlashInferBackend) -> None:
    """A cache's graphs of 2, 3 and 5 rows see the first rows of one table."""
    batches = [paged_batch(SPECS["gqa"], [(5 + rows, 1)] * rows) for rows in (2, 5, 3)]
    tables, whole = [batch.metadata.block_table for batch in batches], torch.zeros((5, 6), dtype=torch.int32)
    for batch, table in [*zip(batches, tables, strict=True)] * 2:
        whole[: table.shape[0], : table.shape[1]] = table
        object.__setattr__(batch.metadata, "block_table", whole[: table.shape[0]])  # a view for this call
        run.plan_on_host(host(batch, captured=True), [site(batch.spec)])
        object.__setattr__(batch.metadata, "block_table", whole[: table.shape[0]])  # and another
        check(run, batch)
    rooms = {wrapper.arrays["indices"].data_ptr() for wrapper in Wrapper.made}
    assert len(Wrapper.made) == 3 and len(rooms) == 1


@interpreted
def test_a_graph_keeps_its_form(run: fi.FlashInferBackend) -> None:
    batch = paged_batch(SPECS["gqa"], [(5, 1), (8, 1)])
    run.plan_on_host(host(batch, captured=True), [site(batch.spec)])
    object.__setattr__(batch.metadata, "query_lens", torch.tensor([2, 0], dtype=torch.int32))
    with pytest.raises(
        ValueError, match="a CUDA graph of 2 tokens in 2 rows was planned for one token a row; give its other steps"
    ):
        run.plan_on_host(host(batch, captured=True), [site(batch.spec)])


# Plans that are no longer true.


@interpreted
def test_a_plan_is_not_used_for_another_step(run: fi.FlashInferBackend) -> None:
    """Two caches, one problem, one wrapper: who attends first plans it again, from what the host knows."""
    first, second = (paged_batch(SPECS["gqa"], sequences) for sequences in (MIXED, [(1, 2), (20, 6), (0, 3)]))
    for batch in (first, second):
        run.plan_on_host(host(batch), [site(batch.spec)])
    for batch in (first, second, first, first):
        check(run, batch)
    assert [len(each.plans) for each in Wrapper.made] == [5]


@interpreted
def test_other_shapes_and_tables_that_are_gone_have_no_plan(run: fi.FlashInferBackend) -> None:
    batch = paged_batch(SPECS["gqa"], [(5, 1), (8, 1)])
    run.plan_on_host(host(batch), [site(batch.spec)])
    longer = paged_batch(SPECS["gqa"], [(5, 3), (7, 4)])
    longer.metadata.block_table.copy_(batch.metadata.block_table)
    pools = {"k_pages": batch.k_pages.nan_to_num(), "v_pages": batch.v_pages.nan_to_num()}
    at = paged(longer, block_table=batch.metadata.block_table, **pools)
    assert run.attend(longer.q, at, [], batch.spec).isfinite().all()  # seven tokens: planned from the lengths on the device
    captured = paged_batch(SPECS["gqa"], [(5, 1), (8, 1)])
    run.plan_on_host(host(captured, captured=True), [site(batch.spec)])
    del captured
    gc.collect()
    run.plan_on_host(host(batch), [site(batch.spec)])
    assert len(run._paged._under_way) == 1 and not run._paged._graphs


# A whole model: what the cache says before each step is what `attend` needs.


@interpreted
@pytest.mark.parametrize("graphs", [False, True])
def test_random_schedules(monkeypatch: pytest.MonkeyPatch, run: fi.FlashInferBackend, graphs: bool) -> None:
    """No call plans on the spot. With `graphs`, steps are those of StepGraphs, run anew where a GPU replays them."""
    for name, anything in (("devices", None), ("dtypes", None), ("head_dims", None)):
        monkeypatch.setattr(fi.FlashInferBackend, name, anything)
    monkeypatch.setattr(fi, "_library", lambda: ())
    backend("flashinfer").__init__()  # type: ignore[misc]  # with no plan of another test
    settings = {"kv_tokens": 48, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17, "poison": True, "kernel": "flashinfer"}
    lm = PagedLM(tiny(), inner="eager", **settings)  # type: ignore[arg-type]
    with as_on_a_gpu(lm) if graphs else lm:
        play(lm, random.Random(0))  # compiles, which runs the ops on made-up lengths
        monkeypatch.setattr(backend("flashinfer")._paged, "_read", None)  # type: ignore[attr-defined]
        for seed in range(1, 6):
            play(lm, random.Random(seed))
        assert {site.kernel for site in lm.report.sites} == {"flashinfer"} and lm.preemptions > 2
    assert any(each.graph for each in Wrapper.made) == graphs


# fp8 pages.


@interpreted
@pytest.mark.parametrize("sequences", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_scales_of_fp8_pages(run: fi.FlashInferBackend, shape: tuple[int, ...], sequences: list[tuple[int, int]]) -> None:
    batch = paged_batch(SPECS["gqa"], sequences, pad_tokens=1)
    k_scale, v_scale = torch.rand(shape) + 0.5, torch.rand(shape) + 0.5
    pools = (torch.ops.paged_attn.attend, batch.k_pages.to(torch.float8_e4m3fn), batch.v_pages.to(torch.float8_e4m3fn))
    at = batch.metadata
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    expected = pools[0](batch.q, *pools[1:], *where, [], batch.spec.encode(), "reference", k_scale, v_scale)
    found = run.attend(batch.q, Paged(*pools[1:], *where, k_scale, v_scale), [], batch.spec)
    torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)
    assert Wrapper.made[0].options.get("use_tensor_cores", True)


# Stateless calls.


@pytest.mark.parametrize("name", ["causal", "gqa", "window", "bidirectional", "softcap", "alibi"])
def test_stateless_equals_oracle(run: fi.FlashInferBackend, name: str) -> None:
    spec = SPECS[name]
    for tq, tk in ((12, 12), (5, 12), (12, 12)):
        q, k, v = stateless(spec, tq, tk)
        out = run.attention(q, k, v, [], spec)
        for b, i in ((0, 0), (0, tq - 1), (1, 4)):
            expected = attend_row(spec, q[b, :, i], k[b].transpose(0, 1), v[b].transpose(0, 1), b, i, [])
            torch.testing.assert_close(out[b, :, i].double(), expected, atol=FLOAT32, rtol=0)
    assert [len(each.plans) for each in Wrapper.made] == [1, 1]


def test_more_causal_queries_than_keys_are_refused(run: fi.FlashInferBackend) -> None:
    with pytest.raises(
        ValueError, match="has 7 queries and 5 keys; it takes at most as many queries as keys; choose kernel='auto'"
    ):
        run.attention(*stateless(SPECS["gqa"], 7, 5), [], SPECS["gqa"])
    assert run.attention(*stateless(SPECS["bidirectional"], 7, 5), [], SPECS["bidirectional"]).shape == (2, 4, 7, 8)
    assert run.attention(*stateless(SPECS["gqa"], 0, 5), [], SPECS["gqa"]).shape == (2, 8, 0, 8)


# When may it be chosen?


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fi, "_library", lambda: ())


@pytest.mark.parametrize(
    ("spec", "page_size", "reason"),
    [
        (AttentionSpec(4, 4, 80, 80), 16, "has no head size 80 (only 64, 128, 256); pad the heads, or "),
        (AttentionSpec(4, 4, 128, 128, m.Chunked(8)), 16, "does not compute the mask 'causal inside chunks of 8 positions'; "),
        (AttentionSpec(4, 4, 128, 128, bias=3 * SLOPE * (J - I)), 16, "knows the standard ALiBi slopes of 4 heads, not "),
        (AttentionSpec(4, 4, 128, 128, scale=-0.1), 16, "takes its maximum before the scale, which must be positive, not -0.1"),
        (AttentionSpec(4, 4, 128, 128, scale=0.0), 16, "takes its maximum before the scale, which must be positive, not 0"),
        (AttentionSpec(4, 4, 128, 128, bias=Load(0, H) * (J - I)), 16, "knows the standard ALiBi slopes of 4 heads, not "),
        (
            AttentionSpec(4, 4, 128, 128, softcap=9.0, sinks=Load(0, H)),
            16,
            "has softcap, ALiBi and sinks one at a time, not softcap with sinks; ",
        ),
        (AttentionSpec(4, 4, 128, 128, softcap=9.0, bias=SLOPE * (J - I)), 16, "one at a time, not softcap with ALiBi; "),
        (AttentionSpec(4, 4, 128, 128, sinks=Load(0, H)), None, "has sinks over pages, not in a stateless call; "),
        (AttentionSpec(4, 4, 128, 128, score=sympy.tanh(S)), 16, "does not compute the score "),
        (AttentionSpec(4, 4, 128, 64), 16, "does not compute head size 128 for queries and keys, 64 for values; "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_refuses(installed: None, spec: AttentionSpec, page_size: int | None, reason: str) -> None:
    reasons = fi.FlashInferBackend().reasons(Request(spec, CUDA, torch.bfloat16, page_size))
    assert len([each for each in reasons if reason in each]) == 1, reasons
    assert reasons[0].endswith("choose kernel='auto'")


def test_what_it_serves(installed: None) -> None:
    run = fi.FlashInferBackend()
    window = m.All(m.Causal(), m.Window(7))
    more = [{}, {"mask": m.Window(7)}, {"mask": window}, {"mask": m.Bidirectional()}, {"softcap": 3.0}, {"bias": SLOPE * (J - I)}]
    for each in [*more, {"sinks": Load(0, H)}]:
        spec = AttentionSpec(4, 2, 128, 128, **each)
        assert run.reasons(Request(spec, CUDA, torch.float16, 16)) == ()
    assert run.reasons(Request(spec, CUDA, torch.float32, 16)) == (
        "computes in bfloat16, float16, not in float32; cast the model, or choose kernel='auto'",
    )


@pytest.mark.parametrize("heads", [1, 4, 12, 16, 40])
def test_standard_slopes(heads: int) -> None:
    slopes = [sympy.Float(each, 17) for each in fi.standard_slopes(heads)]
    chosen = sympy.Piecewise(*((slope, sympy.Eq(H, h)) for h, slope in enumerate(slopes[:-1])), (slopes[-1], True))
    assert fi.is_standard(chosen, heads)
    assert not fi.is_standard(chosen * sympy.Float(1.001), heads)
    assert not fi.is_standard(chosen, heads + 1)
    if heads == 12:  # as BLOOM and MPT write them down: 8 of 8 heads, then every other one of 16
        expected = [2.0 ** -(h + 1) for h in range(8)] + [2.0 ** -(h + 0.5) for h in range(4)]
        assert fi.standard_slopes(heads) == pytest.approx(expected)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(SPECS["gqa"], CUDA, torch.bfloat16, 16)
    fi._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = "needs FlashInfer, which is not installed; pip install 'flashinfer-python>=0.7.2', or choose kernel='auto'"
    assert missing in fi.FlashInferBackend().reasons(request)
    fi._library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "0.6.18.post1")
    old = "needs FlashInfer 0.7.2 or newer, found 0.6.18.post1; pip install 'flashinfer-python>=0.7.2', or choose kernel='auto'"
    assert old in fi.FlashInferBackend().reasons(request)
    fi._library.cache_clear()
    monkeypatch.setattr(metadata, "version", lambda name: "0.7.2.post1")
    assert not any("FlashInfer" in each for each in fi.FlashInferBackend().reasons(request))
    fi._library.cache_clear()


def test_it_is_taken_where_it_measured_faster(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = AttentionSpec(8, 2, 128, 128)
    keys = [(point.phase, 128, 4, point.sequences, point.length) for point in speeds.PAGED]
    for name, other in (("general", "flashinfer"), ("flashinfer", "general")):
        monkeypatch.setattr(measured, "MICROSECONDS", {key: {name: 10.0, other: 15.0} for key in keys})
        choice = choose(spec, CUDA, torch.bfloat16, 16)
        assert choice.kernel == name and "1.50x faster at head size 128" in choice.passed_over[other][0]
    assert choose(spec, CUDA, torch.bfloat16, 16, "flashinfer").kernel == "flashinfer"
    with pytest.raises(UnsupportedError, match="kernel 'flashinfer' was asked for, but it runs on cuda, not on cpu"):
        choose(spec, CPU, torch.bfloat16, 16, "flashinfer")

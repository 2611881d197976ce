"""Does FlashAttention get the right arguments, whichever provider is installed, and is what it gives right?

On the CPU a provider that does what FlashAttention's documentation says, in plain torch, stands for the installed ones.
tests/test_flash_attn_gpu.py asks the libraries themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import pytest
import sympy
import torch

from compile_attn.kernels import flash_attn
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import DeviceStep, HostStep, PlannedSite, Request
from compile_attn.kernels.expr import H, I, J, Load
from compile_attn.kernels.flash_providers import Call, Grid, Provider
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.lm import PagedLM
from compile_attn.manifest import dtype_name
from compile_attn.sampling import Sampling
from tests.oracle import CAPTURED, SLOPE, SPECS, attend_row
from tests.paged import PagedBatch, paged_batch
from tests.test_general import paged, stateless
from tests.test_reference import FLOAT32, MIXED
from tests.tiny import alone, prompts_of, tiny

CUDA = torch.device("cuda")
# All but the one that compares values: what a plan holds in its gaps is any number.
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
DECODE = [(9, 1), (0, 1), (0, 0), (30, 1)]
SPECULATIVE = [(9, 3), (4, 0), (0, 1), (17, 0)]  # as many tokens as sequences, and no decode


class Emulated(Provider):
    """What the documentation says, row by row."""

    name, install = "emulated", "nothing"
    features = flash_attn.FlashAttentionBackend.features

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def found(self) -> bool:
        return True

    def schedule(self, grid: Grid) -> torch.Tensor:
        assert grid.lengths is not None
        return torch.cat([grid.starts, grid.lengths])

    def run(self, call: Call) -> torch.Tensor:
        self.calls.append(call)
        grid = call.grid
        if call.schedule is not None:
            assert torch.equal(call.schedule, self.schedule(grid))
        out = torch.full((*call.q.shape[:2], call.v.shape[-1]), torch.nan)
        starts = grid.starts.tolist()
        assert starts == sorted(starts)
        for row, (begin, end) in enumerate(itertools.pairwise(starts)):
            assert end - begin <= grid.most_queries
            if end > begin:
                k, v = self.keys(call, row)
                assert k.shape[0] <= grid.most_keys
                out[begin:end] = self.row(call, call.q[begin:end], k, v)
        return out

    @staticmethod
    def keys(call: Call, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if call.table is None:
            assert call.k_starts is not None
            span = slice(*call.k_starts[row : row + 2].tolist())
            return call.k[span], call.v[span]
        assert call.grid.lengths is not None and call.grid.of_table is not None
        length, pages = call.grid.lengths[row].item(), call.table[call.grid.of_table[row]]
        place = torch.arange(length)
        at = pages[place // call.k.shape[1]].long(), place % call.k.shape[1]
        return call.k[at], call.v[at]

    @staticmethod
    def row(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grid, group = call.grid, q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = torch.einsum("ihd,jhd->hij", q, k) * grid.spec.scale
        score = grid.softcap * torch.tanh(score / grid.softcap) if grid.softcap else score
        distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
        if call.slopes is not None:
            score = score - call.slopes[:, None, None] * distance.abs()
        hidden = (distance > grid.left) if grid.left >= 0 else torch.zeros_like(distance, dtype=torch.bool)
        hidden = hidden | (distance < -grid.right) if grid.right >= 0 else hidden
        score = score.masked_fill(hidden, -torch.inf)
        if call.sinks is not None:
            score = torch.cat([score, call.sinks[:, None, None].expand(*score.shape[:2], 1)], -1)
        weights = torch.softmax(score, -1)[..., : k.shape[0]]
        return torch.einsum("hij,jhd->ihd", weights.nan_to_num(), v)


def forget() -> None:
    """Which provider was chosen for what."""
    flash_attn._chosen.cache_clear()
    flash_attn._fit.cache_clear()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    provider = Emulated()
    monkeypatch.setattr(flash_attn, "PROVIDERS", (provider,))
    forget()
    monkeypatch.setattr(Emulated, "reasons", lambda self, request: ())
    yield provider
    forget()


def asked(spec: AttentionSpec, page_size: int | None = 16, dtype: torch.dtype = torch.bfloat16) -> Request:
    return Request(spec, CUDA, dtype, page_size)


SERVED = [
    "causal",
    "gqa",
    "one head",
    "mqa, D != Dv",
    "window",
    "bidirectional",
    "softcap",
    "softcap, window, bias",
    "alibi of distance",
    "sinks",
]


def test_which_specs_are_served(emulated: Emulated) -> None:
    assert [name for name, spec in SPECS.items() if not backend("flash_attn").reasons(asked(spec))] == SERVED


@pytest.mark.parametrize(
    "sequences", [MIXED, DECODE, SPECULATIVE, [(3, 0), (0, 0)]], ids=["mixed", "decode", "speculative", "none"]
)
@pytest.mark.parametrize("name", SERVED)
def test_paged_equals_oracle(name: str, sequences: list[tuple[int, int]], emulated: Emulated) -> None:
    """Pads, whose queries are NaN, give 0."""
    for pad_tokens in (0, 1, 3):  # with one, DECODE has as many tokens as sequences
        batch = paged_batch(SPECS[name], sequences, pad_tokens=pad_tokens)
        if batch.q.numel():
            found = batch.attend(CAPTURED, "flash_attn").double()
            torch.testing.assert_close(found, batch.expected(CAPTURED), atol=FLOAT32, rtol=0)
            assert torch.equal(planned(batch), found)


def planned(batch: PagedBatch) -> torch.Tensor:
    """With a plan that the step made once."""
    at, spec = batch.metadata, batch.spec
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    shared = backend("flash_attn").planned(spec)
    assert shared is not None
    plan = torch.ops.paged_attn.plan(*where, at.page_size, dtype_name(batch.q.dtype), shared.encode(), "flash_attn", 8)
    pools = batch.k_pages, batch.v_pages
    captured = list(CAPTURED)
    out = torch.ops.paged_attn.attend(batch.q, *pools, *where, captured, spec.encode(), "flash_attn", None, None, plan)
    return out.double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("lengths", [(12, 12), (5, 12), (12, 9)], ids=str)
@pytest.mark.parametrize("name", [name for name in SERVED if SPECS[name].bias is None])
def test_stateless_equals_oracle(name: str, lengths: tuple[int, int], emulated: Emulated) -> None:
    """Positions count from 0, also where there are fewer queries than keys, or more."""
    spec = SPECS[name]
    q, k, v = stateless(spec, *lengths)
    out = torch.ops.paged_attn.attention(q, k, v, list(CAPTURED), spec.encode(), "flash_attn")
    for b, i in ((0, 0), (0, 3), (1, 4), (1, lengths[0] - 1)):
        wanted = attend_row(spec, q[b, :, i], k[b].transpose(0, 1), v[b].transpose(0, 1), b, i, CAPTURED)
        torch.testing.assert_close(out[b, :, i].double(), wanted, atol=FLOAT32, rtol=0)


def test_nothing_to_do(emulated: Emulated) -> None:
    spec = SPECS["gqa"]
    batch = paged_batch(spec, [(3, 0), (0, 0)])
    assert backend("flash_attn").attend(batch.q, paged(batch), [], spec).shape == (0, 4, 8)
    q, k, v = stateless(spec, 3, 0)
    assert not backend("flash_attn").attention(q, k, v, [], spec).any()
    assert not emulated.calls


def test_queries_that_see_no_key_are_an_error(emulated: Emulated) -> None:
    q, k, v = stateless(SPECS["window"], 12, 7)
    with pytest.raises(ValueError, match="with 5 fewer keys than queries and causal, window of 5 keys, queries see no key"):
        backend("flash_attn").attention(q, k, v, [], SPECS["window"])


def test_pages_of_another_dtype_are_an_error(emulated: Emulated) -> None:
    batch = paged_batch(SPECS["gqa"], DECODE)
    batch.k_pages = batch.k_pages.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"reads pages of torch.float32, the dtype of the queries, not torch.float8_e4m3fn"):
        batch.attend([], "flash_attn")


def test_numbers_follow_from_shapes(emulated: Emulated) -> None:
    """What the host tells the provider: never a length."""
    spec = AttentionSpec(32, 8, 16, 16, scale=0.25)
    for sequences, pad_tokens, most_queries in ((DECODE, 1, 1), (SPECULATIVE, 0, 1), ([(9, 1), (0, 5)], 0, 6)):
        batch = paged_batch(spec, sequences, pad_tokens=pad_tokens)
        batch.attend([], "flash_attn")
        call, grid = emulated.calls[-1], emulated.calls[-1].grid
        assert grid.most_queries == most_queries
        assert grid.most_keys == batch.metadata.block_table.shape[1] * 4
        assert (grid.left, grid.right, grid.softcap, grid.splits, call.sinks, call.slopes) == (-1, 0, 0.0, 1, None, None)


def test_a_plan_is_used(emulated: Emulated) -> None:
    for sequences, pad_tokens in ((DECODE, 1), (MIXED, 2)):
        batch = paged_batch(SPECS["gqa"], sequences, pad_tokens=pad_tokens)
        planned(batch)
        assert emulated.calls[-1].schedule is None  # keys are not divided
        table = torch.nn.functional.pad(batch.metadata.block_table, (0, 1000))
        batch.metadata = replace(batch.metadata, block_table=table)
        found = planned(batch)
        assert emulated.calls[-1].schedule is not None
        torch.testing.assert_close(found, batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


def test_layers_share_what_a_plan_says(emulated: Emulated) -> None:
    batch = paged_batch(SPECS["gqa"], DECODE, pad_tokens=1)
    run, spec = backend("flash_attn"), batch.spec
    at = batch.metadata
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    step = DeviceStep(*where, at.page_size, batch.q.dtype)
    first, second = (paged(batch)._replace(plan=run.plan(step, run.planned(spec) or spec)) for _ in range(2))
    for kv in (first, first, second, first, paged(batch), paged(batch)):
        run.attend(batch.q, kv, [], spec)
    grids = [call.grid for call in emulated.calls]
    assert grids[0] is grids[1]
    assert len({id(grid) for grid in grids}) == 5


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on importing Inductor
def test_a_model_generates_through_it(
    inner: Literal["eager", "inductor"], emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one plan a step for all its layers."""
    for limit in ("devices", "dtypes"):
        monkeypatch.setattr(flash_attn.FlashAttentionBackend, limit, None)
    plans: list[torch.Tensor] = []
    plan = flash_attn.FlashAttentionBackend.plan
    monkeypatch.setattr(flash_attn.FlashAttentionBackend, "plan", lambda *given: plans.append(plan(*given)) or plans[-1])
    prompts = prompts_of([5, 23, 1])
    with PagedLM(tiny(), kv_tokens=256, page_size=4, max_seqs=2, kernel="flash_attn", inner=inner, poison=True) as lm:
        found = lm.generate(prompts, max_new_tokens=5)
        assert {site.kernel for site in lm.report.sites} == {"flash_attn"}
        assert len(lm.report.sites) == 2
        assert len(emulated.calls) == 2 * len(plans) == 2 * lm.cache.steps_run
    assert found == [alone(tiny(), prompt, Sampling(max_new_tokens=5)) for prompt in prompts]


def test_opcheck(emulated: Emulated) -> None:
    batch = paged_batch(SPECS["gqa"], MIXED, pad_tokens=1)
    at, spec = batch.metadata, batch.spec.encode()
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    given = (*where, 4, "float32", spec, "flash_attn", 8)
    torch.library.opcheck(torch.ops.paged_attn.plan.default, given, test_utils=OPCHECKS)
    plan = torch.ops.paged_attn.plan(*given)
    with pytest.raises(ValueError, match="plans 7 numbers a sequence, kernel 'flash_attn' 8; compile it again"):
        torch.ops.paged_attn.plan(*given[:-1], 7)
    attended = (batch.q, batch.k_pages, batch.v_pages, *where, [], spec, "flash_attn", None, None, plan)
    torch.library.opcheck(torch.ops.paged_attn.attend.default, attended)


def test_what_shares_a_plan() -> None:
    run = backend("flash_attn")
    spec = AttentionSpec(8, 2, 64, 64, m.Window(9), scale=0.1, softcap=30.0, sinks=Load(0, H))
    assert run.planned(spec) == run.planned(replace(spec, scale=0.2, softcap=20.0, sinks=Load(2, H)))
    for other in (
        replace(spec, mask=m.Window(10)), replace(spec, softcap=None), replace(spec, sinks=None),
        replace(spec, num_kv_heads=4), replace(spec, head_dim_v=32), replace(spec, bias=SLOPE * (J - I)),
    ):  # fmt: skip
        assert run.planned(spec) != run.planned(other)
    assert run.planned(spec).features() == spec.features()  # so that the same provider serves both


def test_what_the_host_says_decides_splits(emulated: Emulated) -> None:
    """And nothing else: another step, or a lie, gives the same numbers."""
    spec = AttentionSpec(64, 64, 16, 16, scale=0.25)
    batch = paged_batch(spec, [(900, 1), (4, 1)], page_size=16)
    at, wide = batch.metadata, torch.zeros((2, 4096), dtype=torch.int32)
    wide[:, : at.block_table.shape[1]] = at.block_table
    batch.metadata = at = replace(at, block_table=wide)
    wanted = batch.attend([], "flash_attn")
    assert emulated.calls[-1].grid.splits == 2

    def said(seq_lens: list[int], captured: bool, tokens: int = 2) -> int:
        step = HostStep(wide, torch.tensor(seq_lens, dtype=torch.int32), at.query_lens, tokens, 16, captured)
        backend("flash_attn").plan_on_host(step, [PlannedSite(spec, torch.float32, torch.float32)])
        assert torch.equal(batch.attend([], "flash_attn"), wanted)
        splits = emulated.calls[-1].grid.splits
        assert torch.equal(planned(batch), wanted.double())
        assert emulated.calls[-1].grid.splits == splits
        return splits

    assert said([901, 5], captured=False) == 2
    assert said([901, 901], captured=False) == 1
    assert said([901, 901], captured=True) == 2
    assert said([901, 901], captured=False, tokens=9) == 2  # another step


@pytest.mark.parametrize(
    ("sinks", "wanted"),
    [(Load(2, H), [0.5, -1.0, 2.0, 0.0]), (Load(4, 0, H, 0), [1.0, 2.0, 3.0, 4.0]), (0.25 * H + 1, [1.0, 1.25, 1.5, 1.75])],
    ids=str,
)
def test_sinks_become_a_vector(sinks: sympy.Expr, wanted: list[float], emulated: Emulated) -> None:
    spec = AttentionSpec(4, 2, 8, 8, sinks=sinks)
    batch = paged_batch(spec, DECODE)
    batch.attend([*CAPTURED, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)], "flash_attn")
    found = emulated.calls[-1].sinks
    assert found is not None
    assert found.tolist() == wanted


def test_queries_are_aligned(emulated: Emulated) -> None:
    """Kernels read 16 bytes at a time: views of other strides are copied, others not."""
    batch = paged_batch(SPECS["gqa"], DECODE)
    wanted = batch.attend([], "flash_attn")
    wide, odd, across = torch.zeros(3, 8, 20), torch.zeros(3, 4, 9), torch.zeros(3, 8, 4).mT
    for view, copied in ((wide[:, 2:6, 4:12], False), (wide[:, 2:6, 1:9], True), (odd[..., :8], True), (across, True)):
        view.copy_(batch.q)
        batch.q = view
        assert torch.equal(batch.attend([], "flash_attn"), wanted)
        assert (emulated.calls[-1].q.data_ptr() != view.data_ptr()) == copied

"""Is every step served by the kernel that its shapes name, planned by no other, and still right?

The parts are the reference, `general` in Triton's interpreter, and FlashAttention and FlashInfer as tests emulate them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch

import compile_attn as ca
from compile_attn.kernels import by_step, flash_attn, measured, speeds
from compile_attn.kernels import flashinfer as fi
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Backend, DeviceStep, HostStep, Paged, PlannedSite, Request, Shape, plan_size
from compile_attn.kernels.by_step import ByStep
from compile_attn.kernels.reference import ReferenceBackend
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.speeds import Point
from compile_attn.lm import PagedLM
from compile_attn.manifest import dtype_name
from compile_attn.step import StepBuffers
from tests import fake_flashinfer
from tests.oracle import CAPTURED, SPECS
from tests.paged import PagedBatch, paged_batch
from tests.test_cuda_graph import PROMPTS, SETTINGS, greedy
from tests.test_flash_attn import DECODE, OPCHECKS, SERVED, SPECULATIVE, Emulated, forget
from tests.test_fuzz import play
from tests.test_general import interpreted
from tests.test_reference import FLOAT32, MIXED
from tests.tiny import as_on_a_gpu, tiny

CPU = torch.device("cpu")
NAMES = ("reference", "flash_attn", "general", "flashinfer")


@dataclass(frozen=True)
class Small(Point):
    """A point whose table has room for its length alone: the models of tests have no table of 256 tokens."""

    @property
    def shape(self) -> Shape:
        return super().shape._replace(room=self.length)


def fastest_at(monkeypatch: pytest.MonkeyPatch, best: Mapping[Point, str]) -> None:
    """As if the kernels had been measured: one twice as fast as the others at each point."""
    rows = {
        (at.phase, 8, 1, at.sequences, at.length): {each: 1.0 if each == name else 2.0 for each in NAMES}
        for at, name in best.items()
    }
    monkeypatch.setattr(speeds, "PAGED", tuple(best))
    monkeypatch.setattr(measured, "MICROSECONDS", rows)
    by_step.forget()


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    by_step.forget()
    yield
    by_step.forget()


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    """FlashAttention as its documentation says, on a CPU."""
    provider = Emulated()
    monkeypatch.setattr(flash_attn, "PROVIDERS", (provider,))
    monkeypatch.setattr(Emulated, "reasons", lambda self, request: ())
    for limit in ("devices", "dtypes"):
        monkeypatch.setattr(flash_attn.FlashAttentionBackend, limit, None)
    forget()
    yield provider
    forget()


Seen = list[tuple[str, str, Shape]]  # kernel, what it was asked, for which step


def watched(monkeypatch: pytest.MonkeyPatch, *names: str) -> Seen:
    """Everything that these kernels are asked from now on, in order."""
    seen: Seen = []

    def watch(name: str) -> None:
        run = backend(name)
        attend, plan, plan_on_host = run.attend, run.plan, run.plan_on_host

        def attend_(q: Any, kv: Paged, captured: Any, spec: Any) -> Any:
            room = kv.block_table.shape[1] * kv.k_pages.shape[1]
            seen.append((name, "attend", Shape(q.shape[0], kv.block_table.shape[0], room)))
            return attend(q, kv, captured, spec)

        def plan_(step: DeviceStep, spec: Any) -> Any:
            seen.append((name, "plan", step.shape))
            return plan(step, spec)

        def plan_on_host_(step: HostStep, sites: Any) -> None:
            seen.append((name, "plan on host", step.shape))
            plan_on_host(step, sites)

        for method, other in (("attend", attend_), ("plan", plan_), ("plan_on_host", plan_on_host_)):
            monkeypatch.setattr(run, method, other)

    for name in names:
        watch(name)
    return seen


# One op.

SHORT, LONG = [(2, 1), (3, 1)], [(40, 1), (3, 1)]
BY_LENGTH: dict[Point, str] = {  # short decodes, long ones; prompts
    Small("decode", 2, 8, 1): "reference",
    Small("decode", 2, 64, 1): "flash_attn",
    Small("prefill", 2, 8, 1): "flash_attn",
    Small("prefill", 1, 64, 1): "reference",
}


def planned(batch: PagedBatch, kernel: str) -> torch.Tensor:
    """By a plan that the step made once, if the kernel's name asks for one."""
    at, spec, run = batch.metadata, batch.spec, backend(kernel)
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    shared, plan = run.planned(spec), None
    if shared is not None:
        plan = torch.ops.paged_attn.plan(*where, at.page_size, dtype_name(batch.q.dtype), shared.encode(), kernel, run.plan_numbers)
        assert plan.dtype == torch.int32 and plan.shape == (plan_size(at.seq_lens.shape[0], run.plan_numbers),)
    pools, captured = (batch.k_pages, batch.v_pages), list(CAPTURED)
    out: torch.Tensor = torch.ops.paged_attn.attend(batch.q, *pools, *where, captured, spec.encode(), kernel, None, None, plan)
    return out.double()


@pytest.mark.parametrize("name", SERVED)
def test_ragged_batches_equal_the_oracle(name: str, flash: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, with plans and without; only the kernel that is chosen for a step makes its plan."""
    fastest_at(monkeypatch, BY_LENGTH)
    seen = watched(monkeypatch, "reference", "flash_attn")
    served = set()
    for sequences, pad_tokens in [(MIXED, 2), (SHORT, 0), (LONG, 0), (SPECULATIVE, 0), (LONG, 0), (DECODE, 1), (SHORT, 1)]:
        batch = paged_batch(SPECS[name], sequences, pad_tokens=pad_tokens)
        for found in (planned(batch, "reference|flash_attn"), batch.attend(CAPTURED, "reference|flash_attn").double()):
            torch.testing.assert_close(found, batch.expected(CAPTURED), atol=FLOAT32, rtol=0)
        [(one, first, shape), *rest] = seen
        assert [(one, method, shape) for method in (["plan"] if first == "plan" else []) + ["attend", "attend"]] == seen
        assert first == ("plan" if one == "flash_attn" else "attend") and rest
        served.add(one)
        seen.clear()
    assert served == {"reference", "flash_attn"}


def test_a_plan_is_never_that_of_another_step(flash: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two steps of one shape, which FlashAttention serves, comes one that it does not."""
    fastest_at(monkeypatch, BY_LENGTH)
    kernel = "reference|flash_attn"
    for lengths in ([(40, 1), (3, 1)], [(5, 1), (37, 1)], [(40, 1), (39, 1)]):
        long, short = paged_batch(SPECS["gqa"], lengths), paged_batch(SPECS["gqa"], SHORT)
        for batch in (long, short):
            torch.testing.assert_close(planned(batch, kernel), batch.expected([]), atol=FLOAT32, rtol=0)
    assert len(flash.calls) == 3 == len({id(call.grid) for call in flash.calls})


def test_steps_without_tokens_or_sequences(flash: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest_at(monkeypatch, BY_LENGTH)
    for sequences in ([(3, 0), (0, 0)], [(3, 0)]):
        batch = paged_batch(SPECS["gqa"], sequences)
        assert batch.attend([], "reference|flash_attn").shape == planned(batch, "flash_attn|reference").shape == (0, 4, 8)
    assert backend("reference|flash_attn").serving(SPECS["gqa"], Shape(0, 0, 0)).name in ("reference", "flash_attn")


@interpreted
@pytest.mark.parametrize("name", ["everything", "buckets", "window", "gqa"])
def test_a_kernel_for_any_score_among_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest_at(monkeypatch, {Small("decode", 4, 32, 1): "general", Small("prefill", 1, 32, 1): "reference"})
    seen = watched(monkeypatch, "reference", "general")
    for sequences in (MIXED, DECODE):
        batch = paged_batch(SPECS[name], sequences, pad_tokens=1)
        found = batch.attend(CAPTURED, "reference|general").double()
        torch.testing.assert_close(found, batch.expected(CAPTURED), atol=FLOAT32, rtol=0)
    assert [(kernel, method) for kernel, method, _ in seen] == [("reference", "attend"), ("general", "attend")]


def test_opcheck(flash: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the part that serves makes no plan: the graph was compiled for steps of any shape."""
    fastest_at(monkeypatch, BY_LENGTH)
    kernel, spec = "reference|flash_attn", SPECS["gqa"]
    for sequences in (LONG, SHORT):
        at = paged_batch(spec, sequences).metadata
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        given = (*where, 4, "float32", spec.encode(), kernel, 8)
        torch.library.opcheck(torch.ops.paged_attn.plan.default, given, test_utils=OPCHECKS)
        with pytest.raises(ValueError, match=r"plans 7 numbers a sequence, kernel 'reference\|flash_attn' 8; compile it again"):
            torch.ops.paged_attn.plan(*given[:-1], 7)


# A whole model: what the cache says before each step, what the graph plans and what the layers call are one choice.

BY_WIDTH: dict[Point, str] = {  # tables are of 12, 24, 36, 48 tokens here
    Small("decode", 2, 12, 1): "reference",
    Small("decode", 2, 48, 1): "other",
    Small("prefill", 2, 12, 1): "other",
    Small("mixed", 4, 48, 1): "reference",
}


def check_generation(
    monkeypatch: pytest.MonkeyPatch, other: str, of: slice, count: int, graphs: bool, inner: Literal["eager", "inductor"] = "eager"
) -> Seen:
    prompts = PROMPTS[of]
    monkeypatch.setattr(StepBuffers, "width", lambda self, pages, page_size: -(-pages // 3) * 3)  # widths change often
    fastest_at(monkeypatch, {at: other if name == "other" else name for at, name in BY_WIDTH.items()})
    kernel = f"reference|{other}"
    with PagedLM(tiny(), inner=inner, kernel=kernel, **SETTINGS) as lm:  # type: ignore[arg-type]
        if graphs:
            as_on_a_gpu(lm)
        assert lm.generate(prompts, max_new_tokens=2) == greedy(2)[of]  # compiles, which runs ops on made-up lengths
        seen = watched(monkeypatch, "reference", other)
        assert lm.generate(prompts, max_new_tokens=count) == greedy(count)[of]
        assert {site.kernel for site in lm.report.sites} == {kernel}
        assert bool(lm.cuda_graphs) == graphs
    assert {name for name, method, _ in seen if method == "attend"} == {"reference", other}
    for name, _, shape in seen:
        assert name == backend(kernel).serving(AttentionSpec(2, 2, 8, 8), shape).name
        if shape.tokens == shape.sequences:
            assert name == ("reference" if shape.room <= 24 else other)  # 24 is as far from both: the first
    return seen


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on importing Inductor
def test_a_model_generates_through_two(
    inner: Literal["eager", "inductor"], graphs: bool, flash: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = check_generation(monkeypatch, "flash_attn", slice(None), 30, graphs, inner)
    steps = [(name, method) for name, method, _ in seen]
    assert {method for name, method in steps if name == "reference"} == {"attend"}
    count = {method: steps.count(("flash_attn", method)) for method in ("plan on host", "plan", "attend")}
    assert count["attend"] == 2 * count["plan"] > 0, "two layers share a plan"
    shapes = [{shape for name, method, shape in seen if method == each} for each in ("plan on host", "plan", "attend")]
    assert shapes[0] == shapes[1] < shapes[2]
    if not graphs:  # else it is asked before each recording, too, which a CPU does not run
        assert count["plan on host"] == count["plan"]


@interpreted
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_generates_through_general(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_generation(monkeypatch, "general", slice(2, 4), 14, graphs)


@interpreted
@pytest.mark.parametrize("graphs", [False, True])
def test_a_kernel_that_plans_on_the_host_for_its_steps_alone(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under random joins, leaves and preemptions; no call plans on the spot, and no graph finds the plan of another step."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer.module())
    for name in ("devices", "dtypes", "head_dims"):
        monkeypatch.setattr(fi.FlashInferBackend, name, None)
    monkeypatch.setattr(fi, "_library", lambda: ())
    run = backend("flashinfer")
    run.__init__()  # type: ignore[misc]  # with no plan of another test
    few, many = Small("decode", 2, 8, 1), Small("decode", 3, 8, 1)
    fastest_at(
        monkeypatch,
        {few: "flashinfer", many: "reference", Small("prefill", 2, 8, 1): "flashinfer", Small("mixed", 6, 48, 1): "reference"},
    )
    settings = {"kv_tokens": 48, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17, "poison": True}
    lm = PagedLM(tiny(), inner="eager", kernel="reference|flashinfer", **settings)  # type: ignore[arg-type]
    with as_on_a_gpu(lm) if graphs else lm:
        play(lm, random.Random(0))  # compiles, which runs the ops on made-up lengths
        monkeypatch.setattr(run._paged, "_read", None)  # type: ignore[attr-defined]
        seen = watched(monkeypatch, "reference", "flashinfer")
        for seed in range(1, 6):
            play(lm, random.Random(seed))
        assert lm.preemptions > 2
    hosts = [shape for _, method, shape in seen if method == "plan on host"]
    calls = [shape for name, method, shape in seen if (name, method) == ("flashinfer", "attend")]
    assert set(hosts) == set(calls) and {name for name, method, _ in seen if method == "plan on host"} == {"flashinfer"}
    assert {name for name, _, shape in seen if shape.tokens == shape.sequences} == {"reference", "flashinfer"}
    assert any(each.graph for each in fake_flashinfer.Wrapper.made) == graphs


# What it is made of.


class Fake(Backend):
    """Plans so many numbers, for sites that share a mask."""

    features = ReferenceBackend.features

    def __init__(self, name: str, numbers: int = 0, forgets: bool = False) -> None:
        self.name, self.plan_numbers, self.forgets = name, numbers, forgets
        self.planned_for: list[AttentionSpec] = []

    def planned(self, spec: AttentionSpec) -> AttentionSpec | None:
        mask = m.Causal() if self.forgets else spec.mask
        return replace(spec, scale=1.0 / self.plan_numbers, mask=mask) if self.plan_numbers else None

    def plan(self, step: DeviceStep, spec: AttentionSpec) -> torch.Tensor:
        self.planned_for.append(spec)
        return torch.full((plan_size(step.block_table.shape[0], self.plan_numbers),), self.plan_numbers, dtype=torch.int32)


def step_of(sequences: int, tokens: int, width: int) -> DeviceStep:
    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    return DeviceStep(
        zeros(sequences, width), zeros(sequences), zeros(sequences + 1), zeros(tokens), zeros(tokens), 4, torch.float32
    )


def test_plans_of_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has the size that the graph was told, whichever part makes it, for the problem that this part shares."""
    fastest_at(
        monkeypatch,
        {Small("decode", 2, 8, 1): "flash_attn", Small("decode", 2, 64, 1): "reference", Small("prefill", 2, 8, 1): "general"},
    )
    one, other, none = Fake("flash_attn", 3), Fake("reference", 8), Fake("general")
    spec = AttentionSpec(2, 2, 8, 8, m.Window(100), scale=0.1)
    alone, both = ByStep([one, none]), ByStep([none, one, other])
    assert alone.planned(spec) == one.planned(spec) and alone.plan_numbers == 3
    assert both.planned(spec) == spec and both.plan_numbers == 8, "they share nothing but the spec itself"
    assert ByStep([none]).planned(spec) is None
    for step, part in ((step_of(2, 2, 2), one), (step_of(2, 2, 16), other), (step_of(2, 9, 2), none)):
        plan = both.plan(step, spec)
        assert plan.shape == (plan_size(2, 8),) and both.serving(spec, step.shape) is part
        if part is not none:
            assert part.planned_for == [part.planned(spec)] and (plan[: plan_size(2, part.plan_numbers)] == part.plan_numbers).all()


def test_sites_of_one_plan_choose_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window makes tables count for less: what a plan shares must keep it, or the plan would be another part's."""
    fastest_at(monkeypatch, {Small("decode", 2, 8, 1): "flash_attn", Small("decode", 2, 64, 1): "reference"})
    forgetful = ByStep([Fake("reference"), Fake("flash_attn", 3, forgets=True)])
    for mask, serving in ((m.Causal(), "reference"), (m.Window(7), "flash_attn"), (m.Window(60), "reference")):
        spec = AttentionSpec(2, 2, 8, 8, mask)
        shared = forgetful.planned(spec)
        assert shared is not None
        assert {forgetful.serving(each, Shape(2, 2, 64)).name for each in (spec, shared)} == {serving}
    assert forgetful.planned(AttentionSpec(2, 2, 8, 8, m.Window(7), scale=0.1)) == AttentionSpec(2, 2, 8, 8, m.Window(7), scale=0.1)


def test_hosts_plan_once_for_all_sites_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """However they name it: FlashInfer's second plan of a step would take the place of the first."""
    from compile_attn.kernels.backend import planners

    fastest_at(monkeypatch, {Small("decode", 2, 8, 1): "flash_attn", Small("decode", 2, 64, 1): "reference"})
    near, far = (PlannedSite(AttentionSpec(2, 2, 8, 8, mask), torch.float32, torch.float32) for mask in (m.Window(7), m.Causal()))
    alone, shared = backend("flash_attn"), backend("reference|flash_attn")
    sites = [(alone, far), (shared, near), (shared, far)]
    assert planners(sites, Shape(2, 2, 64)) == {alone: [far, near]}
    assert planners(sites, Shape(2, 2, 8)) == {alone: [far, near, far]}
    assert planners(sites[2:], Shape(2, 2, 64)) == {}


def test_what_is_against_a_part_is_against_all() -> None:
    request = Request(SPECS["gqa"], CPU, torch.float32, 16)
    assert backend("reference|sdpa").reasons(request) == (
        "is 'sdpa' in some steps, which does not serve paged calls; choose kernel='auto'",
    )
    assert "no" not in backend("reference|sdpa").reasons(replace(request, page_size=None))[0].split("; ")[1]
    why = "chooses by the shapes of a paged step, and a stateless call is none; name one kernel"
    assert backend("reference|sdpa").reasons(replace(request, page_size=None)) == (why,)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("reference|fast", r"unknown kernel 'fast' in 'reference\|fast'; known kernels are 'sdpa', .*'reference', and 'auto'"),
        ("auto|general", "unknown kernel 'auto' in "),
        ("general|", "unknown kernel '' in "),
        ("reference|sdpa|reference", r"kernel 'reference\|sdpa\|reference' names one twice; name each once"),
    ],
)
def test_a_name_that_means_nothing(name: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        backend(name)


def test_a_paged_model_alone_has_steps() -> None:
    with pytest.raises(ValueError, match=r"kernel 'reference\|sdpa' was asked for, but it chooses by the shapes of a paged step"):
        ca.explain(tiny(), torch.arange(9)[None], kernel="reference|sdpa")
    with pytest.raises(ValueError, match="unknown kernel 'fast' in 'reference"):
        ca.explain(tiny(), torch.arange(9)[None], kernel="reference|fast")


def test_the_report_says_which_steps(flash: Emulated, monkeypatch: pytest.MonkeyPatch) -> None:
    fastest_at(monkeypatch, BY_LENGTH)
    report = ca.explain(tiny(), paged=True, kernel="reference|flash_attn")
    assert {site.kernel for site in report.sites} == {"reference|flash_attn"}
    [text] = {site.steps for site in report.sites}
    assert text.startswith("flash_attn where it measured faster: steps nearest to ") and text.endswith("; reference in all others")
    assert text in report.to_html() and all(site.passed_over["general"] for site in report.sites)

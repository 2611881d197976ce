"""Is attention through FlashInfer right on a GPU? Against the reference in float64, in graphs and out of them."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Sequence

import pytest
import torch

from compile_attn.kernels import flashinfer as fi
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import HostStep, Paged, PlannedSite, Request
from compile_attn.kernels.expr import H, I, J, Load
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from tests.paged import PagedBatch, paged_batch
from tests.scores import SCORES
from tests.test_general import PHASES, close, fp8, on_gpu, paged, stateless

# The library warns of its own use of torch when it is imported and when it compiles.
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("library"), pytest.mark.filterwarnings("ignore")]
BF16, FP16 = torch.bfloat16, torch.float16
SINKS = [0.5, -1.0, 2.0, 0.0, 1.5, -0.3, 0.1, 3.0]


@pytest.fixture(scope="module")
def library() -> None:
    """Skips only where the library is not installed; one that is broken fails."""
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed here: pip install flashinfer-python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import flashinfer  # noqa: F401


def plain(heads: int = 8, kv_heads: int = 2, dim: int = 128, **more: object) -> AttentionSpec:
    return AttentionSpec(heads, kv_heads, dim, dim, scale=dim**-0.5, **more)  # type: ignore[arg-type]


def alibi(heads: int) -> dict[str, object]:
    return {"bias": 2 ** (-8 * (H + 1) / heads) * (J - I)}


def captured_of(spec: AttentionSpec) -> list[torch.Tensor]:
    return [torch.tensor(SINKS[: spec.num_q_heads], device="cuda")] if spec.sinks is not None else []


def expected_of(batch: PagedBatch) -> torch.Tensor:
    return batch.reference(captured_of(batch.spec))


def unpadded(spec: AttentionSpec, sequences: Sequence[tuple[int, int]]) -> PagedBatch:
    return paged_batch(spec, sequences, page_size=16, dtype=BF16, device="cuda")


def host(batch: PagedBatch, captured: bool = False) -> HostStep:
    at = batch.metadata
    return HostStep(at.block_table, at.seq_lens.cpu(), at.query_lens.cpu(), batch.q.shape[0], batch.k_pages.shape[1], captured)


def kernels(run: fi.FlashInferBackend) -> set[str]:
    return {plan.kernel for plan in run._paged._plans.values()}  # those of graphs are not among them


def check(batch: PagedBatch, made: type[fi.FlashInferBackend] = fi.FlashInferBackend) -> set[str]:
    """A call that nobody planned, a planned one, and one in buffers that a graph could hold; the kernels that served them."""
    spec, dtype = batch.spec, batch.q.dtype
    assert made().reasons(Request(spec, batch.q.device, dtype, batch.k_pages.shape[1])) == ()
    expected, served = expected_of(batch), set[str]()
    for how in ("direct", "planned", "captured"):
        run = made()
        if how != "direct":
            run.plan_on_host(host(batch, captured=how == "captured"), [PlannedSite(spec, dtype, dtype)])
        found = run.attend(batch.q, paged(batch), captured_of(spec), spec)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **close(dtype), msg=lambda text, how=how: f"{how}: {text}")
        assert not found[int(batch.metadata.query_lens.sum()) :].any()
        served |= kernels(run)
    return served


# Prompts too short for FA3, whose kernels for other head sizes take long to compile.
SHORT = {
    "decode": PHASES["decode"],
    "prefill": [(0, 120), (0, 33), (90, 60)],
    "mixed": [(0, 70), (513, 1), (90, 65), (0, 0), (15, 1)],
}


@pytest.mark.parametrize("phase", SHORT)
@pytest.mark.parametrize(("dtype", "dim"), [(BF16, 64), (BF16, 128), (BF16, 256), (FP16, 128)], ids=str)
def test_head_sizes(dtype: torch.dtype, dim: int, phase: str) -> None:
    check(on_gpu(plain(dim=dim), SHORT[phase], dtype))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 16])
def test_groups(group: int, phase: str) -> None:
    served = check(on_gpu(plain(2 * group, 2), PHASES[phase], BF16))
    assert phase != "decode" or served == {"cuda cores" if group < 4 else "tensor cores"}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize(
    "spec",
    [
        plain(),
        plain(mask=m.Window(127)),
        plain(mask=m.Window(0)),
        plain(8, 4, mask=m.Window(300)),
        plain(mask=m.Bidirectional()),
        plain(softcap=5.0),
        plain(8, 4, softcap=5.0),
        plain(8, 4, dim=256, softcap=5.0),
        plain(8, 4, dim=256, softcap=5.0, mask=m.Window(127)),
        plain(8, 8, **alibi(8)),
        plain(8, 2, **alibi(8)),
        plain(8, 1, dim=64, sinks=Load(0, H)),
        plain(8, 2, dim=64, sinks=Load(0, H), mask=m.Window(127)),
    ],
    ids=lambda spec: spec.words(),
)
def test_scores_and_masks(spec: AttentionSpec, page_size: int, phase: str) -> None:
    check(on_gpu(spec, PHASES[phase], BF16, page_size))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", SCORES)
def test_printed_scores(name: str, phase: str) -> None:
    check(on_gpu(SCORES[name], PHASES[phase], BF16), fi.FlashInferJitBackend)


def test_long_prompts_take_fa3() -> None:
    long = "fa3" if torch.cuda.get_device_capability() == (9, 0) else "fa2"
    for batch in (unpadded(plain(), [(0, 700), (500, 300), (0, 130)]), on_gpu(plain(), [(0, 900), (40, 1), (300, 200)], BF16)):
        assert long in check(batch)
    assert check(on_gpu(plain(), [(0, 300), (1000, 1), (0, 0), (77, 1)], BF16)) == {long, "tensor cores"}


def test_many_rows() -> None:
    lengths = [(7 * row % 190, 1) for row in range(512)]
    check(unpadded(plain(), lengths))


def test_long_contexts() -> None:
    check(paged_batch(plain(4, 1), [(70_000, 1), (33, 1)], page_size=64, dtype=BF16, device="cuda"))
    check(paged_batch(plain(4, 1, mask=m.Window(1000)), [(40_000, 1), (20_000, 9)], page_size=64, dtype=BF16, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("phase", PHASES)
def test_fp8_pages(phase: str, dtype: torch.dtype) -> None:
    for spec in (plain(), plain(4, 2)):
        batch = on_gpu(spec, PHASES[phase], BF16)
        scales = torch.tensor(0.02, device="cuda"), torch.tensor([0.03, 0.01], device="cuda")
        found, expected = (fp8(batch, dtype, *scales, kernel) for kernel in ("flashinfer", "reference"))
        torch.testing.assert_close(found, expected, **close(BF16))


def test_queries_of_any_strides() -> None:
    batch = on_gpu(plain(), PHASES["mixed"], BF16)
    expected = expected_of(batch)
    fused = torch.full((batch.q.shape[0], 13, 131), torch.nan, dtype=BF16, device="cuda")
    for heads, channels in ((slice(2, 10), slice(0, 128)), (slice(0, 8), slice(3, 131))):
        view = fused[:, heads, channels]
        view.copy_(batch.q)
        found = fi.FlashInferBackend().attend(view, paged(batch), [], batch.spec)
        torch.testing.assert_close(found.double(), expected, **close(BF16))


@pytest.mark.parametrize(
    "spec", [plain(), plain(mask=m.Window(40)), plain(mask=m.Bidirectional()), plain(softcap=5.0), plain(8, 8, **alibi(8))],
    ids=lambda spec: spec.words(),
)  # fmt: skip
def test_stateless(spec: AttentionSpec) -> None:
    run = fi.FlashInferBackend()
    for tq, tk in ((200, 200), (31, 31), (31, 90)):
        q, k, v = (each.to(BF16) for each in stateless(spec, tq, tk, device="cuda"))
        expected = backend("reference").attention(q.double(), k.double(), v.double(), [], spec)
        for _ in range(2):
            torch.testing.assert_close(run.attention(q, k, v, [], spec).double(), expected, **close(BF16))


# CUDA graphs.


@dataclasses.dataclass
class Static:
    """The buffers of a decode graph of two layers, whose specs differ."""

    q: torch.Tensor
    pools: tuple[torch.Tensor, torch.Tensor]
    table: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    specs: tuple[AttentionSpec, ...]
    captured: list[list[torch.Tensor]]
    run: fi.FlashInferBackend

    def fill(self, batch: PagedBatch) -> HostStep:
        """Write a batch; the tail of every buffer holds what must never be read as a value."""
        at = batch.metadata
        for buffer, value in zip(self.pools, (batch.k_pages, batch.v_pages), strict=True):
            buffer.fill_(torch.nan)[: value.shape[0]] = value
        self.q.fill_(torch.nan)[: batch.q.shape[0]] = batch.q
        self.table.fill_(self.pools[0].shape[0] - 1)[:, : at.block_table.shape[1]] = at.block_table
        self.seq_lens.copy_(at.seq_lens)
        self.query_lens.copy_(at.query_lens)
        lengths = at.seq_lens.cpu(), at.query_lens.cpu()
        return HostStep(self.table, *lengths, self.q.shape[0], self.pools[0].shape[1], captured=True)

    def plan(self, step: HostStep) -> None:
        self.run.plan_on_host(step, [PlannedSite(spec, self.q.dtype, self.q.dtype) for spec in self.specs])

    def layers(self) -> list[torch.Tensor]:
        rows = (self.table, self.seq_lens, self.query_lens)
        starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(*rows, self.q.shape[0], self.pools[0].shape[1])
        kv = Paged(*self.pools, self.table, self.seq_lens, starts, positions, token_seq)
        return [self.run.attend(self.q, kv, *each) for each in zip(self.captured, self.specs, strict=True)]


def static(rows: int, tokens: int, specs: tuple[AttentionSpec, ...], page_size: int = 16) -> Static:
    first = specs[0]
    pool = (rows * 100 + 4, page_size, first.num_kv_heads, first.head_dim)
    lengths = torch.zeros((2, rows), dtype=torch.int32, device="cuda")
    return Static(
        torch.full((tokens, first.num_q_heads, first.head_dim), torch.nan, dtype=BF16, device="cuda"),
        (torch.empty(pool, dtype=BF16, device="cuda"), torch.empty(pool, dtype=BF16, device="cuda")),
        torch.zeros((rows, 300), dtype=torch.int32, device="cuda"),
        *lengths,
        specs,
        [captured_of(spec) for spec in specs],
        fi.FlashInferBackend(),
    )


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


GRAPHS = {
    "decode": (4, [[(9, 1), (700, 1), (0, 1), (33, 1)], [(1500, 1), (0, 1), (0, 0), (64, 1)], [(0, 0)] * 4, [(15, 1)] * 4]),
    "steps": (3, [[(40 + step, 1), (step, 1), (95 + step, 1)] for step in range(12)]),
    "long": (900, [[(0, 700), (0, 130), (3, 1)], [(200, 90), (50, 700), (0, 0)], [(0, 30), (0, 800), (0, 31)]]),
    "mixed": (100, [[(0, 40), (7, 1), (0, 0), (300, 20)], [(900, 1), (0, 0), (20, 59), (3, 1)], [(5, 1), (0, 0), (0, 0), (8, 1)]]),
}


@pytest.mark.parametrize("form", GRAPHS)
@pytest.mark.parametrize(
    "specs",
    [
        (plain(), plain(mask=m.Window(100)), plain(mask=m.Window(20)), plain()),
        (plain(4, 2), plain(4, 2, mask=m.Window(100)), plain(4, 2, softcap=5.0)),
        (plain(8, 2, dim=64, sinks=Load(0, H)), plain(8, 2, dim=64, sinks=Load(0, H), mask=m.Window(50))),
    ],
    ids=["windows", "cuda cores", "sinks"],
)
def test_replays_of_layers_that_differ(specs: tuple[AttentionSpec, ...], form: str) -> None:
    """The trap: a plan made for one layer, or for the last step, is found where another was meant."""
    tokens, steps = GRAPHS[form]
    batches = [unpadded(specs[0], sequences) for sequences in steps]
    held = static(len(steps[0]), tokens, specs)
    held.plan(held.fill(batches[0]))
    held.layers()  # compiles, and allocates what is kept
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = held.layers()
    for batch in [*batches, batches[0]]:
        held.plan(held.fill(batch))
        graph.replay()
        for spec, found in zip(specs, out, strict=True):
            batch.spec = spec
            expected = expected_of(batch)
            real = int(batch.metadata.query_lens.sum())
            torch.testing.assert_close(found[:real].double(), expected[:real], **close(BF16))
            assert not found[real:].any()


def test_planning_and_replaying_wait_for_nothing(request: pytest.FixtureRequest) -> None:
    """Steps run ahead of a busy device: a plan written over the one on its way would give the last step's lengths."""
    specs = (plain(), plain(mask=m.Window(100)))
    batches = [unpadded(specs[0], [(200 * step, 1), (16 * step + 15, 1)]) for step in range(6)]
    held = static(2, 2, specs)
    hosts = [held.fill(batch) for batch in batches]
    held.plan(held.fill(batches[0]))
    held.layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = held.layers()
    inputs = []
    for batch in batches:
        held.fill(batch)
        inputs.append([each.clone() for each in (held.q, *held.pools, held.table, held.seq_lens, held.query_lens)])
    results = []
    request.getfixturevalue("no_waiting")
    torch.cuda._sleep(200_000_000)  # a tenth of a second, in which the host prepares all steps
    for values, step in zip(inputs, hosts, strict=True):
        for buffer, value in zip((held.q, *held.pools, held.table, held.seq_lens, held.query_lens), values, strict=True):
            buffer.copy_(value)
        held.plan(step)
        graph.replay()
        results.append([each.clone() for each in out])
    torch.cuda.set_sync_debug_mode("default")
    for batch, found in zip(batches, results, strict=True):
        for spec, each in zip(specs, found, strict=True):
            batch.spec = spec
            torch.testing.assert_close(each.double(), expected_of(batch)[:2], **close(BF16))


def test_a_graph_without_a_plan_is_refused() -> None:
    batch = unpadded(plain(), [(5, 1), (8, 1)])
    run, at = fi.FlashInferBackend(), paged(batch)
    run.attend(batch.q, at, [], batch.spec)
    why = "no plan for a CUDA graph of 2 tokens in 2 rows; call plan_on_host with captured=True"
    with pytest.raises(RuntimeError, match=why), torch.cuda.graph(torch.cuda.CUDAGraph()):
        run.attend(batch.q, at, [], batch.spec)

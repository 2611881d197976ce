"""Is what FlashAttention gives on a GPU right, through the provider that is installed there?

Against the predicate in float64. Slots that no sequence owns, and queries of pads, hold NaN.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch

from compile_attn.kernels import flash_attn, reference
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import DeviceStep, HostStep, Paged, PlannedSite, Request
from compile_attn.kernels.expr import H, Load
from compile_attn.kernels.flash_providers import HopperExtension, HopperPackage
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

pytestmark = pytest.mark.gpu

PHASES = {
    "decode": ([(1000, 1), (36, 1), (4095, 1), (0, 1), (0, 0), (15, 1), (2047, 1)], 1),  # the pad token makes a row a token
    "prefill": ([(0, 700), (0, 33), (0, 128)], 3),
    "mixed": ([(513, 1), (0, 300), (1000, 65), (0, 0), (15, 1), (3000, 1)], 2),
}
TOLERANCE = {torch.float16: 2**-9, torch.bfloat16: 2**-6}  # weights and output are rounded to the dtype


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    """FlashAttention 3, which alone takes pages of any size. Its tests are skipped where it is not installed, and only there."""
    if not HopperExtension().found() and not HopperPackage().found():
        pytest.skip(f"FlashAttention 3 is not installed: {HopperExtension.install}")
    yield
    torch.cuda.synchronize()


@dataclass
class Batch:
    spec: AttentionSpec
    q: torch.Tensor  # [T, Hq, D]
    kv: Paged
    query_lens: torch.Tensor
    keys: list[tuple[torch.Tensor, torch.Tensor]]  # of each sequence: [L, Hkv, D] and [L, Hkv, Dv]

    def attend(self) -> torch.Tensor:
        return backend("flash_attn").attend(self.q, self.kv, captured(), self.spec)

    def planned(self) -> torch.Tensor:
        """The same by a plan that a step would make once."""
        return attend_planned(self.q, self.kv, self.spec)

    def expected(self) -> torch.Tensor:
        out = torch.zeros(self.q.shape[0], self.spec.num_q_heads, self.spec.head_dim_v, dtype=torch.float64, device="cuda")
        sinks, first = [each.double() for each in captured()], 0
        for row, (k, v) in enumerate(self.keys):
            new, length = int(self.query_lens[row]), k.shape[0]
            q = self.q[first : first + new].double().transpose(0, 1)[None]
            i = torch.arange(length - new, length, device="cuda")[:, None]
            j = torch.arange(length, device="cuda")
            b = torch.full((1, 1, 1, 1), row, device="cuda")
            parts = (part.double().transpose(0, 1)[None] for part in (k, v))
            if new:
                out[first : first + new] = reference.attention(q, *parts, b, i, j, None, sinks, self.spec)[0].transpose(0, 1)
            first += new
        return out


def attend_planned(q: torch.Tensor, kv: Paged, spec: AttentionSpec) -> torch.Tensor:
    """What the second of two layers gives, that share a plan: the first must have left it as it was."""
    run = backend("flash_attn")
    shared = run.planned(spec)
    assert shared is not None
    at = (kv.block_table, kv.seq_lens, kv.cu_seqlens_q, kv.positions, kv.token_seq)
    kv = kv._replace(plan=run.plan(DeviceStep(*at, kv.k_pages.shape[1], q.dtype), shared))
    return [run.attend(q, kv, captured(), spec) for _ in range(2)][1]


def captured() -> list[torch.Tensor]:
    return [torch.linspace(-2, 4, 64, dtype=torch.bfloat16, device="cuda")]


def batch_of(
    spec: AttentionSpec,
    sequences: Sequence[tuple[int, int]],
    pad_tokens: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    max_pages: int | None = None,
) -> Batch:
    """Sequences of (context, new) tokens in shuffled pages; tables name pages of others beyond their length."""
    make = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make, device="cuda", dtype=torch.float32).to(dtype)

    lengths = [context + new for context, new in sequences]
    counts = [-(-length // page_size) for length in lengths]
    free = list(range(sum(counts) + 3))
    random.Random(0).shuffle(free)
    width = max_pages or max(counts) + 1
    table = torch.full((len(lengths), width), free[0], dtype=torch.int32)
    pools = [
        torch.full((len(free), page_size, spec.num_kv_heads, dim), torch.nan, dtype=dtype, device="cuda")
        for dim in (spec.head_dim, spec.head_dim_v)
    ]
    keys = []
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        table[row, :count] = pages
        parts = draw(length, spec.num_kv_heads, spec.head_dim), draw(length, spec.num_kv_heads, spec.head_dim_v)
        place = torch.arange(length, device="cuda")
        for pool, part in zip(pools, parts, strict=True):
            pool[pages.long().cuda()[place // page_size], place % page_size] = part
        keys.append(parts)
    query_lens = torch.tensor([new for _, new in sequences], dtype=torch.int32)
    tokens = int(query_lens.sum())
    q = draw(tokens + pad_tokens, spec.num_q_heads, spec.head_dim)
    q[tokens:] = torch.nan
    on_device = table.cuda(), torch.tensor(lengths, dtype=torch.int32).cuda(), query_lens.cuda()
    starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(*on_device, tokens + pad_tokens, page_size)
    return Batch(spec, q, Paged(*pools, *on_device[:2], starts, positions, token_seq), on_device[2], keys)


def check(batch: Batch) -> None:
    page_size, dtype = batch.kv.k_pages.shape[1], batch.q.dtype
    assert backend("flash_attn").reasons(Request(batch.spec, batch.q.device, dtype, page_size)) == ()
    found = batch.attend()
    assert found.dtype == dtype
    expected = batch.expected()
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype] / 4)
    assert not found[int(batch.query_lens.sum()) :].any()
    assert torch.equal(batch.planned(), found)


def spec_of(group: int = 4, kv_heads: int = 2, dims: tuple[int, int] = (128, 128), **more: Any) -> AttentionSpec:
    return AttentionSpec(group * kv_heads, kv_heads, *dims, scale=dims[0] ** -0.5, **more)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dims", [64, 80, 96, 128, 192, 256, (192, 128), (64, 256)], ids=str)
def test_head_sizes(dims: int | tuple[int, int], dtype: torch.dtype, phase: str) -> None:
    check(batch_of(spec_of(dims=dims if isinstance(dims, tuple) else (dims, dims)), *PHASES[phase], dtype))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("page_size", [16, 32, 48, 64, 128, 256])
def test_page_sizes(page_size: int, dims: tuple[int, int], phase: str) -> None:
    """What a page holds beyond its sequence, or held before, is NaN."""
    check(batch_of(spec_of(dims=dims), *PHASES[phase], page_size=page_size))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 16])
def test_groups(group: int, phase: str) -> None:
    check(batch_of(spec_of(group, dims=(64, 64)), *PHASES[phase]))


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"mask": m.Window(127)},
    "one key": {"mask": m.Window(0)},
    "wide window": {"mask": m.Window(100_000)},
    "bidirectional": {"mask": m.Bidirectional()},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": Load(0, H)},
    "sinks, window": {"mask": m.Window(300), "sinks": sympy.Float(0.5) * H},
    "softcap, window": {"mask": m.Window(300), "softcap": 2.0},
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, page_size: int, phase: str) -> None:
    check(batch_of(spec_of(**FEATURES[name]), *PHASES[phase], page_size=page_size))


@pytest.mark.parametrize("name", ["softcap", "window", "bidirectional"])
def test_features_in_float16(name: str) -> None:
    for phase in PHASES.values():
        check(batch_of(spec_of(**FEATURES[name]), *phase, torch.float16))


@pytest.mark.parametrize("name", ["window", "bidirectional", "sinks", "softcap"])
@pytest.mark.parametrize(
    "sequences",
    [[(0, 2), (50, 0)], [(900, 3), (100, 0), (0, 1), (17, 0)], [(4000, 4), (0, 0), (0, 0), (0, 0)], [(5, 0), (0, 2)]],
    ids=str,
)
def test_as_many_tokens_as_sequences_is_no_decode(sequences: list[tuple[int, int]], name: str) -> None:
    check(batch_of(spec_of(), sequences))
    check(batch_of(spec_of(**FEATURES[name]), sequences))


def test_only_pads() -> None:
    for pad_tokens in (3, 5):
        check(batch_of(spec_of(), [(40, 0), (0, 0), (0, 0)], pad_tokens))


@pytest.mark.parametrize(
    "sequences", [[(131_071, 1)], [(131_071, 1), (7, 1), (100_000, 1), (0, 1)], [(130_000, 64), (7, 1)]], ids=str
)
@pytest.mark.parametrize("name", ["softcap", "sinks, window"])
def test_long_contexts(sequences: list[tuple[int, int]], name: str) -> None:
    check(batch_of(spec_of(), sequences, max_pages=131_072 // 16))
    check(batch_of(spec_of(8, 1, **FEATURES[name]), sequences, max_pages=131_072 // 16))


@pytest.mark.parametrize("max_pages", [40, 8192])
def test_many_sequences(max_pages: int) -> None:
    lengths = random.Random(1)
    sequences = [(lengths.randrange(600), 1) for _ in range(500)] + [(0, 0)] * 12
    check(batch_of(spec_of(), sequences, 12, max_pages=max_pages))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["plain", "softcap", "sinks, window"])
def test_what_the_host_says(name: str, phase: str) -> None:
    """The same step divided as its table allows, and undivided because it is said to be even; once truly."""
    sequences, pad_tokens = PHASES[phase]
    batch = batch_of(spec_of(**FEATURES.get(name, {})), sequences, pad_tokens, max_pages=4096)
    site, lengths = PlannedSite(batch.spec, torch.bfloat16, torch.bfloat16), batch.kv.seq_lens.cpu()
    for seq_lens in (lengths, torch.full_like(lengths, 5000)):
        step = HostStep(batch.kv.block_table, seq_lens, batch.query_lens.cpu(), batch.q.shape[0], 16, False)
        backend("flash_attn").plan_on_host(step, [site])
        check(batch)


def test_pages_beyond_int32() -> None:
    small = batch_of(spec_of(1, 8), [(500, 1), (0, 90), (77, 3)])
    pages, used = 140_000, small.kv.k_pages.shape[0]  # 2.3e9 elements
    pools = []
    for part in (small.kv.k_pages, small.kv.v_pages):
        pools.append(torch.empty((pages, *part.shape[1:]), dtype=torch.bfloat16, device="cuda"))
        pools[-1][-used:] = part
    large = small.kv._replace(k_pages=pools[0], v_pages=pools[1], block_table=small.kv.block_table + (pages - used))
    found = backend("flash_attn").attend(small.q, large, [], small.spec)
    assert torch.equal(found, small.attend())


@pytest.mark.parametrize("lengths", [(300, 300), (1, 700), (33, 500), (500, 400)], ids=str)
@pytest.mark.parametrize("name", ["plain", "bidirectional", "softcap", "sinks", "softcap, window"])
def test_stateless(name: str, lengths: tuple[int, int]) -> None:
    spec = spec_of(**FEATURES.get(name, {}))
    make = torch.Generator("cuda").manual_seed(0)
    sizes = ((lengths[0], spec.num_q_heads), (lengths[1], spec.num_kv_heads), (lengths[1], spec.num_kv_heads))
    q, k, v = (torch.randn(2, *size, 128, generator=make, device="cuda").bfloat16().transpose(1, 2) for size in sizes)
    found = backend("flash_attn").attention(q, k, v, captured(), spec)
    exact = [each.double() for each in captured()]
    expected = backend("reference").attention(q.double(), k.double(), v.double(), exact, spec)
    torch.testing.assert_close(found.double(), expected, atol=2**-6, rtol=2**-8)


GRAPHS = {
    "decode": ([(9, 1), (700, 1), (0, 1), (33, 1)], [(1500, 1), (0, 1), (0, 0), (64, 1)], 4),
    "long decode": ([(9, 1), (30_000, 1), (0, 0), (0, 0)], [(15_000, 1), (40_000, 1), (30_000, 1), (20_000, 1)], 4),
    "drafts": ([(9, 1), (700, 1), (0, 1), (33, 1)], [(1500, 3), (77, 0), (0, 0), (64, 1)], 4),
    "mixed": ([(0, 40), (7, 1), (0, 0), (300, 20)], [(900, 1), (0, 0), (20, 59), (3, 1)], 64),
}


@pytest.mark.parametrize("name", ["plain", "sinks, window", "softcap"])
@pytest.mark.parametrize("lengths", GRAPHS)
def test_a_cuda_graph_holds_any_lengths(lengths: str, name: str) -> None:
    before, after, tokens = GRAPHS[lengths]
    spec = spec_of(**FEATURES.get(name, {}))
    batches = [batch_of(spec, each, tokens - sum(new for _, new in each), max_pages=3000) for each in (before, after)]
    static = Static(batches, tokens)
    static.fill(batches[0])
    static.step()
    torch.cuda.set_sync_debug_mode("error")  # nothing waits for the device
    try:
        static.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = static.step()
    for batch in (batches[1], batches[0], batches[1], batches[1]):
        static.fill(batch)
        graph.replay()
        eager = batch.attend()
        assert torch.equal(out, eager)  # the same kernels, splits and order; planned there, not here
        torch.testing.assert_close(out.double(), batch.expected(), atol=2**-6, rtol=2**-8)


class Static:
    """Buffers of a step whose addresses never change."""

    def __init__(self, batches: Sequence[Batch], tokens: int) -> None:
        self.spec, self.tokens = batches[0].spec, tokens
        shapes = [self._parts(batch) for batch in batches]
        self.buffers = [torch.empty([max(sizes) for sizes in zip(*(each.shape for each in parts), strict=True)],
                                    dtype=parts[0].dtype, device="cuda") for parts in zip(*shapes, strict=True)]  # fmt: skip

    @staticmethod
    def _parts(batch: Batch) -> tuple[torch.Tensor, ...]:
        return batch.q, batch.kv.k_pages, batch.kv.v_pages, batch.kv.block_table, batch.kv.seq_lens, batch.query_lens

    def fill(self, batch: Batch) -> None:
        for buffer, value in zip(self.buffers, self._parts(batch), strict=True):
            buffer.fill_(torch.nan if buffer.is_floating_point() else 0)
            buffer[tuple(slice(0, size) for size in value.shape)] = value

    def step(self) -> torch.Tensor:
        q, k_pages, v_pages, *at = self.buffers
        starts, positions, _, token_seq = torch.ops.paged_attn.build_metadata(*at, self.tokens, k_pages.shape[1])
        kv = Paged(k_pages, v_pages, at[0], at[1], starts, positions, token_seq)
        return attend_planned(q, kv, self.spec)


def test_the_provider_that_was_found() -> None:
    """For the log of a run."""
    provider = flash_attn._chosen(spec_of(), torch.device("cuda", 0), torch.bfloat16, 16)
    assert isinstance(provider, (HopperExtension, HopperPackage))

"""Which attention does FlashAttention compute, and with which arguments?

Whatever provider is installed (`flash_providers`) serves the same specs in the same way. Lengths stay on the device: what a
call asks for on the host follows from shapes, so a CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch

from compile_attn.kernels import flash_rows, flash_splits
from compile_attn.kernels.backend import Backend, DeviceStep, HostStep, Paged, PlannedSite, Request, maximum_before_scale, plan_size
from compile_attn.kernels.evaluate import constant, evaluator
from compile_attn.kernels.expr import H, I, J, Load
from compile_attn.kernels.flash_providers import HEAD_DIMS, PROVIDERS, Call, Grid, Provider
from compile_attn.kernels.flash_rows import Rows
from compile_attn.kernels.mask import Bidirectional, Causal, Window
from compile_attn.kernels.spec import AttentionSpec, Feature

_CURE = "choose kernel='auto'"
_MOST_READY = 64  # specs: more than a model has
_LARGE_PAGES = 64  # tokens; no tile has fewer keys, so smaller pages are never read whole
_MULTIPROCESSORS = 132  # of a Hopper device; asked of the device where there is one


class FlashAttentionBackend(Backend):
    """Causal, windowed and bidirectional attention with softcap, sinks or ALiBi, as far as the installed provider goes."""

    name = "flash_attn"
    features = frozenset[Feature]().union(*(provider.features for provider in PROVIDERS))
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    plan_numbers = 8  # four lists of rows, and a schedule of at most four numbers a row and one

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Where those of keys and values are equal; beside them some that differ (`Provider.reasons`)."""
        return list(HEAD_DIMS)

    def __init__(self) -> None:
        # By address of the block table: B and T of the coming step, and what is even in it. Wrong, it costs speed and no more.
        self._said: dict[int, tuple[tuple[int, int], dict[AttentionSpec, bool]]] = {}
        self._ready: dict[int, _Ready] = {}  # by address of a spec: what its last plan says, for the other layers of the step

    def limits(self, request: Request) -> tuple[str, ...]:
        spec, out = request.spec, []
        if not isinstance(spec.mask, (Causal, Window, Bidirectional)):
            out.append(f"knows causal, windowed and bidirectional masks, not '{spec.mask.words()}'; {_CURE}")
        out += maximum_before_scale(spec)
        if spec.sinks is not None and not _by_head(spec.sinks):
            out.append(f"takes one sink a head, not {spec.sinks}; {_CURE}")
        if spec.alibi_slope() is not None and (request.page_size is None or not spec.mask.causal()):
            out.append(f"takes an ALiBi bias in paged calls with a causal mask only; {_CURE}")  # elsewhere it means -|i - j|
        return (*out, *_against_providers(request))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        ours = _chosen(spec, q.device, q.dtype, None)
        batch, heads, queries = q.shape[:3]
        # A provider places the last query at the last key; here the first stands at the first. Keys beyond the last query are
        # hidden from all, so that what remains is a shift to the right.
        keys = k.shape[2] if isinstance(spec.mask, Bidirectional) else min(k.shape[2], queries)
        if not batch * queries * keys:
            return q.new_zeros((batch, heads, queries, v.shape[3]))
        left, right = _window(spec, queries - keys)

        def packed(tensor: torch.Tensor, length: int) -> torch.Tensor:
            return _aligned(tensor[:, :, :length].transpose(1, 2).flatten(0, 1))

        starts, k_starts = (
            torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device) for length in (queries, keys)
        )
        grid = Grid(spec, q.dtype, None, starts, None, None, None, queries, keys, left, right, splits=1)
        sinks, slopes = _vectors(spec, captured, q)
        call = Call(grid, packed(q, queries), packed(k, keys), packed(v, keys), None, k_starts, sinks, slopes)
        return ours.run(call).view(batch, queries, heads, v.shape[3]).transpose(1, 2)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        if kv.k_pages.dtype != q.dtype:
            raise ValueError(f"flash_attn reads pages of {q.dtype}, the dtype of the queries, not {kv.k_pages.dtype}; {_CURE}")
        if not q.numel():
            return q.new_zeros((*q.shape[:2], kv.v_pages.shape[3]))
        ready = None if kv.plan is None else self._ready.get(id(spec))
        if ready is None or ready.plan is not kv.plan or ready.spec is not spec:
            ready = self._prepare(q, kv, spec)
        sinks, slopes = _vectors(spec, captured, q)
        call = Call(ready.grid, _aligned(q), kv.k_pages, kv.v_pages, kv.block_table, None, sinks, slopes, ready.schedule)
        return ready.provider.run(call)

    def _prepare(self, q: torch.Tensor, kv: Paged, spec: AttentionSpec) -> _Ready:
        shape, even = self._said.get(kv.block_table.data_ptr(), (None, {}))
        is_even = shape == (kv.block_table.shape[0], q.shape[0]) and even.get(spec, False)
        fit = _fit(spec, q.device, q.dtype, kv.k_pages.shape[1], *kv.block_table.shape, q.shape[0], is_even)
        built = flash_rows.build(kv, spec.mask.causal()) if kv.plan is None else kv.plan
        rows = flash_rows.read(built, q.shape[0], fit.sequences)
        schedule = rows.behind[: fit.schedule_size] if kv.plan is not None and fit.schedule_size else None
        ready = _Ready(spec, kv.plan, fit.provider, fit.grid(rows), schedule)
        if kv.plan is not None:
            if len(self._ready) >= _MOST_READY:
                self._ready.clear()
            self._ready[id(spec)] = ready
        return ready

    def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
        """Remember whether the coming step is even. A graph of decodes will see other lengths than these, and asks nothing."""
        table, even = step.block_table, dict[AttentionSpec, bool]()
        for site in () if step.captured and step.num_tokens == table.shape[0] else sites:
            lengths = step.query_lens.numpy(), step.seq_lens.numpy()
            even[site.spec] = flash_splits.even(site.spec, *lengths, _multiprocessors(table.device))
        self._said[table.data_ptr()] = (table.shape[0], step.num_tokens), even

    def planned(self, spec: AttentionSpec) -> AttentionSpec:
        """Rows depend on the mask, the schedule on heads and softcap, which choose tiles, and on which provider can."""
        softcap = None if spec.softcap is None else 1.0
        bias, sinks = None if spec.bias is None else J - I, None if spec.sinks is None else sympy.S.Zero
        sizes = spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim_v
        return AttentionSpec(*sizes, spec.mask, softcap=softcap, bias=bias, sinks=sinks)

    def plan(self, step: DeviceStep, spec: AttentionSpec) -> torch.Tensor:
        """Rows, and behind them the provider's schedule."""
        sequences, tokens, device = step.block_table.shape[0], step.token_seq.shape[0], step.token_seq.device
        plan = flash_rows.build(step, spec.mask.causal(), plan_size(sequences, self.plan_numbers) - flash_rows.size(sequences))
        fit = _fit(spec, device, step.dtype, step.page_size, *step.block_table.shape, tokens, even=False)
        if fit.splits > 1:
            rows = flash_rows.read(plan, tokens, sequences)
            schedule = fit.provider.schedule(fit.grid(rows))
            if schedule is not None:
                rows.behind[: schedule.shape[0]] = schedule
        return plan


@dataclass(frozen=True)
class _Ready:
    """All of a call but what differs between layers."""

    spec: AttentionSpec
    plan: torch.Tensor | None
    provider: Provider
    grid: Grid
    schedule: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class _Fit:
    """Which provider runs steps of some shapes, and what it is told that follows from them."""

    provider: Provider
    spec: AttentionSpec
    device: torch.device
    dtype: torch.dtype
    page_size: int
    sequences: int
    tokens: int
    most_keys: int
    left: int
    right: int
    splits: int

    def grid(self, rows: Rows) -> Grid:
        left_pads = rows.zeros if self.page_size >= _LARGE_PAGES else None
        at = (rows.starts, rows.lengths, rows.of_table, left_pads, rows.most_queries, self.most_keys)
        return Grid(self.spec, self.dtype, self.page_size, *at, self.left, self.right, self.splits)

    @functools.cached_property
    def schedule_size(self) -> int:
        """Numbers in a schedule: the same for all lengths, so a schedule of nothing tells it.

        Undivided keys need none: then it is made faster beside the kernel before, in each layer, than reset behind each.
        """
        if self.splits == 1:
            return 0
        nothing = torch.zeros(plan_size(self.sequences, 4), dtype=torch.int32, device=self.device)
        schedule = self.provider.schedule(self.grid(flash_rows.read(nothing, self.tokens, self.sequences)))
        return 0 if schedule is None else schedule.shape[0]


@functools.lru_cache(maxsize=1024)
def _fit(
    spec: AttentionSpec,
    device: torch.device,
    dtype: torch.dtype,
    page_size: int,
    sequences: int,
    most_pages: int,
    tokens: int,
    even: bool,
) -> _Fit:
    (left, right), most_keys = _window(spec, 0), most_pages * page_size
    splits = flash_splits.splits(spec, tokens, sequences, most_keys, _multiprocessors(device), even)
    provider = _chosen(spec, device, dtype, page_size)
    return _Fit(provider, spec, device, dtype, page_size, sequences, tokens, most_keys, left, right, splits)


def _window(spec: AttentionSpec, shift: int) -> tuple[int, int]:
    """Keys to the left and right of a query that stands `shift` places left of its true position."""
    if isinstance(spec.mask, Bidirectional):
        return -1, -1
    window = spec.mask.window()
    if window is None:
        return -1, shift
    if window < shift:
        raise ValueError(f"flash_attn: with {shift} fewer keys than queries and {spec.mask.words()}, queries see no key; {_CURE}")
    return window - shift, shift


def _vectors(
    spec: AttentionSpec, captured: Sequence[torch.Tensor], q: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sinks and ALiBi slopes, one a head."""
    if spec.sinks is None and spec.bias is None:
        return None, None
    slope = _slope(spec)
    sinks = None if spec.sinks is None else _per_head(spec.sinks, spec.num_q_heads, captured, q).to(q.dtype)
    return sinks, None if slope is None else _per_head(slope, spec.num_q_heads, captured, q).float()


_slope = functools.lru_cache(maxsize=256)(AttentionSpec.alibi_slope)  # symbolic work, once a spec


def _per_head(expr: sympy.Expr, heads: int, captured: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if isinstance(expr, Load) and all(index == H or index.is_Integer for index in expr.args[1:]):
        places = tuple(slice(None) if index == H else int(index) for index in expr.args[1:])
        vector = captured[int(expr.args[0])][places]
        if vector.shape == (heads,):
            return vector.contiguous()  # as it lies: no launch
    env = {"h": torch.arange(heads, device=like.device), "captured": captured, "dtype": torch.float32}
    return constant(evaluator(expr)(env), like.device).expand(heads).contiguous()


def _by_head(expr: sympy.Expr) -> bool:
    return bool(expr.free_symbols <= {H})


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Kernels read 16 bytes at a time along the last axis."""
    *strides, last = tensor.stride()
    apart = math.gcd(*strides) * tensor.element_size()
    return tensor if last == 1 and (apart | tensor.data_ptr()) % 16 == 0 else tensor.contiguous()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _MULTIPROCESSORS


# Which provider?


def _against_providers(request: Request) -> tuple[str, ...]:
    """Nothing if one can serve it; else what is against each that is installed, and how to have one that could."""
    out: list[str] = []
    absent: list[Provider] = []
    against = {provider: provider.reasons(request) for provider in PROVIDERS}
    for provider, reasons in against.items():
        if not provider.found():
            absent += [provider] if not reasons else []
            continue
        trouble = None if reasons or request.device.type != "cuda" or not torch.cuda.is_available() else provider.trouble()
        reasons = reasons if trouble is None else (trouble,)
        if not reasons:
            return ()
        out += [f"{reason} (through {provider.name}); {_CURE}" for reason in reasons]
    if absent:
        ways = ", or ".join(f"{provider.name} ({provider.install})" for provider in absent)
        out.append(f"needs {ways}, not installed here; install one, or {_CURE}")
    elif not out:
        out += dict.fromkeys(f"{reason} (through {each.name}); {_CURE}" for each, reasons in against.items() for reason in reasons)
    return tuple(out)


@functools.lru_cache(maxsize=256)
def _chosen(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, page_size: int | None) -> Provider:
    """The best provider that serves this."""
    request = Request(spec, device, dtype, page_size)
    for provider in PROVIDERS:
        if not provider.reasons(request) and provider.found() and provider.trouble() is None:
            return provider
    raise ValueError(f"flash_attn cannot: {'; '.join(_against_providers(request))}. The site: {spec.words()}")

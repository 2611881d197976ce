"""What can FlashInfer serve, and how does a call find the plan that was made for it on the host?

Before a step `plan_on_host` makes one plan for each distinct problem of the model's sites; `attend` finds it by the address of
the step's block table, and reads nothing on the host. A CUDA graph holds addresses: what it is recorded with is kept for
that block table and those shapes, and planned anew before every replay.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import sympy
import torch
from torch.utils.weak import TensorWeakRef

from compile_attn.kernels.backend import FP8, FP8_NAMES, Backend, HostStep, Paged, PlannedSite, Request, maximum_before_scale
from compile_attn.kernels.evaluate import constant, evaluator
from compile_attn.kernels.expr import H, Load
from compile_attn.kernels.flashinfer_plans import Plan, Problem, Requests, Step, capability, parts
from compile_attn.kernels.flashinfer_ragged import RaggedPlans
from compile_attn.kernels.flashinfer_score import variant
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.text import print_expr

_OLDEST = (0, 7, 2)  # before, rows without keys, as pad tokens are, could give NaN
_FEATURES = (Feature.GQA, Feature.SOFTCAP, Feature.ALIBI, Feature.SINKS, Feature.BIDIRECTIONAL, Feature.WINDOW)


class FlashInferBackend(Backend):
    """Causal, windowed and bidirectional attention of 16-bit queries, over pages of 16 or 8 bits."""

    name = "flashinfer"
    features = frozenset(_FEATURES)
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    kv_dtypes = FP8
    head_dims = frozenset({64, 128, 256})

    def __init__(self) -> None:
        self._paged = _PagedPlans()
        self._ragged = RaggedPlans()

    def limits(self, request: Request) -> tuple[str, ...]:
        spec, cure = request.spec, "choose kernel='auto'"
        out = list(_common_limits(request))
        slope = spec.alibi_slope()
        if slope is not None and not is_standard(slope, spec.num_q_heads):
            out.append(f"knows the standard ALiBi slopes of {spec.num_q_heads} heads, not {print_expr(slope)}; {cure}")
        out += maximum_before_scale(spec)
        extras = [name for name, has in (("softcap", spec.softcap), ("ALiBi", spec.bias), ("sinks", spec.sinks)) if has is not None]
        if len(extras) > 1:
            out.append(f"has softcap, ALiBi and sinks one at a time, not {' with '.join(extras)}; {cure}")
        if spec.sinks is not None and request.page_size is None:
            out.append(f"has sinks over pages, not in a stateless call; {cure}")
        return tuple(out)

    def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
        problems = {self._problem(site.spec, site.dtype, site.kv_dtype, step.page_size) for site in sites}
        self._paged.begin(step, problems)

    def drop_plans(self, block_table: torch.Tensor) -> None:
        self._paged.drop(block_table)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        out = q.new_empty(q.shape)
        if out.numel() == 0:
            return out
        problem = self._problem(spec, q.dtype, kv.k_pages.dtype, kv.k_pages.shape[1])
        plans = self._paged.plans(problem, kv, q.shape[0])
        q = aligned(q if kv.k_scale is None else _by_kv_head(q, kv.k_scale))
        sinks = _sinks(spec, captured, q.device)
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            for plan, tokens in plans:
                plan.run(q[tokens], kv.k_pages, kv.v_pages, sinks, out[tokens])
        return out if kv.v_scale is None else _by_kv_head(out, kv.v_scale)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        return self._ragged.attention(aligned(q), aligned(k), aligned(v), Problem.of(spec, q.dtype, k.dtype, 0))

    def _problem(self, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int) -> Problem:
        return Problem.of(spec, dtype, kv_dtype, page_size)


class FlashInferJitBackend(FlashInferBackend):
    """The same with any score of numbers, head and positions, as a variant that the library compiles: a minute at first use.

    Where the library has a kernel for the score, that one is faster.
    """

    name = "flashinfer_jit"
    features = frozenset({*_FEATURES, Feature.BIAS, Feature.SCORE})
    phases = frozenset({"paged"})

    def limits(self, request: Request) -> tuple[str, ...]:
        out = list(_common_limits(request))
        try:
            variant(request.spec)
        except ValueError as error:
            out.append(f"cannot print the score: {error}; choose kernel='auto'")
        return tuple(out)

    def _problem(self, spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int) -> Problem:
        return Problem.of(spec, dtype, kv_dtype, page_size, printed=True)


def _common_limits(request: Request) -> Iterator[str]:
    cure = "choose kernel='auto'"
    yield from (f"{reason}, or {cure}" for reason in _library())
    if (0, 0) < capability(request.device) < (8, 0):
        yield f"needs a GPU of compute capability 8.0, not {'.'.join(map(str, capability(request.device)))}; {cure}"
    if not request.spec.mask.is_bounds():
        yield f"knows masks that are a causal bound and a window, not '{request.spec.mask.words()}'; {cure}"


def get_fp8_dtype_for_flashinfer(kv_cache_dtype: str) -> torch.dtype:
    """The dtype of pages that a name of fp8 means. ValueError for any other name."""
    if kv_cache_dtype not in FP8_NAMES:
        raise ValueError(f"kv_cache_dtype={kv_cache_dtype!r} is no name of fp8; choose one of {', '.join(FP8_NAMES)}")
    return FP8_NAMES[kv_cache_dtype]


_Shape = tuple[int, int, int, int]  # rows, tokens, page size, pages of a row at most


@dataclass(frozen=True)
class _UnderWay:
    """A step that was planned and may run: once, or as the replay of a graph."""

    table: TensorWeakRef  # says whether an address still is this table's
    shape: _Shape
    steps: tuple[Step, ...]  # with fixed addresses: one
    plans: dict[Any, Plan]


class _PagedPlans:
    """The step under way of every block table, by its address, and what the graphs of that table hold, by their shapes too."""

    def __init__(self) -> None:
        self._under_way: dict[int, _UnderWay] = {}
        self._graphs: dict[tuple[int, _Shape], _UnderWay] = {}
        self._rooms: dict[int, tuple[TensorWeakRef, torch.Tensor]] = {}
        self._plans: dict[Any, Plan] = {}

    def begin(self, host: HostStep, problems: set[Problem]) -> None:
        """Take a step under way, and plan it for all problems."""
        self._forget_the_dead()
        table, lengths = host.block_table, (host.seq_lens, host.query_lens, host.num_tokens, host.page_size)
        shape = (table.shape[0], host.num_tokens, host.page_size, table.shape[1])
        asked = Requests.of(*lengths, fixed=host.captured, pinned=table.device.type == "cuda")
        if host.captured:
            now = self._graphs[table.data_ptr(), shape] = self._replayed(asked[0], table, shape)
        else:
            steps = tuple(_sent(each, table, None, None, fixed=False) for each in asked)
            now = _UnderWay(_reference(table), shape, steps, self._plans)
        self._under_way[table.data_ptr()] = now
        for problem in problems:
            self._prepared(problem, table, now)

    def drop(self, table: torch.Tensor) -> None:
        """Forget this table's step under way and its graphs."""
        address = table.data_ptr()
        self._under_way.pop(address, None)
        self._rooms.pop(address, None)
        self._graphs = {key: kept for key, kept in self._graphs.items() if key[0] != address}

    def plans(self, problem: Problem, kv: Paged, tokens: int) -> list[tuple[Plan, slice]]:
        """Of the step under way, with the tokens of each; for a step that nobody began, made here after waiting for the device."""
        table = kv.block_table
        shape = (table.shape[0], tokens, kv.k_pages.shape[1], table.shape[1])
        now = self._under_way.get(table.data_ptr())
        recording = table.is_cuda and torch.cuda.is_current_stream_capturing()
        if now is not None and now.shape == shape and now.table() is not None and (now.steps[0].fixed or not recording):
            return self._prepared(problem, table, now, recording)
        if recording:
            raise RuntimeError(
                f"flashinfer has no plan for a CUDA graph of {tokens} tokens in {shape[0]} rows; "
                "call plan_on_host with captured=True before the graph is recorded, and before every replay"
            )
        return self._prepared(problem, table, self._read(kv, shape))

    def _read(self, kv: Paged, shape: _Shape) -> _UnderWay:
        """A step from the lengths on the device."""
        seq_lens, starts, table = kv.seq_lens.cpu(), kv.cu_seqlens_q.cpu(), kv.block_table
        asked = Requests.of(seq_lens, starts.diff(), *shape[1:3], fixed=False, pinned=table.is_cuda)
        steps = tuple(_sent(each, table, None, None, fixed=False) for each in asked)
        return _UnderWay(_reference(table), shape, steps, self._plans)

    def _replayed(self, asked: Requests, table: torch.Tensor, shape: _Shape) -> _UnderWay:
        """In the buffers and by the plans that a graph of this table and shape was recorded with."""
        kept = self._graphs.get((table.data_ptr(), shape))
        if kept is None:
            owner = _reference(table)
            step = _sent(asked, table, None, self._room(table, owner, asked.count), fixed=True)
            return _UnderWay(owner, shape, (step,), {})
        last = kept.steps[0]
        if last.requests.single != asked.single:
            raise ValueError(
                f"flashinfer: a CUDA graph of {shape[1]} tokens in {shape[0]} rows was planned for "
                f"{'one token a row' if last.requests.single else 'rows of several tokens'}; give its other steps the same form"
            )
        return _UnderWay(kept.table, shape, (_sent(asked, table, last.packed, last.indices, fixed=True),), kept.plans)

    def _prepared(self, problem: Problem, table: torch.Tensor, now: _UnderWay, recording: bool = False) -> list[tuple[Plan, slice]]:
        found = []
        for step in now.steps:
            asked = step.requests
            rows, most_pages = (now.shape[0], now.shape[3]) if step.fixed else (asked.count, asked.most_pages)  # as at every replay
            if asked.single:
                kernel = problem.for_single(rows, most_pages * now.shape[2])
            else:
                kernel = problem.for_many(len(asked.tokens) // rows, table.device)
            key = (problem, kernel, asked.single, table.device)
            plan = now.plans.get(key)
            if recording and (plan is None or plan.step is not step):
                raise RuntimeError(
                    f"flashinfer was not told of {problem} before a CUDA graph is recorded; name every site in plan_on_host"
                )
            with torch.cuda.device_of(table):  # type: ignore[no-untyped-call]
                if plan is None:
                    now.plans[key] = plan = Plan(problem, kernel, step)
                try:
                    plan.prepare(step)
                except RuntimeError as error:
                    if not problem.goes_without_fa3(kernel, error):
                        raise
                    del now.plans[key]
                    return self._prepared(problem, table, now, recording)
            found.append((plan, slice(asked.tokens.start, asked.tokens.stop)))
        return found

    def _room(self, table: torch.Tensor, owner: TensorWeakRef, count: int) -> torch.Tensor:
        """For the pages of any step of this table. One step of a table is under way at a time, so its graphs share it."""
        base, width = table if table._base is None else table._base, table.shape[1]
        most = max(count * width, base.numel())
        kept = self._rooms.get(table.data_ptr())
        if kept is None or kept[0]() is None or kept[1].numel() < most:
            self._rooms[table.data_ptr()] = kept = (owner, torch.empty(most, dtype=torch.int32, device=table.device))
        return kept[1]

    def _forget_the_dead(self) -> None:
        self._under_way = {at: kept for at, kept in self._under_way.items() if kept.table() is not None}
        self._graphs = {key: kept for key, kept in self._graphs.items() if kept.table() is not None}
        self._rooms = {at: kept for at, kept in self._rooms.items() if kept[0]() is not None}


def _reference(table: torch.Tensor) -> TensorWeakRef:
    """Alive as long as the memory: a view may be made for one call, its base is kept."""
    return TensorWeakRef(table if table._base is None else table._base)


def _sent(asked: Requests, table: torch.Tensor, packed: torch.Tensor | None, indices: torch.Tensor | None, *, fixed: bool) -> Step:
    """Copy the requests to the device and gather their pages there, into these buffers or new ones."""
    from compile_attn.kernels.flashinfer_triton import gather_pages

    if packed is None:
        packed = torch.empty(asked.packed.shape, dtype=torch.int32, device=table.device)
    if indices is None:
        indices = torch.empty(asked.pages, dtype=torch.int32, device=table.device)
    packed.copy_(asked.packed, non_blocking=True)
    rows, _, kv_indptr, _ = parts(packed)
    gather_pages(table, rows, kv_indptr, asked.most_pages, indices)
    return Step(asked, packed, indices, fixed)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels load 16 bytes at a time: a tensor in which that cannot be is copied."""
    whole = 16 // tensor.dtype.itemsize
    fits = tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0
    fits = fits and all(stride % whole == 0 for stride in tensor.stride()[:-1])
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)


def _by_kv_head(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """tensor [T, Hq, D] times a float32 scale, one or one a KV head, rounded once: the scale stays on the device."""
    grouped = tensor.view(tensor.shape[0], scale.numel(), -1, tensor.shape[2])
    return torch.mul(grouped, scale.reshape(-1, 1, 1), out=torch.empty_like(grouped)).view(tensor.shape)


def _sinks(spec: AttentionSpec, captured: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor | None:
    """One float32 a head."""
    if spec.sinks is None:
        return None
    if isinstance(spec.sinks, Load) and spec.sinks.args[1:] == (H,):
        return captured[int(spec.sinks.args[0])].to(torch.float32).contiguous()
    env = {"h": torch.arange(spec.num_q_heads, device=device), "captured": captured, "dtype": torch.float32}
    value = constant(_sink_of(spec.sinks)(env), device).to(torch.float32)
    return value.expand(spec.num_q_heads).contiguous()


@functools.lru_cache(maxsize=256)
def _sink_of(sinks: sympy.Expr) -> Any:
    return evaluator(sinks)


def is_standard(slope: sympy.Expr, heads: int) -> bool:
    """Is slope(h), for every head, what the library computes for ALiBi by itself?"""
    if slope.has(Load):
        return False
    return all(math.isclose(float(slope.subs(H, h)), standard, rel_tol=1e-6) for h, standard in enumerate(standard_slopes(heads)))


def standard_slopes(heads: int) -> list[float]:
    """Powers of 2^(-8/n), n the power of 2 up to the number of heads; the other heads take odd powers of 2^(-4/n)."""
    n = 1 << (heads.bit_length() - 1)
    return [2.0 ** (-8.0 / n * (1 + h)) if h < n else 2.0 ** (-4.0 / n * (1 + 2 * (h - n))) for h in range(heads)]


@functools.cache
def _library() -> tuple[str, ...]:
    """What is wrong with the installed library. Looks for it without importing it."""
    needed = ".".join(map(str, _OLDEST))
    pip = f"pip install 'flashinfer-python>={needed}'"
    if importlib.util.find_spec("flashinfer") is None:
        return (f"needs FlashInfer, which is not installed; {pip}",)
    try:
        found = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        return ()  # unpacked without its record: whoever did that chose the version
    release = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    return () if release >= _OLDEST else (f"needs FlashInfer {needed} or newer, found {found}; {pip}",)

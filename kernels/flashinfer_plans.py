"""What does FlashInfer plan on the host, for which requests, and how long does a plan hold?

A `Problem` is what a compiled module and a plan depend on beside lengths. `Requests` are the rows of a step as FlashInfer
takes them. A `Plan` is one wrapper of the library, which holds the plan of one step at a time.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compile_attn.kernels.batch import page_bounds
from compile_attn.kernels.flashinfer_score import variant
from compile_attn.kernels.spec import AttentionSpec

_Array = np.ndarray[Any, np.dtype[np.int32]]
_WORKSPACE = 64 << 20  # bytes for the parts of split requests: no more are needed outside a CUDA graph
_without_fa3: set[tuple[int, torch.dtype]] = set()  # head size and dtype, found out when a plan was made
_LONG = 128  # new tokens a request, on average, from which on FA3's kernel, which splits no keys, is faster


@dataclass(frozen=True)
class Problem:
    """What a wrapper is made for. Sites that are equal in it share one plan a step."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of queries
    kv_dtype: torch.dtype  # of pages
    page_size: int  # 0: stateless
    scale: float
    causal: bool
    window: int  # keys to the left of the query, itself not counted; -1: all
    softcap: float  # 0: none
    alibi: bool
    sinks: bool
    score: tuple[str, str] | None = None  # name and declaration of a variant that computes it; then scale and softcap say nothing

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(spec: AttentionSpec, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, printed: bool = False) -> Problem:
        """What of a spec that `FlashInferBackend.limits` lets pass matters to the library. `printed`: compile the score."""
        window = spec.mask.window()
        return Problem(
            spec.num_q_heads,
            spec.num_kv_heads,
            spec.head_dim,
            dtype,
            kv_dtype,
            page_size,
            1.0 if printed else float(spec.scale),
            spec.mask.causal(),
            -1 if window is None else window,
            0.0 if printed else float(spec.softcap or 0),
            spec.bias is not None and not printed,
            spec.sinks is not None,
            variant(spec) if printed else None,
        )

    @property
    def compiled(self) -> bool:
        """Does it need a variant, compiled at first use?"""
        return self.sinks or self.score is not None

    def for_single(self, requests: int, longest: int) -> str:
        """The library's kernel for one token a request, of sequences no longer than that."""
        if self.compiled:
            return "fa2"
        # Only tensor cores skip what is before a window, and they convert fp8 pages faster. What else decides was measured on an
        # H200 with 8 KV heads: tensor cores are faster from 4 query heads a KV head on, unless there is little to read.
        group, programs = self.num_q_heads // self.num_kv_heads, requests * self.num_kv_heads
        little = (
            longest <= 256 or (longest <= 1024 and programs <= 64) if self.head_dim == 64 else longest <= 256 and programs >= 1024
        )
        cores = group < 4 or (group == 4 and self.head_dim <= 128 and little)
        return "cuda cores" if cores and self.kv_dtype.itemsize == 2 and self.window < 0 else "tensor cores"

    def for_many(self, tokens_each: int, device: torch.device) -> str:
        """The library's kernel for about that many tokens a request. FA3 splits no keys, and only Hopper has it."""
        # A template of FA3 takes minutes to compile: it is used for plain attention alone.
        plain = not (self.alibi or self.compiled or self.softcap) and self.window < 0 and self.dtype == self.kv_dtype
        plain = plain and (self.head_dim, self.dtype) not in _without_fa3
        return "fa3" if plain and tokens_each >= _LONG and capability(device) == (9, 0) else "fa2"

    def goes_without_fa3(self, kernel: str, error: RuntimeError) -> bool:
        """Does the error say that there is no FA3 for these heads, nor a compiler? Then FA2 takes its place from now on."""
        if kernel != "fa3" or type(error).__name__ != "MissingJITCacheError":
            return False
        _without_fa3.add((self.head_dim, self.dtype))
        warnings.warn(
            f"flashinfer has no FA3 kernel for head size {self.head_dim} in {self.dtype} and may not compile one here; prompts go "
            "through FA2, which is slower; unset FLASHINFER_DISABLE_JIT, or install a flashinfer-jit-cache that has it",
            stacklevel=2,
        )
        return True

    def options(self) -> dict[str, Any]:
        """What every `plan` of the library is told."""
        return {
            "pos_encoding_mode": "ALIBI" if self.alibi else "NONE",
            "sm_scale": self.scale,
            "window_left": self.window,
            "logits_soft_cap": self.softcap,
            "q_data_type": self.dtype,
            "kv_data_type": self.kv_dtype,
        }

    def variant(self) -> tuple[list[Any], dict[str, Any]]:
        """jit_args and jit_kwargs of the variant: the printed score's, or the library's own with sinks."""
        if self.score is not None:
            label, (name, source) = self.score[0], self.score
        else:
            found = importlib.import_module("flashinfer.jit.attention.variants").attention_sink_decl
            label, name, source = "sink", "AttentionSink", found["fa2"]
        # The module's name tells apart what it is compiled for: the library's own wrapper for sinks names less.
        names = [str(dtype).removeprefix("torch.").replace("float", "f") for dtype in (self.dtype, self.kv_dtype)]
        module = f"paged_attn_{label}_{'_'.join(names)}_{self.head_dim}_swa_{self.window >= 0}"
        tensors = (["sink"], ["float"]) if self.sinks else ([], [])
        dtypes = (self.dtype, self.kv_dtype, self.dtype, torch.int32)
        extra = (*tensors, ["sm_scale"], ["double"], name, source)
        options = {"use_sliding_window": self.window >= 0, "paged_kv_stride_mode": "equal"}
        return [module, *dtypes, self.head_dim, self.head_dim, *extra], options


class Requests:
    """Rows of a step that have new tokens, as four int32 arrays in one host buffer, so that one copy moves all.

    Pad tokens belong to requests that hold one page and no key, so that no page is read for them and their output is 0.
    """

    def __init__(self, lengths: _Array, new: _Array, tokens: range, page_size: int, *, fixed: bool, pinned: bool) -> None:
        """`tokens`: which of the step's tokens are these rows' new ones and, behind them, pads."""
        pads, self.tokens = len(tokens) - int(new.sum()), tokens
        # A graph of as many tokens as rows is one of decoding; else its rows may have several tokens at the next replay.
        self.single = int(new.max(initial=0)) <= 1 and (not fixed or len(tokens) == len(new))
        if self.single:  # a request a token
            rows = np.concatenate([np.flatnonzero(new), np.full(pads, -1, dtype=np.int64)])
            queries = np.ones_like(rows)
        else:  # a request a row, and one for all pad tokens; as many at every step, where addresses are fixed
            rows = np.where(new > 0, np.arange(len(new)), -1) if fixed else np.flatnonzero(new)
            queries = np.where(rows >= 0, new[rows], 0)
            if pads or fixed:
                rows, queries = np.append(rows, -1), np.append(queries, pads)
        pages, last = page_bounds(np.where(rows >= 0, lengths[rows], 0), page_size)
        pages = np.maximum(1, pages)
        self.count, self.most_pages = len(rows), int(pages.max(initial=1))
        self.packed = torch.empty(4 * self.count + 2, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._array = self.packed.numpy()
        at_rows, at_qo, at_kv, at_last = _places(self.count)
        self._array[at_rows], self._array[at_last] = rows, last
        for at, counts in ((at_qo, queries), (at_kv, pages)):
            self._array[at.start] = 0
            np.cumsum(counts, out=self._array[at.start + 1 : at.stop])
        self.pages = int(self._array[at_kv.stop - 1])

    @classmethod
    def of(
        cls, seq_lens: torch.Tensor, query_lens: torch.Tensor, tokens: int, page_size: int, *, fixed: bool, pinned: bool
    ) -> list[Requests]:
        """A step's requests; those of the rows behind the last one with several tokens apart, for a kernel of their own."""
        lengths, new = seq_lens.numpy(), query_lens.numpy()
        several = np.flatnonzero(new > 1)
        cut = int(several[-1]) + 1 if len(several) and not fixed else 0
        first = int(new[:cut].sum())
        if first in (0, tokens):
            return [cls(lengths, new, range(tokens), page_size, fixed=fixed, pinned=pinned)]
        behind = np.where(np.arange(len(new)) < cut, 0, new)
        return [
            cls(lengths[:cut], new[:cut], range(first), page_size, fixed=False, pinned=pinned),
            cls(lengths, behind, range(first, tokens), page_size, fixed=False, pinned=pinned),
        ]

    def planned_alike(self, other: Requests) -> bool:
        """Have both as many queries and pages each? That is all that a plan divides, but for one of FA3."""
        _, qo, kv, _ = _places(self.count)
        asked = slice(qo.start, kv.stop)
        return self.single == other.single and np.array_equal(self._array[asked], other._array[asked])


def parts(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows [R], qo_indptr [R + 1], kv_indptr [R + 1], last_page_len [R]."""
    rows, qo, kv, last = _places((packed.shape[0] - 2) // 4)
    return packed[rows], packed[qo], packed[kv], packed[last]


def _places(count: int) -> tuple[slice, slice, slice, slice]:
    """Of the four arrays of so many requests."""
    kv, last = 2 * count + 1, 3 * count + 2
    return slice(0, count), slice(count, kv), slice(kv, last), slice(last, last + count)


@dataclass(eq=False)
class Step:
    """Requests, and the device's copy of them. `fixed`: in buffers that later steps of these shapes use again."""

    requests: Requests
    packed: torch.Tensor
    indices: torch.Tensor  # pages of all requests, one after the other, and room behind them
    fixed: bool


class Plan:
    """A wrapper of the library and the step that it is planned for."""

    def __init__(self, problem: Problem, kernel: str, step: Step) -> None:
        self.problem, self.kernel = problem, kernel
        self._fixed, device = step.fixed, step.packed.device
        self._decode = kernel in ("cuda cores", "tensor cores")
        self._wrapper: Any = self._make(step, device)
        if step.fixed and kernel != "fa3":  # what a graph needs is known, and less than the library takes to be sure: 8 MiB
            sizes = self._wrapper.workspace_size(*self._arguments(step), **self._keywords(step))
            plan_bytes = torch.empty(-(-sizes[1] // 256) * 256, dtype=torch.uint8, device=device)
            self._wrapper.reset_workspace_buffer(workspace(device, sizes[0]), plan_bytes)
        self._turns = _Turns(self._wrapper, device)
        self.step: Step | None = None

    def prepare(self, step: Step) -> None:
        """Plan for this step, if it is not planned for it yet. Waits for nothing on the device."""
        if self.step is step:
            return
        last, self.step = self.step, None
        # With fixed addresses the arrays are already where the kernel reads them; the last plan may still be right.
        kept = self._fixed and self.kernel != "fa3" and last is not None and last.requests.planned_alike(step.requests)
        if not kept:
            self._turns.begin()
            self._wrapper.plan(*self._arguments(step), **self._keywords(step))
            self._turns.end()
        self.step = step

    def run(
        self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, sinks: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """q [T, Hq, D] -> out [T, Hq, D]."""
        extra: tuple[Any, ...] = () if sinks is None else (sinks,)
        extra += (self.problem.scale,) if self.problem.compiled else ()
        self._wrapper.run(q, (k_pages, v_pages), *extra, out=out)

    def _make(self, step: Step, device: torch.device) -> Any:
        library, room = importlib.import_module("flashinfer"), workspace(device)
        _, *buffers = parts(step.packed)  # qo_indptr, kv_indptr, last_page_len
        buffers.insert(2, step.indices)
        options: dict[str, Any] = {"use_cuda_graph": step.fixed}
        if self._decode:
            if step.fixed:
                names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
                options |= dict(zip(names, buffers[1:], strict=True))
            options |= {"use_tensor_cores": self.kernel == "tensor cores", "backend": "fa2"}
            return library.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", **options)
        if step.fixed:
            places = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
            options |= dict(zip(places, buffers, strict=True))
        if self.problem.compiled:
            options["jit_args"], options["jit_kwargs"] = self.problem.variant()
        return library.BatchPrefillWithPagedKVCacheWrapper(room, "NHD", backend=self.kernel, **options)

    def _arguments(self, step: Step) -> tuple[Any, ...]:
        _, qo_indptr, kv_indptr, last_page_len = parts(step.requests.packed)
        problem, indices = self.problem, step.indices[: step.requests.pages]
        sizes = (problem.num_q_heads, problem.num_kv_heads, problem.head_dim, problem.page_size)
        rows = (kv_indptr, indices, last_page_len, *sizes)
        return rows if self._decode else (qo_indptr, *rows)

    def _keywords(self, step: Step) -> dict[str, Any]:
        single = step.requests.single
        more = {} if self._decode else {"causal": self.problem.causal and not single, "uniform_q_len": 1 if single else None}
        return self.problem.options() | more


class _Turns:
    """Takes turns with two host buffers: `plan` writes into one and starts a copy from it, and waits for nothing.

    One buffer would be written again while the copy of the last step may still wait behind that step's work. The buffer is
    a private attribute of the wrapper (0.7.2), which has no other way to give it a second one.
    """

    _NAME = "_pin_memory_int_workspace_buffer"

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self._wrapper, self._device = wrapper, device
        first = getattr(wrapper, self._NAME)
        self._buffers = [first, torch.empty(first.shape, dtype=first.dtype, device="cpu", pin_memory=first.is_pinned())]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def begin(self) -> None:
        self._turn ^= 1
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # of two plans ago: done, unless the host is two steps ahead
        setattr(self._wrapper, self._NAME, self._buffers[self._turn])

    def end(self) -> None:
        if self._device.type == "cuda":
            self._copied[self._turn] = event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The device's compute capability; (0, 0) if it is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else (0, 0)


_workspaces: dict[torch.device, torch.Tensor] = {}


def workspace(device: torch.device, size: int = _WORKSPACE) -> torch.Tensor:
    """Of at least that many bytes, shared by all wrappers of a device: their kernels run one after the other."""
    found = _workspaces.get(device)
    if found is None or found.numel() < size:
        size = max(_WORKSPACE, -(-size // (1 << 20)) * (1 << 20))
        _workspaces[device] = found = torch.zeros(size, dtype=torch.uint8, device=device)
    return found

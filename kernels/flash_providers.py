"""Which builds of FlashAttention are there, what can each do, and how is it called?

One small adapter a provider. What it can do is data; what a site asks beyond that becomes sentences. Nothing is imported or
loaded before a site on a CUDA device asks.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compile_attn.kernels.backend import Request
from compile_attn.kernels.spec import AttentionSpec, Feature

Features = frozenset[Feature]
HEAD_DIMS = range(8, 257, 8)
_EVERY = frozenset({Feature.GQA, Feature.BIDIRECTIONAL, Feature.WINDOW})


@dataclass(frozen=True)
class Grid:
    """What is the same for all layers of a spec: R rows of queries, packed, and the keys that each sees.

    Keys lie in pages, `lengths` [R] of them in row `of_table`[r] of the block table, of which `left_pads` [R], always 0, are to be
    skipped (see `_FlashAttention3`); or, where these are None, they are packed like the queries. A query sees keys as if the last
    one of its row stood at the last key: `left` to the left and `right` to the right, -1 for all. Lengths are on the device;
    every number here follows from shapes.
    """

    spec: AttentionSpec
    dtype: torch.dtype  # of q, k and v
    page_size: int | None
    starts: torch.Tensor  # [R + 1] int32
    lengths: torch.Tensor | None
    of_table: torch.Tensor | None
    left_pads: torch.Tensor | None
    most_queries: int  # of a row
    most_keys: int
    left: int
    right: int
    splits: int  # most programs that share the keys of one tile

    @property
    def softcap(self) -> float:
        return self.spec.softcap or 0.0


class Call(NamedTuple):
    """One attention, in words that the providers share. q [T, Hq, D]; k and v [P, PS, Hkv, D] with a table, [N, Hkv, D] without."""

    grid: Grid
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor | None = None  # [B, max_pages] int32
    k_starts: torch.Tensor | None = None  # [R + 1] int32, of packed keys
    sinks: torch.Tensor | None = None  # [Hq] in the dtype of q
    slopes: torch.Tensor | None = None  # [Hq] float32
    schedule: torch.Tensor | None = None  # what the provider made of this grid


class Provider:
    """One way to have FlashAttention."""

    name: str
    install: str  # the line that installs it
    features: Features = _EVERY
    capability: tuple[int, int] = (8, 0)  # of the device, at least
    newest: int = 99  # major capability
    page_multiple: int = 1
    paged_only: bool = False

    def found(self) -> bool:
        """Is it installed? Looks, and imports nothing that is heavy."""
        raise NotImplementedError

    def trouble(self) -> str | None:
        """Why it cannot be loaded although it is installed."""
        return None

    def reasons(self, request: Request) -> tuple[str, ...]:
        """What the request asks beyond what this build does."""
        spec, out = request.spec, []
        missing = sorted(spec.features() - self.features, key=lambda feature: feature.value)
        out += [f"does not compute {spec.asks(feature)}" for feature in missing]
        if spec.head_dim == spec.head_dim_v and spec.head_dim not in HEAD_DIMS:
            out.append(f"has no kernel for head size {spec.head_dim}: it takes multiples of 8, up to 256")
        elif Feature.UNEQUAL_HEAD_DIMS in spec.features() & self.features and not self._takes(spec.head_dim, spec.head_dim_v):
            out.append(f"has no kernel for {spec.asks(Feature.UNEQUAL_HEAD_DIMS)}")
        if request.page_size is None and self.paged_only:
            out.append("is used for paged calls only")
        if request.page_size is not None and request.page_size % self.page_multiple:
            out.append(f"takes pages of a multiple of {self.page_multiple} tokens, not {request.page_size}")
        return (*out, *self._about_device(request), *self.more_reasons(request))

    def more_reasons(self, request: Request) -> tuple[str, ...]:
        """Limits of this build that the tables cannot say."""
        return ()

    def _takes(self, dim: int, dim_v: int) -> bool:
        """Is there a kernel for these head sizes, where they differ?"""
        return False

    def _about_device(self, request: Request) -> tuple[str, ...]:
        if request.device.type != "cuda" or not torch.cuda.is_available():
            return ()
        has = torch.cuda.get_device_capability(request.device)
        if has < self.capability or has[0] > self.newest:
            only = "only" if self.newest == self.capability[0] else "or newer"
            wanted = ".".join(map(str, self.capability))
            return (f"needs a device of compute capability {wanted} {only}, not {has[0]}.{has[1]}",)
        return ()

    def run(self, call: Call) -> torch.Tensor:
        """[T, Hq, Dv]."""
        raise NotImplementedError

    def schedule(self, grid: Grid) -> torch.Tensor | None:
        """What the kernel must know of the lengths beforehand, computed on the device; None: it finds out in each call."""
        return None


class _FlashAttention3(Provider):
    """What both builds of FlashAttention 3 share: Hopper only, any page size, any head size up to 256 by zero padding.

    Large pages of causal prefills are read by TMA, whole: what lies in the last one behind its sequence is multiplied by 0, and
    NaN times 0 is NaN. No page is known to be free of NaN: one that a sequence gave back holds whatever its model had made. Told of
    keys to skip at the left, be it none, the kernel reads them key by key, as it does small pages.
    """

    features = _EVERY | {Feature.SOFTCAP, Feature.UNEQUAL_HEAD_DIMS}
    capability, newest = (9, 0), 9

    def _takes(self, dim: int, dim_v: int) -> bool:
        return dim % 8 == dim_v % 8 == 0 and ((128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512))


class HopperPackage(_FlashAttention3):
    """FlashAttention 3 as its authors build it."""

    name = "flash_attn_interface"
    install = "build hopper/ of github.com/Dao-AILab/flash-attention: python setup.py install"

    def found(self) -> bool:
        return _installed("flash_attn_interface") and _installed("flash_attn_3")

    def run(self, call: Call) -> torch.Tensor:
        library, grid = importlib.import_module("flash_attn_interface"), call.grid
        shared = _common(grid) | {"num_splits": grid.splits}
        if call.table is None:
            cu, most = (grid.starts, call.k_starts), (grid.most_queries, grid.most_keys)
            return _only(library.flash_attn_varlen_func(call.q, call.k, call.v, *cu, *most, **shared))
        where = {
            "cache_seqlens": grid.lengths,
            "cache_batch_idx": grid.of_table,
            "cache_leftpad": grid.left_pads,
            "page_table": call.table,
            "cu_seqlens_q": grid.starts,
            "max_seqlen_q": grid.most_queries,
            "scheduler_metadata": call.schedule,
        }
        return _only(library.flash_attn_with_kvcache(call.q, call.k, call.v, **where, **shared))

    def schedule(self, grid: Grid) -> torch.Tensor | None:
        library, spec = importlib.import_module("flash_attn_interface"), grid.spec
        heads = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
        return library.get_scheduler_metadata(  # type: ignore[no-any-return]
            grid.starts.shape[0] - 1, grid.most_queries, grid.most_keys, *heads, grid.lengths, grid.dtype, spec.head_dim_v,
            cu_seqlens_q=grid.starts, cache_leftpad=grid.left_pads, page_size=grid.page_size,
            causal=grid.right == 0, window_size=(grid.left, grid.right), has_softcap=grid.softcap > 0, num_splits=grid.splits,
        )  # fmt: skip


class HopperExtension(_FlashAttention3):
    """FlashAttention 3 as vLLM builds it: with sinks, without vLLM when the library is named in PAGED_ATTN_FA3."""

    name = "vLLM's FlashAttention 3"
    install = "pip install vllm, or set PAGED_ATTN_FA3 to its vllm_flash_attn/_vllm_fa3_C.abi3.so"
    features = _FlashAttention3.features | {Feature.SINKS}

    def found(self) -> bool:
        return hasattr(torch.ops._vllm_fa3_C, "fwd") or self._library() is not None

    def _library(self) -> Path | None:
        """The extension's file. vLLM itself, whose import takes seconds, is never imported."""
        named = os.environ.get("PAGED_ATTN_FA3")
        if named:
            return Path(named) if Path(named).is_file() else None
        vllm = importlib.util.find_spec("vllm")
        folders = () if vllm is None else vllm.submodule_search_locations or ()
        files = (Path(folder) / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so" for folder in folders)
        return next((file for file in files if file.is_file()), None)

    def trouble(self) -> str | None:
        try:
            self._ops()
        except (OSError, RuntimeError) as error:
            return f"{self._library()} cannot be loaded ({error})"
        return None

    def _ops(self) -> Any:
        if not hasattr(torch.ops._vllm_fa3_C, "fwd"):
            torch.ops.load_library(str(self._library()))  # type: ignore[no-untyped-call]
        return torch.ops._vllm_fa3_C

    def more_reasons(self, request: Request) -> tuple[str, ...]:
        spec = request.spec
        if spec.sinks is None:
            return ()
        out = [f"takes sinks in bfloat16, not in {_name(request.dtype)}"] if request.dtype != torch.bfloat16 else []
        out += [f"takes sinks of at most 64 heads, not {spec.num_q_heads}"] if spec.num_q_heads > 64 else []
        unequal = spec.head_dim != spec.head_dim_v
        return (*out, f"takes no sinks with {spec.asks(Feature.UNEQUAL_HEAD_DIMS)}") if unequal else tuple(out)

    def run(self, call: Call) -> torch.Tensor:
        grid = call.grid
        return self._ops().fwd(  # type: ignore[no-any-return]
            call.q, call.k, call.v,
            None, None, None, None,  # new keys and values, queries of values, out
            grid.starts, call.k_starts, None, None, grid.lengths, grid.most_queries, grid.most_keys, call.table, grid.of_table,
            grid.left_pads, None, None, None, None, None, None,  # cos, sin and lengths of rotary; descales
            grid.spec.scale, grid.right == 0, grid.left, grid.right, grid.softcap, True,
            call.schedule, grid.splits, None, 0, call.sinks, 1, 0, None,
        )[0]  # fmt: skip

    def schedule(self, grid: Grid) -> torch.Tensor | None:
        spec = grid.spec
        return self._ops().get_scheduler_metadata(  # type: ignore[no-any-return]
            grid.starts.shape[0] - 1, grid.most_queries, grid.most_keys,
            spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim_v, grid.dtype,
            grid.lengths, grid.starts, None, None, None, grid.left_pads, grid.page_size, 0,
            grid.right == 0, grid.left, grid.right, grid.softcap > 0, grid.splits, None, 0,
        )  # fmt: skip


class Classic(Provider):
    """FlashAttention 2."""

    name = "flash_attn"
    install = "pip install flash-attn"
    features = _EVERY | {Feature.SOFTCAP, Feature.ALIBI}
    page_multiple = 256

    def found(self) -> bool:
        return _installed("flash_attn") and _installed("flash_attn_2_cuda")  # FlashAttention 4 has the first name alone

    def trouble(self) -> str | None:
        version = importlib.metadata.version("flash_attn")
        old = tuple(int(part) for part in version.split(".")[:2]) < (2, 6)
        return (
            f"is version {version}; from 2.6 on it has every argument that is used here: {self.install} --upgrade" if old else None
        )

    def run(self, call: Call) -> torch.Tensor:
        library, grid = importlib.import_module("flash_attn"), call.grid
        if 0 < grid.most_keys <= grid.right:  # it would take the bound for none
            keys = f"{grid.most_queries} queries on {grid.most_keys} keys"
            raise ValueError(f"flash_attn: {keys}; FlashAttention 2 takes fewer than twice as many; choose kernel='auto'")
        shared = _common(grid) | {"alibi_slopes": call.slopes}
        table, lengths = _gathered(call), grid.lengths
        if table is not None and grid.most_queries == 1:  # only this function splits keys; it fixes the number by shapes
            out = library.flash_attn_with_kvcache(
                call.q[:, None], call.k, call.v, cache_seqlens=lengths, block_table=table, num_splits=0, **shared
            )
            return _only(out)[:, 0]
        k_starts = call.k_starts
        if lengths is not None:
            k_starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        at = (grid.starts, k_starts, grid.most_queries, grid.most_keys)
        return _only(library.flash_attn_varlen_func(call.q, call.k, call.v, *at, block_table=table, **shared))


class Torch(Provider):
    """The FlashAttention 2 inside torch."""

    name = "torch.nn.attention.varlen"
    install = "pip install 'torch>=2.12'"
    page_multiple = 256
    paged_only = True  # stateless calls reach the same kernels through SDPA

    def found(self) -> bool:
        return _torch_takes_tables()

    def run(self, call: Call) -> torch.Tensor:
        library, grid = importlib.import_module("torch.nn.attention.varlen"), call.grid
        out: torch.Tensor = library.varlen_attn(
            call.q, call.k, call.v, grid.starts, None, grid.most_queries, grid.most_keys,
            scale=grid.spec.scale, window_size=(grid.left, grid.right), enable_gqa=call.q.shape[1] != call.k.shape[2],
            seqused_k=grid.lengths, block_table=_gathered(call),
            num_splits=1,  # others have given NaN
        )  # fmt: skip
        return out


# Best first.
PROVIDERS: tuple[Provider, ...] = (HopperPackage(), HopperExtension(), Classic(), Torch())


def _common(grid: Grid) -> dict[str, Any]:
    """Arguments that all packages of FlashAttention's authors name alike."""
    window = grid.left, grid.right
    return {"softmax_scale": grid.spec.scale, "causal": grid.right == 0, "window_size": window, "softcap": grid.softcap}


def _gathered(call: Call) -> torch.Tensor | None:
    """A table of its own for every row, where a provider cannot name another row's."""
    rows = call.grid.of_table
    return call.table if call.table is None or rows is None else call.table.index_select(0, rows)


def _only(out: Any) -> torch.Tensor:
    """Versions differ in whether they return the log of the normaliser too."""
    found: torch.Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@functools.cache
def _torch_takes_tables() -> bool:
    try:
        varlen = importlib.import_module("torch.nn.attention.varlen")
    except ImportError:
        return False
    return "block_table" in inspect.signature(varlen.varlen_attn).parameters


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")

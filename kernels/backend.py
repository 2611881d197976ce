"""What must a kernel backend say of itself, and what must it compute?

It declares what it can as data; `reasons` turns what a site asks beyond that into sentences. No reasons: it can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from compile_attn.kernels import blocks
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.spec import AttentionSpec, Feature

FP8_NAMES = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FP8 = frozenset(FP8_NAMES.values())
KVCache = torch.Tensor | Sequence[torch.Tensor]  # of `Backend.get_kv_cache_shape`, or the pages of keys and those of values


@dataclass(frozen=True)
class Request:
    """What a site asks of a kernel. `page_size` is None for a stateless call, `kv_dtype` where pages are of the queries' dtype."""

    spec: AttentionSpec
    device: torch.device
    dtype: torch.dtype
    page_size: int | None
    kv_dtype: torch.dtype | None = None


class Shape(NamedTuple):
    """What shapes say of a step: known to the host without reading the device, and fixed where a CUDA graph holds the step."""

    tokens: int  # T, pads included
    sequences: int  # B
    room: int  # tokens that a row of the block table can hold, and so a bound on all lengths


class Paged(NamedTuple):  # made in every layer of every step, and a tuple is made in a tenth of a dataclass's time
    """Where the keys and values of `attend` are. Shapes and dtypes as in the op `paged_attn::attend`.

    With a scale, float32 of shape [], [1] or [Hkv], a page holds keys or values divided by it.
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    positions: torch.Tensor
    token_seq: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None
    plan: torch.Tensor | None = None  # what `Backend.plan` gave for this step; for a kernel that makes none it means nothing


@dataclass(frozen=True)
class DeviceStep:
    """What `Backend.plan` may know of a step, the same for all layers. Tensors as in the op `paged_attn::attend`."""

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    positions: torch.Tensor
    token_seq: torch.Tensor
    page_size: int
    dtype: torch.dtype  # of queries

    @property
    def shape(self) -> Shape:
        return Shape(self.token_seq.shape[0], self.block_table.shape[0], self.block_table.shape[1] * self.page_size)


@dataclass(frozen=True)
class HostStep:
    """What the host knows of a step before it runs, for kernels that plan on the host.

    block_table [B, max_pages] int32 is the step's own buffer, whose address never changes; what it holds may still be on its
    way to the device. seq_lens and query_lens [B] int32 are on the CPU, as of this step, 0 for a pad row. `captured`: the step
    is recorded into a CUDA graph or replayed from one, so the addresses that a kernel has seen must hold the new plan.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_lens: torch.Tensor
    num_tokens: int  # T, pads included
    page_size: int
    captured: bool

    @property
    def shape(self) -> Shape:
        return Shape(self.num_tokens, self.block_table.shape[0], self.block_table.shape[1] * self.page_size)


@dataclass(frozen=True)
class PlannedSite:
    """What a host plan depends on beside the step. Sites that are equal share one plan."""

    spec: AttentionSpec
    dtype: torch.dtype  # of queries
    kv_dtype: torch.dtype  # of pages


def plan_size(sequences: int, numbers: int) -> int:
    """Numbers in a plan of so many a sequence: with room for a few more sequences than there are (which may be a symbol)."""
    return numbers * (sequences + 8)


class Backend:
    """One provider of kernels. Meaning it does not declare is refused, with a reason (Law 4)."""

    name: str
    features: frozenset[Feature]
    phases: frozenset[str] = frozenset({"stateless", "paged"})
    devices: frozenset[str] | None = None  # torch device types; None: any
    dtypes: frozenset[torch.dtype] | None = None  # of queries
    kv_dtypes: frozenset[torch.dtype] = frozenset()  # of pages, beside the queries' own; with FP8 go scales
    head_dims: frozenset[int] | None = None

    plan_numbers: int = 0  # that a plan holds for each sequence

    # By the names that serving frameworks have for them. All kernels share one page layout, one metadata class and its builder.

    @classmethod
    def get_name(cls) -> str:
        """`name` in capitals, such as "FLASH_ATTN"."""
        return cls.name.upper()

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes that it takes, ascending; empty where it takes any."""
        return sorted(cls.head_dims or ())

    @classmethod
    def get_impl_cls(cls) -> type[Backend]:
        """The class that computes: this one."""
        return cls

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """The class of a batch."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        """The class that makes a batch of host lists."""
        return AttentionMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, int, int, int, int]:
        """Of one tensor for a layer's keys [0] and values [1], each [P, PS, Hkv, D] and dense. ValueError for a size below 1.

        Which page sizes a kernel takes depends on the library that is installed, and is a reason of `reasons`.
        """
        sizes = (num_blocks, block_size, num_kv_heads, head_size)
        if min(sizes) < 1:
            raise ValueError(f"no cache of (num_blocks, block_size, num_kv_heads, head_size) = {sizes}; each is at least 1")
        return (2, *sizes)

    @staticmethod
    def swap_blocks(src_kv_cache: KVCache, dst_kv_cache: KVCache, src_to_dst: torch.Tensor) -> None:
        """Page src_to_dst[n, 1] of one cache becomes page src_to_dst[n, 0] of another; see `blocks.swap_blocks`."""
        pools = list(zip(_pools(src_kv_cache), _pools(dst_kv_cache), strict=True))
        for src, dst in pools:
            blocks.check_swap(src, dst, src_to_dst)  # of keys and values, before either moves
        for src, dst in pools:
            blocks.swap_blocks(src, dst, src_to_dst)

    @staticmethod
    def copy_blocks(kv_caches: Sequence[KVCache], src_to_dsts: torch.Tensor) -> None:
        """In the cache of every layer, page src_to_dsts[n, 1] becomes page src_to_dsts[n, 0]; see `blocks.copy_blocks`."""
        pools = [_pools(cache) for cache in kv_caches]
        blocks.copy_blocks([k for k, _ in pools], [v for _, v in pools], src_to_dsts)

    # What it can, and does

    def limits(self, request: Request) -> tuple[str, ...]:
        """Reasons that the tables above cannot give: a shape, a library that is not installed. Empty: none."""
        return ()

    def reasons(self, request: Request) -> tuple[str, ...]:
        """Why this backend cannot serve the request; empty when it can."""
        spec, cure = request.spec, "choose kernel='auto'"
        phase = "stateless" if request.page_size is None else "paged"
        out = [f"does not serve {phase} calls; {cure}"] if phase not in self.phases else []
        if self.devices is not None and request.device.type not in self.devices:
            out.append(f"runs on {_listed(self.devices)}, not on {request.device.type}; move the model, or {cure}")
        if self.dtypes is not None and request.dtype not in self.dtypes:
            out.append(f"computes in {_listed(self.dtypes)}, not in {_name(request.dtype)}; cast the model, or {cure}")
        if request.kv_dtype not in {None, request.dtype, *self.kv_dtypes}:
            out.append(f"reads no pages of {_name(request.kv_dtype)}; use kv_dtype='auto', or {cure}")
        wrong = {spec.head_dim, spec.head_dim_v} - (self.head_dims or {spec.head_dim, spec.head_dim_v})
        if wrong:
            out.append(f"has no head size {_listed(wrong)} (only {_listed(self.head_dims or ())}); pad the heads, or {cure}")
        missing = sorted(spec.features() - self.features, key=lambda feature: feature.value)
        out += [f"does not compute {spec.asks(feature)}; {cure}" for feature in missing]
        return (*out, *self.limits(request))

    def serving(self, spec: AttentionSpec, shape: Shape) -> Backend:
        """The kernel that computes this in steps of such shapes: this one, unless it stands for several."""
        return self

    def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
        """Prepare the step's calls of `attend` for these sites, all that it serves, without waiting for the device.

        Most need nothing.
        """

    def drop_plans(self, block_table: torch.Tensor) -> None:
        """Forget what `plan_on_host` has made for steps over this block table [B, max_pages]; graphs of them run no more."""

    def planned(self, spec: AttentionSpec) -> AttentionSpec | None:
        """The spec without what `plan` does not depend on: sites where it is equal share one plan a step. None: none is made."""
        return None

    def plan(self, step: DeviceStep, spec: AttentionSpec) -> torch.Tensor:
        """What all sites of that `planned` spec need of a step, computed on the device: int32 [plan_size(B, plan_numbers)]."""
        raise NotImplementedError(f"{self.name} makes no plans")

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] -> [B, Hq, Tq, Dv]; i and j count rows from 0."""
        raise NotImplementedError(f"{self.name} does not serve stateless calls")

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        """q [T, Hq, D] -> [T, Hq, Dv]; pad tokens give 0."""
        raise NotImplementedError(f"{self.name} does not serve paged calls")


def _pools(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of keys and of values. ValueError where pages might be taken for the two: halves of them would move."""
    pools = list(cache)
    if [pool.dim() for pool in pools] != [4, 4]:
        shapes = list(cache.shape) if isinstance(cache, torch.Tensor) else [list(pool.shape) for pool in pools]
        raise ValueError(f"a cache of {shapes}; give [2, P, PS, Hkv, D], or the pages [P, PS, Hkv, D] of keys and those of values")
    return pools[0], pools[1]


def maximum_before_scale(spec: AttentionSpec) -> tuple[str, ...]:
    """The reason against a library that hides keys by -inf and multiplies by the scale afterwards: below 0 they would be +inf."""
    if spec.scale > 0:
        return ()
    return (f"takes its maximum before the scale, which must be positive, not {spec.scale:g}; choose kernel='auto'",)


def planners(sites: Iterable[tuple[Backend, PlannedSite]], shape: Shape) -> dict[Backend, list[PlannedSite]]:
    """Kernels that plan on the host for a step of these shapes, and for which sites: each plans once a step."""
    out: dict[Backend, list[PlannedSite]] = {}
    for run, site in sites:
        serving = run.serving(site.spec, shape)
        if type(serving).plan_on_host is not Backend.plan_on_host:
            out.setdefault(serving, []).append(site)
    return out


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")


def _listed(values: Iterable[object]) -> str:
    return ", ".join(_name(value) for value in sorted(values, key=lambda each: (isinstance(each, int) and each, _name(each))))

"""How is the Triton kernel launched: with which functions and tensors?

The score and mask are printed from the spec (`triton_print`), and so is the list of the blocks of keys that the mask
lets a tile see (`visible_print`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import linecache
import os
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compile_attn.kernels import hopper
from compile_attn.kernels import tiles as tile_rules
from compile_attn.kernels.backend import FP8, Backend, Paged, Request
from compile_attn.kernels.mask import Mask
from compile_attn.kernels.relaunch import Relaunch
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.tiles import Launch, Size, Tiles, TilesFor, launches, padded, tiles_of
from compile_attn.kernels.triton_print import binary, factor, fits_int32, loads, pairwise, print_score
from compile_attn.kernels.visible_print import print_sight

if TYPE_CHECKING:
    from compile_attn.kernels.general_triton import Batch, Parts, Plan, Pool

_ROWS_EACH = 8  # and parts, and channels, of a program that combines parts
_PARTS_AT_ONCE = 64
_CHANNELS = 128
_MOST_DIM = {4: 512, 2: 1024}  # by bytes of an element: what still fits the smallest tiles in shared memory
_SHARED_MEMORY = 227 << 10  # of a Hopper block; asked of the device where there is one
_run = Relaunch()
_MULTIPROCESSORS = 4  # of no GPU: the interpreter's programs run one after another


class TritonBackend(Backend):
    """What the backends share that launch this kernel, in float32 inside. They differ in the masks they take, and in tiles."""

    features = frozenset(Feature)
    devices = frozenset({"cuda", "cpu"})
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})
    kv_dtypes = FP8

    def tiles(self, spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int) -> Tiles:
        """Tiles for a call; the arguments are those of `tiles_of`."""
        return tiles_of(spec, dot, tokens, shared, read)

    def limits(self, request: Request) -> tuple[str, ...]:
        out = []
        spec, cure = request.spec, "choose kernel='auto'"
        if importlib.util.find_spec("triton") is None:
            out.append(f"needs triton, which is not installed; pip install triton, or {cure}")
        if request.device.type == "cpu" and not _interpreted():
            out.append(f"runs on a CPU only in Triton's interpreter; set TRITON_INTERPRET=1 for tests, or {cure}")
        most, dim = _MOST_DIM.get(request.dtype.itemsize, 0), max(spec.head_dim, spec.head_dim_v)
        if most and dim > most:
            out.append(f"has tiles for head sizes up to {most} in {str(request.dtype).removeprefix('torch.')}, not {dim}; {cure}")
        try:
            print_score(spec, (True,) * (1 + max((number for number, _ in loads(spec)), default=0)))
        except ValueError as error:
            out.append(f"cannot print the score and mask: {error}; {cure}")
        return tuple(out)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        from compile_attn.kernels.general_triton import Batch, Pool

        def by_token(tensor: torch.Tensor) -> tuple[int, int, int, int]:
            return tensor.stride(0), tensor.stride(2), tensor.stride(1), tensor.stride(3)

        out = q.new_empty((*q.shape[:3], v.shape[3]))
        size = Size(q.shape[0], q.shape[2], k.shape[2], 0)
        pools = Pool(k, *by_token(k), k, 0), Pool(v, *by_token(v), v, 0)
        _launch(self.tiles, spec, size, q, by_token(q), pools, Batch(q, 0, q, q, q), captured, out, (False, False))
        return out

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        from compile_attn.kernels.general_triton import Batch, Pool

        def pool(pages: torch.Tensor, scale: torch.Tensor | None) -> Pool:
            flat = pages if scale is None else scale.reshape(-1)
            by_head = 0 if scale is None or scale.numel() == 1 else flat.stride(0)
            page, slot, head, channel = pages.stride()
            return Pool(pages, page, slot, head, channel, flat, by_head)

        table, pages = kv.block_table, kv.k_pages
        batch = Batch(table, table.stride(0), kv.seq_lens, kv.cu_seqlens_q, kv.token_seq)
        out = q.new_empty((*q.shape[:2], kv.v_pages.shape[3]))
        size = Size(table.shape[0], q.shape[0], table.shape[1] * pages.shape[1], pages.shape[1])
        pools = pool(pages, kv.k_scale), pool(kv.v_pages, kv.v_scale)
        scaled = (kv.k_scale is not None, kv.v_scale is not None)
        _launch(self.tiles, spec, size, q, (0, *q.stride()), pools, batch, captured, out, scaled)
        return out


def _launch(
    tiles_for: TilesFor,
    spec: AttentionSpec,
    size: Size,
    q: torch.Tensor,
    q_strides: tuple[int, ...],
    pools: tuple[Pool, Pool],
    batch: Batch,
    captured: Sequence[torch.Tensor],
    out: torch.Tensor,
    scaled: tuple[bool, bool],
) -> None:
    if out.numel() == 0:
        return
    alike = pools[0][1:5] == pools[1][1:5] and spec.head_dim == spec.head_dim_v
    dot, narrow = _dot_dtype(q.dtype, pools[0].at.dtype), pools[1].at.dtype.itemsize == 1
    prepared = _prepare(tiles_for, spec, size, q.device, dot, tuple(each.dtype for each in captured), scaled, narrow, alike)
    flat = _flat(spec, captured)
    form = None if captured else _form(q, q_strides, pools, batch)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        for each in prepared:
            special = each.hopper
            if special is not None and special.takes(q, pools[0].at, pools[1].at):
                args = special.args(q, pools[0].at, pools[1].at, batch, flat, out)
                _run(form and (special, form), special.kernel, special.grid, args, special.options)
                continue
            parts = _parts(out, each.launch)
            tensors = q, q_strides, *pools, batch, flat, out, parts, size.tokens, size.sequences
            key = form and (each, form)
            _run(key, each.kernel, each.grid, (*tensors, *each.rest), each.options)
            if each.combine is not None:
                kernel, grid, rest, options = each.combine
                _run(form and (kernel, each, form), kernel, grid, (batch, parts, out, size.tokens, size.sequences, *rest), options)


def _form(q: torch.Tensor, q_strides: tuple[int, ...], pools: tuple[Pool, Pool], batch: Batch) -> tuple[Any, ...]:
    """What of a call's tensors Triton compiles into a kernel; all others are of this project's making, the same every time."""
    (k, *k_strides, k_scale, k_scale_head), (v, *v_strides, v_scale, v_scale_head) = pools
    pointers = q, k, k_scale, v, v_scale, batch.table, batch.lengths, batch.starts, batch.token_seq
    strides = (*q_strides, *k_strides, k_scale_head, *v_strides, v_scale_head, batch.width)
    return tuple(each.data_ptr() % 16 for each in pointers), tuple(each.dtype for each in pointers), strides


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One launch as all calls of a shape make it. Equal to itself alone, so that it can be part of a key."""

    launch: Launch
    kernel: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]  # of the arguments, behind those that differ from call to call
    options: dict[str, int]  # enable_fp_fusion: Triton's default until 3.10
    combine: tuple[Any, tuple[int, int, int], tuple[Any, ...], dict[str, bool]] | None
    hopper: hopper.Prepared | None  # in its place, where its tensors allow


@functools.lru_cache(maxsize=1024)
def _prepare(
    tiles_for: TilesFor,
    spec: AttentionSpec,
    size: Size,
    device: torch.device,
    dot: torch.dtype,
    captured: tuple[torch.dtype, ...],
    scaled: tuple[bool, bool],
    narrow: bool,
    alike: bool,
) -> tuple[_Prepared, ...]:
    from compile_attn.kernels import combine_triton, grid_triton

    shared, multiprocessors = _device(device)
    whole = tuple(not dtype.is_floating_point for dtype in captured)
    wide = not fits_int32(spec, whole, max(1 << 20, 1 << (max(size.keys, size.tokens) - 1).bit_length()))
    read = sum(captured[number].itemsize for number in pairwise(spec))
    found = []
    for each in launches(tiles_for, spec, dot, size, shared, read, multiprocessors):
        tiles, (blocks, heads, splits) = each.tiles, each.grid

        def constants(tiles: Tiles, words: Callable[[str], str] = str, few: int = each.few, split: bool = splits > 1) -> Any:
            functions, seen = functions_of(spec, whole, words), sight_of(spec.mask, tiles.group, tiles.block_n, words)
            printed = functions.per_row, functions.score, functions.sink, seen.count, seen.clear, seen.edge
            return *printed, _plan(spec, tiles, few, size.page_size, scaled, narrow, alike, split, wide)

        *printed, plan = constants(tiles)
        special = None
        if hopper.ON and size.page_size > 0 and not any(scaled) and hopper.available(device):
            special = hopper.prepare(spec, each, size, (shared, multiprocessors), constants)
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True}
        options |= {"maxnreg": tiles.registers} if tiles.registers else {}
        numbers = (blocks, each.least) if each.programs else (size.keys, splits, each.least)
        kernel, grid = (grid_triton.attend, each.grid) if not each.programs else (grid_triton.attend_evenly, (each.programs, 1, 1))
        combine = None
        if each.in_parts:
            rows, rows_each = tiles.block_q * tiles.group, 1 if tiles.block_m == 16 else _ROWS_EACH
            block, at_once = min(plan.block_dv, _CHANNELS), min(_PARTS_AT_ONCE, 1 << (each.most_parts - 1).bit_length())
            over = blocks * heads, -(-rows // rows_each), plan.block_dv // block
            early = tile_rules.COMBINE_EARLY and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
            combine = combine_triton.combine, over, (at_once, rows_each, block, early, plan), {"launch_pdl": True} if early else {}
        found.append(_Prepared(each, kernel, grid, (*numbers, *printed, plan), options, combine, special))
    return tuple(found)


def forget() -> None:
    """What is chosen for shapes is chosen anew: for who has changed how."""
    launches.cache_clear()
    _prepare.cache_clear()


def _parts(out: torch.Tensor, launch: Launch) -> Parts:
    """Room for what several programs find for one tile."""
    from compile_attn.kernels.general_triton import Parts

    if not launch.in_parts:
        return Parts(out, out, out, out, out, out)
    blocks, heads, splits = launch.grid
    tiles, dim, rows = blocks * heads, out.shape[-1], launch.tiles.block_q * launch.tiles.group
    found = rows * (tiles + launch.programs if launch.programs else tiles * splits)
    acc, top, total = out.new_empty(found * (dim + 2), dtype=torch.float32).split_with_sizes((found * dim, found, found))
    numbers = out.new_empty(tiles * (2 + rows), dtype=torch.int32).split_with_sizes((tiles, tiles, tiles * rows))
    return Parts(acc, top, total, *numbers)


def functions_of(spec: AttentionSpec, whole: tuple[bool, ...], words: Callable[[str], str] = str) -> types.SimpleNamespace:
    """The printed functions of a spec, compiled by Triton when first launched.

    Triton reads a function's source through `linecache`, so the source needs no file. Its disk cache goes by source and name.
    """
    return _load("score", words(print_score(spec, whole)))


def sight_of(mask: Mask, heads: int, block_n: int, words: Callable[[str], str] = str) -> types.SimpleNamespace:
    """The printed functions that name the blocks of keys that a tile of so many heads may see."""
    return _load("sight", words(print_sight(mask, heads, block_n)))


@functools.lru_cache(maxsize=256)
def _load(what: str, source: str) -> types.SimpleNamespace:
    name = f"compile_attn_{what}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    found: dict[str, Any] = {"__name__": name}
    exec(compile(source, file, "exec", dont_inherit=True), found)
    return types.SimpleNamespace(**{"sink": None, **found})


def _flat(spec: AttentionSpec, captured: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The captured tensors as the printed functions unpack them."""
    flat: list[Any] = []
    for number, axes in loads(spec):
        tensor = captured[number]
        if tensor.dim() != axes:
            raise ValueError(f"captured tensor {number} has shape {list(tensor.shape)}; the spec reads it with {axes} indices")
        flat += [tensor, *(each for axis in range(axes) for each in (tensor.shape[axis], tensor.stride(axis)))]
    return tuple(flat) or (0,)


@functools.lru_cache(maxsize=1024)
def _plan(
    spec: AttentionSpec,
    tiles: Tiles,
    few: int,
    page_size: int,
    scaled: tuple[bool, bool],
    narrow: bool,
    alike: bool,
    split: bool,
    wide: bool,
) -> Plan:
    import triton.language as tl

    from compile_attn.kernels.general_triton import Plan

    dots = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return Plan(
        page_size=page_size,
        group=tiles.group,
        groups=spec.num_q_heads // spec.num_kv_heads // tiles.group,
        heads=spec.num_q_heads,
        dim=spec.head_dim,
        dim_v=spec.head_dim_v,
        binary=binary(spec),
        factor=factor(spec),
        alike=alike,
        k_scaled=scaled[0],
        v_scaled=scaled[1],
        whole=tl.int64 if wide else tl.int32,
        dot=dots[tiles.dot],
        # Values of 8 bits are exact in float16, to which the device converts them at once, and weights are at most 1.
        dot_v=tl.float16 if narrow and tiles.dot == torch.bfloat16 else dots[tiles.dot],
        few=few,
        block_q=tiles.block_q,
        block_m=tiles.block_m,
        block_n=tiles.block_n,
        block_d=padded(spec.head_dim),
        block_dv=padded(spec.head_dim_v),
        split=split,
        together=tiles.together,
    )


def _dot_dtype(queries: torch.dtype, keys: torch.dtype) -> torch.dtype:
    """What both are multiplied in: fp8 pages in the queries' dtype, in which they are exact."""
    dtype = queries if keys.itemsize == 1 else torch.promote_types(queries, keys)
    return torch.float32 if dtype == torch.bfloat16 and _interpreted() else dtype  # the interpreter multiplies no bfloat16


def _interpreted() -> bool:
    """Does Triton run kernels as Python, on any device? It reads this variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Shared memory of a block, and multiprocessors."""
    if device.type != "cuda":
        return _SHARED_MEMORY, _MULTIPROCESSORS
    from triton.runtime import driver

    found = driver.active.utils.get_device_properties(device.index)
    return found["max_shared_mem"], found["multiprocessor_count"]

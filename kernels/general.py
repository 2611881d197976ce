"""Which Triton kernel serves a spec that no library knows, and with which tiles?

The score and mask are printed from the spec (`triton_print`) into the loop of `general_triton`. Tiles, splits and grids
follow from shapes alone: no length is read on the host, so a CUDA graph can hold a call.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import linecache
import os
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compile_attn.kernels.backend import FP8, Backend, Paged, Request
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.triton_print import binary, factor, fits_int32, loads, pairwise, print_score

if TYPE_CHECKING:
    from compile_attn.kernels.general_triton import Batch, Parts, Plan, Pool

_PROGRAMS_EACH = 2  # of a multiprocessor at once, where they wait for memory
_KEYS_A_PROGRAM = 256  # fewer, and writing and combining the parts costs as much as reading the keys
_KEYS_A_SPLIT = 1024  # of a tile of many tokens
_MOST_SPLITS = 128
_ROWS_EACH = 8  # and parts, and channels, of a program that combines parts
_PARTS_AT_ONCE = 64
_CHANNELS = 128
_MOST_DIM = {4: 512, 2: 1024}  # by bytes of an element: what still fits the smallest tiles in shared memory
_SHARED_MEMORY = 227 << 10  # of a Hopper block; asked of the device where there is one
_MULTIPROCESSORS = 4  # of no GPU: the interpreter's programs run one after another


class GeneralBackend(Backend):
    """Serves every spec, in float32 inside."""

    name = "general"
    features = frozenset(Feature)
    devices = frozenset({"cuda", "cpu"})
    dtypes = frozenset({torch.float32, torch.float16, torch.bfloat16})
    kv_dtypes = FP8

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
        size = _Size(q.shape[0], q.shape[2], k.shape[2], 0)
        pools = Pool(k, *by_token(k), k, 0), Pool(v, *by_token(v), v, 0)
        _launch(spec, size, q, by_token(q), pools, Batch(q, 0, q, q, q, q), captured, out, (False, False))
        return out

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        from compile_attn.kernels.general_triton import Batch, Pool

        def pool(pages: torch.Tensor, scale: torch.Tensor | None) -> Pool:
            flat = pages if scale is None else scale.reshape(-1)
            by_head = 0 if scale is None or scale.numel() == 1 else flat.stride(0)
            page, slot, head, channel = pages.stride()
            return Pool(pages, page, slot, head, channel, flat, by_head)

        table, pages = kv.block_table, kv.k_pages
        batch = Batch(table, table.stride(0), kv.seq_lens, kv.cu_seqlens_q, kv.positions, kv.token_seq)
        out = q.new_empty((*q.shape[:2], kv.v_pages.shape[3]))
        size = _Size(table.shape[0], q.shape[0], table.shape[1] * pages.shape[1], pages.shape[1])
        pools = pool(pages, kv.k_scale), pool(kv.v_pages, kv.v_scale)
        scaled = (kv.k_scale is not None, kv.v_scale is not None)
        _launch(spec, size, q, (0, *q.stride()), pools, batch, captured, out, scaled)
        return out


@dataclass(frozen=True)
class _Size:
    """What shapes say of a call. Stateless (page_size 0): tokens and keys of each sequence; paged: tokens of all."""

    sequences: int
    tokens: int
    keys: int  # at most, a sequence
    page_size: int

    def tokens_each(self) -> int:
        """Tokens of a sequence, on average."""
        return self.tokens if self.page_size == 0 else -(-self.tokens // max(1, self.sequences))

    def blocks(self, block_q: int, few: int) -> int:
        """Tiles of tokens, at most. Paged: every sequence served begins one, and so do the pad tokens behind the last."""
        if self.page_size == 0:
            return self.sequences * -(-self.tokens // block_q)
        if few > 0 or block_q == 1:
            return self.sequences if few > 0 else self.tokens
        return self.tokens // block_q + 1 + (min(self.sequences, self.tokens // (1 - few)) if few else self.sequences)


def _launch(
    spec: AttentionSpec,
    size: _Size,
    q: torch.Tensor,
    q_strides: tuple[int, ...],
    pools: tuple[Pool, Pool],
    batch: Batch,
    captured: Sequence[torch.Tensor],
    out: torch.Tensor,
    scaled: tuple[bool, bool],
) -> None:
    from compile_attn.kernels import combine_triton, grid_triton

    if out.numel() == 0:
        return
    shared, multiprocessors = _device(q.device)
    whole = tuple(not tensor.is_floating_point() for tensor in captured)
    functions, flat = functions_of(spec, whole), _flat(spec, captured)
    wide = not fits_int32(spec, whole, max(1 << 20, 1 << (max(size.keys, size.tokens) - 1).bit_length()))
    read = sum(captured[number].element_size() for number in pairwise(spec))
    alike = pools[0][1:5] == pools[1][1:5] and spec.head_dim == spec.head_dim_v
    for each in launches(spec, _dot_dtype(q.dtype, pools[0].at.dtype), size, shared, read, multiprocessors):
        tiles, (blocks, heads, splits) = each.tiles, each.grid
        plan = _plan(spec, tiles, each.few, size.page_size, scaled, pools[1].at.dtype.itemsize == 1, alike, splits > 1, wide)
        parts = _parts(out, each)
        tensors = q, q_strides, *pools, batch, flat, out, parts, size.tokens, size.sequences
        printed = functions.per_row, functions.score, functions.sink
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages} | ({"maxnreg": tiles.registers} if tiles.registers else {})
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            if each.programs:
                grid_triton.attend_evenly[(each.programs,)](*tensors, blocks, each.least, *printed, plan, **options)
            else:
                grid_triton.attend[each.grid](*tensors, size.keys, splits, each.least, *printed, plan, **options)
            if each.in_parts:
                rows, rows_each = tiles.block_q * tiles.group, 1 if tiles.block_m == 16 else _ROWS_EACH
                block, at_once = min(plan.block_dv, _CHANNELS), min(_PARTS_AT_ONCE, 1 << (each.most_parts - 1).bit_length())
                over = blocks * heads, -(-rows // rows_each), plan.block_dv // block
                combine_triton.combine[over](batch, parts, out, size.tokens, size.sequences, at_once, rows_each, block, plan)


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


def functions_of(spec: AttentionSpec, whole: tuple[bool, ...]) -> types.SimpleNamespace:
    """The printed functions of a spec, compiled by Triton when first launched.

    Triton reads a function's source through `linecache`, so the source needs no file. Its disk cache goes by source and name.
    """
    source = print_score(spec, whole)
    return _load(source)


@functools.lru_cache(maxsize=256)
def _load(source: str) -> types.SimpleNamespace:
    name = f"compile_attn_score_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    found: dict[str, Any] = {"__name__": name}
    exec(compile(source, file, "exec", dont_inherit=True), found)
    return types.SimpleNamespace(per_row=found["per_row"], score=found["score"], sink=found.get("sink"))


def _flat(spec: AttentionSpec, captured: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The captured tensors as the printed functions unpack them."""
    flat: list[Any] = []
    for number, axes in loads(spec):
        tensor = captured[number]
        if tensor.dim() != axes:
            raise ValueError(f"captured tensor {number} has shape {list(tensor.shape)}; the spec reads it with {axes} indices")
        flat += [tensor, *(each for axis in range(axes) for each in (tensor.shape[axis], tensor.stride(axis)))]
    return tuple(flat) or (0,)


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, and how many warps and stages of prefetched keys work on them."""

    group: int  # query heads in a tile, all of one KV head
    block_q: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    dot: torch.dtype
    registers: int = 0  # of a thread, at most; 0: as many as the compiler takes


@functools.lru_cache(maxsize=1024)
def tiles_of(spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int = 0) -> Tiles:
    """Tiles for sequences of about that many tokens. As large as is fast, as small as shared memory asks.

    `read`: bytes of captured tensors for every query and key. Like keys and values, they are fetched ahead, `stages` times.
    """
    dims, bytes_ = _padded(spec.head_dim) + _padded(spec.head_dim_v), dot.itemsize
    per_kv_head = spec.num_q_heads // spec.num_kv_heads
    rows = tokens * per_kv_head
    block_m = 16 if rows <= 16 else 32 if bytes_ == 4 else 64 if rows <= 64 else 128
    # Triton 3.6 compiles loads of 64 keys wrongly where a value's channels are no multiple of 16 (40 channels of a key, 24 of
    # a value: other rows, or an illegal address); 32 keys are right, and tests/test_general.py runs odd sizes on a GPU.
    block_n, stages = (32 if bytes_ == 4 or spec.head_dim_v % 16 else 64), 3

    def too_large() -> bool:
        ahead = block_n * (dims * bytes_ + block_m * read) * stages
        return block_m * (_padded(spec.head_dim) + block_n) * bytes_ + ahead > shared

    while too_large() and (stages > 1 or block_n > 16 or block_m > 16):
        if stages > 2 or (stages == 2 and block_n <= 32 and block_m <= 64):
            stages -= 1
        elif block_n > 32 or (block_n > 16 and block_m <= 16):
            block_n //= 2
        else:
            block_m //= 2
    group = max(each for each in range(1, block_m + 1) if per_kv_head % each == 0)
    block_q = 1 if tokens <= 1 else block_m // group  # with one, no sequence is searched for
    if block_m == 128 and block_n == 64 and dims == 256 and stages == 3 and not read:
        block_n = 128
    warps = (
        4 if dims <= 128 and bytes_ == 2 else 8 if block_m == 128 or block_m * _padded(spec.head_dim_v) >= 1 << 14 else 4
    )  # or the output spills
    return Tiles(group, block_q, block_m, block_n, warps, stages, dot)


@dataclass(frozen=True)
class Launch:
    """Which sequences it serves, and how work is spread."""

    tiles: Tiles
    few: int  # `Plan.few`
    grid: tuple[int, int, int]  # tiles of tokens, tiles of heads, programs that may share the keys of a tile
    least: int  # blocks of keys of a program that shares them
    programs: int  # that share all work evenly; 0: a tile, or its part, each

    @property
    def most_parts(self) -> int:
        return self.programs or self.grid[2]

    @property
    def in_parts(self) -> bool:
        """May a tile be of several programs? Those that share all work say so of every tile."""
        return self.programs > 0 or self.grid[2] > 1


@functools.lru_cache(maxsize=1024)
def launches(
    spec: AttentionSpec, dot: torch.dtype, size: _Size, shared: int, read: int, multiprocessors: int
) -> tuple[Launch, ...]:
    """In a batch of chunks and single tokens a tile fit for a chunk would be empty but for one token: those have a launch of
    their own. What a batch holds is known on the device alone, so both launches look for theirs.
    """
    if size.page_size == 0 or size.sequences == 1 or size.tokens <= size.sequences:
        served = [(tiles_of(spec, dot, size.tokens_each(), shared, read), 0)]
    else:
        single = tiles_of(spec, dot, max(1, 16 * spec.num_kv_heads // spec.num_q_heads), shared, read)
        longest = tiles_of(spec, dot, size.tokens, shared, read)
        served = [(single, single.block_q), (longest, -single.block_q)] if longest.block_m > single.block_m else [(longest, 0)]
    return tuple(_spread(spec, size, *each, shared, multiprocessors) for each in served)


def _spread(spec: AttentionSpec, size: _Size, tiles: Tiles, few: int, shared: int, multiprocessors: int) -> Launch:
    """Tiles of few tokens wait for memory, and their sequences may differ a thousandfold: an equal share for every program.

    Tiles of many tokens are many programs, or share the keys of each where they are not. How many do, its length decides.
    """
    blocks, heads = size.blocks(tiles.block_q, few), spec.num_q_heads // tiles.group
    window = spec.mask.window()
    keys = size.keys if window is None else min(size.keys, window + tiles.block_q)
    if few > 0 or (size.page_size > 0 and tiles.block_q == 1 and size.tokens <= size.sequences):
        least = -(-_KEYS_A_PROGRAM // tiles.block_n)
        fit = max(
            1, shared // (tiles.block_n * tiles.stages * (_padded(spec.head_dim) + _padded(spec.head_dim_v)) * tiles.dot.itemsize)
        )
        programs = min(multiprocessors * min(_PROGRAMS_EACH, fit), blocks * heads * -(-keys // _KEYS_A_PROGRAM))
        return Launch(tiles, few, (blocks, heads, 1), least, max(1, programs))
    wanted = -(-multiprocessors * _PROGRAMS_EACH // max(1, blocks * heads))
    splits = max(1, min(_MOST_SPLITS, wanted, keys // _KEYS_A_SPLIT))
    return Launch(tiles, few, (blocks, heads, splits), -(-_KEYS_A_SPLIT // tiles.block_n), 0)


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
    window = spec.mask.window()
    return Plan(
        page_size=page_size,
        group=tiles.group,
        groups=spec.num_q_heads // spec.num_kv_heads // tiles.group,
        heads=spec.num_q_heads,
        dim=spec.head_dim,
        dim_v=spec.head_dim_v,
        causal=spec.mask.causal(),
        window=-1 if window is None else window,
        bounded=spec.mask.is_bounds(),
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
        block_d=_padded(spec.head_dim),
        block_dv=_padded(spec.head_dim_v),
        split=split,
    )


def _dot_dtype(queries: torch.dtype, keys: torch.dtype) -> torch.dtype:
    """What both are multiplied in: fp8 pages in the queries' dtype, in which they are exact."""
    dtype = queries if keys.itemsize == 1 else torch.promote_types(queries, keys)
    return torch.float32 if dtype == torch.bfloat16 and _interpreted() else dtype  # the interpreter multiplies no bfloat16


def _interpreted() -> bool:
    """Does Triton run kernels as Python, on any device? It reads this variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())  # what tl.dot takes


@functools.cache
def _device(device: torch.device) -> tuple[int, int]:
    """Shared memory of a block, and multiprocessors."""
    if device.type != "cuda":
        return _SHARED_MEMORY, _MULTIPROCESSORS
    from triton.runtime import driver

    found = driver.active.utils.get_device_properties(device.index)
    return found["max_shared_mem"], found["multiprocessor_count"]

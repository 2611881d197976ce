"""How is attention cut into tiles, and shared by programs?

All of it follows from shapes: no length is read on the host, so a CUDA graph can hold a call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.visible import most_keys

_AT_ONCE, _SMALL_AT_ONCE = 2, 3  # programs of few tokens that a multiprocessor holds; of small heads
_REGISTERS = 1 << 16  # of a multiprocessor, on every NVIDIA GPU since 2014
_PARTS_EACH = 4  # of a multiprocessor, if that is enough for the longest sequences
COMBINE_EARLY = False  # the programs that combine parts are brought up while the last parts are found
_WAVES = 2  # of tiles of many tokens
_KEYS_A_PROGRAM = 256  # fewer, and writing and combining the parts costs as much as reading the keys
_KEYS_ALONE = 1280  # of a program a tile: where all are few, sharing them evenly costs more than the longest does
_KEYS_A_SPLIT = 1024  # of a tile of many tokens
_MOST_SPLITS = 128


@dataclass(frozen=True)
class Size:
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
    together: bool = False  # `Plan.together`


TilesFor = Callable[[AttentionSpec, torch.dtype, int, int, int], Tiles]  # as `tiles_of`


@functools.lru_cache(maxsize=1024)
def tiles_of(
    spec: AttentionSpec,
    dot: torch.dtype,
    tokens: int,
    shared: int,
    read: int = 0,
    heads: int | None = None,
    most: tuple[int, int] = (128, 128),
) -> Tiles:
    """Tiles for sequences of about that many tokens. As large as is fast, as small as shared memory asks.

    `read`: bytes of captured tensors for every query and key. Like keys and values, they are fetched ahead, `stages` times.
    `heads`: of a KV head, those that one tile may hold; all by default. `most`: its rows and its keys, at most.
    """
    dims, bytes_ = padded(spec.head_dim) + padded(spec.head_dim_v), dot.itemsize
    per_kv_head = heads or spec.num_q_heads // spec.num_kv_heads
    rows = tokens * per_kv_head
    block_m = min(most[0], 16 if rows <= 16 else 32 if bytes_ == 4 else 64 if rows <= 64 else 128)
    # Triton 3.6 compiles loads of 64 keys wrongly where a value's channels are no multiple of 16 (40 channels of a key, 24 of
    # a value: other rows, or an illegal address); 32 keys are right, and tests/test_general.py runs odd sizes on a GPU.
    block_n, stages = min(most[1], 32 if bytes_ == 4 or spec.head_dim_v % 16 else 64), 3

    def too_large() -> bool:
        ahead = block_n * (dims * bytes_ + block_m * read) * stages
        return block_m * (padded(spec.head_dim) + block_n) * bytes_ + ahead > shared

    while too_large() and (stages > 1 or block_n > 16 or block_m > 16):
        if stages > 2 or (stages == 2 and block_n <= 32 and block_m <= 64):
            stages -= 1
        elif block_n > 32 or (block_n > 16 and block_m <= 16):
            block_n //= 2
        else:
            block_m //= 2
    group = max(each for each in range(1, block_m + 1) if per_kv_head % each == 0)
    block_q = 1 if tokens <= 1 else block_m // group  # with one, no sequence is searched for
    if block_m == 128 and block_n == 64 and dims == 256 and stages == 3 and most[1] >= 128 and not read:
        block_n = 128
    warps = (
        4 if dims <= 128 and bytes_ == 2 else 8 if block_m == 128 or block_m * padded(spec.head_dim_v) >= 1 << 14 else 4
    )  # or the output spills
    registers = 168 if block_m == 16 and bytes_ == 2 and dims <= 128 else 0  # three programs fit a multiprocessor
    return Tiles(group, block_q, block_m, block_n, warps, stages, dot, registers)


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
    tiles_for: TilesFor, spec: AttentionSpec, dot: torch.dtype, size: Size, shared: int, read: int, multiprocessors: int
) -> tuple[Launch, ...]:
    """In a batch of chunks and single tokens a tile fit for a chunk would be empty but for one token: those have a launch of
    their own. What a batch holds is known on the device alone, so both launches look for theirs.
    """
    if size.page_size == 0 or size.sequences == 1 or size.tokens <= size.sequences:
        served = [(tiles_for(spec, dot, size.tokens_each(), shared, read), 0)]
    else:
        single = tiles_for(spec, dot, max(1, 16 * spec.num_kv_heads // spec.num_q_heads), shared, read)
        longest = tiles_for(spec, dot, size.tokens, shared, read)
        served = [(single, single.block_q), (longest, -single.block_q)] if longest.block_m > single.block_m else [(longest, 0)]
    return tuple(_spread(spec, size, *each, shared, multiprocessors) for each in served)


def _spread(spec: AttentionSpec, size: Size, tiles: Tiles, few: int, shared: int, multiprocessors: int) -> Launch:
    """Tiles of few tokens wait for memory, and their sequences may differ a thousandfold: an equal share for every program,
    unless programs enough for the longest are few, and find their tile without a search.

    Tiles of many tokens are many programs, or share the keys of each where they are not. How many do, its length decides.
    """
    blocks, heads = size.blocks(tiles.block_q, few), spec.num_q_heads // tiles.group
    keys = min(size.keys, most_keys(spec.mask, tiles.group, tiles.block_q, 1 << max(0, size.keys - 1).bit_length()))
    small = few > 0 or (size.page_size > 0 and tiles.block_q == 1 and size.tokens <= size.sequences)
    each = _KEYS_A_PROGRAM if small else _KEYS_A_SPLIT
    least, splits = -(-each // tiles.block_n), -(-keys // each)
    if small and keys <= _KEYS_ALONE and blocks * heads >= multiprocessors:
        return Launch(tiles, few, (blocks, heads, 1), least, 0)
    if small and blocks * heads * splits > multiprocessors * _PARTS_EACH:
        return Launch(tiles, few, (blocks, heads, 1), least, multiprocessors * _at_once(spec, tiles, shared))
    if not small:
        splits = min(splits, -(-multiprocessors * _WAVES // max(1, blocks * heads)), _MOST_SPLITS)
    return Launch(tiles, few, (blocks, heads, max(1, splits)), least, 0)


def _at_once(spec: AttentionSpec, tiles: Tiles, shared: int) -> int:
    """Programs of a multiprocessor, so many that all fit."""
    block = tiles.block_n * (padded(spec.head_dim) + padded(spec.head_dim_v)) * tiles.dot.itemsize
    most = min(_SMALL_AT_ONCE, _REGISTERS // (32 * tiles.warps * tiles.registers)) if tiles.registers else _AT_ONCE
    return max(1, min(most, shared // (block * tiles.stages)))


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())  # what tl.dot takes

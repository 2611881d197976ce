"""Which tile does a program of the kernel for Hopper take when, and which blocks of keys does the tile visit?

Grids follow from shapes alone, so that a CUDA graph holds a launch for any lengths: tiles are counted, and found, from the batch's
tensors on the device.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

SEQUENCES = gl.constexpr(256)  # looked through at once


@gluon.jit
def add(a, b):  # type: ignore[no-untyped-def]
    return a + b


@gluon.jit  # type: ignore[untyped-decorator]
def blocks_of(some, batch, PLAN: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of some sequences: number, first token, and how many blocks of tokens this launch serves. Pad tokens are one more."""
    starts, num_tokens, num_sequences = batch[2], batch[4], batch[5]
    each = some + gl.arange(0, SEQUENCES, layout=gl.BlockedLayout([8], [32], [WARPS], [0]))
    begin = gl.load(starts + each, mask=each <= num_sequences, other=num_tokens)
    end = gl.load(starts + each + 1, mask=each < num_sequences, other=num_tokens)
    blocks = (end - begin + PLAN.block_q - 1) // PLAN.block_q
    if PLAN.few < 0:
        blocks = gl.where((end - begin > -PLAN.few) | (each == num_sequences), blocks, 0)
    return each, begin, blocks


@gluon.jit  # type: ignore[untyped-decorator]
def count_blocks(batch, PLAN: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of all sequences."""
    total = gl.to_tensor(0)
    for some in range(0, batch[5] + 1, SEQUENCES):
        _, _, blocks = blocks_of(some, batch, PLAN, WARPS)
        total += gl.sum(blocks, 0)
    return total


@gluon.jit  # type: ignore[untyped-decorator]
def find(block, batch, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of a block of tokens, and its first token."""
    starts, num_tokens, num_sequences = batch[2], batch[4], batch[5]
    b = num_sequences
    first = num_tokens
    if num_sequences == 1:  # nothing to look through
        new = gl.load(starts + 1)
        behind = block - (new + PLAN.block_q - 1) // PLAN.block_q
        b = gl.where(behind < 0, 0, 1)
        first = gl.where(behind < 0, block * PLAN.block_q, new + behind * PLAN.block_q)
    else:
        done = gl.to_tensor(0)
        for some in range(0, num_sequences + 1, SEQUENCES):
            each, begin, blocks = blocks_of(some, batch, PLAN, 1)
            ends = done + gl.associative_scan(blocks, 0, add)
            mine = (block < ends) & (block >= ends - blocks)
            b += gl.sum(gl.where(mine, each - num_sequences, 0), 0)
            first += gl.sum(gl.where(mine, begin + (block - ends + blocks) * PLAN.block_q - num_tokens, 0), 0)
            done += gl.sum(blocks, 0)
    return b, first


@gluon.jit  # type: ignore[untyped-decorator]
def tile_at(t, blocks, batch, COUNT: gl.constexpr, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile number t: late tokens first, which see the most keys, and every other round in reverse order.

    Sequence, first token and end of its tokens, tile of heads, position of token 0, number of keys, what tells the visited
    blocks of keys, how many of them need a mask, and how many there are.
    """
    heads: gl.constexpr = PLAN.heads // PLAN.group
    _, lengths, starts, _, num_tokens, num_sequences = batch
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    n = t * programs + gl.where(t % 2 == 1, programs - 1 - program, program)
    head_tile = n % heads
    b, first = find(blocks - 1 - n // heads, batch, PLAN)
    real = b < num_sequences
    end = gl.load(starts + b + 1, mask=real, other=num_tokens)
    length = gl.load(lengths + b, mask=real, other=0)
    origin = length - end
    last = gl.minimum(first + PLAN.block_q, end) - 1
    clears, edges, seen = COUNT(gl.maximum(first + origin, 0), gl.maximum(last + origin, 0), head_tile * PLAN.group, length)
    # A tile that sees nothing has a visit all the same, of no key at all: its output is to be written.
    length = gl.where(clears + edges > 0, length, 0)
    edges = gl.where(clears + edges > 0, edges, 1)
    return gl.minimum(b, num_sequences - 1), first, end, head_tile, origin, length, seen, edges, clears + edges


@gluon.jit  # type: ignore[untyped-decorator]
def start_of(k, clears, seen, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of the k-th visit: blocks that need a mask come last."""
    return gl.maximum(gl.where(k < clears, CLEAR(k, seen), EDGE(k - clears, seen)), 0) * PLAN.block_n

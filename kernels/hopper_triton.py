"""How do the warps of a Hopper multiprocessor share attention? One fetches, two groups of four compute.

A program stays, and takes tile after tile. Its fetching warp has TMA copy queries, and keys and values page by page, to rings of
slots in shared memory, as far ahead as there are slots; each group of warps takes its half of the rows of a tile, and while one
waits for the tensor cores, or computes a softmax, the other goes on. What is full and what is empty, barriers in shared memory say.
Which tile comes when, and which blocks of keys it visits, every warp computes for itself from the same numbers. The score and the
visited blocks are the printed functions of the general kernel (`general_triton`), read as Gluon: Triton with layouts and warps.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7
_shared = gl.shared_memory_descriptor
seen_as = getattr(_shared, "reinterpret", None) or _shared._reinterpret  # public since Triton 3.9
fetch_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.9

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
def find(block, batch, PLAN: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]
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
            each, begin, blocks = blocks_of(some, batch, PLAN, WARPS)
            ends = done + gl.associative_scan(blocks, 0, add)
            mine = (block < ends) & (block >= ends - blocks)
            b += gl.sum(gl.where(mine, each - num_sequences, 0), 0)
            first += gl.sum(gl.where(mine, begin + (block - ends + blocks) * PLAN.block_q - num_tokens, 0), 0)
            done += gl.sum(blocks, 0)
    return b, first


@gluon.jit  # type: ignore[untyped-decorator]
def tile_at(turn, blocks, batch, COUNT: gl.constexpr, PLAN: gl.constexpr, WARPS: gl.constexpr):  # type: ignore[no-untyped-def]
    """This program's tile of that turn: late tokens first, which see the most keys, and every other turn in reverse order.

    Sequence, first token and end of its tokens, tile of heads, position of token 0, number of keys, what tells the visited
    blocks of keys, how many of them need a mask, and how many there are.
    """
    heads: gl.constexpr = PLAN.heads // PLAN.group
    _, lengths, starts, _, num_tokens, num_sequences = batch
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    n = turn * programs + gl.where(turn % 2 == 1, programs - 1 - program, program)
    head_tile = n % heads
    b, first = find(blocks - 1 - n // heads, batch, PLAN, WARPS)
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
def start_of(k, edges, seen, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of the k-th visit: blocks that need a mask come first."""
    return gl.maximum(gl.where(k < edges, EDGE(k, seen), CLEAR(k - edges, seen)), 0) * PLAN.block_n


@gluon.jit  # type: ignore[untyped-decorator]
def rows_of(start, length, pages, nowhere, PLAN: gl.constexpr, CUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """Of each page of a block, the row of the pool where it begins, or behind the pool, where the sequence owns no such page:
    TMA then gives zeros."""
    PAGES: gl.constexpr = CUT.pages
    rows = ()
    for p in gl.static_range(PAGES):
        at = start + p * CUT.box
        page = gl.load(pages + at // PLAN.page_size, mask=at < length, other=0)
        rows = rows + (gl.where(at < length, page * PLAN.page_size + at % PLAN.page_size, nowhere),)  # type: ignore[assignment]  # noqa: RUF005
    return rows


@gluon.jit  # type: ignore[untyped-decorator]
def fetch(pool, ring, full, slot, rows, channel, PLAN: gl.constexpr, CUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """A block of keys or values. A ring holds slots, parts of the channels, pages."""
    PARTS: gl.constexpr = PLAN.block_d // CUT.part
    PAGES: gl.constexpr = CUT.pages
    mbarrier.expect(full.index(slot), PLAN.block_n * PLAN.block_d * 2)
    for h in gl.static_range(PARTS):
        for p in gl.static_range(PAGES):
            buffer = ring.index((slot * PARTS + h) * PAGES + p)
            fetch_box(pool, [rows[p], channel + h * CUT.part], full.index(slot), buffer)


@gluon.jit  # type: ignore[untyped-decorator]
def advance(slot, phase, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    slot += 1
    phase = gl.where(slot == STAGES, phase ^ 1, phase)
    return gl.where(slot == STAGES, 0, slot), phase


@gluon.jit  # type: ignore[untyped-decorator]
def produce(  # type: ignore[no-untyped-def]
    turns, blocks, batch, nowhere, q, keys, values, rings, bars,
    COUNT: gl.constexpr, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """The warp that fetches."""
    PARTS: gl.constexpr = PLAN.block_d // CUT.part
    TOKENS: gl.constexpr = CUT.rows // PLAN.group
    GROUPS: gl.constexpr = CUT.groups
    qs, ks, vs = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty = bars
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1)
    for turn in range(0, turns):
        b, first, _, head_tile, _, length, seen, edges, visits = tile_at(turn, blocks, batch, COUNT, PLAN, 1)
        channel = head_tile // PLAN.groups * PLAN.block_d
        pages = batch[0] + b.to(gl.int64) * batch[3]
        rows = rows_of(start_of(0, edges, seen, CLEAR, EDGE, PLAN), length, pages, nowhere, PLAN, CUT)
        mbarrier.wait(q_empty.index(q_slot), q_phase)
        mbarrier.expect(q_full.index(q_slot), GROUPS * CUT.rows * PLAN.block_d * 2)
        for g in gl.static_range(GROUPS):
            for h in gl.static_range(PARTS):
                buffer = qs.index((q_slot * GROUPS + g) * PARTS + h)
                at = [first + g * TOKENS, head_tile * PLAN.group, h * CUT.part]
                fetch_box(q, at, q_full.index(q_slot), buffer)
        q_slot, q_phase = advance(q_slot, q_phase, CUT.q_stages)
        for k in range(0, visits):
            following = start_of(gl.minimum(k + 1, visits - 1), edges, seen, CLEAR, EDGE, PLAN)
            ahead = rows_of(following, length, pages, nowhere, PLAN, CUT)
            mbarrier.wait(k_empty.index(slot), phase)
            fetch(keys, ks, k_full, slot, rows, channel, PLAN, CUT)
            mbarrier.wait(v_empty.index(slot), phase)
            fetch(values, vs, v_full, slot, rows, channel, PLAN, CUT)
            slot, phase = advance(slot, phase, CUT.stages)
            rows = ahead


@gluon.jit  # type: ignore[untyped-decorator]
def exponential(x, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    return gl.exp2(x) if PLAN.binary else gl.exp(x)


@gluon.jit  # type: ignore[untyped-decorator]
def scored(  # type: ignore[no-untyped-def]
    s, start, row, captured, length, S: gl.constexpr, SCORE: gl.constexpr, MASKED: gl.constexpr, PLAN: gl.constexpr
):
    """The scores of a block of keys, -inf where the mask hides, or there is no key."""
    j = start + gl.arange(0, PLAN.block_n, layout=gl.SliceLayout(0, S))
    value = SCORE(s, j[None, :].to(PLAN.whole), row, captured, MASKED)
    if MASKED:
        value = gl.where((j < length)[None, :], value, float("-inf"))
    return value


@gluon.jit  # type: ignore[untyped-decorator]
def clear_behind(values, owned, PLAN: gl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros in place of the values of a block that the sequence does not own (Law 8): their weights are 0, but 0 * NaN is not.

    Both groups do so, each before it reads: they write the same.
    """
    D: gl.constexpr = PLAN.block_dv
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    n = gl.arange(0, PLAN.block_n, layout=gl.SliceLayout(1, LAYOUT))
    tile = values.load(LAYOUT)
    values.store(gl.where((n < owned)[:, None], tile, 0.0).to(PLAN.dot))
    fence_async_shared()  # what the tensor cores read next comes by another way than what threads write
    barrier()


@gluon.jit  # type: ignore[untyped-decorator]
def visit(  # type: ignore[no-untyped-def]
    k, edges, seen, queries, acc, top, total, slot, phase, row, captured, length, ks, vs, bars,
    SCORE: gl.constexpr, CLEAR: gl.constexpr, EDGE: gl.constexpr, MASKED: gl.constexpr,
    S: gl.constexpr, OUT: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """One block of keys joins the running softmax. A slot is let go as soon as the product that reads it is done: Triton puts a
    barrier of the group before an arrival, which one thread makes for all."""
    _, _, k_full, k_empty, v_full, v_empty = bars
    start = start_of(k, edges, seen, CLEAR, EDGE, PLAN)
    mbarrier.wait(k_full.index(slot), phase)
    zeros = gl.full([CUT.rows, PLAN.block_n], 0.0, gl.float32, layout=S)
    s = warpgroup_mma(queries, ks.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(slot), count=1)
    value = scored(s, start, row, captured, length, S, SCORE, MASKED, PLAN)
    higher = gl.maximum(top, gl.max(value, 1))
    against = gl.where(higher == float("-inf"), 0.0, higher) * PLAN.factor  # nothing visible yet: no -inf minus -inf
    # What fades does so first: its products fit between the exponentials, of which the device makes one in eight clocks.
    fade = exponential(top * PLAN.factor - against, PLAN)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, OUT))[:, None]
    weights = exponential(value * PLAN.factor - against[:, None], PLAN)
    total = total * fade + gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(PLAN.dot), gl.DotOperandLayout(0, OUT, 2))
    mbarrier.wait(v_full.index(slot), phase)
    if MASKED:  # noqa: SIM102  a constant, and a number of the device
        if (start < length) & (start + PLAN.block_n > length):
            clear_behind(vs.index(slot), length - start, PLAN)
    acc = warpgroup_mma(p, vs.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, higher, total


@gluon.jit  # type: ignore[untyped-decorator]
def begin(  # type: ignore[no-untyped-def]
    b, head, i, captured, SINK: gl.constexpr, R: gl.constexpr, OUT: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr
):
    """The softmax of no keys; a sink is a key without a value, seen first."""
    top = gl.full([CUT.rows], float("-inf"), gl.float32, layout=R)
    total = gl.full([CUT.rows], 0.0, gl.float32, layout=R)
    if SINK is not None:
        top = total + SINK(b, head, i, captured)
        total = gl.where(top == float("-inf"), 0.0, 1.0)
    return gl.full([CUT.rows, PLAN.block_dv], 0.0, gl.float32, layout=OUT), top, total


@gluon.jit  # type: ignore[untyped-decorator]
def write(  # type: ignore[no-untyped-def]
    acc, first, end, head_tile, out, LAYOUT: gl.constexpr, GROUP: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr
):
    r = GROUP * CUT.rows + gl.arange(0, CUT.rows, layout=gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, PLAN.block_dv, layout=gl.SliceLayout(0, LAYOUT))
    base = out + (first.to(gl.int64) * PLAN.heads + head_tile * PLAN.group) * PLAN.dim_v
    inner = (r // PLAN.group * PLAN.heads + r % PLAN.group) * PLAN.dim_v
    gl.store(base + inner[:, None] + channel[None, :], acc, mask=(first + r // PLAN.group < end)[:, None])


@gluon.jit  # type: ignore[untyped-decorator]
def consume(  # type: ignore[no-untyped-def]
    GROUP: gl.constexpr, turns, blocks, batch, captured, out, rings, bars,
    PER_ROW: gl.constexpr, SCORE: gl.constexpr, SINK: gl.constexpr,
    COUNT: gl.constexpr, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """A group of four warps that computes."""
    N: gl.constexpr = PLAN.block_n
    D: gl.constexpr = PLAN.block_d
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    R: gl.constexpr = gl.SliceLayout(1, S)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=CUT.part * 2, element_bitwidth=16, rank=2)
    qs = seen_as(rings[0], PLAN.dot, [CUT.q_stages * CUT.groups, CUT.rows, D], SHARED)
    ks = seen_as(rings[1], PLAN.dot, [CUT.stages, N, D], SHARED)
    vs = seen_as(rings[2], PLAN.dot, [CUT.stages, N, D], SHARED)
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    for turn in range(0, turns):
        b, first, end, head_tile, origin, length, seen, edges, visits = tile_at(turn, blocks, batch, COUNT, PLAN, 4)
        r = GROUP * CUT.rows + gl.arange(0, CUT.rows, layout=R)
        head = (head_tile * PLAN.group + r % PLAN.group).to(PLAN.whole)
        i = gl.maximum(first + r // PLAN.group + origin, 0).to(PLAN.whole)
        row = PER_ROW(b.to(PLAN.whole), head[:, None], i[:, None], captured)
        acc, top, total = begin(b.to(PLAN.whole), head, i, captured, SINK, R, OUT, PLAN, CUT)
        queries = qs.index(q_slot * CUT.groups + GROUP)
        mbarrier.wait(bars[0].index(q_slot), q_phase)
        for k in range(0, edges):
            acc, top, total = visit(
                k, edges, seen, queries, acc, top, total, slot, phase, row, captured, length, ks, vs, bars,
                SCORE, CLEAR, EDGE, True, S, OUT, PLAN, CUT,
            )  # fmt: skip
            slot, phase = advance(slot, phase, CUT.stages)
        for k in range(edges, visits):
            acc, top, total = visit(
                k, edges, seen, queries, acc, top, total, slot, phase, row, captured, length, ks, vs, bars,
                SCORE, CLEAR, EDGE, False, S, OUT, PLAN, CUT,
            )  # fmt: skip
            slot, phase = advance(slot, phase, CUT.stages)
        acc = acc * gl.convert_layout(1.0 / gl.where(total == 0, 1.0, total), gl.SliceLayout(1, OUT))[:, None]
        barrier()
        queries.store(acc.to(PLAN.dot))  # its queries are read: room in which rows become whole lines of memory
        barrier()
        write(queries.load(STORE), first, end, head_tile, out, STORE, GROUP, PLAN, CUT)
        fence_async_shared()
        mbarrier.arrive(bars[1].index(q_slot), count=1)
        q_slot, q_phase = advance(q_slot, q_phase, CUT.q_stages)


@gluon.jit  # type: ignore[untyped-decorator]
def barriers(COUNT: gl.constexpr, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    """One for each slot; COUNT arrivals make a phase."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(STAGES):
        mbarrier.init(bars.index(n), count=COUNT)
    return bars


@gluon.jit(do_not_specialize=["captured", "width", "num_tokens", "num_sequences", "nowhere"])  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, keys, values, table, lengths, starts, captured, out, width, num_tokens, num_sequences, nowhere,
    PER_ROW: gl.constexpr, SCORE: gl.constexpr, SINK: gl.constexpr,
    COUNT: gl.constexpr, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """Tiles of queries of a paged batch, every program an equal number of them.

    q, keys, values: descriptors of [tokens, heads, channels], and of pools as rows of all KV heads. nowhere: a row behind those.
    """
    heads: gl.constexpr = PLAN.heads // PLAN.group
    PARTS: gl.constexpr = PLAN.block_d // CUT.part
    TOKENS: gl.constexpr = CUT.rows // PLAN.group
    qs = gl.allocate_shared_memory(PLAN.dot, [CUT.q_stages * CUT.groups * PARTS, TOKENS, PLAN.group, CUT.part], q.layout)
    ks = gl.allocate_shared_memory(PLAN.dot, [CUT.stages * PARTS * CUT.pages, CUT.box, CUT.part], keys.layout)
    vs = gl.allocate_shared_memory(PLAN.dot, [CUT.stages * PARTS * CUT.pages, CUT.box, CUT.part], values.layout)
    of_queries = barriers(1, CUT.q_stages), barriers(CUT.groups, CUT.q_stages)
    of_keys = barriers(1, CUT.stages), barriers(CUT.groups, CUT.stages)
    of_values = barriers(1, CUT.stages), barriers(CUT.groups, CUT.stages)
    fence_async_shared()
    rings = qs, ks, vs
    bars = of_queries + of_keys + of_values
    batch = table, lengths, starts, width, num_tokens, num_sequences
    blocks = count_blocks(batch, PLAN, 4)
    programs = gl.num_programs(0)
    turns = blocks * heads // programs
    place = gl.where(turns % 2 == 1, programs - 1 - gl.program_id(0), gl.program_id(0))
    turns += gl.where(place < blocks * heads - turns * programs, 1, 0)
    gl.warp_specialize(
        [
            (consume, (
                0, turns, blocks, batch, captured, out, rings, bars, PER_ROW, SCORE, SINK, COUNT, CLEAR, EDGE, PLAN, CUT,
            )),
            (consume, (
                1, turns, blocks, batch, captured, out, rings, bars, PER_ROW, SCORE, SINK, COUNT, CLEAR, EDGE, PLAN, CUT,
            )),
            (produce, (turns, blocks, batch, nowhere, q, keys, values, rings, bars, COUNT, CLEAR, EDGE, PLAN, CUT)),
        ],
        [4, 1],
        [CUT.registers, CUT.few_registers],
    )  # fmt: skip

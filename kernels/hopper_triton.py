"""How do the warps of a Hopper multiprocessor share attention? One fetches, two groups of four compute.

A program stays, and takes tile after tile. Its fetching warp has TMA copy queries, and keys and values page by page, to rings of
slots in shared memory, as far ahead as there are slots; each group of warps takes its half of the rows of a tile, and the two take
turns at the tensor cores. What is full and what is empty, and whose turn it is, barriers in shared memory say. Which tile comes
when, and which blocks of keys it visits, the fetching warp computes, and notes in shared memory beside what it fetches. The score
and the visited blocks are the printed functions of the general kernel (`general_triton`): Gluon is Triton with layouts and warps.
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

from compile_attn.kernels.hopper_tiles_triton import count_blocks, start_of, tile_at

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7
_shared = gl.shared_memory_descriptor
seen_as = getattr(_shared, "reinterpret", None) or _shared._reinterpret  # public since Triton 3.9
fetch_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.9


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


@gluon.jit
def note(page, numbers):  # type: ignore[no-untyped-def]
    """Written by the one warp that fetches; whoever waits for what is fetched next finds it."""
    SIZE: gl.constexpr = page.shape[0]
    n = gl.arange(0, SIZE, layout=gl.BlockedLayout([SIZE], [32], [1], [0]))
    line = gl.to_tensor(0) + n * 0
    for each in gl.static_range(SIZE):
        line = gl.where(n == each, numbers[each], line)
    page.store(line)
    barrier()


@gluon.jit
def noted(page):  # type: ignore[no-untyped-def]
    """The numbers of a note. Each thread reads them all, so that to pick one is to name a register."""
    SIZE: gl.constexpr = page.shape[0]
    LAYOUT: gl.constexpr = gl.BlockedLayout([SIZE], [32], [4], [0])
    line = page.load(LAYOUT)
    n = gl.arange(0, SIZE, layout=LAYOUT)
    found = ()
    for each in gl.static_range(SIZE):
        found = found + (gl.sum(gl.where(n == each, line, 0), 0),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@gluon.jit  # type: ignore[untyped-decorator]
def advance(slot, phase, STAGES: gl.constexpr):  # type: ignore[no-untyped-def]
    slot += 1
    phase = gl.where(slot == STAGES, phase ^ 1, phase)
    return gl.where(slot == STAGES, 0, slot), phase


@gluon.jit  # type: ignore[untyped-decorator]
def produce(  # type: ignore[no-untyped-def]
    tiles, blocks, batch, nowhere, q, keys, values, rings, notes, bars,
    COUNT: gl.constexpr, CLEAR: gl.constexpr, EDGE: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """The warp that fetches, and that alone knows what comes next: with queries and with keys goes a note of what they are."""
    PARTS: gl.constexpr = PLAN.block_d // CUT.part
    TOKENS: gl.constexpr = CUT.rows // PLAN.group
    GROUPS: gl.constexpr = CUT.groups
    qs, ks, vs = rings
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = bars
    slot, phase = gl.to_tensor(0), gl.to_tensor(1)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(1)
    for t in range(0, tiles):
        b, first, end, head_tile, origin, length, seen, edges, visits = tile_at(t, blocks, batch, COUNT, PLAN)
        channel = head_tile // PLAN.groups * PLAN.block_d
        pages = batch[0] + b.to(gl.int64) * batch[3]
        start = start_of(0, visits - edges, seen, CLEAR, EDGE, PLAN)
        rows = rows_of(start, length, pages, nowhere, PLAN, CUT)
        mbarrier.wait(q_empty.index(q_slot), q_phase)
        note(notes[0].index(q_slot), (b, first, end, head_tile, origin, length, edges, visits))
        mbarrier.expect(q_full.index(q_slot), GROUPS * CUT.rows * PLAN.block_d * 2)
        for g in gl.static_range(GROUPS):
            for h in gl.static_range(PARTS):
                buffer = qs.index((q_slot * GROUPS + g) * PARTS + h)
                at = [first + g * TOKENS, head_tile * PLAN.group, h * CUT.part]
                fetch_box(q, at, q_full.index(q_slot), buffer)
        q_slot, q_phase = advance(q_slot, q_phase, CUT.q_stages)
        for k in range(0, visits):
            following = start_of(gl.minimum(k + 1, visits - 1), visits - edges, seen, CLEAR, EDGE, PLAN)
            ahead = rows_of(following, length, pages, nowhere, PLAN, CUT)
            mbarrier.wait(k_empty.index(slot), phase)
            note(notes[1].index(slot), (start,))
            fetch(keys, ks, k_full, slot, rows, channel, PLAN, CUT)
            mbarrier.wait(v_empty.index(slot), phase)
            fetch(values, vs, v_full, slot, rows, channel, PLAN, CUT)
            slot, phase = advance(slot, phase, CUT.stages)
            start, rows = following, ahead


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
def multiplied(queries, keys, S: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr):  # type: ignore[no-untyped-def]
    """The products of queries and a block of keys, under way."""
    zeros = gl.full([CUT.rows, PLAN.block_n], 0.0, gl.float32, layout=S)
    return warpgroup_mma(queries, keys.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit  # type: ignore[untyped-decorator]
def visit(  # type: ignore[no-untyped-def]
    s, start, queries, acc, top, total, slot, phase, turn, row, captured, length, ks, vs, starts, bars,
    GROUP: gl.constexpr, SCORE: gl.constexpr, MASKED: gl.constexpr, LAST: gl.constexpr,
    S: gl.constexpr, OUT: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """One block of keys joins the running softmax, and the queries are multiplied with the next one.

    The groups take turns at the tensor cores: one multiplies while the other computes exponentials. A slot is let go as soon as the
    product that reads it is done: Triton puts a barrier of the group before an arrival, which one thread makes for all.
    """
    _, _, k_full, k_empty, v_full, v_empty, turns = bars
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
    after, after_phase = advance(slot, phase, CUT.stages)
    if LAST:
        mbarrier.wait(turns.index(GROUP), turn)
        acc = warpgroup_mma(p, vs.index(slot), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
    else:
        mbarrier.wait(k_full.index(after), after_phase)
        (start,) = noted(starts.index(after))
        mbarrier.wait(turns.index(GROUP), turn)
        s = multiplied(queries, ks.index(after), S, PLAN, CUT)
        acc = warpgroup_mma(p, vs.index(slot), acc, is_async=True)
        acc, s = warpgroup_mma_wait(0, deps=(acc, s))
        mbarrier.arrive(k_empty.index(after), count=1)
    mbarrier.arrive(turns.index(1 - GROUP), count=1)
    mbarrier.arrive(v_empty.index(slot), count=1)
    return s, start, acc, higher, total, after, after_phase, turn ^ 1


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
    GROUP: gl.constexpr, tiles, captured, out, rings, notes, bars,
    PER_ROW: gl.constexpr, SCORE: gl.constexpr, SINK: gl.constexpr, PLAN: gl.constexpr, CUT: gl.constexpr,
):  # fmt: skip
    """A group of four warps that computes. It asks nothing but what the notes say."""
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
    q_full, q_empty, k_full, k_empty, _, _, turns = bars
    slot, phase = gl.to_tensor(0), gl.to_tensor(0)
    q_slot, q_phase = gl.to_tensor(0), gl.to_tensor(0)
    turn = gl.to_tensor(1 - GROUP)  # the first group's comes at once
    for _ in range(0, tiles):
        mbarrier.wait(q_full.index(q_slot), q_phase)
        b, first, end, head_tile, origin, length, edges, visits = noted(notes[0].index(q_slot))
        r = GROUP * CUT.rows + gl.arange(0, CUT.rows, layout=R)
        head = (head_tile * PLAN.group + r % PLAN.group).to(PLAN.whole)
        i = gl.maximum(first + r // PLAN.group + origin, 0).to(PLAN.whole)
        row = PER_ROW(b.to(PLAN.whole), head[:, None], i[:, None], captured)
        acc, top, total = begin(b.to(PLAN.whole), head, i, captured, SINK, R, OUT, PLAN, CUT)
        queries = qs.index(q_slot * CUT.groups + GROUP)
        mbarrier.wait(k_full.index(slot), phase)
        (start,) = noted(notes[1].index(slot))
        mbarrier.wait(turns.index(GROUP), turn)
        s = multiplied(queries, ks.index(slot), S, PLAN, CUT)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
        mbarrier.arrive(k_empty.index(slot), count=1)
        turn ^= 1
        clears = gl.minimum(visits - edges, visits - 1)
        for _ in range(0, clears):
            s, start, acc, top, total, slot, phase, turn = visit(
                s, start, queries, acc, top, total, slot, phase, turn, row, captured, length, ks, vs, notes[1], bars,
                GROUP, SCORE, False, False, S, OUT, PLAN, CUT,
            )  # fmt: skip
        for _ in range(clears, visits - 1):
            s, start, acc, top, total, slot, phase, turn = visit(
                s, start, queries, acc, top, total, slot, phase, turn, row, captured, length, ks, vs, notes[1], bars,
                GROUP, SCORE, True, False, S, OUT, PLAN, CUT,
            )  # fmt: skip
        # Whatever the last block is: a mask hides nothing in one that needs none.
        _, start, acc, top, total, slot, phase, turn = visit(
            s, start, queries, acc, top, total, slot, phase, turn, row, captured, length, ks, vs, notes[1], bars,
            GROUP, SCORE, True, True, S, OUT, PLAN, CUT,
        )  # fmt: skip
        acc = acc * gl.convert_layout(1.0 / gl.where(total == 0, 1.0, total), gl.SliceLayout(1, OUT))[:, None]
        barrier()
        queries.store(acc.to(PLAN.dot))  # its queries are read: room in which rows become whole lines of memory
        barrier()
        write(queries.load(STORE), first, end, head_tile, out, STORE, GROUP, PLAN, CUT)
        fence_async_shared()
        mbarrier.arrive(q_empty.index(q_slot), count=1)
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
    of_tiles = gl.allocate_shared_memory(gl.int32, [CUT.q_stages, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    of_visits = gl.allocate_shared_memory(gl.int32, [CUT.stages, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    notes = of_tiles, of_visits
    of_queries = barriers(1, CUT.q_stages), barriers(CUT.groups, CUT.q_stages)
    of_keys = barriers(1, CUT.stages), barriers(CUT.groups, CUT.stages)
    of_values = barriers(1, CUT.stages), barriers(CUT.groups, CUT.stages)
    fence_async_shared()
    rings = qs, ks, vs
    of_groups = (barriers(1, 2),)  # whose turn it is
    bars = of_queries + of_keys + of_values + of_groups
    batch = table, lengths, starts, width, num_tokens, num_sequences
    blocks = count_blocks(batch, PLAN, 4)
    programs = gl.num_programs(0)
    tiles = blocks * heads // programs
    place = gl.where(tiles % 2 == 1, programs - 1 - gl.program_id(0), gl.program_id(0))
    tiles += gl.where(place < blocks * heads - tiles * programs, 1, 0)
    gl.warp_specialize(
        [
            (consume, (0, tiles, captured, out, rings, notes, bars, PER_ROW, SCORE, SINK, PLAN, CUT)),
            (consume, (1, tiles, captured, out, rings, notes, bars, PER_ROW, SCORE, SINK, PLAN, CUT)),
            (produce, (tiles, blocks, batch, nowhere, q, keys, values, rings, notes, bars, COUNT, CLEAR, EDGE, PLAN, CUT)),
        ],
        [4, 1],
        [CUT.registers, CUT.few_registers],
    )  # fmt: skip

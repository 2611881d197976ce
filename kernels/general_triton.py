"""How does one Triton program attend? Flash attention whose score is a function printed from the spec.

A program owns the query heads of one KV head for `block_q` consecutive tokens of one sequence, as rows of one tile, and
goes over the keys that some row may see, or over its share of them where the keys are split. Key blocks that the bounds
prove visible as a whole are taken without a mask. In paged mode keys are found through the block table and sequences
through the starts of their tokens; nothing is read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

NONE, ALL, SOME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of the blocks of a loop need a mask


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled."""

    page_size: int  # 0: stateless, every sequence has its keys in one page of its own
    group: int  # query heads in a tile
    groups: int  # tiles that share a KV head
    heads: int  # query heads
    dim: int
    dim_v: int
    binary: bool  # a weight is a power of 2, not of e
    factor: float  # what a printed score is multiplied by before
    alike: bool  # keys and values of a token stand at the same place of their pools
    k_scaled: bool  # pages hold the values by a scale
    v_scaled: bool
    whole: tl.dtype  # of positions: int32, or int64 where a product could exceed it
    dot: tl.dtype  # of the operands of the product of queries and keys, and of that of weights and values
    dot_v: tl.dtype
    few: int  # n: only sequences of at most n new tokens, a tile each; -n: only the others; 0: all
    block_q: int  # tokens of a tile; its rows: block_q * group, padded to
    block_m: int
    block_n: int  # keys of a tile
    block_d: int  # head sizes, padded to a power of two
    block_dv: int
    split: bool  # several programs share the keys of a tile of queries
    together: bool  # one loop over blocks of keys with and without a mask, where they are few


# Tuples that hold no tuples: Triton 3.6 loses a stride of 1 in a nested one.
class Pool(NamedTuple):
    """Keys or values, and their strides. Stateless: a sequence is a page, a token is a slot."""

    at: Any
    page: int
    slot: int
    head: int
    channel: int
    scale: Any
    scale_head: int  # 0: one for all heads


class Batch(NamedTuple):
    """Where the tokens of a paged batch are; in stateless mode unused."""

    table: Any
    width: int
    lengths: Any
    starts: Any
    token_seq: Any


class Parts(NamedTuple):
    """What several programs found for one tile. Per row of a part: values before normalisation, highest score, sum of weights.

    Per tile: its first part, and how many. Per row of a tile: its row of the output, or -1.
    """

    acc: Any
    top: Any
    total: Any
    first: Any
    used: Any
    place: Any


@triton.jit
def portion(number, low, high, of):  # type: ignore[no-untyped-def]
    """Of this number of blocks the part from low to high, where all are `of`."""
    return (number.to(tl.int64) * low // of).to(tl.int32), (number.to(tl.int64) * high // of).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def exponential(x, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.exp2(x) if PLAN.binary else tl.exp(x)


@triton.jit  # type: ignore[untyped-decorator]
def _pages(start, limit, b, batch, MASKED: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the keys of a block are: one page, or a page for every key. Loaded a block ahead, or keys could not be."""
    if PLAN.page_size == 0:
        page = b
    else:
        at = batch.table + b.to(tl.int64) * batch.width + start // PLAN.page_size
        n = tl.arange(0, PLAN.block_n)
        if PLAN.page_size % PLAN.block_n == 0:
            page = tl.load(at, mask=start < limit, other=0)
        elif PLAN.block_n % PLAN.page_size == 0:
            # Not `start < limit`: the interpreter of Triton 3.9 takes no comparison of scalars for the mask of a block (it keeps
            # the type of what was compared). The compiler makes the same of both.
            key = start + n if MASKED != NONE else tl.broadcast_to(start, (PLAN.block_n,))
            page = tl.load(at + n // PLAN.page_size, mask=key < limit, other=0)
        else:
            page = tl.load(at + (start % PLAN.page_size + n) // PLAN.page_size, mask=start + n < limit, other=0)
    return page


@triton.jit  # type: ignore[untyped-decorator]
def _slots(start, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of every key of a block, in its page. What does not depend on the block is computed once."""
    n = tl.arange(0, PLAN.block_n)
    if PLAN.page_size == 0:
        slot = start.to(tl.int64) + n
    elif PLAN.page_size % PLAN.block_n == 0:
        slot = start % PLAN.page_size + n
    elif PLAN.block_n % PLAN.page_size == 0:
        slot = n % PLAN.page_size
    else:
        slot = (start % PLAN.page_size + n) % PLAN.page_size
    return slot


@triton.jit  # type: ignore[untyped-decorator]
def _tile(pool, slots, pages, kv_head, owned, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys or values, a row each. One that the sequence does not own is never read (Law 8)."""
    channel = tl.arange(0, BLOCK)[None, :]
    at = pool.at + kv_head * pool.head + slots[:, None] + channel * pool.channel + pages
    if MASKED != NONE:
        tile = tl.load(at, mask=owned[:, None] & (channel < DIM), other=0.0)
    elif DIM == BLOCK:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=channel < DIM, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    state, page, queries, row, start, masked, length, kv_head, scale, keys, values, captured,
    SCORE: tl.constexpr, MASKED: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """One block of keys joins the running softmax."""
    acc, top, total = state
    j = start + tl.arange(0, PLAN.block_n)
    owned = j < length
    slot = _slots(start, PLAN)
    many: tl.constexpr = PLAN.page_size > 0 and PLAN.page_size % PLAN.block_n != 0
    page = page.to(tl.int64)[:, None] if many else page.to(tl.int64)
    slots = slot * keys.slot
    pages = page * keys.page
    k = _tile(keys, slots, pages, kv_head, owned, MASKED, PLAN.dim, PLAN.block_d)
    # tf32x3: three products of halves, float32 to the last bits; "ieee" would do without tensor cores.
    s = tl.dot(queries, tl.trans(k.to(PLAN.dot)), input_precision="tf32x3")
    if PLAN.k_scaled:
        s = s * scale
    value = SCORE(s, j[None, :].to(PLAN.whole), row, captured, False)
    if masked:
        value = tl.where(owned[None, :], SCORE(s, j[None, :].to(PLAN.whole), row, captured, True), float("-inf"))
    higher = tl.maximum(top, tl.max(value, 1))
    against = tl.where(higher == float("-inf"), 0.0, higher) * PLAN.factor  # nothing visible yet: no -inf minus -inf
    weights = exponential(value * PLAN.factor - against[:, None], PLAN)
    fade = exponential(top * PLAN.factor - against, PLAN)
    if not PLAN.alike:
        slots = slot * values.slot
        pages = page * values.page
    v = _tile(values, slots, pages, kv_head, owned, MASKED, PLAN.dim_v, PLAN.block_dv)
    acc = tl.dot(weights.to(PLAN.dot_v), v.to(PLAN.dot_v), acc * fade[:, None], input_precision="tf32x3")
    return acc, higher, total * fade + tl.sum(weights, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _begin(b, head, i, opens, captured, SINK: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The softmax of no keys; a sink is a key without a value, seen first."""
    top = tl.full((PLAN.block_m,), float("-inf"), tl.float32)
    total = tl.full((PLAN.block_m,), 0.0, tl.float32)
    if SINK is not None:
        sink = tl.full((PLAN.block_m,), 0.0, tl.float32) + SINK(b, head, i, captured)
        top = tl.where(opens, sink, top)  # as scores are printed: without the factor
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    return tl.full((PLAN.block_m, PLAN.block_dv), 0.0, tl.float32), top, total


@triton.jit  # type: ignore[untyped-decorator]
def _end(state, place, inside, part, alone, scale, out, parts, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    acc, top, total = state
    if PLAN.v_scaled:
        acc = acc * scale
    channel = tl.arange(0, PLAN.block_dv)[None, :]
    stored = inside[:, None] & (channel < PLAN.dim_v)
    if alone:
        acc = acc * (1.0 / tl.where(total == 0, 1.0, total))[:, None]  # a row that sees no key: 0
        tl.store(out + place[:, None] * PLAN.dim_v + channel, acc.to(out.dtype.element_ty), mask=stored)
    else:
        row = part.to(tl.int64) * (PLAN.block_q * PLAN.group) + tl.arange(0, PLAN.block_m)
        tl.store(parts.acc + row[:, None] * PLAN.dim_v + channel, acc, mask=stored)
        tl.store(parts.top + row, top, mask=inside)
        tl.store(parts.total + row, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _start(k, clears, seen, CLEAR: tl.constexpr, EDGE: tl.constexpr, MASKED: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of a tile's k-th block: of those without a mask, of the others, or of both, one kind after the other."""
    if MASKED == NONE:
        block = CLEAR(k, seen)
    elif MASKED == ALL:
        block = EDGE(k, seen)
    else:
        block = tl.where(k < clears, CLEAR(k, seen), EDGE(k - clears, seen))
    return block * PLAN.block_n


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # type: ignore[no-untyped-def]
    state, begin, end, clears, seen, queries, row, b, kv_head, length, scale, keys, values, batch, captured,
    CLEAR: tl.constexpr, EDGE: tl.constexpr, SCORE: tl.constexpr, MASKED: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Blocks of keys from the begin-th on, of those without a mask, of the others, or of both."""
    start = _start(begin, clears, seen, CLEAR, EDGE, MASKED, PLAN)
    page = _pages(start, tl.where(begin < end, length, 0), b, batch, MASKED, PLAN)
    for k in range(begin, end):
        following = _start(k + 1, clears, seen, CLEAR, EDGE, MASKED, PLAN)
        ahead = _pages(following, tl.where(k + 1 < end, length, 0), b, batch, MASKED, PLAN)
        masked = MASKED if MASKED != SOME else k >= clears
        state = _visit(
            state, page, queries, row, start, masked, length, kv_head, scale, keys, values, captured, SCORE, MASKED, PLAN
        )  # fmt: skip
        page = ahead
        start = following
    return state


@triton.jit  # type: ignore[untyped-decorator]
def compute(  # type: ignore[no-untyped-def]
    b, rows, head_tile, length, begin, end, clears, seen, opens, part, alone,
    q, q_strides, keys, values, batch, captured, out, parts,
    PER_ROW: tl.constexpr, SCORE: tl.constexpr, SINK: tl.constexpr, CLEAR: tl.constexpr, EDGE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The rows of a tile over its blocks of keys from the begin-th on; `clears` of all need no mask.

    To the output, or, where other programs have more of them, to `part` of the parts.

    opens: these are the first blocks, which a sink goes before.
    """
    token, head, i, place, inside = rows
    kv_head = (head_tile // PLAN.groups).to(tl.int64)
    channel = tl.arange(0, PLAN.block_d)[None, :]
    at = q + b.to(tl.int64) * q_strides[0] + token.to(tl.int64) * q_strides[1] + head.to(tl.int64) * q_strides[2]
    queries = tl.load(at[:, None] + channel * q_strides[3], mask=inside[:, None] & (channel < PLAN.dim), other=0.0).to(PLAN.dot)
    b_whole = b.to(PLAN.whole)
    i = i.to(PLAN.whole)
    head = head.to(PLAN.whole)
    row = PER_ROW(b_whole, head[:, None], i[:, None], captured)
    scale = tl.load(keys.scale + kv_head * keys.scale_head).to(tl.float32) if PLAN.k_scaled else 1.0
    state = _begin(b_whole, head, i, opens, captured, SINK, PLAN)
    if PLAN.together:
        state = _walk(
            state, begin, end, clears, seen, queries, row, b, kv_head, length, scale, keys, values, batch, captured,
            CLEAR, EDGE, SCORE, SOME, PLAN,
        )  # fmt: skip
    else:
        state = _walk(
            state, begin, tl.minimum(end, clears), clears, seen, queries, row, b, kv_head, length, scale, keys, values, batch,
            captured, CLEAR, EDGE, SCORE, NONE, PLAN,
        )  # fmt: skip
        state = _walk(
            state, tl.maximum(begin - clears, 0), end - clears, clears, seen, queries, row, b, kv_head, length, scale, keys, values,
            batch, captured, CLEAR, EDGE, SCORE, ALL, PLAN,
        )  # fmt: skip
    scale = tl.load(values.scale + kv_head * values.scale_head).to(tl.float32) if PLAN.v_scaled else 1.0
    _end(state, place, inside, part, alone, scale, out, parts, PLAN)

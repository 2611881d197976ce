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

SEQUENCES = tl.constexpr(256)  # looked through at once


@dataclass(frozen=True)
class Plan:
    """What is fixed when a kernel is compiled."""

    page_size: int  # 0: stateless, every sequence has its keys in one page of its own
    group: int  # query heads in a tile
    groups: int  # tiles that share a KV head
    dim: int
    dim_v: int
    causal: bool  # no key to the right of its query is visible
    window: int  # greatest i - j of a visible key; -1: unbounded
    bounded: bool  # the mask is what causal and window say, nothing more
    binary: bool  # a weight is a power of 2, not of e
    factor: float  # what a printed score is multiplied by before
    alike: bool  # keys and values of a token stand at the same place of their pools
    k_scaled: bool  # pages hold the values by a scale
    v_scaled: bool
    whole: tl.dtype  # of positions: int32, or int64 where a product could exceed it
    dot: tl.dtype  # of the operands of both products
    few: int  # n: only sequences of at most n new tokens, a tile each; -n: only the others; 0: all
    block_q: int  # tokens of a tile; its rows: block_q * group, padded to
    block_m: int
    block_n: int  # keys of a tile
    block_d: int  # head sizes, padded to a power of two
    block_dv: int
    split: bool  # several programs share the keys of a tile of queries


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
    positions: Any
    token_seq: Any


class Parts(NamedTuple):
    """Per row and split: values before normalisation, highest score, sum of weights.

    Per tile: how many splits it uses. Per row: its row of the output, or -1.
    """

    acc: Any
    top: Any
    total: Any
    used: Any
    place: Any


@triton.jit  # type: ignore[untyped-decorator]
def _find(block, batch, num_tokens, num_sequences, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sequence of a block of tokens, and its first token: every sequence that this launch serves begins a block.

    Pad tokens are one sequence more, behind the last.
    """
    b = num_sequences
    first = num_tokens
    done = 0
    for some in range(0, num_sequences + 1, SEQUENCES):
        each = some + tl.arange(0, SEQUENCES)
        begin = tl.load(batch.starts + each, mask=each <= num_sequences, other=num_tokens)
        end = tl.load(batch.starts + each + 1, mask=each < num_sequences, other=num_tokens)
        blocks = (end - begin + PLAN.block_q - 1) // PLAN.block_q
        if PLAN.few < 0:
            blocks = tl.where((end - begin > -PLAN.few) | (each == num_sequences), blocks, 0)
        ends = done + tl.cumsum(blocks, 0)
        mine = (block < ends) & (block >= ends - blocks)
        b += tl.sum(tl.where(mine, each - num_sequences, 0))
        first += tl.sum(tl.where(mine, begin + (block - ends + blocks) * PLAN.block_q - num_tokens, 0))
        done += tl.sum(blocks)
    return b, first


@triton.jit  # type: ignore[untyped-decorator]
def _sequence(block, batch, num_tokens, num_sequences, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sequence, first token, end of its tokens and number of its keys, for a block of tokens in paged mode."""
    if PLAN.few > 0:
        b = block
        first = tl.load(batch.starts + b)
    elif PLAN.block_q == 1:
        first = block
        b = tl.load(batch.token_seq + first)  # not masked: nothing waits for the other load
        b = tl.where(first < tl.load(batch.starts + num_sequences), b, num_sequences)
    else:
        b, first = _find(block, batch, num_tokens, num_sequences, PLAN)
    real = b < num_sequences
    end = tl.load(batch.starts + b + 1, mask=real, other=num_tokens)
    length = tl.load(batch.lengths + b, mask=real, other=0)
    if PLAN.few > 0:
        end = tl.where(end - first > PLAN.few, first, end)
    return tl.minimum(b, num_sequences - 1), first, end, length


@triton.jit  # type: ignore[untyped-decorator]
def _key_blocks(i, inside, length, split, splits, least, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks [begin, end) to visit, of them [clear, clear_end) in which every row sees every key, and the splits in use.

    Splits are for the longest sequence that there may be: a tile with few keys uses as many as are worth it.
    """
    last = tl.max(tl.where(inside, i, 0))
    first = tl.min(tl.where(inside, i, last))
    low = 0
    clear_low = 0
    if PLAN.window >= 0:
        low = tl.maximum(first - PLAN.window, 0)
        clear_low = tl.maximum(last - PLAN.window, 0)
    high = length
    clear_high = length
    if PLAN.causal:
        high = tl.minimum(length, last + 1)
        clear_high = tl.minimum(length, first + 1)
    begin = low // PLAN.block_n
    end = tl.maximum((high + PLAN.block_n - 1) // PLAN.block_n, begin)
    used = 1
    if PLAN.split:
        share = tl.maximum((end - begin + splits - 1) // splits, least)
        used = tl.maximum((end - begin + share - 1) // share, 1)
        begin = tl.minimum(begin + split * share, end)
        end = tl.minimum(begin + share, end)
    clear = begin
    clear_end = begin
    if PLAN.bounded:
        clear = tl.minimum(tl.maximum((clear_low + PLAN.block_n - 1) // PLAN.block_n, begin), end)
        clear_end = tl.minimum(tl.maximum(clear_high // PLAN.block_n, clear), end)
    return (begin, end, clear, clear_end), used


@triton.jit  # type: ignore[untyped-decorator]
def _edge(n, clear, clear_end, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first key of the n-th block, where those from `clear` to `clear_end` are left out."""
    return tl.where(n < clear, n, n + clear_end - clear) * PLAN.block_n


@triton.jit  # type: ignore[untyped-decorator]
def _exp(x, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
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
            page = tl.load(at + n // PLAN.page_size, mask=(start + n if MASKED else start) < limit, other=0)
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
    if MASKED:
        tile = tl.load(at, mask=owned[:, None] & (channel < DIM), other=0.0)
    elif DIM == BLOCK:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=channel < DIM, other=0.0)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    state, page, queries, row, start, length, kv_head, scale, keys, values, captured,
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
    value = SCORE(s, j[None, :].to(PLAN.whole), row, captured, MASKED)
    if MASKED:
        value = tl.where(owned[None, :], value, float("-inf"))
    higher = tl.maximum(top, tl.max(value, 1))
    against = tl.where(higher == float("-inf"), 0.0, higher) * PLAN.factor  # nothing visible yet: no -inf minus -inf
    weights = _exp(value * PLAN.factor - against[:, None], PLAN)
    fade = _exp(top * PLAN.factor - against, PLAN)
    if not PLAN.alike:
        slots = slot * values.slot
        pages = page * values.page
    v = _tile(values, slots, pages, kv_head, owned, MASKED, PLAN.dim_v, PLAN.block_dv)
    acc = tl.dot(weights.to(PLAN.dot), v.to(PLAN.dot), acc * fade[:, None], input_precision="tf32x3")
    return acc, higher, total * fade + tl.sum(weights, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _begin(b, head, i, split, captured, SINK: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The softmax of no keys; a sink is a key without a value, seen first."""
    top = tl.full((PLAN.block_m,), float("-inf"), tl.float32)
    total = tl.full((PLAN.block_m,), 0.0, tl.float32)
    if SINK is not None:
        sink = tl.full((PLAN.block_m,), 0.0, tl.float32) + SINK(b, head, i, captured)
        top = tl.where(split == 0, sink, top)  # as scores are printed: without the factor
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    return tl.full((PLAN.block_m, PLAN.block_dv), 0.0, tl.float32), top, total


@triton.jit
def _tile_number():  # type: ignore[no-untyped-def]
    return tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the rows of this tile are in `parts`."""
    return _tile_number() * (PLAN.block_q * PLAN.group) + tl.arange(0, PLAN.block_m)


@triton.jit  # type: ignore[untyped-decorator]
def _end(state, place, inside, split, splits, used, scale, out, parts, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    acc, top, total = state
    if PLAN.v_scaled:
        acc = acc * scale
    channel = tl.arange(0, PLAN.block_dv)[None, :]
    stored = inside[:, None] & (channel < PLAN.dim_v)
    if used > 1:
        part = _rows(PLAN).to(tl.int64) * splits + split
        tl.store(parts.acc + part[:, None] * PLAN.dim_v + channel, acc, mask=stored)
        tl.store(parts.top + part, top, mask=inside)
        tl.store(parts.total + part, total, mask=inside)
    else:
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]  # a row that sees no key: 0
        tl.store(out + place[:, None] * PLAN.dim_v + channel, acc.to(out.dtype.element_ty), mask=stored)


@triton.jit  # type: ignore[untyped-decorator]
def _walk(  # type: ignore[no-untyped-def]
    state, blocks, queries, row, b, kv_head, length, scale, keys, values, batch, captured, SCORE: tl.constexpr, PLAN: tl.constexpr
):  # fmt: skip
    """All blocks of keys: first those without a mask."""
    begin, end, clear, clear_end = blocks
    limit = clear_end * PLAN.block_n
    page = _pages(clear * PLAN.block_n, limit, b, batch, False, PLAN)
    for n in range(clear, clear_end):
        start = n * PLAN.block_n
        ahead = _pages(start + PLAN.block_n, limit, b, batch, False, PLAN)
        state = _visit(state, page, queries, row, start, length, kv_head, scale, keys, values, captured, SCORE, False, PLAN)
        page = ahead
    start = _edge(begin, clear, clear_end, PLAN)
    page = _pages(start, length, b, batch, True, PLAN)
    for n in range(begin, end - (clear_end - clear)):
        following = _edge(n + 1, clear, clear_end, PLAN)
        ahead = _pages(following, length, b, batch, True, PLAN)
        state = _visit(state, page, queries, row, start, length, kv_head, scale, keys, values, captured, SCORE, True, PLAN)
        page = ahead
        start = following
    return state


# Not specialised: what changes from step to step, or with no gain, would only compile the kernel again.
@triton.jit(do_not_specialize=["batch", "captured", "num_tokens", "num_sequences", "num_keys", "splits", "least"])  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, q_strides, keys, values, batch, captured, out, parts, num_tokens, num_sequences, num_keys, splits, least,
    PER_ROW: tl.constexpr, SCORE: tl.constexpr, SINK: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Stateless: num_tokens queries and num_keys keys in each of the sequences.

    splits: programs that may share the keys of a tile, each with `least` blocks of them or more.
    q_strides: sequence (paged: 0), token, head, channel. The output is contiguous rows of dim_v, a row a token and head;
    stateless: a head and token of a sequence.
    """
    # Late tokens see the most keys under a causal mask: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = (tl.program_id(1) // PLAN.groups).to(tl.int64)
    split = tl.program_id(2)
    if PLAN.page_size > 0:
        b, first, end, length = _sequence(block, batch, num_tokens, num_sequences, PLAN)
    else:
        blocks = (num_tokens + PLAN.block_q - 1) // PLAN.block_q
        b = block // blocks
        first = block % blocks * PLAN.block_q
        end = num_tokens
        length = num_keys
    r = tl.arange(0, PLAN.block_m)
    token = first + r // PLAN.group
    in_tile = r < PLAN.block_q * PLAN.group
    inside = (token < end) & in_tile
    head = tl.program_id(1) * PLAN.group + r % PLAN.group
    num_heads = tl.num_programs(1) * PLAN.group
    i = tl.load(batch.positions + token, mask=inside, other=0).to(tl.int32) if PLAN.page_size > 0 else token
    blocks, used = _key_blocks(i, inside, length, split, splits, least, PLAN)
    wide = token.to(tl.int64)
    place = wide * num_heads + head if PLAN.page_size > 0 else (b * num_heads + head).to(tl.int64) * num_tokens + token
    if PLAN.split:
        tl.store(parts.used + _tile_number(), used, mask=split == 0)
        tl.store(parts.place + _rows(PLAN), tl.where(inside, place, -1).to(tl.int32), mask=in_tile & (split == 0))
    if (first >= end) | (split >= used):
        return
    channel = tl.arange(0, PLAN.block_d)[None, :]
    at = q + b.to(tl.int64) * q_strides[0] + wide * q_strides[1] + head.to(tl.int64) * q_strides[2]
    queries = tl.load(at[:, None] + channel * q_strides[3], mask=inside[:, None] & (channel < PLAN.dim), other=0.0).to(PLAN.dot)
    b_whole = b.to(PLAN.whole)
    i = i.to(PLAN.whole)
    head = head.to(PLAN.whole)
    row = PER_ROW(b_whole, head[:, None], i[:, None], captured)
    scale = tl.load(keys.scale + kv_head * keys.scale_head).to(tl.float32) if PLAN.k_scaled else 1.0
    state = _begin(b_whole, head, i, split, captured, SINK, PLAN)
    state = _walk(state, blocks, queries, row, b, kv_head, length, scale, keys, values, batch, captured, SCORE, PLAN)
    scale = tl.load(values.scale + kv_head * values.scale_head).to(tl.float32) if PLAN.v_scaled else 1.0
    _end(state, place, inside, split, splits, used, scale, out, parts, PLAN)

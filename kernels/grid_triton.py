"""Which tile of queries does a program take, and which of its keys?

Either one tile a program, or, where tiles are of few tokens, an equal share of all blocks of keys of the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compile_attn.kernels.general_triton import compute, portion

SEQUENCES = tl.constexpr(256)  # looked through at once


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


@triton.jit
def _bounds(b, batch, num_tokens, num_sequences):  # type: ignore[no-untyped-def]
    """Of a sequence, the end of its tokens and the number of its keys."""
    real = b < num_sequences
    end = tl.load(batch.starts + b + 1, mask=real, other=num_tokens)
    length = tl.load(batch.lengths + b, mask=real, other=0)
    return end, length


@triton.jit  # type: ignore[untyped-decorator]
def _sequence(block, batch, num_tokens, num_sequences, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sequence, first token, end of its tokens, number of its keys, and position of token 0, for a block of tokens."""
    if PLAN.few > 0:
        b = block
        first = tl.load(batch.starts + b)
    elif PLAN.block_q == 1:
        first = block
        b = tl.load(batch.token_seq + first)  # not masked: nothing waits for the other load
        b = tl.where(first < tl.load(batch.starts + num_sequences), b, num_sequences)
    elif num_sequences == 1:  # nothing to look through
        new = tl.load(batch.starts + 1)
        blocks = (new + PLAN.block_q - 1) // PLAN.block_q
        b = (block >= blocks).to(tl.int32)
        first = tl.where(b == 0, block * PLAN.block_q, new + (block - blocks) * PLAN.block_q)
    else:
        b, first = _find(block, batch, num_tokens, num_sequences, PLAN)
    if PLAN.few == 0 and PLAN.block_q == 1:
        # In a decode, mostly the sequence of the token's own number: these loads need not wait for the one that says so.
        end, length = _bounds(first, batch, num_tokens, num_sequences)
        if b != first:
            end, length = _bounds(b, batch, num_tokens, num_sequences)
    else:
        end, length = _bounds(b, batch, num_tokens, num_sequences)
    origin = length - end  # the last token is the last key: what `positions` holds, without a load that waits for this one
    if PLAN.few > 0:
        end = tl.where(end - first > PLAN.few, first, end)
    return tl.minimum(b, num_sequences - 1), first, end, length, origin


@triton.jit  # type: ignore[untyped-decorator]
def _rows(b, first, end, origin, head_tile, num_tokens, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Token, head, position and row of the output of every row of a tile, and whether there is such a row."""
    r = tl.arange(0, PLAN.block_m)
    token = first + r // PLAN.group
    inside = (token < end) & (r < PLAN.block_q * PLAN.group)
    head = head_tile * PLAN.group + r % PLAN.group
    i = tl.maximum(token + origin, 0)  # of a pad token, 0
    if PLAN.page_size > 0:
        place = token.to(tl.int64) * PLAN.heads + head
    else:
        place = (b * PLAN.heads + head).to(tl.int64) * num_tokens + token
    return token, head, i, place, inside


@triton.jit  # type: ignore[untyped-decorator]
def _sight(first, end, origin, head_tile, length, COUNT: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many blocks of keys a tile sees, clear ones and others, and what tells which."""
    last = tl.minimum(first + PLAN.block_q, end) - 1
    return COUNT(tl.maximum(first + origin, 0), tl.maximum(last + origin, 0), head_tile * PLAN.group, length)


@triton.jit  # type: ignore[untyped-decorator]
def _announce(tile, first, used, rows, opens, parts, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """By the program that has the first blocks of a tile: where its parts will be."""
    place, inside = rows[3], rows[4]
    r = tl.arange(0, PLAN.block_m)
    tl.store(parts.first + tile, first, mask=opens)
    tl.store(parts.used + tile, used, mask=opens)
    at = parts.place + tile * (PLAN.block_q * PLAN.group) + r
    announced = tl.where(opens, PLAN.block_q * PLAN.group, 0)  # not `opens & ...`: see general_triton's `_pages`
    tl.store(at, tl.where(inside, place, -1).to(tl.int32), mask=r < announced)


# Not specialised: what changes from step to step, or with no gain, would only compile the kernel again.
@triton.jit(do_not_specialize=["batch", "captured", "num_tokens", "num_sequences", "num_keys", "splits", "least"])  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, q_strides, keys, values, batch, captured, out, parts, num_tokens, num_sequences, num_keys, splits, least,
    PER_ROW: tl.constexpr, SCORE: tl.constexpr, SINK: tl.constexpr,
    COUNT: tl.constexpr, CLEAR: tl.constexpr, EDGE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Stateless: num_tokens queries and num_keys keys in each of the sequences.

    splits: programs that may share the keys of a tile, each with `least` blocks of them or more.
    q_strides: sequence (paged: 0), token, head, channel. The output is contiguous rows of dim_v, a row a token and head;
    stateless: a head and token of a sequence.
    """
    # Late tokens see the most keys under a causal mask: they begin first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head_tile = tl.program_id(1)
    split = tl.program_id(2)
    if PLAN.page_size > 0:
        b, first, end, length, origin = _sequence(block, batch, num_tokens, num_sequences, PLAN)
    else:
        each = (num_tokens + PLAN.block_q - 1) // PLAN.block_q
        b = block // each
        first = block % each * PLAN.block_q
        end = num_tokens
        length = num_keys
        origin = 0
    rows = _rows(b, first, end, origin, head_tile, num_tokens, PLAN)
    clears, edges, seen = _sight(first, end, origin, head_tile, length, COUNT, PLAN)
    begin = 0
    finish = clears + edges
    used = 1
    part = 0
    if PLAN.split:
        tile = block * tl.num_programs(1) + head_tile
        used = tl.minimum(splits, tl.maximum(finish // least, 1))
        part = tile * splits + split
        begin, finish = portion(finish, split, split + 1, used)
        _announce(tile, tile * splits, used, rows, split == 0, parts, PLAN)
    if (first >= end) | (split >= used):
        return
    compute(
        b, rows, head_tile, length, begin, finish, clears, seen, split == 0, part, used == 1,
        q, q_strides, keys, values, batch, captured, out, parts, PER_ROW, SCORE, SINK, CLEAR, EDGE, PLAN,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def served(item, batch, num_tokens, num_sequences, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Is there such an item, how many tokens has it, and how many keys?

    An item is a token, or, where `few` says how many of its tokens make a tile, a sequence.
    """
    if PLAN.few > 0:
        real = item < num_sequences
        new = tl.load(batch.starts + item + 1, mask=real, other=0) - tl.load(batch.starts + item, mask=real, other=0)
        keys = tl.load(batch.lengths + item, mask=real, other=0)
        real = (new > 0) & (new <= PLAN.few)
    else:
        real = item < num_tokens
        new = 1
        b = tl.load(batch.token_seq + item, mask=real, other=0)
        keys = tl.load(batch.lengths + b, mask=item < tl.load(batch.starts + num_sequences), other=0)
    return real, new, keys


@triton.jit  # type: ignore[untyped-decorator]
def _weights(item, batch, num_tokens, num_sequences, COUNT: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Blocks of keys that an item's first heads see, and one where they see none: its output is to be written. 0: no item."""
    real, new, keys = served(item, batch, num_tokens, num_sequences, PLAN)
    clears, edges, _ = COUNT(tl.maximum(keys - new, 0), tl.maximum(keys - 1, 0), 0, keys)
    return tl.where(real, tl.maximum(clears + edges, 1), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _work(known, batch, num_tokens, num_sequences, num_items, COUNT: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weights of all items, and how many items there are."""
    total = tl.sum(known)
    items = tl.sum((known > 0).to(tl.int32))
    for some in range(SEQUENCES, num_items, SEQUENCES):
        blocks = _weights(some + tl.arange(0, SEQUENCES), batch, num_tokens, num_sequences, COUNT, PLAN)
        total += tl.sum(blocks)
        items += tl.sum((blocks > 0).to(tl.int32))
    return total, items


@triton.jit  # type: ignore[untyped-decorator]
def _item(at, known, batch, num_tokens, num_sequences, num_items, COUNT: tl.constexpr, PLAN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The item at this place of all blocks of keys, its weight, and the weights before it. `known`: those of the first items."""
    item = 0
    weight = 0
    before = 0
    done = 0
    blocks = known
    for some in range(0, num_items, SEQUENCES):
        each = some + tl.arange(0, SEQUENCES)
        if some > 0:
            blocks = _weights(each, batch, num_tokens, num_sequences, COUNT, PLAN)
        ends = done + tl.cumsum(blocks, 0)
        here = (at < ends) & (at >= ends - blocks)
        item += tl.sum(tl.where(here, each, 0))
        weight += tl.sum(tl.where(here, blocks, 0))
        before += tl.sum(tl.where(here, ends - blocks, 0))
        done += tl.sum(blocks)
    return item, weight, before


@triton.jit(do_not_specialize=["batch", "captured", "num_tokens", "num_sequences", "num_items", "least"])  # type: ignore[untyped-decorator]
def attend_evenly(  # type: ignore[no-untyped-def]
    q, q_strides, keys, values, batch, captured, out, parts, num_tokens, num_sequences, num_items, least,
    PER_ROW: tl.constexpr, SCORE: tl.constexpr, SINK: tl.constexpr,
    COUNT: tl.constexpr, CLEAR: tl.constexpr, EDGE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """An equal share of all blocks of keys: item after item, of each the tiles of its heads one by one.

    However long the sequences are, and however long they may become, all programs end at about the same time. A share is
    `least` blocks or more, if it is but a part of a tile.
    """
    heads: tl.constexpr = PLAN.heads // PLAN.group
    program = tl.program_id(0)
    known = _weights(tl.arange(0, SEQUENCES), batch, num_tokens, num_sequences, COUNT, PLAN)
    total, items = _work(known, batch, num_tokens, num_sequences, num_items, COUNT, PLAN)
    share = tl.minimum(least, (total + items - 1) // tl.maximum(items, 1))
    share = tl.maximum((total * heads + tl.num_programs(0) - 1) // tl.num_programs(0), share)
    at = program * share
    until = tl.minimum(at + share, total * heads)
    if at >= until:
        return
    item, weight, before = _item(at // heads, known, batch, num_tokens, num_sequences, num_items, COUNT, PLAN)
    while at < until:
        begin = before * heads + (at - before * heads) // weight * weight
        head_tile = (at - before * heads) // weight
        low = at - begin
        high = tl.minimum(until - begin, weight)
        tile = item * heads + head_tile  # parts are counted through programs and tiles: each begins one at most
        used = (begin + weight - 1) // share - begin // share + 1
        b, first, end, length, origin = _sequence(item, batch, num_tokens, num_sequences, PLAN)
        rows = _rows(b, first, end, origin, head_tile, num_tokens, PLAN)
        _announce(tile, begin // share + tile, used, rows, low == 0, parts, PLAN)
        clears, edges, seen = _sight(first, end, origin, head_tile, length, COUNT, PLAN)
        from_, to = portion(clears + edges, low, high, weight)
        compute(
            b, rows, head_tile, length, from_, to, clears, seen, low == 0, program + tile, used == 1,
            q, q_strides, keys, values, batch, captured, out, parts, PER_ROW, SCORE, SINK, CLEAR, EDGE, PLAN,
        )  # fmt: skip
        at = begin + high
        if (at < until) & (head_tile == heads - 1):
            item, weight, before = _item(at // heads, known, batch, num_tokens, num_sequences, num_items, COUNT, PLAN)

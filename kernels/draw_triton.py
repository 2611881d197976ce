"""Which token does each row draw, on a GPU? Two launches: blocks of logits, then rows; nothing is sorted.

The first launch leaves of every block its largest logit and the sum of its weights, exp of logits over temperature, relative to
that. From these a row that draws among all tokens finds the block in which its number falls, and the token in it. For a row with
top_k or top_p they bound the smallest logit that can be kept from below. Only blocks that reach the bound are read again; the
logits above it are gathered where they are few; and the smallest kept one is found among them by halving the range of its bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_CHUNK, _TILE = 8192, 4096  # logits of a program of the first launch, and of a tile of the second
_BLOCK = 64  # logits of a block: 128 bytes of bfloat16
_MOST_BLOCKS = 4096  # of a row; those of a larger vocabulary are larger
_ROOM = 8192  # candidates of a row that are gathered; where there are more, each round reads their blocks
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # of a logit as float32, at the low end


@triton.jit
def _read(logits, token, inside):  # type: ignore[no-untyped-def]
    """As float32, -inf outside. NaN counts as infinity: both are no token."""
    x = tl.load(logits + token, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(x != x, float("inf"), x)


@triton.jit
def _rate(temperature):  # type: ignore[no-untyped-def]
    """By what a difference of logits is multiplied to give the binary logarithm of a weight.

    Neither infinite nor 0, so that a difference of 0 stays 0 and an infinite one infinite.
    """
    rate = 1.4426950408889634 / tl.where(temperature > 0, temperature, 1.0)
    return tl.minimum(tl.maximum(rate, 1e-30), 1e30).to(tl.float32)


@triton.jit
def _weight(x, highest, rate):  # type: ignore[no-untyped-def]
    """Relative to that of the highest."""
    return tl.exp2((x - highest) * rate)


@triton.jit
def _uniform(seed, count):  # type: ignore[no-untyped-def]
    """As `sampling.uniform` does it."""
    z = seed.to(tl.uint64, bitcast=True) + (count + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) >> 11).to(tl.int64).to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit  # type: ignore[untyped-decorator]
def _key(x, UNUSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A whole number that is ordered as floats are."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> UNUSED).to(tl.int64)


@triton.jit  # type: ignore[untyped-decorator]
def _float(key, UNUSED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float of a key; that of a negative one has its unused bits set."""
    bits = ((key << UNUSED) | tl.where(key < 0, (1 << UNUSED) - 1, 0)).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _total(tile):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(tile, 1), 0)


@triton.jit
def _pick(weight, place, target, none):  # type: ignore[no-untyped-def]
    """The first place at which the running sum of the weights exceeds the target, or `none`, and the last that could be drawn.

    Places ascend. One without weight is never drawn, also where the parallel sum rounds upwards between two others.
    """
    real = weight > 0
    first = tl.min(tl.where(real & (tl.cumsum(weight, 0) > target), place, none), 0)
    return first, tl.max(tl.where(real, place, -1), 0)


@triton.jit  # type: ignore[untyped-decorator]
def blocks(  # type: ignore[no-untyped-def]
    logits, temperature, high, mass, stride, vocabulary, num_blocks, BLOCK: tl.constexpr, MANY: tl.constexpr
):
    """The largest logit of each block, and the sum of its weights relative to that."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * MANY + tl.arange(0, MANY)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = _read(logits + row * stride, token, token < vocabulary)
    top = tl.max(x, 1)
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)  # a block of -inf weighs 0; one with inf is no token
    weight = _weight(x, shift[:, None], _rate(tl.load(temperature + row)))
    tl.store(high + row * num_blocks + block, top, mask=block < num_blocks)
    tl.store(mass + row * num_blocks + block, tl.sum(weight, 1), mask=block < num_blocks)


@triton.jit  # type: ignore[untyped-decorator]
def _first_of(logits, high, highest, vocabulary, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first token with the largest logit."""
    chosen = tl.min(tl.where(high == highest, tl.arange(0, BLOCKS), BLOCKS), 0)
    token = chosen * BLOCK + tl.arange(0, BLOCK)
    return tl.min(tl.where(_read(logits, token, token < vocabulary) == highest, token, vocabulary), 0)


@triton.jit  # type: ignore[untyped-decorator]
def _of_all(logits, weight, total, number, rate, vocabulary, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Drawn among all tokens: a block by its weight, then one of its tokens by what the block leaves of the number."""
    block, target = tl.arange(0, BLOCKS), number * total
    first, last = _pick(weight, block, target, BLOCKS)
    chosen = tl.where(first < BLOCKS, first, last)
    share = (target - tl.sum(tl.where(block < chosen, weight, 0.0), 0)) / tl.sum(tl.where(block == chosen, weight, 0.0), 0)
    token = chosen * BLOCK + tl.arange(0, BLOCK)
    x = _read(logits, token, token < vocabulary)
    inner = _weight(x, tl.max(x, 0), rate).to(tl.float64)
    first, last = _pick(inner, token, share * tl.sum(inner, 0), vocabulary)
    return tl.where(first < vocabulary, first, last)


@triton.jit  # type: ignore[untyped-decorator]
def _bound(high, mass, highest, total, most, reach, rate, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A logit that no kept one lies below, found from blocks alone.

    If `most` blocks reach it, so do as many tokens. Without top_k: what lies below it is in blocks that do not reach it, or is in
    a block that does, and is then neither more than the block without its largest nor more than a block full of that logit.
    """
    scale = _weight(high, highest, rate)
    whole, rest = mass * scale, (mass - 1.0) * scale
    spare = ((1.0 - reach - 1e-5) * total).to(tl.float32)  # 1e-5: more than what float32 can err in any sum here
    low, top = _key(tl.full((), float("-inf"), tl.float32), 16), _key(highest, 16)
    while low < top:
        middle = low + (top - low + 1) // 2
        limit = _float(middle, 16)
        above = high >= limit
        below = tl.sum(tl.where(above, tl.minimum(rest, (BLOCK - 1) * _weight(limit, highest, rate)), whole), 0)
        proven = tl.where(most > 0, tl.sum(above.to(tl.int32), 0) >= most, below <= spare)
        low = tl.where(proven, middle, low)
        top = tl.where(proven, top, middle - 1)
    return _float(low, 16)


@triton.jit  # type: ignore[untyped-decorator]
def _candidates(  # type: ignore[no-untyped-def]
    row, scratch, gathered, held, n, vocabulary, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Logits and tokens of a tile of the candidates, as they were gathered or in their listed blocks; -inf beyond the last.

    A block fills a row of the tile: so the compiler sees what lies side by side, and joins loads.
    """
    listed, values, tokens = scratch
    block, place = n * (TILE // BLOCK) + tl.arange(0, TILE // BLOCK), tl.arange(0, BLOCK)[None, :]
    if gathered:
        at = block[:, None] * BLOCK + place
        x = tl.load(values + at, mask=at < held, other=float("-inf"))
        token = tl.load(tokens + at, mask=at < held, other=0)
    else:
        there = block * BLOCK < held
        token = tl.load(listed + block, mask=there, other=0)[:, None] * BLOCK + place
        x = _read(row, token, there[:, None] & (token < vocabulary))
    return x, token


@triton.jit  # type: ignore[untyped-decorator]
def _gather(  # type: ignore[no-untyped-def]
    row, high, limit, scratch, vocabulary, num_blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write down the blocks that reach the limit and, if they fill more than a tile, their logits that do.

    Returns whether those were few enough to be gathered, and how many places the candidates take, gathered or in blocks.
    """
    listed, values, tokens = scratch
    block = tl.arange(0, BLOCKS)
    reached = (block < num_blocks) & (high >= limit)
    tl.store(listed + tl.cumsum(reached.to(tl.int32), 0) - 1, block, mask=reached)
    held = tl.sum(reached.to(tl.int32), 0) * BLOCK
    gathered = tl.full((), False, tl.int1)
    tl.debug_barrier()  # what one thread has written another will read
    if held > TILE:
        count = tl.zeros((), tl.int32)
        for n in range(tl.cdiv(held, TILE)):
            x, token = _candidates(row, scratch, False, held, n, vocabulary, BLOCK, TILE)
            x, token = tl.reshape(x, (TILE,)), tl.reshape(token, (TILE,))
            kept = (x >= limit) & (x > float("-inf"))
            place = count + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(values + place, x, mask=kept & (place < ROOM))
            tl.store(tokens + place, token, mask=kept & (place < ROOM))
            count += tl.sum(kept.to(tl.int32), 0)
        gathered = count <= ROOM
        held = tl.where(gathered, count, held)
        tl.debug_barrier()
    return gathered, held


@triton.jit  # type: ignore[untyped-decorator]
def _search(  # type: ignore[no-untyped-def]
    row, scratch, gathered, held, vocabulary, limit, highest, rate, most, reach,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A bound that as few candidates reach as there can be, if they are to be `most`, of weight `reach`; `limit` if all are less.

    Also: how many are above it, their weight, and how many equal it.
    """
    low, top = _key(limit, UNUSED), _key(highest, UNUSED)
    there, passed = held, tl.zeros((), tl.int32)  # how many are not below `low`, at most, and how many above `top`
    while (low < top) & (there - passed > 1):
        middle = low + (top - low + 1) // 2
        bound = _float(middle, UNUSED)
        # Summed when all are seen: a sum over threads waits for them.
        count, mass = tl.zeros((TILE // BLOCK, BLOCK), tl.int32), tl.zeros((TILE // BLOCK, BLOCK), tl.float32)
        for n in range(tl.cdiv(held, TILE)):
            x, _ = _candidates(row, scratch, gathered, held, n, vocabulary, BLOCK, TILE)
            count += (x >= bound).to(tl.int32)
            mass += tl.where(x >= bound, _weight(x, highest, rate), 0.0)
        found = _total(count)
        enough = (found >= most) & (_total(mass) >= reach)
        low, there = tl.where(enough, middle, low), tl.where(enough, found, there)
        top, passed = tl.where(enough, top, middle - 1), tl.where(enough, passed, found)
    bound = _float(low, UNUSED)
    above, equal = tl.zeros((TILE // BLOCK, BLOCK), tl.int32), tl.zeros((TILE // BLOCK, BLOCK), tl.int32)
    over = tl.zeros((TILE // BLOCK, BLOCK), tl.float64)
    for n in range(tl.cdiv(held, TILE)):
        x, _ = _candidates(row, scratch, gathered, held, n, vocabulary, BLOCK, TILE)
        above += (x > bound).to(tl.int32)
        equal += (x == bound).to(tl.int32)
        over += tl.where(x > bound, _weight(x, highest, rate), 0.0).to(tl.float64)
    return bound, _total(above), _total(over), _total(equal)


@triton.jit  # type: ignore[untyped-decorator]
def _of_kept(  # type: ignore[no-untyped-def]
    row, scratch, gathered, held, vocabulary, bound, ties, total, number, highest, rate, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Drawn among the candidates above the bound and the first `ties` that equal it, which weigh `total` together."""
    chosen, last = tl.full((), vocabulary, tl.int32), tl.full((), -1, tl.int32)
    target, seen, n = number * total, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    while (chosen == vocabulary) & (n * TILE < held):
        x, token = _candidates(row, scratch, gathered, held, n, vocabulary, BLOCK, TILE)
        x, token = tl.reshape(x, (TILE,)), tl.reshape(token, (TILE,))
        tie = (x == bound).to(tl.int32)
        kept = (x > bound) | ((tie > 0) & (seen + tl.cumsum(tie, 0) <= ties))
        weight = tl.where(kept, _weight(x, highest, rate), 0.0).to(tl.float64)
        chosen, final = _pick(weight, token, target, vocabulary)
        last = tl.maximum(last, final)
        target -= tl.sum(weight, 0)
        seen += tl.sum(tie, 0)
        n += 1
    return tl.where(chosen < vocabulary, chosen, last)


@triton.jit  # type: ignore[untyped-decorator]
def _of_likeliest(  # type: ignore[no-untyped-def]
    row, high, mass, scratch, highest, total, most, reach, number, rate, vocabulary, num_blocks,
    UNUSED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Drawn among the `most` likeliest (0: all), of these among the likeliest that have the share `reach` of their weight."""
    bound = _bound(high, mass, highest, total, most, reach, rate, BLOCK)
    gathered, held = _gather(row, high, bound, scratch, vocabulary, num_blocks, BLOCK, BLOCKS, TILE, ROOM)
    ties = tl.full((), 2147483647, tl.int32)  # of those that equal the bound, the first so many are kept
    weight = total
    if most > 0:
        bound, above, over, equal = _search(
            row, scratch, gathered, held, vocabulary, bound, highest, rate, most, 0.0, UNUSED, BLOCK, TILE
        )
        ties = tl.minimum(most - above, equal)
        weight = over + ties * _weight(bound, highest, rate).to(tl.float64)
    if reach < 1:
        lowest, needed = bound, reach * weight
        bound, _, over, equal = _search(
            row, scratch, gathered, held, vocabulary, bound, highest, rate, 0, needed, UNUSED, BLOCK, TILE
        )
        each = _weight(bound, highest, rate).to(tl.float64)
        there = tl.where(bound == lowest, tl.minimum(ties, equal), equal)
        wanted = tl.maximum(tl.ceil((needed - over) / tl.maximum(each, 1e-300)), 1.0)  # at least one: over is not enough
        ties = tl.minimum(wanted, there.to(tl.float64)).to(tl.int32)
        weight = over + ties * each
    return _of_kept(row, scratch, gathered, held, vocabulary, bound, ties, weight, number, highest, rate, BLOCK, TILE)


@triton.jit  # type: ignore[untyped-decorator]
def rows(  # type: ignore[no-untyped-def]
    logits, high, mass, listed, values, tokens, temperature, top_k, top_p, seeds, counts, draws, out,
    stride, vocabulary, num_blocks, NOT_FINITE: tl.constexpr, UNUSED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    row, block = logits + at * stride, tl.arange(0, BLOCKS)
    tops = tl.load(high + at * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    highest, warmth = tl.max(tops, 0), tl.load(temperature + at)
    if tl.abs(highest) == float("inf"):
        token = tl.full((), NOT_FINITE, tl.int32)
    elif warmth > 0:
        rate = _rate(warmth)
        sums = tl.load(mass + at * num_blocks + block, mask=block < num_blocks, other=0.0)
        weight = (sums * _weight(tops, highest, rate)).to(tl.float64)
        total = tl.sum(weight, 0)
        number = _uniform(tl.load(seeds + at), tl.load(counts + at)) if draws is None else tl.load(draws + at)
        most, reach = tl.load(top_k + at), tl.load(top_p + at)
        most = tl.where(most < vocabulary, most, 0).to(tl.int32)
        if (most > 0) | (reach < 1):
            scratch = (listed + at * num_blocks, values + at * ROOM, tokens + at * ROOM)
            token = _of_likeliest(
                row, tops, sums, scratch, highest, total, most, reach, number, rate, vocabulary, num_blocks,
                UNUSED, BLOCK, BLOCKS, TILE, ROOM,
            )  # fmt: skip
        else:
            token = _of_all(row, weight, total, number, rate, vocabulary, BLOCK, BLOCKS)
    else:
        token = _first_of(row, tops, highest, vocabulary, BLOCK, BLOCKS)
    tl.store(out + at, token.to(tl.int64))


def draw(logits: torch.Tensor, how: Sequence[torch.Tensor], draws: torch.Tensor | None, not_finite: int) -> torch.Tensor:
    """A token of each row of logits [R, V]: [R] int64; `not_finite` where the largest is NaN or infinite.

    `how`: the tensors of `SamplingRows`; `draws` [R] float64: in place of numbers made of seeds and counts.
    """
    count, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    temperature, top_k, top_p, seeds, counts = (each.contiguous() for each in how)
    draws = None if draws is None else draws.contiguous()
    block = max(_BLOCK, triton.next_power_of_2(vocabulary) // _MOST_BLOCKS)
    num_blocks = triton.cdiv(vocabulary, block)
    many = min(_CHUNK // block, triton.next_power_of_2(num_blocks))

    def scratch(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((count, size), dtype=dtype, device=logits.device)

    high, mass = scratch(num_blocks, torch.float32), scratch(num_blocks, torch.float32)
    listed, values, tokens = scratch(num_blocks, torch.int32), scratch(_ROOM, torch.float32), scratch(_ROOM, torch.int32)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if count:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            blocks[(count, triton.cdiv(num_blocks, many))](
                logits, temperature, high, mass, logits.stride(0), vocabulary, num_blocks, block, many, num_warps=8
            )
            rows[(count,)](
                logits, high, mass, listed, values, tokens, temperature, top_k, top_p, seeds, counts, draws, out,
                logits.stride(0), vocabulary, num_blocks, not_finite, _UNUSED_BITS[logits.dtype],
                block, triton.next_power_of_2(num_blocks), min(_TILE, many * block), _ROOM, num_warps=16,
            )  # fmt: skip
    return out

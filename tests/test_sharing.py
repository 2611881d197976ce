"""Does any mix of joins, forks, cuts, ends and evictions keep every sequence's keys, and every page with those who own it?

Beside the cache runs a plain model: what each sequence must hold, position by position. Keys stand in for those of a network: a
number for each prefix and state of the weights, written where the device's block table says. So a table that lags, a page that two
write, or one that is found for other tokens, ends in a wrong number.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from compile_attn.cache import CachedSequence, Chunk, OutOfPages, PagedKVCache, StalePrefix
from compile_attn.kernels.batch import advance_step, build_metadata
from tests.tiny import layer_kv

STEMS = ([1] * 30, [1, 1, 1, 1, 1, 2] * 5, [3, 1] * 15)
SALTS = (None, None, "a")
SEED = st.integers(0, 2**32)


@dataclass(eq=False)
class Told:
    """What a sequence must hold: its tokens, and the key of each."""

    seq: CachedSequence
    salt: str | None
    tokens: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    found: bool = False  # its keys are another's, and it has not run yet
    changes: int = 0  # of the model when it began


class Play:
    """A cache, and what must be in it."""

    def __init__(self, kv_tokens: int, page_size: int, max_seqs: int = 4) -> None:
        self.cache = PagedKVCache(kv_tokens=kv_tokens, page_size=page_size, max_seqs=max_seqs, max_seq_len=24, poison=True)
        self.graph, self.weight, self.changes = "first", torch.zeros(1), 0
        self.cache.bind([layer_kv(), layer_kv()], owner=0)
        self.told: list[Told] = []
        self.in_batch: list[Told] = []
        self.numbers: dict[tuple[int, tuple[int, ...]], int] = {}
        self.counted: Counter[str] = Counter()  # so that a test can say what has happened

    # What must be there

    def key(self, tokens: list[int]) -> int:
        """A number for each text, under each graph and value of the weight."""
        model = hash((self.graph, self.weight.item()))
        return self.numbers.setdefault((model, tuple(tokens)), len(self.numbers) + 1)

    def keys_of(self, tokens: list[int]) -> list[int]:
        return [self.key(tokens[: end + 1]) for end in range(len(tokens))]

    def extend(self, one: Told, new: list[int]) -> None:
        for token in new:
            one.tokens.append(token)
            one.keys.append(self.key(one.tokens))

    # What a step does

    def protected(self) -> dict[int, torch.Tensor]:
        """Pages that nobody may write: of several owners, or known by their tokens."""
        state = self.cache._seqs
        pages = [page for page in range(1, self.cache.num_pages + 1) if state.pages.references(page) > 1 or page in state._index]
        return {page: self.cache.k_pages[0][page].clone() for page in pages}

    def proven(self, chunks: list[tuple[Told, list[int]]]) -> None:
        """As a step does first. Where it is not refused, what was found is what this model makes."""
        self.cache.proof.check(self.graph, [self.weight])
        for one, _ in chunks:
            assert not one.found or one.keys == self.keys_of(one.tokens), "the keys of another model"
            one.found = False

    def refused(self, chunks: list[tuple[Told, list[int]]], before: list[int]) -> None:
        """Not without a reason; and nothing was changed."""
        assert before == [one.seq.length for one in self.told] and not any(one.seq.unrun for one in self.told)
        stale = [one for one, _ in chunks if one.found and (one.changes < self.changes or one.keys != self.keys_of(one.tokens))]
        assert stale, "the model is what it was"
        for one in stale:
            self.free(one)
        self.counted["refused"] += 1

    def written(self) -> None:
        """As a model does: keys of the new tokens, through the block table on the device."""
        table, seq_lens, query_lens, _ = self.cache.step_inputs()
        batch = self.cache.current
        assert batch is not None
        _, positions, slots, rows = build_metadata(table, seq_lens, query_lens, batch.shape[1], self.cache.page_size)
        for slot, position, row in zip(slots.tolist(), positions.tolist(), rows.tolist(), strict=True):
            if slot >= 0:
                for pool in (*self.cache.k_pages, *self.cache.v_pages):
                    pool.flatten(0, 1)[slot] = self.in_batch[row].keys[position]

    def wanted(self, growing: list[tuple[CachedSequence, int]]) -> int:
        """Pages for the tokens, and a copy for each that writes a page while another has it, too."""
        owners, pages_for = Counter(page for one in self.told for page in one.seq.pages), self.cache.pages_for
        total = 0
        for seq, count in growing:
            total += pages_for(seq.length + count) - len(seq.pages)
            if seq.length % self.cache.page_size and owners[seq.pages[-1]] > 1:
                owners[seq.pages[-1]] -= 1
                total += 1
        return total

    def step(self, chunks: list[tuple[Told, list[int]]]) -> None:
        cache, growing = self.cache, [(one.seq, len(new)) for one, new in chunks]
        wanted, free = self.wanted(growing), cache.free_pages
        assert wanted <= sum(cache.pages_wanted(*each) for each in growing)
        before = [(one.seq.pages, one.seq.length) for one in self.told]
        lengths = [one.seq.length for one in self.told]
        try:
            cache.batch([Chunk(one.seq, new) for one, new in chunks])
        except StalePrefix:
            self.refused(chunks, lengths)
            return
        except OutOfPages:
            assert wanted > free and before == [(one.seq.pages, one.seq.length) for one in self.told], "nothing was changed"
            self.counted["out of pages"] += 1
            return
        assert free - cache.free_pages == wanted, "as many pages as were counted"
        self.counted["copies"] += sum(
            one.seq.pages[: len(old)] != old for one, (old, _) in zip(self.told, before, strict=True) if old
        )
        try:
            self.proven(chunks)
        except StalePrefix:
            self.refused(chunks, lengths)
            return
        kept = self.protected()
        self.in_batch = [one for one, _ in chunks]
        for one, new in chunks:
            self.extend(one, new)
        self.written()
        self.untouched(kept)

    def steady(self) -> None:
        """As a CUDA graph does: the device advances by itself, then the host follows."""
        cache, batch = self.cache, self.cache.current
        if batch is None or cache.advanced_width() != batch.width:
            return
        assert all(one.seq.freed is False for one in self.in_batch)
        rows, buffers = batch.shape[0], cache.buffers
        before = [buffers.input_ids.clone(), buffers.position_ids.clone(), buffers.seq_lens.clone()]
        sampled = torch.arange(rows) % 3 + 1
        advance_step(buffers.input_ids[:rows], buffers.position_ids[:rows], buffers.seq_lens[:rows], sampled)
        try:
            cache.advance()
        except OutOfPages:
            for buffer, old in zip((buffers.input_ids, buffers.position_ids, buffers.seq_lens), before, strict=True):
                buffer.copy_(old)
            return
        self.cache.proof.check(self.graph, [self.weight])
        kept = self.protected()
        for row, one in enumerate(self.in_batch):
            self.extend(one, [int(sampled[row])])
        self.written()
        self.untouched(kept)
        self.counted["steady"] += 1

    def untouched(self, kept: dict[int, torch.Tensor]) -> None:
        for page, content in kept.items():
            assert torch.equal(self.cache.k_pages[0][page].view(torch.int32), content.view(torch.int32)), f"page {page} was written"

    def add(self, tokens: list[int] | None, salt: str | None) -> Told:
        cache = self.cache
        free, wanted = cache.free_pages, None if tokens is None else cache.find(tokens, salt=salt).pages_to_admit
        seq = cache.add(tokens, salt=salt)
        one = Told(seq, salt, [] if tokens is None else tokens[: seq.length], found=seq.length > 0, changes=self.changes)
        one.keys = self.kept_in(seq)
        if tokens is not None:
            assert free - cache.free_pages + cache.pages_wanted(seq, len(tokens) - seq.length) == wanted
        self.told.append(one)
        self.counted["hits"] += seq.length > 0
        return one

    def begin(self, tokens: list[int], salt: str | None) -> None:
        """As a server begins a request: what the cache does not know of its prompt is run."""
        tokens = tokens[: self.cache.length_limit]
        one = self.add(tokens, salt)
        self.step([(one, tokens[one.seq.length :])])

    def fork(self, one: Told, length: int) -> None:
        seq = self.cache.fork(one.seq, length)
        found = one.found and length > 0
        self.told.append(Told(seq, one.salt, one.tokens[:length], one.keys[:length], found, one.changes))

    def truncate(self, one: Told, length: int) -> None:
        self.cache.truncate(one.seq, length)
        del one.tokens[length:], one.keys[length:]
        one.found = one.found and length > 0

    def change(self, what: str) -> None:
        """The model: another compiled graph, or the first one again; another tensor; or this one, changed in place."""
        if what == "graph":
            self.graph = "second" if self.graph == "first" else "first"
        elif what == "tensor":
            self.weight = self.weight + 1
        else:
            self.weight.add_(1)
        self.changes += 1

    def forget(self) -> None:
        self.cache.forget_prefixes()
        self.changes += 1

    def free(self, one: Told) -> None:
        self.told.remove(one)
        self.cache.free(one.seq)

    # What must hold after each of these

    def check(self) -> None:
        cache, state = self.cache, self.cache._seqs
        owners = Counter(page for one in self.told for page in one.seq.pages)
        assert [state.pages.references(page) for page in range(cache.num_pages + 1)] == [
            owners[p] for p in range(cache.num_pages + 1)
        ]
        free, evictable = state.pages._free, list(state.pages._evictable)
        assert sorted([*owners, *free, *evictable]) == list(range(1, cache.num_pages + 1)), "each page once, none lost"
        assert cache.free_pages == len(free) + len(evictable) and cache.pages_in_use == len(owners)
        assert all(page in state._index for page in evictable) and not any(page in state._index for page in free)
        assert [bool(kept) for kept in state.pages._kept] == [page in state._index for page in range(cache.num_pages + 1)]
        for pool in (*cache.k_pages, *cache.v_pages):
            assert pool[[0, *free]].isnan().all(), "what nobody can ask for is poisoned"
        for one in self.told:
            self.holds(one)
        for page, count in owners.items():
            assert count == 1 or len({one.salt for one in self.told if page in one.seq.pages}) == 1, "tenants share a page"

    def holds(self, one: Told) -> None:
        seq, size = one.seq, self.cache.page_size
        assert seq.length == len(one.tokens) and len(seq.pages) == self.cache.pages_for(seq.length)
        for pool in (self.cache.k_pages[1], self.cache.v_pages[0]):
            assert self.kept_in(seq, pool) == one.keys, f"{seq!r} of pages of {size} tokens"

    def kept_in(self, seq: CachedSequence, pool: torch.Tensor | None = None) -> list[int]:
        found: list[int] = (
            (self.cache.k_pages[1] if pool is None else pool)[list(seq.pages)].flatten(0, 1)[: seq.length, 0, 0].tolist()
        )
        return found


class Sharing(RuleBasedStateMachine):
    """Any order of the cache's operations."""

    @initialize(size=st.sampled_from([1, 2, 4]), pages=st.integers(4, 14))
    def begin(self, size: int, pages: int) -> None:
        self.play = self.make(size * pages, size)

    def make(self, kv_tokens: int, page_size: int) -> Play:
        return Play(kv_tokens, page_size)

    def one(self, seed: int) -> Told:
        return random.Random(seed).choice(self.play.told)

    @property
    def some(self) -> bool:
        return bool(self.play.told)

    @rule(stem=st.integers(0, 2), length=st.integers(1, 13), salt=st.sampled_from(SALTS))
    def add(self, stem: int, length: int, salt: str | None) -> None:
        self.play.begin(STEMS[stem][:length], salt)

    @rule(stem=st.integers(0, 2), length=st.integers(1, 13), salt=st.sampled_from(SALTS))
    def find(self, stem: int, length: int, salt: str | None) -> None:
        """What is known, without running the rest."""
        self.play.add(STEMS[stem][:length], salt)

    @rule(salt=st.sampled_from(SALTS))
    def add_unknown(self, salt: str | None) -> None:
        self.play.add(None, salt)

    @precondition(lambda self: self.some)
    @rule(seed=SEED, count=st.integers(1, 4))
    def batch(self, seed: int, count: int) -> None:
        draw = random.Random(seed)
        chosen = draw.sample(self.play.told, min(count, len(self.play.told)))
        limit = self.play.cache.length_limit
        news = [(one, [draw.choice((1, 1, 2)) for _ in range(draw.choice((1, 1, 1, 2, 5)))]) for one in chosen]
        news = [(one, new[: limit - one.seq.length]) for one, new in news if one.seq.length < limit]
        if news:
            self.play.step(news)

    @precondition(lambda self: self.some)
    @rule(count=st.integers(1, 3))
    def advance(self, count: int) -> None:
        for _ in range(count):
            self.play.steady()

    @precondition(lambda self: self.some)
    @rule(seed=SEED, part=st.none() | st.floats(0, 1))
    def fork(self, seed: int, part: float | None) -> None:
        one = self.one(seed)
        self.play.fork(one, one.seq.length if part is None else int(part * one.seq.length))

    @precondition(lambda self: self.some)
    @rule(seed=SEED, back=st.integers(0, 9))
    def truncate(self, seed: int, back: int) -> None:
        one = self.one(seed)
        self.play.truncate(one, max(0, one.seq.length - back))

    @precondition(lambda self: self.some)
    @rule(seed=SEED, known=st.integers(-3, 3))
    def keep(self, seed: int, known: int) -> None:
        """Of its tokens some may not be known yet, and some not be in the cache."""
        one = self.one(seed)
        tokens = [*one.tokens, 1, 1, 1][: max(0, len(one.tokens) + known)]
        if tokens:
            self.play.cache.keep(one.seq, tokens)

    @precondition(lambda self: self.some)
    @rule(seed=SEED, first=st.booleans())
    def free(self, seed: int, first: bool) -> None:
        one = self.one(seed)
        if first and one.tokens:
            self.play.cache.keep(one.seq, one.tokens)
        self.play.free(one)

    @rule()
    def forget(self) -> None:
        self.play.forget()

    @rule(what=st.sampled_from(["graph", "tensor", "in place"]))
    def another_model(self, what: str) -> None:
        self.play.change(what)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "play"):
            self.play.check()


def test_any_order_of_operations() -> None:
    run_state_machine_as_test(Sharing, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("page_size", [1, 2, 4])
def test_long_plays(page_size: int) -> None:
    """The same by weights of a server's day, long enough that everything happens often."""
    draw, counted = random.Random(page_size), Counter[str]()
    for _ in range(16):
        play = Play(page_size * draw.choice((8, 16, 32)), page_size)
        for _ in range(200):
            failed = play.counted["out of pages"]
            one_of_a_day(play, draw)
            play.check()
            if play.counted["out of pages"] > failed:
                play.free(draw.choice(play.told))
        counted += play.counted
    assert counted["hits"] > 100 and counted["steady"] > 100 and counted["out of pages"] > 50
    assert counted["refused"] > 0
    assert (counted["copies"] > 100) == (page_size > 1), "pages of one token are full, and never copied"


def one_of_a_day(play: Play, draw: random.Random) -> None:
    told: list[Any] = play.told
    what = draw.choices(
        ["add", "find", "batch", "steady", "fork", "truncate", "keep", "end", "model"], [4, 0.5, 6, 6, 2, 2, 3, 4, 0.3]
    )[0]
    one = draw.choice(told) if told else None
    limit = play.cache.length_limit
    if what == "add" or one is None:
        play.begin(draw.choice(STEMS)[: draw.randint(1, 12)], draw.choice(SALTS))
    elif what == "find":
        play.add(draw.choice(STEMS)[: draw.randint(1, 12)], draw.choice(SALTS))
    elif what == "batch":
        chosen = [each for each in draw.sample(told, min(4, len(told))) if each.seq.length < limit]
        if chosen:
            play.step([(each, [draw.choice((1, 2))]) for each in chosen])
    elif what == "steady":
        for _ in range(3):
            play.steady()
    elif what == "fork":
        play.fork(one, draw.randint(0, one.seq.length))
    elif what == "truncate":
        play.truncate(one, draw.randint(0, one.seq.length))
    elif what == "keep" and one.tokens:
        play.cache.keep(one.seq, one.tokens)
    elif what == "end":
        if one.tokens:
            play.cache.keep(one.seq, one.tokens)
        play.free(one)
    elif what == "model":
        play.change(draw.choice(("graph", "tensor", "in place")))

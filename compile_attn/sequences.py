"""Which sequence holds which pages, and which pages may several hold?

A page that a step writes has one owner, and is not known by its tokens: everything here keeps to that. A page of several is copied
before one of them writes (copy-on-write). A sequence whose pages change, other than by more at their end, gets a new array of them
(see `step._Table`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn

import torch

from compile_attn.origin import Origin, StalePrefix
from compile_attn.pages import OutOfPages, PageAllocator
from compile_attn.pools import Pools
from compile_attn.prefixes import Node, PrefixIndex, Salt, check_salt
from compile_attn.step import token_array

Tokens = Sequence[int] | torch.Tensor


class CachedSequence:
    """One growing sequence: its pages in order and how many of its tokens have been handed to a step."""

    __slots__ = ("_epoch", "_found", "_known", "_node", "_pages", "_salt", "freed", "length", "unrun")

    def __init__(self, salt: Salt = None, epoch: int = 0) -> None:
        self._pages = array("i")
        self._salt, self._epoch = salt, epoch  # when its first key was made, or found
        self._found = False  # it begins with keys that it found, and no step of its own has shown that it would make the same
        self._known = 0  # how many of its first pages are known,
        self._node: Node | None = None  # and where that ends
        self.length = 0
        self.unrun = False  # its last batch has not been run, so keys and values of the newest tokens are missing
        self.freed = False

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages)

    @property
    def known_pages(self) -> int:
        """How many of its first pages later sequences may begin with."""
        return self._known

    def __repr__(self) -> str:
        return f"CachedSequence(length={self.length}, pages={len(self._pages)}{', freed' if self.freed else ''})"


@dataclass(frozen=True)
class Found:
    """What is known of the tokens of a sequence to come; to be handed to `add()` before anything else is done to the cache.

    length           so many of the first tokens need not be run
    pages_to_admit   how many of the free pages a sequence of all the tokens takes
    """

    length: int
    pages_to_admit: int
    _pages: Sequence[int]
    _salt: Salt
    _epoch: int
    _last: Node | None  # of the pages


class Sequences:
    """The sequences of one cache, its pages, and the prefixes that it knows. `PagedKVCache` says what methods mean to a caller."""

    def __init__(self, page_size: int, pools: Pools) -> None:
        self.page_size = page_size
        self.alive: set[CachedSequence] = set()
        self.hits = self.hit_tokens = 0
        self.origin: Origin | None = None  # of all that is known
        self._pools = pools
        self._epoch = 0  # how often all prefixes were forgotten
        self.resize(0)

    def resize(self, num_pages: int) -> None:
        """So many pages, of which nothing is known."""
        self.pages = PageAllocator(num_pages, self._lose)
        self._index = PrefixIndex(self.page_size)
        self._epoch += 1

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    # Prefixes

    def check_origin(
        self, code: object, tensors: Sequence[torch.Tensor], begun: Sequence[tuple[CachedSequence, int]]
    ) -> CachedSequence | None:
        """By what the next step is run; `begun`: its sequences, unless it repeats the last one, and their tokens before it.

        If it is not what has made all that is known, that is forgotten. A sequence that has begun with some of it, if there is one.
        """
        found = [seq for seq, _ in begun if seq._found]
        if self.origin is None:
            self.origin = Origin(code, tensors)
            return None
        same = self.origin.same(code, tensors)
        if same and not (found and not self.origin.stands()):
            return None
        self.forget()
        for seq, length in begun:
            if not length:
                seq._epoch = self._epoch
        if same:
            self.origin.renew()
        else:
            self.origin = Origin(code, tensors)
        return found[0] if found else None

    def find(self, tokens: Tokens | None, salt: Salt) -> Found:
        pages, length = self._known(tokens, salt)
        held = sum(self.pages.references(page) > 0 for page in pages)
        copied = length % self.page_size and self.pages.references(pages[-1]) > 0
        wanted = self._pages_for(0 if tokens is None else len(tokens)) - held + bool(copied)
        return Found(length, wanted, pages, salt, self._epoch, self._index.node(pages[-1]) if pages else None)

    def add(self, found: Found) -> CachedSequence:
        if found._epoch != self._epoch or (found._pages and not self._index.holds(found._last)):
            raise ValueError("what was found is known no more; call find() again, and add() right after it")
        seq = CachedSequence(found._salt, self._epoch)
        for page in found._pages:
            self.pages.share(page)
        seq._pages.extend(found._pages)
        seq.length, seq._found = found.length, found.length > 0
        seq._known, seq._node = len(found._pages), found._last
        self._known_up_to(seq, found.length)
        self.alive.add(seq)
        self.hits += bool(found.length)
        self.hit_tokens += found.length
        return seq

    def kept(self, seq: CachedSequence) -> int:
        if seq._epoch != self._epoch:
            return seq.length
        return seq._known * self.page_size if self._index.holds(seq._node) else 0

    def keep(self, seq: CachedSequence, tokens: Tokens, start: int) -> None:
        if seq._epoch != self._epoch:
            return
        known = self.kept(seq)
        if start not in (0, known):
            raise ValueError(f"start={start}; {known} tokens of {seq!r} are known: give those after them, or all")
        ids = token_array(tokens)
        first, full = start // self.page_size, min(start + len(ids), seq.length) // self.page_size
        new, node = self._index.put(ids, seq._salt, seq._pages[first:full], seq._node if start else None)
        for page in new:
            self.pages.keep(page)
        if full * self.page_size > known:
            seq._known, seq._node = full, node

    def _known_up_to(self, seq: CachedSequence, length: int) -> None:
        """Of its tokens after so many nothing is known."""
        while seq._node is not None and seq._known * self.page_size > length:
            seq._known, seq._node = seq._known - 1, seq._node.before

    def forget(self) -> None:
        """Know no prefix any more, nor any that begins in a sequence there is now. Who has found one must have run to run on."""
        self._epoch += 1
        self._poison([page for page in self._index.clear() if self.pages.lose(page)])

    # Growing, shrinking, sharing

    def pages_wanted(self, seq: CachedSequence, count: int) -> int:
        """How many of the free pages so many more tokens take."""
        return self._pages_for(seq.length + count) - len(seq._pages) + len(self._shared(self._guarded([seq])))

    def grow(self, growing: Sequence[tuple[CachedSequence, int]]) -> None:
        """Make each sequence so many tokens longer, in pages that it may write.

        Raises OutOfPages or StalePrefix, with nothing changed.
        """
        for seq, _ in growing:
            if seq._found and seq._epoch != self._epoch:
                raise stale(seq)
        size = self.page_size
        counts = [-(-(seq.length + count) // size) - len(seq._pages) for seq, count in growing]
        guarded = self._guarded(seq for seq, _ in growing)
        shared = self._shared(guarded)
        wanted = sum(counts) + len(shared)
        if wanted > self.pages.free_pages:
            self._out_of_pages(growing, wanted)
        pages = iter(self.pages.take(wanted))
        moves = [(seq, next(pages)) for seq in shared]
        moved = {*shared}
        moves += self._kept_apart([seq for seq in guarded if seq not in moved])
        pairs = [(seq._pages[-1], new) for seq, new in moves]
        for seq, new in moves:
            seq._pages = seq._pages[:-1]
            seq._pages.append(new)
        for (seq, count), more in zip(growing, counts, strict=True):
            if more:
                seq._pages.extend(islice(pages, more))
            if not seq.length:
                seq._epoch = self._epoch
            seq.length += count
            seq.unrun = True
        try:
            self._pools.copy(pairs)
        finally:
            self._give_back(old for old, _ in pairs)

    def fork(self, seq: CachedSequence, length: int) -> CachedSequence:
        other = CachedSequence(seq._salt, seq._epoch)
        other._pages = seq._pages[: self._pages_for(length)]
        other.length, other._found = length, seq._found and length > 0
        other._known, other._node = seq._known, seq._node
        self._known_up_to(other, length)
        for page in other._pages:
            self.pages.share(page)
        self.alive.add(other)
        return other

    def restore(self, length: int, salt: Salt, epoch: int, found: bool) -> CachedSequence:
        """A sequence that was there before, in other pages, which the caller fills. Raises OutOfPages, with nothing changed."""
        seq = CachedSequence(salt, epoch)
        seq._pages.extend(self.pages.take(self._pages_for(length)))
        seq.length, seq._found = length, found
        self.alive.add(seq)
        return seq

    def truncate(self, seq: CachedSequence, length: int) -> None:
        kept = self._pages_for(length)
        dropped = seq._pages[kept:]
        if dropped:
            seq._pages = seq._pages[:kept]
        seq.length, seq._found = length, seq._found and length > 0
        self._known_up_to(seq, length)
        self._give_back(reversed(dropped))

    def free(self, seq: CachedSequence) -> None:
        pages, seq._pages = seq._pages, array("i")
        self._give_back(reversed(pages))
        self.alive.discard(seq)
        seq.length, seq._found, seq.unrun, seq.freed = 0, False, False, True

    # Checks

    def check_mine(self, seq: CachedSequence) -> None:
        if seq.freed:
            raise ValueError(f"{seq!r} was freed and has no pages; start a new one with cache.add()")
        if seq not in self.alive:
            raise ValueError(f"{seq!r} belongs to another cache; use a sequence made by this cache's add()")

    def check_usable(self, seq: CachedSequence) -> None:
        if seq.freed or seq not in self.alive:
            self.check_mine(seq)
        if seq.unrun:
            raise ValueError(
                f"{seq!r} was in a batch that was never run, so its newest keys and values are missing; "
                "call the compiled model once a batch, where torch does not run it eagerly, or free the sequence"
            )

    def check_length(self, seq: CachedSequence, length: int | None) -> int:
        self.check_usable(seq)
        if length is not None and not (type(length) is int and 0 <= length <= seq.length):
            raise ValueError(f"length={length!r} of {seq!r}; it has 0 to {seq.length} tokens")
        return seq.length if length is None else length

    # Pages

    def _known(self, tokens: Tokens | None, salt: Salt) -> tuple[list[int], int]:
        """The pages that hold the first of these tokens, and how many. Never the last token: its logits are wanted."""
        check_salt(salt)
        if tokens is None:
            return [], 0
        ids = token_array(tokens)
        if self.origin is not None and not self.origin.stands():
            self.origin.renew()
            self.forget()
        pages = self._index.match(ids, salt)
        length = min(len(pages) * self.page_size, len(ids) - 1)
        return pages[: self._pages_for(length)], length

    def _guarded(self, seqs: Iterable[CachedSequence]) -> list[CachedSequence]:
        """Those whose next token belongs on their last page, which is not theirs to write: others own it, or it is known."""
        size, guarded = self.page_size, self.pages.guarded
        return [seq for seq in seqs if seq.length % size and guarded(seq._pages[-1])]

    def _shared(self, guarded: Sequence[CachedSequence]) -> list[CachedSequence]:
        """Those of them whose page has another owner when their turn comes: of two, the second one is left alone with it."""
        left: dict[int, int] = {}
        found = []
        for seq in guarded:
            page = seq._pages[-1]
            if self.pages.references(page) - left.get(page, 0) > 1:
                left[page] = left.get(page, 0) + 1
                found.append(seq)
        return found

    def _kept_apart(self, seqs: Sequence[CachedSequence]) -> list[tuple[CachedSequence, int]]:
        """For sequences alone with a page that is known, another page each; where none is left, theirs is known no more.

        The old page is free afterwards, so this takes no page in the end, and whoever counts pages need not know of it.
        """
        out = []
        for seq in seqs:
            if seq._pages[-1] not in self._index:
                continue
            if self.pages.free_pages:
                out.append((seq, self.pages.take(1)[0]))
            else:
                self._lose(seq._pages[-1])
        return out

    def _out_of_pages(self, growing: Sequence[tuple[CachedSequence, int]], wanted: int) -> NoReturn:
        free, total = self.pages.free_pages, self.pages.num_pages
        raise OutOfPages(
            f"this batch of {len(growing)} chunks and {sum(count for _, count in growing)} new tokens needs {wanted} more "
            f"pages; {free} of {total} are free (page_size {self.page_size}); free a sequence, "
            f"pass fewer tokens, or make the cache larger (kv_tokens={total * self.page_size})"
        )

    def _lose(self, page: int) -> None:
        """Know this page no more, nor what follows it."""
        self._poison([each for each in self._index.forget(page) if self.pages.lose(each)])

    def _give_back(self, pages: Iterable[int]) -> None:
        """A sequence's come from its tail, so that of a prefix the end is evicted first."""
        self._poison(self.pages.give_back(pages))

    def _poison(self, freed: list[int]) -> None:
        if freed and self._pools.poisoned:
            self._pools.poison(freed)


def stale(seq: CachedSequence) -> StalePrefix:
    """Why it must not run on."""
    return StalePrefix(
        f"{seq!r} begins with keys that it found, and the model has changed since these were made: a weight, an attribute, or how "
        "it is compiled; they are known no longer, and the batch was not run: free the sequence, add its tokens again, batch anew"
    )

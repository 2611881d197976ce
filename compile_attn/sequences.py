"""Which sequence holds which pages, and which pages may several hold?

A page that a step writes has one owner, and is not known by its tokens: everything here keeps to that. A page of several is copied
before one of them writes (copy-on-write). A sequence whose pages change, other than by more at their end, gets a new array of them
(see `step._Table`).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch

from compile_attn.pages import PageAllocator
from compile_attn.pools import Pools
from compile_attn.prefixes import PrefixIndex, Salt
from compile_attn.step import token_array

Tokens = Sequence[int] | torch.Tensor


class CachedSequence:
    """One growing sequence: its pages in order and how many of its tokens have been handed to a step."""

    __slots__ = ("_epoch", "_pages", "_salt", "freed", "length", "unrun")

    def __init__(self, salt: Salt = None, epoch: int = 0) -> None:
        self._pages = array("i")
        self._salt, self._epoch = salt, epoch
        self.length = 0
        self.unrun = False  # its last batch has not been run, so keys and values of the newest tokens are missing
        self.freed = False

    @property
    def pages(self) -> tuple[int, ...]:
        return tuple(self._pages)

    def __repr__(self) -> str:
        return f"CachedSequence(length={self.length}, pages={len(self._pages)}{', freed' if self.freed else ''})"


class Sequences:
    """The sequences of one cache, its pages, and the prefixes that it knows. `PagedKVCache` says what methods mean to a caller."""

    def __init__(self, page_size: int, pools: Pools) -> None:
        self.page_size = page_size
        self.alive: set[CachedSequence] = set()
        self.hits = self.hit_tokens = 0
        self._fingerprint: Callable[[], object] | None = None  # of the weights that make keys
        self._stands: object = None  # its value when prefixes were asked for last: under another one keys would be others
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

    def bind(self, fingerprint: Callable[[], object] | None) -> None:
        """By what the weights are told apart from now on."""
        if self._fingerprint is not None:  # compiled anew: the model may have changed in other ways
            self.forget()
        self._fingerprint = fingerprint
        self._stands = None if fingerprint is None else fingerprint()

    # Prefixes

    def add(self, tokens: Tokens | None, salt: Salt) -> CachedSequence:
        pages, length = self._known(tokens, salt)
        seq = CachedSequence(salt, self._epoch)
        for page in pages:
            self.pages.share(page)
        seq._pages.extend(pages)
        seq.length = length
        self.alive.add(seq)
        self.hits += bool(length)
        self.hit_tokens += length
        return seq

    def pages_to_admit(self, tokens: Tokens, salt: Salt) -> int:
        """The pages that a sequence of these tokens takes out of those that are free."""
        pages, length = self._known(tokens, salt)
        held = sum(self.pages.references(page) > 0 for page in pages)
        copied = length % self.page_size and self.pages.references(pages[-1]) > 0
        return self._pages_for(len(tokens)) - held + bool(copied)

    def keep(self, seq: CachedSequence, tokens: Tokens) -> None:
        if seq._epoch != self._epoch:
            return
        ids = token_array(tokens)
        full = min(len(ids), seq.length) // self.page_size
        for page in self._index.put(ids, seq._salt, seq._pages[:full]):
            self.pages.keep(page)

    def forget(self) -> None:
        """Know no prefix any more, nor any that begins in a sequence there is now."""
        self._epoch += 1
        self._poison([page for page in self._index.clear() if self.pages.lose(page)])

    # Growing, shrinking, sharing

    def pages_wanted(self, seq: CachedSequence, count: int) -> int:
        """The pages that so many more tokens take."""
        return self._pages_for(seq.length + count) - len(seq._pages) + len(self._shared([seq]))

    def pages_wanted_by(self, growing: Sequence[tuple[CachedSequence, int]]) -> int:
        """The same for several in one batch: of two that share a page, the second one to write is then its only owner."""
        more = sum(self._pages_for(seq.length + count) - len(seq._pages) for seq, count in growing)
        return more + len(self._shared([seq for seq, _ in growing]))

    def grow(self, growing: Sequence[tuple[CachedSequence, int]]) -> None:
        """Give each sequence the pages for so many more tokens, and a last page of its own. There must be pages enough."""
        seqs = [seq for seq, _ in growing]
        moves = [(seq, self.pages.take(1)[0]) for seq in self._shared(seqs)]
        more = [self.pages.take(self._pages_for(seq.length + count) - len(seq._pages)) for seq, count in growing]
        moves += self._kept_apart(seqs, {seq for seq, _ in moves})
        pairs = [(seq._pages[-1], new) for seq, new in moves]
        for seq, new in moves:
            seq._pages = seq._pages[:-1]
            seq._pages.append(new)
        for seq, pages in zip(seqs, more, strict=True):
            seq._pages.extend(pages)
        try:
            self._pools.copy(pairs)
        finally:
            self._give_back(old for old, _ in pairs)

    def fork(self, seq: CachedSequence, length: int) -> CachedSequence:
        other = CachedSequence(seq._salt, seq._epoch)
        other._pages = seq._pages[: self._pages_for(length)]
        other.length = length
        for page in other._pages:
            self.pages.share(page)
        self.alive.add(other)
        return other

    def truncate(self, seq: CachedSequence, length: int) -> None:
        kept = self._pages_for(length)
        dropped = seq._pages[kept:]
        if dropped:
            seq._pages = seq._pages[:kept]
        seq.length = length
        self._give_back(reversed(dropped))

    def free(self, seq: CachedSequence) -> None:
        pages, seq._pages = seq._pages, array("i")
        self._give_back(reversed(pages))
        self.alive.discard(seq)
        seq.length, seq.unrun, seq.freed = 0, False, True

    def _known(self, tokens: Tokens | None, salt: Salt) -> tuple[list[int], int]:
        """The pages that hold the first of these tokens, and how many. Never the last token: its logits are wanted."""
        if not (salt is None or isinstance(salt, (str, bytes))):
            raise ValueError(f"salt={salt!r}; a cache salt is a str, bytes or None")
        if tokens is None:
            return [], 0
        ids = token_array(tokens)
        stands = None if self._fingerprint is None else self._fingerprint()
        if stands != self._stands:
            self._stands = stands
            self.forget()
        pages = self._index.match(ids, salt)
        length = min(len(pages) * self.page_size, len(ids) - 1)
        return pages[: self._pages_for(length)], length

    def _shared(self, seqs: Iterable[CachedSequence]) -> list[CachedSequence]:
        """Those whose last page is to be written, and has another owner when their turn comes."""
        left: Counter[int] = Counter()
        found = []
        for seq in seqs:
            if seq.length % self.page_size and self.pages.references(seq._pages[-1]) - left[seq._pages[-1]] > 1:
                left[seq._pages[-1]] += 1
                found.append(seq)
        return found

    def _kept_apart(self, seqs: Sequence[CachedSequence], moved: set[CachedSequence]) -> list[tuple[CachedSequence, int]]:
        """Those that are to write a known page of their own, each with another page; where none is left, the page is forgotten.

        The old page is free afterwards, so this takes no page in the end, and whoever counts pages need not know of it.
        """
        out = []
        for seq in seqs:
            if seq.length % self.page_size and seq not in moved and seq._pages[-1] in self._index:
                if self.pages.free_pages:
                    out.append((seq, self.pages.take(1)[0]))
                else:
                    self._lose(seq._pages[-1])
        return out

    def _lose(self, page: int) -> None:
        """Know this page no more, nor what follows it."""
        self._poison([each for each in self._index.forget(page) if self.pages.lose(each)])

    def _give_back(self, pages: Iterable[int]) -> None:
        """A sequence's come from its tail, so that of a prefix the end is evicted first."""
        self._poison(self.pages.give_back(pages))

    def _poison(self, freed: list[int]) -> None:
        if freed and self._pools.poisoned:
            self._pools.poison(freed)

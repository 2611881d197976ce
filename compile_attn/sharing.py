"""Which pages that hold its first tokens already can a request begin with, and which of its own does it leave to others?

A page can be known by its tokens as soon as the step that fills it was sent and the host has read them: what is sent later runs
later. It is made known when somebody looks, or when its request lets go of it: a step of decodes alone spends no time on it. After
a step that failed all prefixes are forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from compile_attn.cache import CachedSequence, PagedKVCache
from compile_attn.requests import Request


class Beginning(NamedTuple):
    """What admitting a request comes to: how many of the free pages all its tokens take, and its sequence, to be made at once."""

    pages: int
    make: Callable[[], CachedSequence]


class Sharing:
    """Pages that the requests of one cache share.

    prefix_cache   whether what a request has computed is found by later ones; samples of one prompt share their pages anyway
    """

    def __init__(self, cache: PagedKVCache, prefix_cache: bool) -> None:
        self._cache, self._prefix_cache = cache, prefix_cache

    def beginning(self, request: Request) -> Beginning:
        """The longest there is. Of a request none of whose tokens is pending."""
        cache, length = self._cache, request.length
        found = cache.find(request.ids(0, length), salt=request.salt) if self._prefix_cache else None
        shared, kin = max(((self._common(request, one), one.seq) for one in request.kin), key=_length, default=(0, None))
        if kin is not None and shared > (0 if found is None else found.length):
            copied = shared % cache.page_size > 0
            return Beginning(cache.pages_for(length) - cache.pages_for(shared) + copied, partial(cache.fork, kin, shared))
        if found is not None:
            return Beginning(found.pages_to_admit, partial(cache.add, found))
        return Beginning(cache.pages_for(length), partial(cache.add, salt=request.salt))

    def _common(self, request: Request, kin: Request) -> int:
        """Tokens that both begin with and that were run; not the last one, whose logits are wanted."""
        return 0 if kin.seq is None else min(len(request.prompt), request.length - 1, kin.seq.length)

    def keep(self, requests: Iterable[Request]) -> None:
        """Know the full pages of these requests whose tokens were read."""
        cache, size = self._cache, self._cache.page_size
        for request in requests if self._prefix_cache else ():
            seq = request.seq
            if seq is None:
                continue
            full = min(seq.length, len(request.prompt) + len(request.new_tokens)) // size
            if seq.known_pages < full and (known := cache.kept(seq)) < full * size:
                cache.keep(seq, request.ids(known, full * size), known)


def _length(found: tuple[int, object]) -> int:
    return found[0]

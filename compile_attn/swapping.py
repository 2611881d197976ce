"""Where do the pages of a sequence wait while others need the room?

Copied to host memory and back byte for byte, so that the sequence goes on as if nothing had been. `swap_cost.py` says when this
takes less time than computing its tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from compile_attn.cache import CachedSequence, PagedKVCache
from compile_attn.kernels.blocks import swap_blocks
from compile_attn.modes import in_own_modes
from compile_attn.pages import page_count

# Pages are gathered on the device before they leave it: so many bytes at a time, which costs a copy of its own no speed.
_STAGED = 32 << 20


class Swapped:
    """A sequence that waits in host memory; good for one `back` or `drop`."""

    __slots__ = ("_epoch", "_found", "_pages", "_salt", "_space", "length")

    def __init__(self, seq: CachedSequence, pages: list[int], space: SwapSpace) -> None:
        self.length, self._space = seq.length, space
        self._salt, self._epoch, self._found = seq._salt, seq._epoch, seq._found
        self._pages: list[int] | None = pages

    def __repr__(self) -> str:
        return f"Swapped(length={self.length}{'' if self._pages is not None else ', used'})"


class SwapSpace:
    """Host memory for pages of one cache, of the same layout and dtypes, taken once.

    cache    bound to a model (whose first call makes its pages)
    tokens   that fit in it; a multiple of the cache's page_size

    On a GPU the memory is pinned (torch rounds that of each pool up to a power of two) and nothing waits: copies are queued on the
    current stream, which must be the one on which the model runs. There they come after the steps that wrote the pages, and before
    all that write them later; the host itself never reads or writes them.
    """

    def __init__(self, cache: PagedKVCache, tokens: int) -> None:
        pages = page_count(tokens, cache.page_size, "tokens")
        if not cache.k_pages:
            raise ValueError("the cache has no pages yet, so it is not known how large they are; run the model on it once")
        self._cache, self._closed = cache, False
        self._free = list(range(pages))
        self._pools = self._made(pages)

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self._cache.device

    @property
    def free_tokens(self) -> int:
        """Room that is left, in whole pages."""
        return len(self._free) * self._cache.page_size

    @property
    def bytes_a_token(self) -> float:
        """That move for each token, one way."""
        return sum(pool[0].nbytes for pool in self._pools) / self._cache.page_size

    def pages_for(self, tokens: int) -> int:
        """Of the cache, for so many tokens."""
        return self._cache.pages_for(tokens)

    @in_own_modes
    def out(self, seq: CachedSequence) -> Swapped | None:
        """End the sequence here and keep what its pages hold; they come free. None, with nothing changed, where there is no room.

        Pages that others hold, or that are known as a prefix, stay as they are, and are copied too. ValueError for a sequence that
        was freed, that is another cache's, or whose last batch was not run.
        """
        self._check_open()
        self._cache._seqs.check_usable(seq)
        count = len(seq.pages)
        if count > len(self._free):
            return None
        with self._taken(count) as pages:
            for device, host in zip(self._on_device(), self._pools, strict=True):
                _move(device, host, [*zip(seq.pages, pages, strict=True)])
        swapped = Swapped(seq, pages, self)
        self._cache.free(seq)
        return swapped

    @in_own_modes
    def back(self, swapped: Swapped) -> CachedSequence:
        """The sequence that goes on, in pages of its own; its host memory comes free. Raises OutOfPages, with nothing changed.

        ValueError where it was used already, or is longer than the cache allows since it was resized; it can be dropped then.
        """
        self._check_open()
        pages = self._check(swapped)
        if swapped.length > self._cache.length_limit:
            raise ValueError(
                f"{swapped!r}; the cache was resized and holds at most {self._cache.length_limit} tokens a sequence now: drop it"
            )
        seq = self._cache._seqs.restore(swapped.length, swapped._salt, swapped._epoch, swapped._found)
        try:
            for device, host in zip(self._on_device(), self._pools, strict=True):
                _move(host, device, [*zip(pages, seq.pages, strict=True)])
        except BaseException:
            self._cache.free(seq)
            raise
        self._give_back(swapped)
        return seq

    def drop(self, swapped: Swapped) -> None:
        """Let go of what was kept. ValueError where it was used already."""
        self._check_open()
        self._check(swapped)
        self._give_back(swapped)

    def close(self) -> None:
        """Let go of the memory. Nothing that was swapped can come back."""
        self._pools, self._free, self._closed = [], [], True

    def _check_open(self) -> None:
        self._cache._check_open()
        if self._closed:
            raise ValueError("this SwapSpace is closed; make a new one")

    def _made(self, pages: int) -> list[torch.Tensor]:
        pinned = self.device.type == "cuda"
        return [
            torch.empty((pages, *pool.shape[1:]), dtype=pool.dtype, device="cpu", pin_memory=pinned) for pool in self._on_device()
        ]

    def _on_device(self) -> list[torch.Tensor]:
        return [*self._cache.k_pages, *self._cache.v_pages]  # asked for each time: a cache that is resized has others

    @contextmanager
    def _taken(self, count: int) -> Iterator[list[int]]:
        """So many pages, the first that are free, as neighbours are one copy; free again where what is done with them fails."""
        pages, self._free = self._free[:count], self._free[count:]
        try:
            yield pages
        except BaseException:
            self._free = sorted([*self._free, *pages])
            raise

    def _give_back(self, swapped: Swapped) -> None:
        assert swapped._pages is not None
        self._free, swapped._pages = sorted([*self._free, *swapped._pages]), None

    def _check(self, swapped: Swapped) -> list[int]:
        if swapped._space is not self:
            raise ValueError(f"{swapped!r} is kept in another SwapSpace; use the one whose out() has made it")
        if swapped._pages is None:
            raise ValueError(f"{swapped!r} came back or was dropped already; each is good for one back() or drop()")
        return swapped._pages


def _move(source: torch.Tensor, target: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Copy pages, a part of them at a time."""
    step = max(1, _STAGED // max(1, source[0].nbytes))
    for begin in range(0, len(pairs), step):
        swap_blocks(source, target, torch.tensor(pairs[begin : begin + step], dtype=torch.int64, device="cpu"))

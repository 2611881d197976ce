"""Which pages are free?"""

from __future__ import annotations

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """The free pages do not hold the new tokens. Nothing was changed."""


class PageAllocator:
    """A stack of free pages: O(1) a page, and the page freed last is used first (a stale read then shows soonest).

    Pages are numbered from 1. Page 0 is nobody's: it is what block tables hold where they show no page.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._taken = bytearray(num_pages + 1)  # becomes a reference count when sequences share pages

    @property
    def free_pages(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(f"{count} pages are needed, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._taken[page] = 1
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert self._taken[page], f"page {page} is given back twice"
            self._taken[page] = 0
            self._free.append(page)


def at_least_one(name: str, value: int) -> int:
    """The value, if it is a count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
    return value


def page_count(kv_tokens: int, page_size: int) -> int:
    """Pages that hold exactly so many tokens."""
    if at_least_one("kv_tokens", kv_tokens) % page_size:
        near = max(1, round(kv_tokens / page_size)) * page_size
        raise ValueError(f"kv_tokens={kv_tokens} is not a multiple of page_size={page_size}; the nearest is {near}")
    return kv_tokens // page_size

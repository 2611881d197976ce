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

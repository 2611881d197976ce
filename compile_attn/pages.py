"""Which pages are free, and how many sequences own each of the others?"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable


class OutOfPages(RuntimeError):
    """The free pages do not hold the new tokens. Nothing was changed."""


class PageAllocator:
    """A stack of free pages: O(1) a page, and the page freed last is used first (a stale read then shows soonest).

    A page may have several owners. One that nobody owns any more is free, or evictable where its content is kept: it counts as
    free, and when no other is left, the one that was given back first is taken first.

    Pages are numbered from 1. Page 0 is nobody's: it is what block tables hold where they show no page.

    on_evict    is told which page is needed for something else, and lets go of it: `lose`
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))
        self._owners = array("i", bytes(4 * (num_pages + 1)))
        self._kept = bytearray(num_pages + 1)
        self._evictable: OrderedDict[int, None] = OrderedDict()  # the one given back first comes first
        self._on_evict = on_evict or self.lose

    @property
    def free_pages(self) -> int:
        return len(self._free) + len(self._evictable)

    def references(self, page: int) -> int:
        """How many own it."""
        return self._owners[page]

    def guarded(self, page: int) -> bool:
        """Whether nobody may write it: it has several owners, or its content is kept."""
        return self._owners[page] > 1 or bool(self._kept[page])

    def take(self, count: int) -> list[int]:
        """So many pages, each with one owner."""
        if count > len(self._free) and count > self.free_pages:
            raise OutOfPages(f"{count} pages are needed, {self.free_pages} of {self.num_pages} are free")
        while len(self._free) < count:
            self._on_evict(next(iter(self._evictable)))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
        return pages

    def share(self, page: int) -> None:
        """One owner more. A page that nobody owns must be one whose content is kept."""
        if not self._owners[page]:
            del self._evictable[page]
        self._owners[page] += 1

    def give_back(self, pages: Iterable[int]) -> list[int]:
        """One owner less for each. Those that are free now, with contents that nobody can ask for."""
        freed = []
        for page in pages:
            assert self._owners[page], f"page {page} is given back twice"
            self._owners[page] -= 1
            if self._owners[page]:
                continue
            if self._kept[page]:
                self._evictable[page] = None
            else:
                self._free.append(page)
                freed.append(page)
        return freed

    def keep(self, page: int) -> None:
        """Its content outlives its owners, until the page is needed."""
        assert self._owners[page], f"page {page} is nobody's"
        self._kept[page] = 1

    def lose(self, page: int) -> bool:
        """Its content is kept no longer. Whether the page is free now."""
        self._kept[page] = 0
        if page not in self._evictable:
            return False
        del self._evictable[page]
        self._free.append(page)
        return True


def at_least_one(name: str, value: int) -> int:
    """The value, if it is a count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; it must be a whole number of at least 1")
    return value


def page_count(tokens: int, page_size: int, name: str = "kv_tokens") -> int:
    """Pages that hold exactly so many tokens; name: what they are called where they were asked for."""
    if at_least_one(name, tokens) % page_size:
        near = max(1, round(tokens / page_size)) * page_size
        raise ValueError(f"{name}={tokens} is not a multiple of page_size={page_size}; the nearest is {near}")
    return tokens // page_size

"""Which pages hold the keys and values of a prompt's first tokens already?

A tree: a node is a page, the branch to it is labelled with the token ids of that page, and the path from a root spells a prefix.
There is a root for each cache salt. Two prefixes meet in one node only if all their ids are equal, so a wrong page cannot be found,
by accident or by intent: no hash has to be trusted (a dict compares what it has hashed), and there is no secret to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.int64]]
Salt = str | bytes | None  # None: what has no salt is shared among all that have none


class Node:
    """A full page, the node before it, the ids that lead here, and what follows."""

    __slots__ = ("before", "following", "ids", "page")

    def __init__(self, before: Node | None, ids: bytes | Salt, page: int) -> None:
        self.before, self.ids, self.page = before, ids, page
        self.following: dict[bytes, Node] = {}


class PrefixIndex:
    """The pages whose token ids are known, by these ids and those of all pages before them."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._roots: dict[Salt, Node] = {}
        self._nodes: dict[int, Node] = {}  # by page

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, page: int) -> bool:
        return page in self._nodes

    def node(self, page: int) -> Node | None:
        """Of a page that is known."""
        return self._nodes.get(page)

    def holds(self, node: Node | None) -> bool:
        """Whether this node is still known."""
        return node is not None and self._nodes.get(node.page) is node

    def match(self, tokens: Ints, salt: Salt = None) -> list[int]:
        """The pages of the longest known prefix, of whole pages."""
        node, pages = self._roots.get(salt), list[int]()
        for ids in self._labels(tokens):
            node = None if node is None else node.following.get(ids)
            if node is None:
                break
            pages.append(node.page)
        return pages

    def put(self, tokens: Ints, salt: Salt, pages: Sequence[int], after: Node | None = None) -> tuple[list[int], Node]:
        """Know these pages by their tokens, from the beginning or after a known page.

        Returns those that were not known before, and the node of the last one. Of two pages for one prefix the first one stays.
        """
        labels = list(self._labels(tokens[: len(pages) * self._page_size]))
        node, there = after or self._roots.get(salt) or Node(None, salt, 0), 0
        while there < len(labels) and labels[there] in node.following:
            node = node.following[labels[there]]
            self._check(pages[there], node)
            there += 1
        for page in pages[there : len(labels)]:
            self._check(page, None)
        if there < len(labels):
            first = node
            for ids, page in zip(labels[there:], pages[there:], strict=False):
                node.following[ids] = node = self._nodes[page] = Node(node, ids, page)
            if first.before is None:
                self._roots[salt] = first
        return list(pages[there : len(labels)]), node

    def forget(self, page: int) -> list[int]:
        """Know this page no more, nor those after it, which could not be found without it. All of them, the last ones first."""
        node = self._nodes[page]
        before = node.before
        assert before is not None
        del before.following[node.ids]  # type: ignore[arg-type]
        if before.before is None and not before.following:
            del self._roots[before.ids]
        gone = [each.page for each in _below(node)][::-1]
        for each in gone:
            del self._nodes[each]
        return gone

    def clear(self) -> list[int]:
        """Know nothing more; the pages that were known."""
        pages = list(self._nodes)
        self._roots, self._nodes = {}, {}
        return pages

    def _check(self, page: int, node: Node | None) -> None:
        """Refuse to know a page at two places."""
        if self._nodes.get(page, node) is not node:
            raise ValueError(f"page {page} is known to hold other tokens than those given for it; give the sequence's own tokens")

    def _labels(self, tokens: Ints) -> Iterator[bytes]:
        """The ids of each full page."""
        data, step = tokens.tobytes(), self._page_size * tokens.itemsize
        for end in range(step, len(data) + 1, step):
            yield data[end - step : end]


def check_salt(salt: Salt) -> None:
    """Refuse what could not keep tenants apart."""
    if not (salt is None or isinstance(salt, (str, bytes))):
        raise ValueError(f"salt={salt!r}; a cache salt is a str, bytes or None")


def _below(node: Node) -> Iterator[Node]:
    """The node and all that follow it, each after the one before it."""
    left = [node]
    while left:
        node = left.pop()
        yield node
        left.extend(node.following.values())

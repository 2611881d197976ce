"""What may a node hold, seen along the token axis?

The claim behind every value here is a simulation. Let P be the captured program, run for one sequence, and Q the
rewritten one, run once on the packed new tokens of many. A node is `Tok` when its slice for a packed token in Q equals its
slice for that token in P, `Free` when it is the same tensor in every run, and so on. `Mixed` claims nothing, so it may not
reach the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx


@dataclass(frozen=True)
class Space:
    """A set of rows: `tokens` are the T tokens in order; `last` is one row a sequence, of size 1 in P; `sorted` are rows that
    a sort has permuted, `rows` times T of them; a `part` is one group of a sorted space; `chosen` are rows where a condition
    holds, in order."""

    kind: str
    rows: int = 1
    node: fx.Node | None = None  # the sort, or the condition
    group: int = -1  # of a part

    @property
    def by_data(self) -> bool:
        """Whether the number of rows is data."""
        return self.kind in ("part", "chosen")


TOKENS = Space("tokens")
LAST = Space("last")


@dataclass(frozen=True)
class Axis:
    """A dim that runs over `pre` x the rows of the space x `post`, row-major: pre and post are other axes merged with it."""

    space: Space = TOKENS
    pre: int = 1
    post: int = 1

    @property
    def count(self) -> int:
        """The length of the axis in units of T (for `last`, in P, in units of 1)."""
        return self.pre * self.space.rows * self.post

    @property
    def plain(self) -> bool:
        return self.pre == self.post == 1


@dataclass(frozen=True)
class Free:
    """The same in every run: depends on no token and not on T."""


@dataclass(frozen=True)
class Size:
    """A number: `on_tokens` when it depends on T or on data of tokens; `group` = (ids, g, E): how many
    of the ids, of E kinds, are g."""

    on_tokens: bool
    group: tuple[fx.Node, int, int] | None = None


@dataclass(frozen=True)
class Tok:
    """Slice r along `dim` depends on row r only; `uniform`: not even on r; `fill`: every element is this number."""

    dim: int
    axis: Axis = Axis()
    uniform: bool = False
    fill: float | None = None


@dataclass(frozen=True)
class Iota:
    """start + step * (row number along `dim`), `count` * T rows: a position or a row number, as each user decides."""

    dim: int
    count: int = 1
    start: float = 0
    step: float = 1

    @property
    def is_row_number(self) -> bool:
        return self.start == 0 and self.step == 1


@dataclass(frozen=True)
class Index:
    """Element r along `dim` is the row number, on the axis `target`, of what `axis` holds at r; constant along other dims.

    `bijective`: every row of the target is named once. `once`: none is named twice.
    """

    dim: int
    axis: Axis
    target: Axis
    bijective: bool = False
    once: bool = False


@dataclass(frozen=True)
class Mixed:
    """Depends on several tokens, or on T, since `node`. `counts` = (ids, E): for each of E groups, how many elements of the
    node `ids` are equal to it; `cumulative`: their running sum. These two a grouped product may take."""

    reason: str
    node: fx.Node
    cure: str = ""
    counts: tuple[fx.Node, int] | None = None
    cumulative: bool = False


Value: TypeAlias = Free | Size | Tok | Iota | Index | Mixed | tuple[Any, ...]
Row: TypeAlias = Tok | Iota | Index  # what has a token axis


class Sizes:
    """Sizes in units of T. Every question is asked of the symbols, never of their hints, and adds no guard."""

    def __init__(self, length: torch.SymInt) -> None:
        self.symbol: sympy.Expr = length.node.expr
        self._count = cache(self._count_of)

    def depends(self, size: object) -> bool:
        """Whether this number depends on T, or on data (an unbacked symbol)."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return False
        symbols = size.node.expr.free_symbols
        return self.symbol in symbols or any(str(symbol).startswith(("u", "zuf")) for symbol in symbols)

    def is_data(self, size: object) -> bool:
        """Whether this number was read from data (an unbacked symbol)."""
        if not isinstance(size, torch.SymInt):
            return False
        return all(str(symbol).startswith("u") for symbol in size.node.expr.free_symbols)

    def count(self, size: object) -> int | None:
        """c where the size is c * T, else None."""
        return self._count(size.node.expr) if isinstance(size, torch.SymInt) else None

    def same(self, a: object, b: object) -> bool:
        """Whether both are the same number of tokens."""
        return self.count(a) is not None and self.count(a) == self.count(b)

    def _count_of(self, expr: sympy.Expr) -> int | None:
        ratio = expr / self.symbol
        return int(ratio) if ratio.is_Integer else None

    def is_last(self, index: object) -> bool:
        """Whether this index names the last of T rows."""
        if isinstance(index, torch.SymInt):
            return bool(index.node.expr - self.symbol == -1)
        return isinstance(index, int) and index == -1


def product(sizes: Sequence[object]) -> int | None:
    """The product of sizes, or None where one of them is a symbol."""
    result = 1
    for size in sizes:
        if not isinstance(size, int):
            return None
        result *= size
    return result


def is_one(size: object) -> bool:
    """Whether a size is the literal 1; asking a symbol would add a guard."""
    return isinstance(size, int) and size == 1


def row_axis(value: Row) -> Axis:
    """The axis that a value has along its `dim`."""
    return Axis(TOKENS, 1, value.count) if isinstance(value, Iota) else value.axis


def has_size(sizes: Sizes, size: object, axis: Axis) -> bool:
    """Whether a dim of this size in P can be this axis."""
    if axis.space.by_data:
        return axis.plain  # the size is data; what made it was checked
    if axis.space is LAST:
        return isinstance(size, int) and size == axis.pre * axis.post
    if axis.space.kind == "sorted" and sizes.is_data(size):
        return axis.plain  # its groups, joined again
    return sizes.count(size) == axis.count


def reshaped_axis(sizes: Sizes, before: Sequence[Any], dim: int, axis: Axis, after: Sequence[Any]) -> tuple[int, Axis] | None:
    """Where an axis goes when a tensor of shape `before` is viewed in shape `after`: (dim, Axis), or None where it is cut.

    A view keeps the linear order of elements, so the number of elements ahead of and behind each row stays. Rows of the
    space `last` have size 1 in P and fit several dims: the one with least merged into it, then the same dim, then the last.
    """
    ahead, behind = product(before[:dim]), product(before[dim + 1 :])
    if ahead is None or behind is None:
        return None
    ahead, behind = ahead * axis.pre, behind * axis.post
    found: list[tuple[tuple[int, bool, int], Axis]] = []
    for place, size in enumerate(after):
        pre, post = product(after[:place]), product(after[place + 1 :])
        if not pre or not post or ahead % pre or behind % post:
            continue
        new = replace(axis, pre=ahead // pre, post=behind // post)
        if has_size(sizes, size, new):
            found.append(((new.pre * new.post, len(before) != len(after) or place != dim, -place), new))
    if not found:
        return None
    (_, _, place), new = min(found, key=lambda entry: entry[0])
    return -place, new

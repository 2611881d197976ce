"""Which keys may a query see?

A mask is a small frozen value. `predicate()` is its only definition: a sympy Boolean over b, h, i, j and `Load`, true where
key j is visible to query i. The families here are those that some kernel can exploit; `General` is everything else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean

from compile_attn.kernels.expr import B, H, I, J, Load


class Mask(ABC):
    """A set of visible (b, h, i, j)."""

    @abstractmethod
    def predicate(self) -> Boolean:
        """True where key j is visible to query i."""

    @abstractmethod
    def words(self) -> str:
        """The mask as a phrase of a report."""

    def window(self) -> int | None:
        """The greatest i - j of a visible key: keys to the left of the query, itself not counted. None: unbounded."""
        return None

    def causal(self) -> bool:
        """No key to the right of its query is visible. `classify` makes this True whenever it can be proven."""
        return True

    def is_bounds(self) -> bool:
        """Does it say no more than `causal` and `window` do: j <= i, i - j <= window?"""
        window = self.window()
        bounds = [sympy.Le(J, I)] if self.causal() else []
        bounds += [] if window is None else [sympy.Le(I - J, window)]
        return bool(self.predicate() == sympy.And(*bounds))

    def features(self) -> frozenset[str]:
        """Names of `spec.Feature` members that a kernel must have."""
        return frozenset()


@dataclass(frozen=True)
class Causal(Mask):
    """j <= i."""

    def predicate(self) -> Boolean:
        return sympy.Le(J, I)

    def words(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Bidirectional(Mask):
    """Every key."""

    def predicate(self) -> Boolean:
        return sympy.true

    def words(self) -> str:
        return "bidirectional"

    def causal(self) -> bool:
        return False

    def features(self) -> frozenset[str]:
        return frozenset({"BIDIRECTIONAL"})


@dataclass(frozen=True)
class Window(Mask):
    """Causal, and at most `left` keys before the query: a Hugging Face sliding_window of w is Window(w - 1)."""

    left: int

    def predicate(self) -> Boolean:
        return sympy.And(sympy.Le(J, I), sympy.Le(I - J, self.left))

    def words(self) -> str:
        return f"causal, window of {self.left + 1} keys"

    def window(self) -> int | None:
        return self.left

    def features(self) -> frozenset[str]:
        return frozenset({"WINDOW"})


@dataclass(frozen=True)
class Chunked(Mask):
    """Causal inside chunks of `size` positions."""

    size: int

    def predicate(self) -> Boolean:
        return sympy.And(sympy.Le(J, I), sympy.Eq(sympy.floor(I / self.size), sympy.floor(J / self.size)))

    def words(self) -> str:
        return f"causal inside chunks of {self.size} positions"

    def window(self) -> int | None:
        return self.size - 1

    def features(self) -> frozenset[str]:
        return frozenset({"CHUNKED"})


@dataclass(frozen=True)
class Prefix(Mask):
    """Causal, and the first `length` keys are visible to every query."""

    length: int

    def predicate(self) -> Boolean:
        return sympy.Or(sympy.Le(J, I), sympy.Lt(J, self.length))

    def words(self) -> str:
        return f"causal, first {self.length} keys visible to all"

    def causal(self) -> bool:
        return self.length <= 1  # key 0 alone is to the right of no query

    def features(self) -> frozenset[str]:
        return frozenset({"PREFIX"})


@dataclass(frozen=True)
class SameDocument(Mask):
    """Query and key carry the same number in captured tensor `tensor`, shape [B, T]. Not causal by itself."""

    tensor: int

    def predicate(self) -> Boolean:
        return sympy.Eq(Load(self.tensor, B, I), Load(self.tensor, B, J))

    def words(self) -> str:
        return f"same document (captured tensor {self.tensor})"

    def causal(self) -> bool:
        return False

    def features(self) -> frozenset[str]:
        return frozenset({"DOCUMENTS", "CAPTURED", "BIDIRECTIONAL"})


@dataclass(frozen=True)
class BlockSparse(Mask):
    """Causal; blocks of `block_size` positions; the last `local_blocks` key blocks, and every `vert_stride`-th one.

    Query block a sees key block b iff b <= a and (a - b < local_blocks or (b + slide + 1) mod vert_stride = 0), where heads
    slide by `head_step`, each group of `heads_per_step` alike: slide = (head_offset + h) // heads_per_step * head_step.
    Head 0 here may be head `head_offset` of a model whose heads are spread over several devices.
    """

    block_size: int
    local_blocks: int
    vert_stride: int
    head_step: int = 0
    head_offset: int = 0
    heads_per_step: int = 1

    def predicate(self) -> Boolean:
        query_block, key_block = sympy.floor(I / self.block_size), sympy.floor(J / self.block_size)
        local = sympy.Lt(query_block - key_block, self.local_blocks)
        slide = sympy.floor((H + self.head_offset) / self.heads_per_step) * self.head_step
        vertical = sympy.Eq(sympy.Mod(key_block + slide + 1, self.vert_stride), 0)
        return sympy.And(sympy.Le(J, I), sympy.Or(local, vertical))

    def words(self) -> str:
        heads = "head" if self.heads_per_step == 1 else f"{self.heads_per_step} heads"
        slide = f", sliding by {self.head_step} per {heads}" if self.head_step else ""
        slide += f", counted from head {self.head_offset}" if self.head_step and self.head_offset else ""
        return f"causal, blocks of {self.block_size}: {self.local_blocks} local, every {self.vert_stride}th vertical{slide}"

    def features(self) -> frozenset[str]:
        return frozenset({"BLOCK_SPARSE"})


@dataclass(frozen=True)
class General(Mask):
    """Any other predicate."""

    expr: Boolean

    def predicate(self) -> Boolean:
        return self.expr

    def words(self) -> str:
        return f"keys where {self.expr}"

    def causal(self) -> bool:
        return False

    def features(self) -> frozenset[str]:
        captured = {"CAPTURED"} if self.expr.has(Load) else set()
        return frozenset({"GENERAL_MASK", "BIDIRECTIONAL", *captured})


@dataclass(frozen=True, init=False)
class _Combined(Mask):
    """Several masks, joined. The order is part of the value; `classify` writes the named families first."""

    masks: tuple[Mask, ...]

    def __init__(self, *masks: Mask) -> None:
        object.__setattr__(self, "masks", masks)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.masks))})"

    def predicate(self) -> Boolean:
        raise NotImplementedError

    def words(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True, init=False, repr=False)
class All(_Combined):
    """Visible in every one of the masks."""

    def predicate(self) -> Boolean:
        return sympy.And(*(mask.predicate() for mask in self.masks))

    def words(self) -> str:
        return " and ".join(mask.words() for mask in self.masks)

    def window(self) -> int | None:
        bounds = [bound for mask in self.masks if (bound := mask.window()) is not None]
        return min(bounds, default=None)

    def causal(self) -> bool:
        return any(mask.causal() for mask in self.masks)

    def features(self) -> frozenset[str]:
        names = frozenset[str]().union(*(mask.features() for mask in self.masks))
        return names - {"BIDIRECTIONAL"} if self.causal() else names


@dataclass(frozen=True, init=False, repr=False)
class Any(_Combined):
    """Visible in at least one of the masks."""

    def predicate(self) -> Boolean:
        return sympy.Or(*(mask.predicate() for mask in self.masks))

    def words(self) -> str:
        return "either " + " or ".join(mask.words() for mask in self.masks)

    def window(self) -> int | None:
        bounds = [bound for mask in self.masks if (bound := mask.window()) is not None]
        return max(bounds, default=None) if len(bounds) == len(self.masks) else None

    def causal(self) -> bool:
        return all(mask.causal() for mask in self.masks)

    def features(self) -> frozenset[str]:
        names = frozenset[str]().union(*(mask.features() for mask in self.masks))
        return names | {"GENERAL_MASK"}

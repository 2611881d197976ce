"""Which terms occur while a graph is read, and how does reading stop?"""

from __future__ import annotations

import sympy
from torch import fx

from compile_attn.passes.graph import location
from compile_attn.passes.report import Rejected


class Dot(sympy.Function):  # type: ignore[misc]
    """`Dot(k, *index)`: an element of the product of the two operands of contraction k."""

    is_real = True


class Opaque(sympy.Function):  # type: ignore[misc]
    """`Opaque(k, *index)`: a reduction over an axis that the index lacks, such as the maximum of a row."""

    is_real = True


class Unreadable(Exception):
    """A node that the reader does not understand."""

    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.reason)
        self.rejected = rejected


def unreadable(node: fx.Node, why: str, cure: str) -> Unreadable:
    """The exception that rejects a node: what stopped the reader, and what can be written instead."""
    return Unreadable(Rejected(why, location(node), cure))

"""What did the compiler do with each attention, and why?

A Report is a value: sites rewritten, sites rejected, what was done about tokens, and the graph before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location


@dataclass(frozen=True)
class Rewritten:
    """A site that now runs in a fused kernel."""

    where: Location
    spec: AttentionSpec
    kernel: str
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kernel -> reasons it was not taken
    nodes_removed: int = 0
    nodes_added: int = 0


@dataclass(frozen=True)
class Rejected:
    """A site, or a token-mixing node, that stays as it was: what was found, what is supported, the cure."""

    reason: str
    where: Location
    cure: str = ""


@dataclass(frozen=True)
class TokenRewrite:
    """A node rewritten so that it reads the batch: kind is "positions", "table", "last_token" or "rows"."""

    kind: str
    where: Location
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything that one compilation did."""

    mode: str  # "stateless" or "paged"
    sites: tuple[Rewritten, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    tokens: tuple[TokenRewrite, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase -> seconds
    before: str = ""  # the normalised graph as text
    after: str = ""
    max_positions: int | None = None  # length of the shortest position table that the model indexes by position


class RefusedError(RuntimeError):
    """The model cannot be rewritten soundly. `report` holds everything that was found."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

"""What did the compiler do with each attention, and why?

A Report is a value: sites rewritten, sites rejected, what was done about tokens, and the graph before and after.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


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

    def diff(self) -> str:
        """Unified diff of the normalised graph before and after; empty where nothing was rewritten."""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="")
        return "\n".join(lines) if self.after else ""

    def to_html(self, path: str | None = None) -> str:
        """One self-contained page: sites, masks as pictures, the diff. Written to `path` where that is given."""
        from compile_attn.passes.render import html

        page = html(self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(page)
        return page

    def summary(self) -> str:
        """One line."""
        done = f"{len(self.sites)} attention site(s) rewritten ({self.mode}), {len(self.rejected)} rejected"
        return done + (f", {len(self.tokens)} token rewrite(s)" if self.mode == "paged" else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.summary()
        if self.sites:
            yield _table("rewritten", ("where", "what it computes", "kernel", "others"), [_site_row(site) for site in self.sites])
        if self.rejected:
            rows = [(one.where.module or one.where.node, one.reason, one.cure, one.where.source) for one in self.rejected]
            yield _table("rejected", ("where", "reason", "cure", "source"), rows)
        if self.tokens:
            changes = [(one.kind, one.where.module or one.where.node, one.detail) for one in self.tokens]
            yield _table("tokens", ("kind", "where", "rewrite"), changes)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


def _site_row(site: Rewritten) -> tuple[str, ...]:
    others = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in site.passed_over.items())
    return site.where.module or site.where.node, site.spec.words(), site.kernel, others


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table in which equal neighbours that differ in place alone share a row."""
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, title=title, title_justify="left")
    groups: dict[tuple[str, ...], list[str]] = {}
    place = 1 if title == "tokens" else 0
    for row in rows:
        groups.setdefault((*row[:place], "", *row[place + 1 :]), []).append(row[place])
    for row, places in groups.items():
        where = places[0] if len(places) == 1 else f"{places[0]} ... {places[-1]} ({len(places)})"
        table.add_row(*(Text(where if n == place else cell) for n, cell in enumerate(row)))
    return table


class RefusedError(RuntimeError):
    """The model cannot be rewritten soundly. `report` holds everything that was found."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

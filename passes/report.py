"""What did the compiler do with each attention, and why?

A Report is a value: sites rewritten, sites rejected, what was done about tokens, and the graph before and after.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.text import print_expr
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
    steps: str = ""  # where several kernels share the steps: which serves which
    asked: str = ""  # what of its meaning is not the model's own, and who asked for it
    lines: tuple[str, ...] = ()  # the user's lines that the nodes removed came from, each as `Location.source` has it


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
class LinearMerge:
    """Linears that read one tensor: kind "merged", or "apart" with the reason why one of them is not."""

    kind: str
    where: Location
    detail: str


class Printed(ABC):
    """A value that rich can print; `str` of it is the same in 140 columns, without colours."""

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What `rich.console.Console.print` shows."""

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


@dataclass(frozen=True)
class Report(Printed):
    """Everything that one compilation did."""

    mode: str  # "stateless" or "paged"
    sites: tuple[Rewritten, ...] = ()
    rejected: tuple[Rejected, ...] = ()
    tokens: tuple[TokenRewrite, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)  # phase -> seconds
    before: str = ""  # the normalised graph as text
    after: str = ""
    linears: tuple[LinearMerge, ...] = ()
    max_positions: int | None = None  # length of the shortest position table that the model indexes by position

    def diff(self) -> str:
        """Unified diff of the normalised graph before and after; empty where nothing was rewritten."""
        lines = difflib.unified_diff(self.before.splitlines(), self.after.splitlines(), "before", "after", lineterm="")
        return "\n".join(lines) if self.after else ""

    def to_html(self, path: str | None = None) -> str:
        """One self-contained page: sites with their formulas, masks and source lines, and both graphs side by side.

        It is written to `path` where that is given. Source lines are read now, from the files that the report names.
        """
        from compile_attn.passes.render import html

        page = html(self)
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(page)
        return page

    def summary(self) -> str:
        """One line."""
        if self.mode == "paged" and self.rejected:
            return f"this model cannot be paged, for {counted(len(self.rejected), 'reason')}; nothing was rewritten"
        done = f"{counted(len(self.sites), 'attention site')} rewritten ({self.mode}), {len(self.rejected)} rejected"
        merged = sum(one.kind == "merged" for one in self.linears)
        told = self.mode == "paged" and (self.tokens or self.before)  # a saved program does not know what it was
        done += f", {counted(len(self.tokens), 'token rewrite')}" if told else ""
        return done + (f", {counted(merged, 'group')} of linears merged" if merged else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.summary()
        if self.sites:
            rows = [(_where(at), _meaning(site), _kernel(site)) for site, at in grouped(self.sites)]
            yield table("rewritten", ("where", "what it computes", "kernel"), rows)
        if self.rejected:
            reasons = [(_where(at), one.reason, one.cure) for one, at in grouped(self.rejected)]
            yield table("rejected", ("where", "reason", "cure"), reasons)
        if self.tokens:
            changes = [(_where(at), one.kind, one.detail) for one, at in grouped(self.tokens)]
            yield table("tokens", ("where", "kind", "rewrite"), changes)
        if self.linears:
            groups = [(_where(at), one.kind, one.detail) for one, at in grouped(self.linears)]
            yield table("linears", ("where", "kind", "what"), groups)


_Located = TypeVar("_Located", Rewritten, Rejected, TokenRewrite, LinearMerge)


def grouped(entries: Iterable[_Located]) -> list[tuple[_Located, list[Location]]]:
    """Entries that differ in module and node alone, such as those of equal layers, once, with all their places."""
    groups: dict[str, tuple[_Located, list[Location]]] = {}
    for entry in entries:
        key = repr(replace(entry, where=Location(source=entry.where.source)))
        groups.setdefault(key, (entry, []))[1].append(entry.where)
    return list(groups.values())


def _where(places: Sequence[Location]) -> str:
    """First and last place of a group, and their source line."""
    first, last = (at.module or at.node for at in (places[0], places[-1]))
    span = first if len(places) == 1 else f"{first} ... {last} ({len(places)})"
    return "\n".join(part for part in (span, places[0].source) if part)


def _meaning(site: Rewritten) -> str:
    predicate = print_expr(site.spec.mask.predicate())
    seen = "every key is visible" if predicate == "True" else f"visible where {predicate}"
    return "\n".join((site.spec.words(), *filter(None, [site.asked]), seen))


def _kernel(site: Rewritten) -> str:
    others = [f"not {name}: {'; '.join(reasons)}" for name, reasons in site.passed_over.items()]
    nodes = [f"{counted(site.nodes_removed, 'node')} removed, {site.nodes_added} added"] if site.nodes_removed else []
    return "\n".join((site.kernel, *filter(None, [site.steps]), *others, *nodes))


def counted(number: int, noun: str) -> str:
    """ "1 node", "2 nodes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table in which nothing is cut, nor read as markup."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", show_lines=True)
    for name in columns:
        made.add_column(name, overflow="fold")  # a path that is too long goes on in the next line, and is not cut
    for row in rows:
        made.add_row(*map(Text, row))
    return made


class RefusedError(RuntimeError):
    """The model cannot be rewritten soundly. `report` holds everything that was found."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

"""What is different between two reports?

Sites are matched by the module they stand in: those of equal meaning first, the others in their order. What a site means, who
serves it and why not the others is compared; how the model spells it (lines, nodes, how many of them were removed) is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy

from compile_attn.kernels.mask import Mask
from compile_attn.kernels.text import print_expr
from compile_attn.passes.places import places
from compile_attn.passes.report import Printed, Rejected, Report, Rewritten, counted, table
from compile_attn.passes.stable import without_numbers

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Site: TypeAlias = Rewritten | Rejected
_Told: TypeAlias = tuple[Site, dict[str, str]]  # with all that is compared of it, in words


@dataclass(frozen=True)
class Change:
    """One thing that differs, in words; "" on the side where it is not there.

    Of a site `field` is a field of its spec ("mask", "scale", ...), "kernel", "steps", "asked", "not KERNEL" (the reasons
    against it), "reason", "cure", or "site" where it was read on one side and rejected on the other. Of a report it is "mode",
    "max_positions", or the kind and module of a token rewrite or of linears.
    """

    field: str
    before: str
    after: str


@dataclass(frozen=True)
class SiteChange:
    """A site that both reports have, and what differs."""

    module: str
    before: Site
    after: Site
    changes: tuple[Change, ...]


@dataclass(frozen=True)
class ReportDiff(Printed):
    """What `compare` found; true if anything differs. rich prints it as tables, `str` as text."""

    gained: tuple[Site, ...] = ()
    lost: tuple[Site, ...] = ()
    changed: tuple[SiteChange, ...] = ()
    others: tuple[Change, ...] = ()  # mode, max_positions, token rewrites, linears

    def __bool__(self) -> bool:
        return bool(self.gained or self.lost or self.changed or self.others)

    def summary(self) -> str:
        """One line."""
        if not self:
            return "no difference"
        numbers = f"{counted(len(self.gained), 'site')} gained, {len(self.lost)} lost, {len(self.changed)} changed"
        return numbers + (f", {counted(len(self.others), 'other difference')}" if self.others else "")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.summary()
        for title, sites in (("gained", self.gained), ("lost", self.lost)):
            if sites:
                entries = ((one.where.module, [_told(one)]) for one in sites)
                yield table(title, ("where", "what it computes", "kernel"), _alike(entries))
        if self.changed:
            changes = ((site.module, [_row(one) for one in site.changes]) for site in self.changed)
            yield table("changed", ("where", "what", "before", "after"), _alike(changes))
        if self.others:
            yield table("others", ("what", "before", "after"), [_row(one) for one in self.others])


def compare(before: Report, after: Report) -> ReportDiff:
    """Sites gained, lost and changed, and what else two reports of `explain`, of a `PagedLM` or of a refusal say differently.

    The graphs are not compared: `Report.before` and `Report.after` are their text.
    """
    old, new = _by_module(before), _by_module(after)
    gained: list[Site] = []
    lost: list[Site] = []
    changed: list[SiteChange] = []
    for module in dict.fromkeys([*old, *new]):
        left, right = _unequal(old.get(module, []), new.get(module, []))
        for one, other in zip(left, right, strict=False):
            changed.append(SiteChange(module, one[0], other[0], tuple(_changes(one[1], other[1]))))
        lost += [site for site, _ in left[len(right) :]]
        gained += [site for site, _ in right[len(left) :]]
    return ReportDiff(tuple(gained), tuple(lost), tuple(changed), tuple(_others(before, after)))


def _by_module(report: Report) -> dict[str, list[_Told]]:
    modules: dict[str, list[_Told]] = {}
    sites: tuple[Site, ...] = (*report.sites, *report.rejected)
    for site in sites:
        modules.setdefault(site.where.module, []).append((site, _meaning(site, report)))
    return modules


def _meaning(site: Site, report: Report) -> dict[str, str]:
    if isinstance(site, Rejected):
        reason = without_numbers(site.reason, report.before)
        return {"site": f"rejected: {reason}", "reason": reason, "cure": without_numbers(site.cure, report.before)}
    spec = {field.name: _words(getattr(site.spec, field.name)) for field in fields(site.spec)}
    against = {f"not {kernel}": "; ".join(reasons) for kernel, reasons in site.passed_over.items()}
    told = f"{site.spec.words()}, by {site.kernel}"
    return {"site": told, **spec, "kernel": site.kernel, "steps": site.steps, "asked": site.asked, **against}


def _words(value: Any) -> str:
    if isinstance(value, Mask):
        return value.words()
    if value is None:
        return ""
    return print_expr(value) if isinstance(value, sympy.Basic) else str(value)


def _unequal(old: Sequence[_Told], new: Sequence[_Told]) -> tuple[list[_Told], list[_Told]]:
    """The entries of one module without those that have an equal on the other side."""
    left: list[_Told] = []
    right = list(new)
    for entry in old:
        equal = next((other for other in right if other[1] == entry[1]), None)
        if equal is None:
            left.append(entry)
        else:
            right.remove(equal)
    return left, right


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    if ("kernel" in old) != ("kernel" in new):
        yield Change("site", old["site"], new["site"])
        return
    for name in dict.fromkeys([*old, *new]):
        if name != "site" and old.get(name, "") != new.get(name, ""):
            yield Change(name, old.get(name, ""), new.get(name, ""))


def _others(before: Report, after: Report) -> Iterator[Change]:
    for name in ("mode", "max_positions"):
        if getattr(before, name) != getattr(after, name):
            yield Change(name, str(getattr(before, name)), str(getattr(after, name)))
    old, new = _rewrites(before), _rewrites(after)
    yield from (Change(name, detail, "") for name, detail in (old - new).elements())
    yield from (Change(name, "", detail) for name, detail in (new - old).elements())


def _rewrites(report: Report) -> Counter[tuple[str, str]]:
    """Token rewrites and linears, as a title and what was done."""
    told: Counter[tuple[str, str]] = Counter()
    for what, entries in (("tokens", report.tokens), ("linears", report.linears)):
        for one in entries:
            where = f" in {one.where.module}" if one.where.module else ""
            told[f"{what}: {one.kind}{where}", without_numbers(one.detail, report.before)] += 1
    return told


def _row(change: Change) -> tuple[str, ...]:
    return change.field, change.before, change.after


def _told(site: Site) -> tuple[str, ...]:
    return (f"rejected: {site.reason}", "") if isinstance(site, Rejected) else (site.spec.words(), site.kernel)


def _alike(entries: Iterable[tuple[str, Sequence[tuple[str, ...]]]]) -> list[tuple[str, ...]]:
    """Rows under their module; modules of which the same is said share them."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for module, rows in entries:
        groups.setdefault(tuple(rows), []).append(module)
    return [(places(modules) if row is rows[0] else "", *row) for rows, modules in groups.items() for row in rows]

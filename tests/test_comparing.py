"""Does a comparison say what differs between two reports, field by field, and nothing else?"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.comparing import Change
from compile_attn.kernels.mask import Causal, Window
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.graph import Location
from compile_attn.passes.report import LinearMerge, Rejected, Report, Rewritten, TokenRewrite
from tests.tiny import tiny

IDS = torch.arange(9)[None]
SPEC = AttentionSpec(4, 2, 8, 8, Causal(), scale=0.5)
SITES = tuple(Rewritten(Location(f"matmul_{n}", f"layers.{n}.attn"), SPEC, "general", {"sdpa": ("too slow",)}) for n in range(3))
REPORT = Report("stateless", SITES)


def _with(*sites: Rewritten, **changes: object) -> Report:
    return replace(REPORT, sites=sites or SITES, **changes)  # type: ignore[arg-type]


def test_nothing_differs() -> None:
    """Nodes, lines, times and counts of nodes are spelling."""
    moved = [replace(site, where=replace(site.where, node="bmm", source="m.py:3: x"), nodes_removed=9) for site in SITES]
    found = ca.compare(REPORT, _with(*moved, seconds={"fuse": 1.0}, before="x", after="y"))
    assert not found and found == ca.ReportDiff() and str(found) == "no difference"
    assert not ca.compare(ca.explain(tiny(seed=0), IDS), ca.explain(tiny(seed=1), IDS))


def test_fields_of_a_site() -> None:
    spec = replace(SPEC, mask=Window(7), softcap=30.0, head_dim=16)
    other = replace(SITES[1], spec=spec, kernel="reference", passed_over={"sdpa": ("has no softcap",)})
    found = ca.compare(REPORT, _with(SITES[0], other, SITES[2]))
    [site] = found.changed
    assert (found.gained, found.lost, found.others) == ((), (), ()) and found
    assert (site.module, site.before, site.after) == ("layers.1.attn", SITES[1], other)
    assert site.changes == (
        Change("head_dim", "8", "16"),
        Change("mask", "causal", "causal, window of 8 keys"),
        Change("softcap", "", "30.0"),
        Change("kernel", "general", "reference"),
        Change("not sdpa", "too slow", "has no softcap"),
    )


def test_gained_and_lost() -> None:
    found = ca.compare(_with(*SITES[:2]), _with(*SITES[1:]))
    assert (found.lost, found.gained, found.changed) == (SITES[:1], SITES[2:], ())
    assert found.summary() == "1 site gained, 1 lost, 0 changed"


def test_several_sites_of_a_module() -> None:
    """Equal ones are matched first: what is inserted before them is gained, and nothing else changes."""
    cross = replace(SITES[0], spec=replace(SPEC, mask=Window(3)))
    found = ca.compare(_with(SITES[0], SITES[0]), _with(cross, SITES[0], SITES[0]))
    assert (found.gained, found.lost, found.changed) == ((cross,), (), ())
    found = ca.compare(_with(SITES[0], cross), _with(SITES[0]))
    assert (found.gained, found.lost, found.changed) == ((), (cross,), ())


def test_read_and_rejected() -> None:
    rejected = Rejected("probabilities are also used by [mean]", SITES[0].where, "return them no more")
    found = ca.compare(REPORT, _with(*SITES[1:], rejected=(rejected,)))
    told = f"rejected: {rejected.reason}"
    assert found.changed[0].changes == (Change("site", f"{SPEC.words()}, by general", told),)
    other = replace(rejected, reason="dropout")
    found = ca.compare(_with(rejected=(rejected,)), _with(rejected=(other,)))
    assert found.changed[0].changes == (Change("reason", rejected.reason, "dropout"),)


def test_names_of_nodes_in_reasons_do_not_differ() -> None:
    """mean and mean_1 are one op: an op of the same kind before it changes nothing."""

    class Leaking(nn.Module):
        def __init__(self, more: bool) -> None:
            super().__init__()
            self.more = more

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = x.mean(-1, keepdim=True) + x if self.more else x
            seen = (x @ x.mT).softmax(-1)
            return seen @ x, seen.mean(-1)

    reports = [ca.explain(Leaking(more), torch.randn(1, 5, 16)) for more in (False, True)]
    assert reports[0].rejected[0].reason != reports[1].rejected[0].reason
    assert not ca.compare(*reports)


def test_what_is_not_a_site() -> None:
    tokens, linears = TokenRewrite("rows", Location(), "the last 3 ops"), LinearMerge("merged", Location("", "layers.0"), "q, k, v")
    found = ca.compare(_with(tokens=(tokens,)), _with(mode="paged", max_positions=64, linears=(linears,)))
    assert found.others == (
        Change("mode", "stateless", "paged"),
        Change("max_positions", "None", "64"),
        Change("tokens: rows", "the last 3 ops", ""),
        Change("linears: merged in layers.0", "", "q, k, v"),
    )
    assert found and found.summary() == "0 sites gained, 0 lost, 0 changed, 4 other differences"


def test_the_tables() -> None:
    """Equal layers share their rows."""
    windows = [replace(site, spec=replace(SPEC, mask=Window(7), scale=0.25)) for site in SITES]
    found = ca.compare(REPORT, _with(*windows, replace(SITES[0], where=Location("", "layers.3.attn")), mode="paged"))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(found).splitlines() if "│" in line]
    assert lines == [
        ["layers.3.attn", SPEC.words(), "general"],
        ["layers.[0-2].attn", "mask", "causal", "causal, window of 8 keys"],
        ["", "scale", "0.5", "0.25"],
        ["mode", "stateless", "paged"],
    ]
    assert str(found).startswith("1 site gained, 0 lost, 3 changed, 1 other difference\ngained\n")

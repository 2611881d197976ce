"""Do the passes run in their order, and is a graph that they cannot serve left alone, with the reason?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from compile_attn.kernels.select import UnsupportedError
from compile_attn.passes.graph import Location, placeholders
from compile_attn.passes.pipeline import STEP_INPUTS, PagedGeometry, Rewriting, refusal, rewrite_paged, rewrite_stateless
from compile_attn.passes.report import RefusedError, Rejected, Report
from tests.tiny import POSITIONS, TinyDecoder, tiny

_ops = torch.ops.paged_attn
GEOMETRY = PagedGeometry(page_size=4)


def _rewritten(
    model: nn.Module | Callable[..., Any],
    rewrite: Callable[[fx.GraphModule, Sequence[Any]], Rewriting],
    *inputs: Tensor,
    dynamic: bool = True,
) -> tuple[fx.GraphModule, Rewriting]:
    """The captured graph and what became of it; an error of the pass comes as it is."""
    made: list[tuple[fx.GraphModule, Rewriting]] = []
    errors: list[Exception] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        try:
            made.append((gm, rewrite(gm, examples)))
        except Exception as error:
            errors.append(error)
        return gm.forward

    if dynamic:
        for given in inputs:
            torch._dynamo.mark_dynamic(given, given.dim() - 1)
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    if errors:
        raise errors[0]
    return made[0]


def _stateless(gm: fx.GraphModule, examples: Sequence[Any]) -> Rewriting:
    return rewrite_stateless(gm, examples, kernel="auto")


def _place(gm: fx.GraphModule, name: str) -> int | None:
    named = [place for place, node in enumerate(placeholders(gm.graph)) if f"_{name}_" in node.name]
    return named[0] if named else None


def _paged(gm: fx.GraphModule, examples: Sequence[Any], kernel: str = "auto") -> Rewriting:
    ids = _place(gm, "input_ids")
    assert ids is not None
    positions = _place(gm, "position_ids")
    return rewrite_paged(gm, examples, kernel=kernel, geometry=GEOMETRY, token_ids=ids, positions=positions)


def _ids(length: int = 7, rows: int = 1) -> Tensor:
    return torch.arange(rows * length).view(rows, length)


def _targets(rewriting: Rewriting) -> list[object]:
    return [node.target for node in rewriting.module.graph.nodes if node.op == "call_function"]


def test_stateless() -> None:
    captured, rewriting = _rewritten(tiny(), _stateless, _ids())
    report = rewriting.report
    assert rewriting.module is not captured and rewriting.layers == () and rewriting.inputs is None
    assert list(report.seconds) == ["normalize", "report", "recognise", "lower"]
    assert len(report.sites) == 2 and not report.rejected
    assert torch.ops.aten.softmax.int not in _targets(rewriting)
    assert "aten.softmax" in report.before and "aten.softmax" not in report.after
    names = [node.name for node in rewriting.module.graph.nodes]
    assert all(site.where.node in report.before for site in report.sites) and "softmax" not in names


def test_what_cannot_be_traced_stays_as_it_was() -> None:
    def mapped(x: Tensor) -> Tensor:
        mapped_rows: Tensor = torch.vmap(lambda row: (row @ row.mT).softmax(-1) @ row)(x)
        return mapped_rows

    captured, rewriting = _rewritten(mapped, _stateless, torch.randn(2, 3, 4), dynamic=False)
    assert rewriting.module is captured and rewriting.report.sites == ()
    [rejected] = rewriting.report.rejected
    assert rejected.reason.startswith("the captured graph cannot be traced to ATen: ") and "vmap" in rejected.reason


def test_paged() -> None:
    _, rewriting = _rewritten(tiny(), _paged, _ids())
    report, graph = rewriting.report, rewriting.module.graph
    assert list(report.seconds) == ["normalize", "report", "recognise", "lower", "tokens"]
    added = [node.name for node in placeholders(graph)][-8:]
    assert added == [*STEP_INPUTS, "k_pages_0", "v_pages_0", "k_pages_1", "v_pages_1"]
    assert rewriting.inputs is not None and len(rewriting.inputs.values) == len(placeholders(graph))
    assert len(rewriting.layers) == len(report.sites) == 2
    ops = [target for target in _targets(rewriting) if str(target).startswith("paged_attn")]
    assert ops == [_ops.build_metadata.default, *[_ops.write_kv.default, _ops.attend.default] * 2]
    assert {change.kind for change in report.tokens} == {"positions", "rows"}
    assert report.max_positions == POSITIONS
    assert torch.ops.aten.arange.default not in _targets(rewriting)


class Given(TinyDecoder):
    """Positions are given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tok(input_ids) + self.pos(position_ids)
        for attention in self.attention:
            x = x + attention(x)
        logits: Tensor = self.head(x)
        return logits


class Rolled(TinyDecoder):
    """Something but attention mixes tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids).roll(1, 1)


def test_paged_with_positions_that_are_given() -> None:
    _, rewriting = _rewritten(Given().requires_grad_(False), _paged, _ids(), _ids())
    assert len(rewriting.layers) == 2 and not rewriting.report.rejected


@pytest.mark.parametrize(
    ("model", "inputs", "dynamic", "why"),
    [
        (tiny, (_ids(rows=2),), True, r"input 'input_ids' has shape \(2, s\d+\); a paged model takes \[1, T\]"),
        (tiny, (_ids(),), False, r"input 'input_ids' has shape \(1, 7\); a paged model takes \[1, T\] with a dynamic T"),
        (
            Rolled,
            (_ids(),),
            True,
            r"roll.*\[node roll, .*test_pipeline.py:\d+: return super\(\).forward\(input_ids\).roll\(1, 1\)\]",
        ),
    ],
    ids=["two rows", "static", "mixing"],
)
def test_refusals(model: Callable[[], nn.Module], inputs: tuple[Tensor, ...], dynamic: bool, why: str) -> None:
    with pytest.raises(RefusedError, match=why) as refused:
        _rewritten(model().requires_grad_(False), _paged, *inputs, dynamic=dynamic)
    report = refused.value.report
    assert report.mode == "paged" and report.sites == () and report.after == "" and report.rejected
    assert report.before, "what was captured can still be looked at"


def test_a_kernel_that_cannot() -> None:
    with pytest.raises(UnsupportedError, match="kernel 'sdpa' was asked for, but it does not serve paged calls"):
        _rewritten(tiny(), lambda gm, examples: _paged(gm, examples, "sdpa"), _ids())


def test_a_refusal_says_each_reason_once() -> None:
    here, nowhere = Location("roll", "layers.0", "m.py:3: x.roll(1, 1)"), Location()
    reasons = [Rejected("a", here, "b"), Rejected("a", here, "b"), Rejected("c", nowhere)]
    error = refusal(Report("paged"), reasons)
    assert str(error) == (
        "paged_attn cannot page this model, and nothing was rewritten:\n  - a [node roll, layers.0, m.py:3: x.roll(1, 1)]; b\n  - c"
    )
    assert error.report.rejected == (reasons[0], reasons[2])

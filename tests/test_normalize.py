"""Does every captured graph come out in the one dialect that the passes read?"""

from __future__ import annotations

import torch
from torch import nn

from compile_attn.passes.graph import location, placeholders
from tests.capture import captured

_aten = torch.ops.aten


def targets(normalized: object) -> set[object]:
    return {n.target for n in normalized.module.graph.nodes if n.op == "call_function"}  # type: ignore[attr-defined]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[:, :2] = 0
        self.seen.copy_(x[:, :4])
        return y


def test_in_place_writes_become_functional_and_mutated_buffers_are_written_back() -> None:
    model, x = InPlace(), torch.randn(1, 6)
    normalized = captured(model, x)
    assert _aten.copy_.default in targets(normalized)
    writes = [n for n in normalized.module.graph.nodes if n.target is _aten.copy_.default]
    assert [normalized.sources[n.args[0]] for n in writes] == ["seen"]
    model.seen.zero_()
    (out,) = normalized.module(*[x if normalized.sources[p] == "x" else model.seen for p in placeholders(normalized.module.graph)])
    assert torch.equal(out, torch.cat([torch.zeros(1, 2), 2 * x[:, 2:]], 1))
    assert torch.equal(model.seen, x[:, :4])


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = 0.37

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return torch.einsum("btd,bsd->bts", self.project(x) * self.scale, x).softmax(-1)


def test_einsum_is_decomposed_and_composite_ops_stay_whole() -> None:
    x = torch.randn(1, 5, 8)
    ops = targets(captured(Scores(), x, dynamic=[(x, 1)]))
    assert _aten.einsum.default not in ops
    assert {_aten.bmm.default, _aten.linear.default, _aten.layer_norm.default, _aten.softmax.int} <= ops


def test_sources_and_constants_are_in_the_users_terms() -> None:
    x = torch.randn(1, 5, 8)
    normalized = captured(Scores(), x, dynamic=[(x, 1)])
    names = {normalized.sources[p] for p in placeholders(normalized.module.graph)}
    assert {"x", "project.weight", "project.bias", "norm.weight", "norm.bias"} <= names
    assert {normalized.sources[n] for n in normalized.constants} == {
        "project.weight",
        "project.bias",
        "norm.weight",
        "norm.bias",
    }


def test_dynamic_floats_are_constants_again() -> None:
    x = torch.randn(1, 5, 8)
    normalized = captured(Scores(), x, every_size=True)
    scales = [n.args[1] for n in normalized.module.graph.nodes if n.target is _aten.mul.Tensor]
    assert scales == [0.37]


def test_a_float_that_changes_is_compiled_anew() -> None:
    model, x = Scores(), torch.randn(1, 5, 8)
    torch._dynamo.reset()
    fast = torch.compile(model, backend="paged_attn", dynamic=True, options={"inner": "eager", "on_rejected": "keep"})
    with torch.no_grad():
        for scale in (0.37, 0.9):
            model.scale = scale
            torch.testing.assert_close(fast(x), model(x))


def test_location_names_module_and_line() -> None:
    x = torch.randn(1, 5, 8)
    normalized = captured(Scores(), x, dynamic=[(x, 1)])
    linear = next(n for n in normalized.module.graph.nodes if n.target is _aten.linear.default)
    where = location(linear)
    assert where.module == "project"
    assert "test_normalize.py" in where.source and "torch.einsum" in where.source

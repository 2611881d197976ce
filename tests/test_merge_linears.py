"""Do linears that read one tensor become one, with nobody the wiser: not the outputs, not the parameters, not the memory?"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compile_attn.passes.cleanup import relax_views
from compile_attn.passes.graph import placeholders
from compile_attn.passes.merge_linears import merge_linears
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.readable import readable
from compile_attn.passes.weights import JoinedWeights
from tests import capture

pytestmark = pytest.mark.usefixtures("no_grad")
WIDTH = 12
_aten = torch.ops.aten
Forward = Callable[[Any, Tensor], Any]


class Siblings(nn.Module):
    """Weights a, b, c of 12, 4 and 8 rows; what is computed with them is the test's own."""

    def __init__(self, forward: Forward, bias: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, rows, bias=bias) for rows in (12, 4, 8))
        self.table = nn.Embedding(8, WIDTH)
        self.plus, self.odd, self.square = (nn.Parameter(torch.randn(*shape)) for shape in ((4,), (3, WIDTH), (WIDTH, WIDTH)))
        self.register_buffer("fixed", torch.randn(4, WIDTH))
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def together(*parts: Tensor) -> Tensor:
    """A number of every part: what is returned itself is left alone."""
    return torch.cat([torch.sin(part.reshape(part.shape[0], -1)) for part in parts], -1)


def captured(model: nn.Module, x: Tensor) -> Normalized:
    normalized = capture.captured(model, x)
    relax_views(normalized.module.graph)
    return normalized


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape or (3, 5, WIDTH), generator=torch.Generator().manual_seed(0))


def run(normalized: Normalized, x: Tensor, joined: list[tuple[int, ...]]) -> Any:
    inputs = [normalized.constants.get(node, x) for node in placeholders(normalized.module.graph)]
    inputs = inputs[: len(inputs) - len(joined)]
    normalized.module.recompile()
    [out] = normalized.module(*inputs, *JoinedWeights(joined)(inputs))
    return out


def products(normalized: Normalized) -> list[Any]:
    targets = {_aten.linear.default, _aten.mm.default, _aten.matmul.default, _aten.addmm.default}
    return [node for node in normalized.module.graph.nodes if node.target in targets]


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,))


MERGED: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "linear": (lambda m, x: together(m.a(x), m.b(x), m.c(x)), ()),
    "linear of a vector": (lambda m, x: m.a(x[0, 0]).sum() + m.b(x[0, 0]).sum() + m.c(x[0, 0]).sum(), ()),
    "equal views": (lambda m, x: together(m.a(x.view(-1, WIDTH)), m.b(x.view(-1, WIDTH)), m.c(x.reshape(-1, WIDTH))), ()),
    "norms written three times": (lambda m, x: together(m.a(normed(x)), m.b(normed(x)), m.c(normed(x))), ()),
    "matmul": (lambda m, x: together(x @ m.a.weight.T, x @ m.b.weight.t(), torch.matmul(x, m.c.weight.mT)), ()),
    "mm": (lambda m, x: together(*(torch.mm(x, one.weight.transpose(0, 1)) for one in (m.a, m.b, m.c))), (5, WIDTH)),
    "mixed spellings": (
        lambda m, x: together(m.a(x), x.mm(m.b.weight.permute(1, 0)), x @ m.c.weight.transpose(-1, -2)),
        (5, WIDTH),
    ),
    "one weight twice": (lambda m, x: together(m.a(x), m.b(x), torch.cos(m.a(x)), m.c(x)), ()),
    "complex pairs": (
        lambda m, x: together(*(torch.view_as_complex(one(x).view(3, 5, -1, 2)).abs() for one in (m.a, m.b, m.c))),
        (),
    ),
    "two layers of one set of weights": (lambda m, x: together(*(one(y) for y in (x, x.cos()) for one in (m.a, m.b, m.c))), ()),
    "two layers of one set in other orders": (
        lambda m, x: together(m.a(x), m.b(x), m.c(x), m.c(x.cos()), m.a(x.cos()), m.b(x.cos())),
        (),
    ),
}


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("bias", [False, True])
def test_merged(name: str, bias: bool) -> None:
    forward, shape = MERGED[name]
    if bias and "m" in name.split()[0] and name != "norms written three times":
        forward = lambda m, x: together(*(torch.addmm(one.bias, x.view(-1, WIDTH), one.weight.T) for one in (m.a, m.b, m.c)))  # noqa: E731
    model, x = Siblings(forward, bias), x_of(*shape)
    want = model(x)
    normalized = captured(model, x)
    merged = merge_linears(normalized)
    layers = 2 if name.startswith("two") else 1
    assert [one.kind for one in merged.entries] == ["merged"] * layers
    assert len(products(normalized)) == layers and len(merged.joined) == 1 + bias
    assert merged.entries[0].detail == "a.weight, b.weight, c.weight: one product of 12 + 4 + 8 columns"
    torch.testing.assert_close(run(normalized, x, merged.joined), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), want, atol=0, rtol=0)


class Odd(Tensor):
    """A tensor of another type, as quantised and sharded weights are."""


def sparse_rows(model: Siblings) -> None:
    model.b.weight = nn.Parameter(torch.randn(WIDTH, 4).T)


def hooked(model: Siblings) -> None:
    model.b.weight.register_hook(lambda grad: grad)


def part_of_another(model: Siblings) -> None:
    model.b.weight = nn.Parameter(torch.randn(9, WIDTH)[2:6])


def shared_memory(model: Siblings) -> None:
    model.b.weight.share_memory_()


def also_held(model: Siblings) -> None:
    model.held = [model.b.weight.detach()]  # type: ignore[assignment]


def two_parameters_of_one_memory(model: Siblings) -> None:
    model.other = nn.Parameter(model.b.weight.data)


MOVED: dict[Callable[[Siblings], None], str] = {
    sparse_rows: "b.weight has strides (1, 4), so its rows are not contiguous",
    hooked: "b.weight has hooks, which may count on where it lies",
    part_of_another: "b.weight is a part of a larger tensor",
    shared_memory: "b.weight is shared with other processes",
    also_held: "b.weight shares its memory with another tensor, such as a state_dict that is still held",
    two_parameters_of_one_memory: "b.weight shares its memory with another tensor, such as a state_dict that is still held",
}


def ab(m: Any, x: Tensor) -> Tensor:
    return together(m.a(x), m.b(x))


APART: dict[str, tuple[Forward, str | None]] = {
    "different inputs": (lambda m, x: together(m.a(x), m.b(x.cos())), None),
    "different views": (lambda m, x: together(m.a(x[:, 1:]), m.b(x[:, :-1])), None),
    "an attention's products": (lambda m, x: together(x @ x.mT, x @ x.mT.cos()), None),
    "no parameter": (lambda m, x: together(m.a(x), x @ m.fixed.T), "fixed is no parameter"),
    "a weight that is computed": (lambda m, x: together(m.a(x), F.linear(x, m.b.weight * 2)), "mul is no parameter itself"),
    "a quantised weight": (
        lambda m, x: together(m.a(x), F.linear(x, m.fixed.to(torch.int8).to(x.dtype) * m.plus[:, None])),
        "mul is no parameter itself",
    ),
    "another dtype": (
        lambda m, x: together(m.a(x), F.linear(x.double(), m.b.weight.double())),
        None,
    ),
    "a transposed weight": (lambda m, x: together(m.b(x), x @ m.square), "square has a column for each output, not a row"),
    "a bias for some": (lambda m, x: together(m.a(x), F.linear(x, m.b.weight, m.plus)), "with a bias"),
    "a bias that is computed": (
        lambda m, x: together(F.linear(x, m.b.weight, m.plus.cos()), F.linear(x, m.a.weight, m.plus.repeat(3))),
        "has a bias that is no parameter with a number for each output",
    ),
    "one weight, two biases": (
        lambda m, x: together(*(F.linear(x, m.b.weight, bias) for bias in (m.plus, m.table.weight[0, :4])), m.a(x)),
        "b.weight has a bias that is no parameter",
    ),
    "an embedding too": (
        lambda m, x: together(F.linear(x, m.table.weight), m.b(x), m.table.weight[:3]),
        "is used by slice_1 as well",
    ),
    "returned": (lambda m, x: (m.a(x), m.b(x).view(-1)), "gives an output of the model, whose strides are the caller's"),
    "taken by its strides": (
        lambda m, x: together(m.a(x), m.b(x).as_strided((3, 10), (20, 1))),
        "gives what as_strided takes by its strides",
    ),
    "an odd width beside complex numbers": (
        lambda m, x: together(torch.view_as_complex(m.b(x).view(3, 5, 2, 2)).abs(), F.linear(x, m.odd)),
        "odd has 3 outputs, and others are viewed as complex numbers, which need even strides",
    ),
}


@pytest.mark.parametrize("name", APART)
def test_apart(name: str) -> None:
    """Near misses: the reason is said where two linears do read one tensor, and the graph stays as it was."""
    forward, why = APART[name]
    _stays(Siblings(forward), x_of(), why)


def _stays(model: Siblings, x: Tensor, why: str | None) -> None:
    want = model(x)
    normalized = captured(model, x)
    before = readable(normalized.module.graph, normalized.sources)
    merged = merge_linears(normalized)
    assert readable(normalized.module.graph, normalized.sources) == before and not merged.joined
    assert {one.kind for one in merged.entries} <= {"apart"}
    assert any(why in one.detail for one in merged.entries) if why is not None else not merged.entries, merged.entries
    torch.testing.assert_close(model(x), want, atol=0, rtol=0)


@pytest.mark.parametrize("change", MOVED, ids=lambda change: change.__name__)
def test_memory_that_must_not_move(change: Callable[[Siblings], None]) -> None:
    model = Siblings(ab)
    change(model)
    _stays(model, x_of(), MOVED[change])


def test_a_bias_that_must_not_move() -> None:
    model = Siblings(ab, bias=True)
    held = model.b.bias.detach()
    _stays(model, x_of(), "b.weight has a bias that shares its memory with another tensor")
    del held


def test_an_inference_weight_stays() -> None:
    with torch.inference_mode():
        weight = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)
    model = Siblings(ab)
    model.b.weight = weight
    _stays(model, x_of(), "b.weight was made in inference mode")


def test_another_type_of_tensor_stays() -> None:
    model = Siblings(ab)
    normalized = captured(model, x_of())
    [place] = [node for node in normalized.constants if normalized.sources[node] == "b.weight"]
    normalized.constants[place] = nn.Parameter(torch.randn(4, WIDTH).as_subclass(Odd))
    merged = merge_linears(normalized)
    assert [one.detail for one in merged.entries] == ["b.weight is a Odd, not a plain parameter"] and not merged.joined


def test_the_others_of_one_that_stays_are_merged() -> None:
    model, x = Siblings(lambda m, x: together(m.a(x), m.b(x), m.c(x))), x_of()
    hooked(model)
    want = model(x)
    normalized = captured(model, x)
    merged = merge_linears(normalized)
    assert [one.kind for one in merged.entries] == ["apart", "merged"] and len(products(normalized)) == 2
    torch.testing.assert_close(run(normalized, x, merged.joined), want, atol=1e-5, rtol=0)


def test_biases_make_two_groups() -> None:
    model = Siblings(lambda m, x: together(m.a(x), m.b(x), F.linear(x, m.c.weight), F.linear(x, m.more)), bias=True)
    model.more = nn.Parameter(torch.randn(2, WIDTH))
    x = x_of()
    want = model(x)
    normalized = captured(model, x)
    merged = merge_linears(normalized)
    assert [one.kind for one in merged.entries] == ["merged", "merged"] and len(products(normalized)) == 2
    torch.testing.assert_close(run(normalized, x, merged.joined), want, atol=1e-5, rtol=0)


def test_a_weight_of_two_groups_belongs_to_none() -> None:
    model = Siblings(lambda m, x: together(m.a(x), m.b(x), m.c(x), m.a(x.cos()), F.linear(x.cos(), m.more)))
    model.more = nn.Parameter(torch.randn(2, WIDTH))
    x = x_of()
    want = model(x)
    normalized = captured(model, x)
    merged = merge_linears(normalized)
    told = {one.detail.split(" is used")[0] for one in merged.entries if one.kind == "apart"}
    assert told == {"a.weight"} and len(merged.joined) == 1, merged.entries
    torch.testing.assert_close(run(normalized, x, merged.joined), want, atol=1e-5, rtol=0)


def joined_model(bias: bool = True) -> tuple[Siblings, Normalized, list[tuple[int, ...]]]:
    model = Siblings(lambda m, x: together(m.a(x), m.b(x), m.c(x)), bias)
    normalized = captured(model, x_of())
    joined = merge_linears(normalized).joined
    run(normalized, x_of(), joined)
    return model, normalized, joined


def test_the_model_keeps_its_parameters() -> None:
    model = Siblings(lambda m, x: together(m.a(x), m.b(x), m.c(x)), bias=True)
    before, kept = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    normalized = captured(model, x_of())
    run(normalized, x_of(), merge_linears(normalized).joined)
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in after.items():
        assert value.shape == before[name].shape and value.stride() == before[name].stride() and torch.equal(value, before[name])
    assert all(kept[name] is parameter and parameter._base is None for name, parameter in model.named_parameters())
    storages = {one.weight.untyped_storage().data_ptr() for one in (model.a, model.b, model.c)}
    assert len(storages) == 1 and model.a.weight.untyped_storage().nbytes() == 24 * WIDTH * 4


def test_loading_reaches_the_joined_weights() -> None:
    model, normalized, joined = joined_model()
    other = Siblings(model._forward, bias=True)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(run(normalized, x_of(), joined), other(x_of()), atol=1e-5, rtol=0)


def test_saving_and_copying() -> None:
    model, _, _ = joined_model()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    alone = io.BytesIO()
    torch.save(Siblings(model._forward, bias=True).state_dict(), alone)
    assert file.tell() < alone.tell() + 512  # the joined tensor is written once
    file.seek(0)
    loaded = torch.load(file)
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    other = copy.deepcopy(model)
    model.a.weight.fill_(0)
    assert all(torch.equal(loaded[name], value) for name, value in other.state_dict().items())


def test_gradients_still_reach_the_parameters() -> None:
    model, _, _ = joined_model()
    fresh = Siblings(model._forward, bias=True)
    fresh.load_state_dict(model.state_dict())
    with torch.enable_grad():
        for one in (model, fresh):
            one(x_of()).sum().backward()
    for mine, other in zip(model.parameters(), fresh.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=0, rtol=0)


def test_a_second_graph_takes_the_block_as_it_is() -> None:
    """Written in another order, too: the rows are taken as they lie."""
    model, _, _ = joined_model()
    model._forward = lambda m, x: together(m.c(x), m.a(x), m.b(x))
    addresses = [one.data_ptr() for one in model.parameters()]
    normalized = captured(model, x_of())
    merged = merge_linears(normalized)
    assert merged.entries[0].detail == "a.weight, b.weight, c.weight: one product of 12 + 4 + 8 columns"
    torch.testing.assert_close(run(normalized, x_of(), merged.joined), model(x_of()), atol=1e-5, rtol=0)
    assert [one.data_ptr() for one in model.parameters()] == addresses


def test_a_single_row_of_any_stride() -> None:
    """One row is contiguous whatever its stride says: such as a column of a flat buffer, transposed."""
    flat, model = torch.randn(4 * WIDTH + WIDTH), Siblings(lambda m, x: together(m.gate(x), m.up(x)))
    model.gate, model.up = nn.Linear(WIDTH, 1, bias=False), nn.Linear(WIDTH, 4, bias=False)
    model.gate.weight = nn.Parameter(flat[:WIDTH].view(WIDTH, 1).t())
    model.up.weight = nn.Parameter(flat[WIDTH:].view(4, WIDTH))
    assert model.gate.weight.is_contiguous() and model.gate.weight.stride() == (1, 1)
    want, normalized = model(x_of()), captured(model, x_of())
    merged = merge_linears(normalized)
    assert len(merged.joined) == 1 and len(products(normalized)) == 1
    torch.testing.assert_close(run(normalized, x_of(), merged.joined), want, atol=1e-5, rtol=0)


def test_replaced_data_is_joined_again() -> None:
    model, normalized, joined = joined_model()
    inputs = [normalized.constants.get(node, x_of()) for node in placeholders(normalized.module.graph)][: -len(joined)]
    weights = JoinedWeights(joined)
    [first, _] = weights(inputs)
    assert weights(inputs)[0] is first
    model.b.weight.data = torch.randn(4, WIDTH)
    model.c.bias.data = torch.randn(8)
    [out] = normalized.module(*inputs, *weights(inputs))
    torch.testing.assert_close(out, model(x_of()), atol=1e-5, rtol=0)
    assert weights(inputs)[0] is first and model.b.weight.untyped_storage().nbytes() == 24 * WIDTH * 4
    model.b.weight.data = torch.randn(9, WIDTH)[2:6]
    with pytest.raises(
        ValueError, match=r"merged with others was replaced, and the new one is a part of a larger tensor; copy into"
    ):
        weights(inputs)


def test_another_model_of_the_class_gets_weights_of_its_own() -> None:
    model, normalized, joined = joined_model()
    other = Siblings(model._forward, bias=True)
    weights = JoinedWeights(joined)
    for one in (model, other, model, other):
        parameters = dict(one.named_parameters())
        by_name = [parameters.get(normalized.sources[node], x_of()) for node in normalized.sources if node.name[:6] != "joined"]
        [out] = normalized.module(*by_name, *weights(by_name))
        torch.testing.assert_close(out, one(x_of()), atol=1e-5, rtol=0)
    assert model.a.weight.data_ptr() != other.a.weight.data_ptr()

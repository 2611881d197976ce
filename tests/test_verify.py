"""Is a graph that holds only for the sizes of the first call found out?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from compile_attn import PagedLM, Sampling
from compile_attn.passes.bounds import NotABound
from compile_attn.passes.graph import is_tensor, placeholders
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.verify import FreshInputs, assumed_bounds, excepted, verify
from tests.capture import captured
from tests.tiny import alone, prompts_of, tiny

_aten = torch.ops.aten


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, places: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        torch._check(ids.shape[1] == places.shape[1])  # type: ignore[no-untyped-call]
        return self.table(ids) + self.table(places), other.cos()


def _table() -> Normalized:
    ids, places, other = torch.arange(5)[None], torch.arange(5)[None], torch.ones(3, 2)
    dynamic = [(ids, 1), (places, 1), (other, 0)]
    return captured(Table(), ids, places, other, dynamic=dynamic)


def test_inputs_are_free_of_the_first_call() -> None:
    normalized = _table()
    inputs = FreshInputs(normalized.module.graph)
    named = dict(zip(normalized.sources.values(), inputs.values, strict=True))
    table, ids, places, other = (named[name] for name in ("table.weight", "ids", "places", "other"))
    assert (table.shape, ids.shape[0], other.shape[1]) == ((9, 4), 1, 2), "what is constant stays"
    tokens, same, free = (size.node.expr for size in (ids.shape[1], places.shape[1], other.shape[0]))
    assert tokens == same != free, "what was one symbol is one symbol"
    env = inputs.mode.shape_env
    assert env is not None and all(env.bound_sympy(symbol).lower == 2 for symbol in (tokens, free))


def test_a_sound_graph() -> None:
    module = _table().module
    inputs = FreshInputs(module.graph)
    verify(module, inputs)
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "call_function" and is_tensor(node)]
    assert len(values) == 4 and all(isinstance(value, FakeTensor) and value.fake_mode is inputs.mode for value in values)


def _const_size(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(_aten.view.default, (x, [5, 4]))


def _broadcast(graph: fx.Graph, x: fx.Node) -> fx.Node:
    return graph.call_function(_aten.add.Tensor, (x, graph.call_function(_aten.ones.default, ([5, 4],))))


@pytest.mark.parametrize("wrong", [_const_size, _broadcast])
def test_a_graph_for_five_tokens_only(wrong: Callable[[fx.Graph, fx.Node], fx.Node]) -> None:
    """Five is what the first call had."""
    module = captured(nn.Sigmoid(), x := torch.ones(5, 4), dynamic=[(x, 0)]).module
    graph = module.graph
    place = next(node for node in placeholders(graph) if isinstance(node.meta["val"], Tensor))
    [last] = [node for node in graph.nodes if node.op == "call_function"]
    with graph.inserting_before(last):
        last.args = (wrong(graph, place),)
    module.recompile()
    assert module(5, x)[0].shape == (5, 4), "it does run for five"
    with pytest.raises(Exception, match=r"view|add"):
        verify(module, FreshInputs(graph))


def test_a_malformed_graph() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = 3
    late = graph.call_function(_aten.sin.default, (x,))
    graph.output(late)
    late.args = (graph.call_function(_aten.cos.default, (x,)),)
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        verify(fx.GraphModule({}, graph), FreshInputs(graph))


def test_nothing_is_assumed_by_a_sound_graph() -> None:
    module = _table().module
    inputs = FreshInputs(module.graph)
    verify(module, inputs)
    assert assumed_bounds(inputs) == {}


def test_what_a_compiler_assumes_is_a_bound_or_an_error() -> None:
    inputs = FreshInputs(_table().module.graph)
    tokens = next(value.shape[1] for value in inputs.values if isinstance(value, Tensor) and value.dtype == torch.int64)
    assert tokens * 1024 < 2**31
    assert assumed_bounds(inputs) == {tokens.node.expr: 2**21 - 1}
    assert tokens == 67  # the hint: as a compiler that takes it for the size
    with pytest.raises(NotABound, match="= 67"):
        assumed_bounds(inputs)


def test_single_sizes_are_excepted() -> None:
    """Whether two strides are equal, say: the code is that for the lengths for which they are not."""
    inputs = FreshInputs(_table().module.graph)
    places = [n for n, x in enumerate(inputs.values) if isinstance(x, Tensor) and x.dtype == torch.int64]
    tokens = inputs.values[places[0]].shape[1]
    assert excepted(inputs) == []
    assert tokens * 4 != 12 and tokens != 90
    assert excepted(inputs) == [(place, 1, size) for place in places for size in (3, 90)] and assumed_bounds(inputs) == {}


def test_a_step_of_such_a_size_is_run_by_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every other by what was compiled."""
    compiled_for: list[int] = []

    def assuming(module: fx.GraphModule, inputs: Any, inner: str) -> Any:
        [place] = [n for n, x in enumerate(inputs) if isinstance(x, Tensor) and x.dtype == torch.int64 and x.dim() == 2]
        assert inputs[place].shape[1] * 4 != 12

        def run(*args: Any) -> Any:
            compiled_for.append(args[place].shape[1])
            return module(*args)

        return run

    monkeypatch.setattr("compile_attn.backend._compile_inner", assuming)
    prompts = prompts_of([5, 2, 1])
    with PagedLM(tiny(1), 128, max_seqs=4) as lm:
        assert lm.generate(prompts, max_new_tokens=3) == [alone(tiny(1), prompt, Sampling(max_new_tokens=3)) for prompt in prompts]
        assert set(compiled_for) == {8}, "the prompts; decodes are of 3 tokens"
        lm.generate(prompts[:2], max_new_tokens=2)
        assert set(compiled_for) == {8, 7, 2}

"""Is each token proven to be by itself exactly when it is, and does the rewritten graph give each sequence its own result?

A batch packs chunks of several sequences, each at its own positions; the rows asked for must be what the untouched model
gives for that token of that sequence alone.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import fx, nn

import compile_attn.kernels.ops
from compile_attn.passes.graph import Location, output_node, placeholders
from compile_attn.passes.normalize import Normalized, normalize
from compile_attn.passes.report import Rejected
from compile_attn.passes.tokens import TokenProof, TokensRefused, prove_tokens
from tests.models import tokenwise_chosen  # noqa: F401  registers its models
from tests.models.tokenwise import GIVEN, LAST, MIXING, PROVEN, D, K, Model, N, V, attend

pytest.importorskip("transformers.integrations.moe")  # registers grouped_mm_fallback, which its models call

CHUNKS = ((0, 3), (4, 9), (7, 8), (0, 1))  # of four sequences: tokens [a, b)
TOLERANCE = 2e-5  # float32, sums of 16 products in another order; the greatest seen is 2e-6


class Captured:
    """A model's normalised graph with the step's two inputs added, and the means to run it."""

    def __init__(self, model: nn.Module, *, given: bool = False) -> None:
        self.model = model.eval()
        self.normalized, self.examples = _capture(model, given)
        graph = self.normalized.module.graph
        graph.eliminate_dead_code()
        inputs = placeholders(graph)
        names = {node: self.normalized.sources[node] for node in inputs}
        self.tokens = [node for name in ("input_ids", "position_ids") for node in inputs if names[node] == name]
        self.given = frozenset(self.tokens[1:])
        mode = self.tokens[0].meta["val"].fake_mode
        with mode:
            length = self.tokens[0].meta["val"].shape[1]
            self.positions = _placeholder(graph, "positions", torch.empty(length, dtype=torch.int64))
            self.rows = _placeholder(graph, "rows", torch.empty(_symbol(mode), dtype=torch.int64))

    def prove(self, rejected: list[Rejected] | None = None) -> TokenProof:
        proof = prove_tokens(
            self.normalized.module,
            tokens=self.tokens,
            positions=self.positions,
            rows=self.rows,
            constants=self.normalized.constants,
            position_inputs=self.given,
            rejected=rejected or [],
        )
        self.normalized.module.recompile()
        return proof

    def run(self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> Any:
        """The rewritten graph on packed tokens."""
        special = {self.positions: positions, self.rows: rows, **dict.fromkeys(self.given, positions[None])}
        special[self.tokens[0]] = ids[None]
        values = []
        for node, example in zip(placeholders(self.graph), [*self.examples, None, None], strict=True):
            value = special.get(node, example)
            values.append(ids.shape[0] if isinstance(value, (int, torch.SymInt)) else value)
        with torch.no_grad():
            return self.normalized.module(*values)

    @property
    def graph(self) -> fx.Graph:
        return self.normalized.module.graph


def _capture(model: nn.Module, given: bool) -> tuple[Normalized, list[Any]]:
    found: list[tuple[Normalized, list[Any]]] = []

    def backend(gm: fx.GraphModule, examples: list[Any]) -> Any:
        found.append((normalize(gm, examples), examples))
        return gm.forward

    ids, places = torch.randint(0, V, (1, 11)), torch.arange(11)[None].clone()
    arguments = {"input_ids": ids, **({"position_ids": places} if given else {})}
    for tensor in arguments.values():
        torch._dynamo.mark_dynamic(tensor, 1)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**arguments)
    return found[0]


def _symbol(mode: Any) -> Any:
    """A fresh symbolic size."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource("number_of_rows")
    symbol = mode.shape_env.create_symbol(19, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    return mode.shape_env.create_symintnode(symbol, hint=19, source=source)


def _placeholder(graph: fx.Graph, name: str, example: torch.Tensor) -> fx.Node:
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = example
    return node


def _sequences() -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(3)
    return [torch.randint(0, V, (end,), generator=make) for _, end in CHUNKS]


def _alone(model: nn.Module, ids: torch.Tensor, given: bool) -> torch.Tensor:
    """The untouched model on one whole sequence, [T, V] or [1, V]."""
    with torch.no_grad():
        out = model(ids[None], torch.arange(ids.shape[0])[None]) if given else model(ids[None])
    return out.reshape(-1, out.shape[-1])


def _check(captured: Captured, *, last: bool = False, chunks: tuple[tuple[int, int], ...] = CHUNKS) -> None:
    sequences = _sequences()
    packed = torch.cat([ids[a:b] for ids, (a, b) in zip(sequences, chunks, strict=True)])
    positions = torch.cat([torch.arange(a, b) for a, b in chunks])
    alone = [_alone(captured.model, ids, bool(captured.given)) for ids in sequences]
    if last:
        rows = torch.tensor([b - a for a, b in chunks]).cumsum(0) - 1
        expected = torch.cat(alone)
    else:
        every = torch.cat([one[a:b] for one, (a, b) in zip(alone, chunks, strict=True)])
        rows = torch.tensor([2, 0, 5, 8, 8, packed.shape[0] - 1])
        expected = every[rows]
    logits = captured.run(packed, positions, rows)[0]
    assert logits.shape[-2] == len(rows) and logits.numel() == expected.numel()
    assert torch.allclose(logits.reshape(expected.shape), expected, atol=TOLERANCE), name_of(captured)


def name_of(captured: Captured) -> str:
    return str(getattr(captured.model, "body", captured.model))


@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str) -> None:
    torch.manual_seed(0)
    captured = Captured(Model(PROVEN[name]))
    proof = captured.prove()
    assert "rows" in [rewrite.kind for rewrite in proof.rewrites]
    _check(captured)


@pytest.mark.parametrize("name", GIVEN)
def test_given_positions(name: str) -> None:
    captured = Captured(Model(GIVEN[name]), given=True)
    captured.prove()
    _check(captured)


@pytest.mark.parametrize("head", [True, False], ids=["head", "bare"])
@pytest.mark.parametrize("name", LAST)
def test_last_token(name: str, head: bool) -> None:
    torch.manual_seed(0)
    captured = Captured(Model(LAST[name], head=head))
    proof = captured.prove()
    assert "last_token" in [rewrite.kind for rewrite in proof.rewrites]
    if "attention" not in name:
        _check(captured, last=True)
    else:
        _ragged_attention(captured, [end for _, end in CHUNKS])
        _check(captured, last=True, chunks=tuple((0, end) for _, end in CHUNKS))


def _ragged_attention(captured: Captured, lengths: list[int]) -> None:
    """Stand-in for pages: attention within each of whole sequences."""

    def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        parts = zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True)
        return torch.cat([torch.ops.paged_attn.attention(*part, *rest) for part in parts], 2)

    for node in captured.graph.nodes:
        if node.target is torch.ops.paged_attn.attention.default:
            node.target = apart
    captured.normalized.module.recompile()


@pytest.mark.parametrize("name", MIXING)
def test_mixing_is_refused_and_nothing_changes(name: str) -> None:
    body, reason = MIXING[name]
    captured = Captured(Model(body))
    before = str(captured.graph)
    with pytest.raises(TokensRefused) as refused:
        captured.prove()
    found = refused.value.rejected
    assert any(re.search(reason, each.reason) for each in found), found
    assert all((each.where.source or "only where T" in each.reason) and each.cure for each in found), found
    assert str(captured.graph) == before


def test_a_recurrent_layer_is_refused_or_not_captured() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = m.gru(x)[0]
        return out

    try:
        captured = Captured(Model(body))
    except torch._dynamo.exc.TorchDynamoException:
        return
    with pytest.raises(TokensRefused):
        captured.prove()


def test_the_head_runs_on_the_wanted_rows_only() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        x = x + attend(m.norm(x))
        x = x + m.a(m.norm(x))
        return m.rms(x)

    captured = Captured(Model(body))
    proof = captured.prove()
    selects = [node for node in captured.graph.nodes if node.target is torch.ops.aten.index_select.default]
    sources = [node.args[0] for node in selects]
    assert len(selects) == 2  # the residual stream, and what attention gave
    assert {node.target for node in sources} <= {torch.ops.aten.embedding.default, torch.ops.paged_attn.attention.default}
    assert [rewrite.kind for rewrite in proof.rewrites] == ["rows"]
    _ragged_attention(captured, [end for _, end in CHUNKS])
    _check(captured, chunks=tuple((0, end) for _, end in CHUNKS))


def test_a_table_bounds_positions() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        return x + m.wpe(torch.arange(x.shape[1]) + 2) + m.cos[: x.shape[1]]

    proof = Captured(Model(body)).prove()
    assert proof.max_positions == N - 2
    assert {rewrite.kind for rewrite in proof.rewrites} == {"positions", "table", "rows"}


def test_a_guard_bounds_tokens() -> None:
    def body(m: Model, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] <= 48
        return m.a(x)

    proof = Captured(Model(body)).prove()
    assert proof.max_tokens == proof.max_positions == 48  # beyond it, the model itself may do something else
    unbound = Captured(Model(lambda m, x: m.a(x))).prove()
    assert unbound.max_tokens is unbound.max_positions is None


class Outputs(nn.Module):
    """Logits with other outputs beside them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed, self.head = kind, nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        logits = self.head(x)
        if self.kind == "hidden":
            return logits, x * 2
        if self.kind == "loss":
            return logits, logits.mean()
        return (input_ids + 1, x.sum((0, 1))) if self.kind == "pooled" else input_ids + 1


def test_other_outputs_keep_every_row() -> None:
    captured = Captured(Outputs("hidden"))
    captured.prove()
    ids = torch.arange(5)
    logits, hidden = captured.run(ids, torch.arange(5), torch.tensor([1, 4]))
    with torch.no_grad():
        expected, every = captured.model(ids[None])
    assert torch.allclose(logits, expected[:, [1, 4]], atol=TOLERANCE) and torch.equal(hidden, every)


@pytest.mark.parametrize(("kind", "reason"), [("loss", "reduces"), ("pooled", "reduces"), ("ids", "no logits")])
def test_outputs_that_are_no_logits(kind: str, reason: str) -> None:
    with pytest.raises(TokensRefused, match=reason):
        Captured(Outputs(kind)).prove()


def test_a_refusal_names_the_attention_that_was_left() -> None:
    body, _ = MIXING["attention_left_over"]
    captured = Captured(Model(body))
    softmax = next(node for node in captured.graph.nodes if "softmax" in str(node.target))
    site = Rejected("the scores have a spell on them", Location(softmax.name, "", "here.py:1"), "lift it")
    with pytest.raises(TokensRefused) as refused:
        captured.prove([site])
    (found,) = refused.value.rejected
    assert "the scores have a spell on them" in found.reason and found.cure == "lift it"


def test_what_attention_captures_is_given_for_the_model() -> None:
    class Captures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            q = x.view(1, -1, 2, 8).transpose(1, 2)
            spec = "AttentionSpec(num_q_heads=2, num_kv_heads=2, head_dim=8, head_dim_v=8)"
            out: torch.Tensor = torch.ops.paged_attn.attention(q, q, q, [input_ids.float()], _spec(spec), "reference")
            return self.head(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    with pytest.raises(TokensRefused, match="given per token"):
        Captured(Captures()).prove()


def _spec(_: str) -> str:
    from tests.models.tokenwise import SPEC

    return SPEC


def test_an_input_per_token_is_refused() -> None:
    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(input_ids) * position_ids[..., None])  # type: ignore[no-any-return]

    captured = Captured(Segments(), given=True)
    captured.tokens, captured.given = captured.tokens[:1], frozenset()
    with pytest.raises(TokensRefused, match="is given per token"):
        captured.prove()


def test_output_stays_last_in_the_graph() -> None:
    captured = Captured(Model(PROVEN["sorted_experts_added_back"]))
    captured.prove()
    assert output_node(captured.graph) is list(captured.graph.nodes)[-1]
    assert K == 2 and compile_attn.kernels.ops is not None

"""Is a fused op fed the right axes, and its result put back in the right ones?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from compile_attn.passes import lower
from compile_attn.passes.cleanup import cleanup, relax_views
from compile_attn.passes.graph import placeholders
from compile_attn.passes.recognise import recognise
from tests.capture import captured

_aten = torch.ops.aten
_ops = torch.ops.paged_attn
TOLERANCE = 1e-6
B, T, HQ, HKV, D, DV = 2, 7, 4, 2, 8, 6
Q, K, V = torch.randn(B, HQ, T, D), torch.randn(B, HKV, T, D), torch.randn(B, HKV, T, DV)


def _causal(scores: Tensor) -> Tensor:
    rows, columns = scores.shape[-2:]
    return scores.masked_fill(torch.ones(rows, columns, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    return _causal(q @ k.mT) @ v


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D], and the result [B, T, H * D]."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    k, v = (x.repeat_interleave(HQ // HKV, 2) for x in (k, v))
    return torch.einsum("bhts,bshd->bthd", _causal(torch.einsum("bthd,bshd->bhts", q, k)), v).flatten(2)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Five axes: KV heads, and the query heads of each."""
    q = q.view(B, HKV, HQ // HKV, T, D)
    return _causal(torch.einsum("bgrtd,bgsd->bgrts", q, k)) @ v[:, :, None]


def batch_and_heads_merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(HQ // HKV, 1) for x in (k, v))
    q, k, v = (x.reshape(B * HQ, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm(_causal(torch.bmm(q, k.mT)), v)


def all_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :HKV] @ k.mT).softmax(-1) @ v


def fewer_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _causal(q[:, :HKV, :3] @ k.mT) @ v


class Calls(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run(q, k, v)


FORMS = [heads_first, tokens_first, grouped, batch_and_heads_merged, all_keys, fewer_queries]


def _fused(run: Callable[..., Tensor], kernel: str) -> tuple[fx.GraphModule, fx.Node, list[Tensor]]:
    normalized = captured(Calls(run), Q, K, V)
    relax_views(normalized.module.graph)
    [site], rejected = recognise(normalized, paged=False, positions=frozenset())
    assert not rejected
    fused = lower.fuse(normalized.module.graph, site, kernel)
    cleanup(normalized.module.graph)
    normalized.module.recompile()
    given = {"q": Q, "k": K, "v": V}
    return normalized.module, fused, [given[normalized.sources[node]] for node in placeholders(normalized.module.graph)]


@pytest.mark.parametrize("kernel", ["sdpa", "reference"])
@pytest.mark.parametrize("run", FORMS, ids=lambda run: run.__name__)
def test_every_layout(run: Callable[..., Tensor], kernel: str) -> None:
    module, _, inputs = _fused(run, kernel)
    assert not any(node.target is _aten.softmax.int for node in module.graph.nodes)
    wanted = run(Q, K, V)
    (found,) = module(*inputs)
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def test_sdpa_where_its_own_arguments_say_it() -> None:
    """is_causal means the last rows; over fewer queries than keys these would be others than the model's."""
    plain = {run.__name__ for run in FORMS if _fused(run, "sdpa")[1].target is _aten.scaled_dot_product_attention.default}
    assert plain == {run.__name__ for run in FORMS} - {"fewer_queries"}
    fused = _fused(fewer_queries, "sdpa")[1]
    assert fused.target is _ops.attention.default and lower.spec_of(fused).num_q_heads == HKV


def test_fused_nodes_carry_their_spec_and_place() -> None:
    module, fused, _ = _fused(heads_first, "reference")
    spec = lower.spec_of(fused)
    assert (spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim_v) == (HQ, HKV, D, DV)
    assert "return _causal(q @ k.mT) @ v" in fused.meta["stack_trace"]
    assert lower.remaining_attention(module.graph) == [fused]


def test_pages() -> None:
    """Each fused node becomes one write and one read of pages of its own, fed by one build_metadata."""
    module, layers, step = _paged("reference")
    graph = module.graph
    assert [step.block_table.name, step.seq_lens.name, step.logits_rows.name] == ["block_table", "seq_lens", "logits_rows"]
    assert layers == (lower.LayerKV(HKV, D, DV, torch.float32, torch.device("cpu")),) * 2
    assert lower.remaining_attention(graph) == []
    pages = {node.name: tuple(node.meta["val"].shape) for node in graph.nodes if "_pages_" in node.name}
    assert pages == {f"{kind}_pages_{n}": (10, 4, HKV, d) for n in (0, 1) for kind, d in (("k", D), ("v", DV))}
    ops = [node.target for node in graph.nodes if str(node.target).startswith("paged_attn")]
    assert ops == [_ops.build_metadata.default, *[_ops.write_kv.default, _ops.attend.default] * 2]
    graph.lint()


def test_a_kernel_that_plans_does_so_once_for_equal_sites() -> None:
    module, _, step = _paged("flash_attn")
    [plan] = [node for node in module.graph.nodes if node.target is _ops.plan.default]
    attends = [node for node in module.graph.nodes if node.target is _ops.attend.default]
    assert [node.args[-1] for node in attends] == [plan, plan]
    assert plan.args[:5] == (step.block_table, step.seq_lens, step.cu_seqlens_q, step.positions, step.token_seq)
    assert plan.args[5:7] == (4, "float32")
    assert plan.meta["val"].dtype == torch.int32
    module.graph.lint()
    module, _, _ = _paged("flash_attn", second=windowed)
    plans = [node for node in module.graph.nodes if node.target is _ops.plan.default]
    assert [node.args[-1] for node in module.graph.nodes if node.target is _ops.attend.default] == plans
    assert ["Causal" in str(node.args[7]) for node in plans] == [True, False]


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    score = q @ k.repeat_interleave(HQ // HKV, 1).mT
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    return score.masked_fill((j > i) | (i - j > 2), -torch.inf).softmax(-1) @ v.repeat_interleave(HQ // HKV, 1)


def _paged(kernel: str, second: Any = None) -> tuple[Any, Any, Any]:
    """A model of two layers, paged."""
    ids = torch.arange(T)[None]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, (HQ + HKV) * D + HKV * DV)
            self.table = nn.Embedding(T, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.qkv(self.table(ids))
            q, k, v = x.split([HQ * D, HKV * D, HKV * DV], -1)
            q, k, v = (y.unflatten(-1, (-1, d)).transpose(1, 2) for y, d in ((q, D), (k, D), (v, DV)))
            return heads_first(q, k, v) + (second or heads_first)(q.sin(), k, v)

    normalized = captured(Two().requires_grad_(False), ids, dynamic=[(ids, 1)])
    module, graph = normalized.module, normalized.module.graph
    sites, _ = recognise(normalized, paged=True, positions=frozenset())
    for site in sites:
        lower.fuse(graph, site, kernel)
    cleanup(graph)
    [tokens] = [node for node, name in normalized.sources.items() if name == "ids"]
    with tokens.meta["val"].fake_mode:
        table, rows = torch.empty(3, 5, dtype=torch.int32), torch.empty(3, dtype=torch.int32)
        examples = [table, rows, rows, torch.empty(2, dtype=torch.int64)]
    step = lower.add_step_inputs(module, tokens, examples, page_size=4)
    layers = lower.page(module, step, num_pages=10, page_size=4)
    return module, layers, step

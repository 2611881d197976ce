"""How does a recognised site become an op, and the op a paged one?

Stateless: a site becomes one `paged_attn::attention` node (or plain SDPA, where that says the same). Paged: those nodes then
become `write_kv` and `attend` over pages, fed by one `build_metadata` node.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.kernels.mask import Bidirectional, Causal
from compile_attn.kernels.select import Choice, backend, choose
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes import emit
from compile_attn.passes.graph import add_placeholder, is_tensor, placeholders, same_size, val
from compile_attn.passes.recognise import AttentionSite, Operand

_aten = torch.ops.aten
_ops = torch.ops.paged_attn
_CANONICAL = "bhtd"
STEP_INPUTS = ("block_table", "seq_lens", "query_lens", "logits_rows")  # what a cache hands over at each step, in order


@dataclass(frozen=True)
class LayerKV:
    """What one attention site keeps per token: pages K [P, PS, Hkv, D] and V [P, PS, Hkv, Dv]. dtype: that of the model's keys."""

    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class StepNodes:
    """The nodes that describe the batch of one step, in a graph that is being paged."""

    block_table: fx.Node
    seq_lens: fx.Node
    logits_rows: fx.Node
    cu_seqlens_q: fx.Node
    positions: fx.Node
    slot_mapping: fx.Node
    token_seq: fx.Node


def choose_kernel(
    site: AttentionSite, kernel: str, page_size: int | None, kv_dtype: torch.dtype | None = None, needs_grad: bool = False
) -> Choice:
    """The kernel for one site; `page_size` is None for a stateless call, `kv_dtype` for pages of the model's own dtype."""
    query = val(site.q[0].node)
    return choose(site.spec, query.device, query.dtype, page_size, kernel, kv_dtype, needs_grad)


def fuse(graph: fx.Graph, site: AttentionSite, kernel: str) -> fx.Node:
    """Replace the site by one fused node; what it replaced is left dead in the graph. Returns the fused node."""
    like = site.output.node
    with graph.inserting_before(like):
        q, k, v = (_joined(graph, operands, like) for operands in (site.q, site.k, (site.v,)))
        k, v = (_with_heads(graph, node, site.spec.num_kv_heads, like) for node in (k, v))
        if kernel == "sdpa" and _plain_sdpa(site, q, k):
            causal, grouped = isinstance(site.spec.mask, Causal), site.spec.num_q_heads != site.spec.num_kv_heads
            options = {"scale": site.spec.scale, "enable_gqa": grouped}
            sdpa = _aten.scaled_dot_product_attention.default
            fused = emit.call(graph, sdpa, q, k, v, None, 0.0, causal, like=like, **options)
        else:
            captured = list(site.captured)
            fused = emit.call(graph, _ops.attention.default, q, k, v, captured, site.spec.encode(), kernel, like=like)
        result = _as_output(graph, fused, site.output, like)
    like.replace_all_uses_with(result)
    return fused


def _plain_sdpa(site: AttentionSite, q: fx.Node, k: fx.Node) -> bool:
    """Whether aten SDPA's own arguments express the spec: causal over equal lengths, or no mask, no bias, and a positive scale."""
    spec = site.spec
    if spec.scale <= 0 or spec.bias is not None or spec.score is not None or spec.sinks is not None or spec.softcap is not None:
        return False
    square = same_size(val(q).shape[2], val(k).shape[2])
    return isinstance(spec.mask, Bidirectional) or (isinstance(spec.mask, Causal) and square)


def _joined(graph: fx.Graph, operands: Sequence[Operand], like: fx.Node) -> fx.Node:
    """The operands as [B, H, T, D], side by side in D, the heads repeated where one part has fewer."""
    parts = [_canonical(graph, operand, like) for operand in operands]
    heads = max(int(val(part).shape[1]) for part in parts)
    parts = [_with_heads(graph, part, heads, like) for part in parts]
    return parts[0] if len(parts) == 1 else emit.call(graph, _aten.cat.default, parts, -1, like=like)


def _canonical(graph: fx.Graph, operand: Operand, like: fx.Node) -> fx.Node:
    """The operand as [B, H, T, D], by reshape and permute."""
    axes, lengths = _elementary(graph, operand)
    node = emit.reshape(graph, operand.node, lengths, like)
    order = [dim for letter in "1" + _CANONICAL for dim, axis in enumerate(axes) if axis == letter]
    node = emit.permute(graph, node, order, like)
    groups = [[lengths[dim] for dim in order if axes[dim] == letter] for letter in _CANONICAL]
    return emit.reshape(graph, node, [emit.product(graph, group) for group in groups], like)


def _elementary(graph: fx.Graph, operand: Operand) -> tuple[str, list[int | fx.Node]]:
    """The letters and sizes of the dims of an operand, a dim of two letters being two."""
    lengths: list[int | fx.Node] = []
    for dim, (axis, heads) in enumerate(zip(operand.axes, operand.heads, strict=True)):
        length = emit.size(graph, operand.node, dim)
        if len(axis) == 1:
            lengths.append(length)
            continue
        other = length // heads if isinstance(length, int) else emit.call(graph, operator.floordiv, length, heads)
        lengths += [heads, other] if axis[0] == "h" else [other, heads]
    return "".join(operand.axes), lengths


def _with_heads(graph: fx.Graph, node: fx.Node, heads: int, like: fx.Node) -> fx.Node:
    """[B, h, T, D] with each head repeated to make `heads`: where only one of K and V is shared by more query heads."""
    times = heads // int(val(node).shape[1])
    return node if times == 1 else emit.call(graph, _aten.repeat_interleave.self_int, node, times, 1, like=like)


def _as_output(graph: fx.Graph, fused: fx.Node, output: Operand, like: fx.Node) -> fx.Node:
    """The fused [B, H, T, Dv] in the shape of the node that it replaces. Strides may differ: cleanup makes views reshapes."""
    axes = [(letter, heads) for axis, heads in zip(output.axes, output.heads, strict=True) for letter in axis]
    places = {"b": 0, "t": 2, "d": 3}
    lengths = [emit.size(graph, fused, places[letter]) if letter in places else heads for letter, heads in axes]
    order = [dim for wanted in "1" + _CANONICAL for dim, (letter, _) in enumerate(axes) if letter == wanted]
    node = emit.reshape(graph, fused, [lengths[dim] for dim in order], like)
    node = emit.permute(graph, node, [order.index(dim) for dim in range(len(axes))], like)
    rest = iter(lengths)
    return emit.reshape(graph, node, [emit.product(graph, [next(rest) for _ in axis]) for axis in output.axes], like)


def add_step_inputs(module: fx.GraphModule, tokens: fx.Node, examples: Sequence[torch.Tensor], page_size: int) -> StepNodes:
    """Add the placeholders of `STEP_INPUTS` and the one metadata node, ahead of all computation.

    `examples` are fake tensors for the placeholders: block_table [B, max_pages] int32, seq_lens [B] int32, query_lens [B]
    int32, logits_rows [R] int64. `tokens` is the placeholder [1, T] of token ids.
    """
    graph = module.graph
    nodes = [add_placeholder(graph, name, example) for name, example in zip(STEP_INPUTS, examples, strict=True)]
    block_table, seq_lens, query_lens, logits_rows = nodes
    with graph.inserting_after(placeholders(graph)[-1]):
        length = emit.size(graph, tokens, 1)
    with graph.inserting_after(length if isinstance(length, fx.Node) else placeholders(graph)[-1]):
        metadata = emit.call(graph, _ops.build_metadata.default, block_table, seq_lens, query_lens, length, page_size)
    parts = []
    after = metadata
    for place in range(4):
        with graph.inserting_after(after):
            after = emit.call(graph, operator.getitem, metadata, place)
        parts.append(after)
    cu_seqlens_q, positions, slot_mapping, token_seq = parts
    return StepNodes(block_table, seq_lens, logits_rows, cu_seqlens_q, positions, slot_mapping, token_seq)


def page(
    module: fx.GraphModule, step: StepNodes, num_pages: int | torch.SymInt, page_size: int, kv_dtype: torch.dtype | None = None
) -> tuple[LayerKV, ...]:
    """Turn every fused node into write_kv and attend over pages of its own, placeholders `k_pages_n` and `v_pages_n`.

    With a kv_dtype pages are of that dtype, by a scale each: `k_scale_n` and `v_scale_n` follow, float32 [].
    Returns what each site keeps, in the order of the new placeholders (K and V of site 0, of site 1, ...).
    """
    graph = module.graph
    layers: list[LayerKV] = []
    plans: dict[tuple[str, str, str], fx.Node] = {}
    for fused in [n for n in graph.nodes if n.target is _ops.attention.default]:
        q, k, v, captured, spec, kernel = fused.args
        key, value = val(k), val(v)
        layer = LayerKV(int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), key.dtype, key.device)
        number = len(layers)
        pools = []
        for name, like in (("k", key), ("v", value)):
            pool = like.new_empty((num_pages, page_size, layer.num_kv_heads, like.shape[3]), dtype=kv_dtype)
            pools.append(add_placeholder(graph, f"{name}_pages_{number}", pool))
        scales = []
        if kv_dtype is not None:
            one = key.new_empty((), dtype=torch.float32)
            scales = [add_placeholder(graph, f"{name}_scale_{number}", one) for name in ("k", "v")]
        with graph.inserting_before(fused):
            q, k, v = (_token_major(graph, node, fused) for node in (q, k, v))
            emit.call(graph, _ops.write_kv.default, k, v, *pools, step.slot_mapping, *scales, like=fused)
            where = (step.block_table, step.seq_lens, step.cu_seqlens_q, step.positions, step.token_seq)
            planned = _plan(graph, where, page_size, fused, plans)
            more = scales if planned is None else [*(scales or (None, None)), planned]
            out = emit.call(graph, _ops.attend.default, q, *pools, *where, captured, spec, kernel, *more, like=fused)
            # In this order the result is [1, T, H, D] laid out as if new, so that a model's own contiguous() after it is no copy.
            out = emit.call(graph, _aten.unsqueeze.default, out, 0, like=fused)
            out = emit.call(graph, _aten.transpose.int, out, 1, 2, like=fused)
        fused.replace_all_uses_with(out)
        graph.erase_node(fused)
        layers.append(layer)
    return tuple(layers)


def _plan(
    graph: fx.Graph,
    where: tuple[fx.Node, ...],
    page_size: int,
    fused: fx.Node,
    plans: dict[tuple[str, str, str], fx.Node],
) -> fx.Node | None:
    """The plan that this site shares with others, made where the first of them stands; None if its kernel makes none."""
    kernel = str(fused.args[5])
    run = backend(kernel)
    shared = run.planned(spec_of(fused))
    if shared is None:
        return None
    key = (kernel, shared.encode(), str(val(fused.args[0]).dtype).removeprefix("torch."))  # type: ignore[arg-type]
    if key not in plans:
        more = (page_size, key[2], key[1], kernel, run.plan_numbers)
        plans[key] = emit.call(graph, _ops.plan.default, *where, *more, like=fused)
    return plans[key]


def _token_major(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    """[1, H, T, D] as [T, H, D]."""
    node = emit.call(graph, _aten.select.int, node, 0, 0, like=like)
    return emit.call(graph, _aten.transpose.int, node, 0, 1, like=like)


def spec_of(fused: fx.Node) -> AttentionSpec:
    """The spec that a fused node carries."""
    return AttentionSpec.decode(str(fused.args[4]))


def remaining_attention(graph: fx.Graph) -> list[fx.Node]:
    """Fused nodes of a graph, in order."""
    return [n for n in graph.nodes if n.target is _ops.attention.default and is_tensor(n)]

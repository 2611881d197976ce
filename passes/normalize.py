"""How does a graph that Dynamo captured become one dialect of ATen?

Functional, pre-dispatch ATen with symbolic shapes: `linear`, `layer_norm`, `softmax` and SDPA stay whole, in-place writes are
gone, and only what hides an attention in one op is taken apart (`decompositions`). Every later pass may rely on that.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from compile_attn.passes.decompositions import DECOMPOSITIONS
from compile_attn.passes.flex import spell_out_flex
from compile_attn.passes.graph import output_node, placeholders
from compile_attn.passes.traced import Traced

_aten = torch.ops.aten


@dataclass(frozen=True)
class Normalized:
    """A graph with the placeholders of the captured one, in its order, and the real values for them where they are constants."""

    module: fx.GraphModule
    constants: dict[fx.Node, torch.Tensor]  # parameters and buffers: placeholders or get_attr nodes whose values may be read
    sources: dict[fx.Node, str]  # placeholder -> name in the user's terms: "input_ids", "model.norm.weight"
    flex: int = 0  # how many flex_attention ops were spelled out: worth it only if they become fused ops again


def normalize(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Normalized:
    """Trace Dynamo's graph to functional pre-dispatch ATen.

    `example_inputs` are what Dynamo hands a backend: real parameters and buffers, integers for symbolic sizes.
    """
    gm, flex = spell_out_flex(gm)
    _refuse_transforms(gm)
    _drop_dropout(gm)
    _specialize_floats(gm)
    captured = placeholders(gm.graph)
    traced = Traced(gm)
    module: Any = traced.find()
    if module is None:
        module = _trace(gm)
        traced.keep(module)
    inputs = placeholders(module.graph)
    sources = {new: _source_name(old) for new, old in zip(inputs, captured, strict=True)}
    constants = {
        new: example
        for new, old, example in zip(inputs, captured, example_inputs, strict=True)
        if isinstance(example, torch.Tensor) and _is_state(old, example)
    }
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value = getattr(module, str(node.target), None)
            if isinstance(value, torch.Tensor):
                constants[node] = value
    module.recompile()
    return Normalized(module, constants, sources, flex)


def _trace(gm: fx.GraphModule) -> fx.GraphModule:
    # Private API, fenced here and tested on every supported torch: aot_export_module is what torch.export itself calls, and
    # the only entry that gives functional *pre-dispatch* ATen with Dynamo's symbols kept (make_fx keeps in-place ops).
    from torch._functorch.aot_autograd import aot_export_module

    fakes = [node.meta["example_value"] for node in placeholders(gm.graph)]
    module: Any
    module, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions=dict(DECOMPOSITIONS))
    _restore_mutations(module, signature, placeholders(module.graph))
    _drop_asserts(module.graph)
    for node in module.graph.find_nodes(op="get_attr"):
        value = getattr(module, str(node.target), None)
        real = getattr(value, "constant", None)  # a tensor literal traced as a FakeTensor keeps its value there
        if real is not None:
            setattr(module, str(node.target), real)
    return fx.GraphModule(module, _copied(module.graph))


def _copied(graph: fx.Graph) -> fx.Graph:
    """A graph gives no name twice, not even of a node that is gone. A copy knows its nodes alone, as one does that was kept."""
    copied = fx.Graph()
    result = copied.graph_copy(graph, {})
    copied.output(result).meta.update(output_node(graph).meta)
    return copied


def _refuse_transforms(gm: fx.GraphModule) -> None:
    """vmap; tracing into it fails and leaves functorch's own state behind."""
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("_vmap_increment_nesting", "flex_attention", "flex_attention_hop", "_add_batch_dim"):
            raise NotImplementedError(f"{name} (vmap or flex_attention) is not read")


def _drop_dropout(gm: fx.GraphModule) -> None:
    """Dropout that is off returns its input itself. The tracer would not let what it returns be written to (`x += y`)."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _DROPOUTS:
            continue
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        source, rate, training = (given.arguments[name] for name in ("input", "p", "training"))
        if isinstance(source, fx.Node) and (training is False or rate == 0):
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
    gm.recompile()


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def _specialize_floats(gm: fx.GraphModule) -> None:
    """Under dynamic=True Dynamo passes Python floats as 0-dim tensors and takes `.item()`: make them constants again.

    A scale that is a symbol cannot be read. `float()` of the backed symbol adds the guard that makes the constant sound.
    Floats that depend on a size stay symbols: as constants they would hold for one length only.
    """
    for node in list(gm.graph.nodes):
        value = node.meta.get("example_value")
        if node.op == "call_method" and node.target == "item" and isinstance(value, torch.SymFloat):
            node.replace_all_uses_with(float(value))
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:  # their products and quotients, which Dynamo has left as symbols of the graph too
        value = node.meta.get("example_value")
        if node.op == "call_function" and isinstance(value, torch.SymFloat) and not _has_sizes(value):
            node.replace_all_uses_with(float(value))
    gm.recompile()


def _has_sizes(number: torch.SymFloat) -> bool:
    return any(symbol.is_integer for symbol in number.node.expr.free_symbols)


def _restore_mutations(module: fx.GraphModule, signature: Any, inputs: list[fx.Node]) -> None:
    """Functionalization returned the new values of mutated inputs as extra outputs; write them back with copy_ instead."""
    mutated = {**signature.user_inputs_to_mutate, **signature.buffers_to_mutate, **signature.parameters_to_mutate}
    if not mutated:
        return
    by_name = {node.name: node for node in inputs}
    out = output_node(module.graph)
    results = list(out.args[0])  # type: ignore[arg-type]
    with module.graph.inserting_before(out):
        for result in results[: len(mutated)]:
            target = by_name[mutated[result.name]]
            module.graph.call_function(_aten.copy_.default, (target, result)).meta["val"] = target.meta["val"]
    out.args = (tuple(results[len(mutated) :]),)


def _drop_asserts(graph: fx.Graph) -> None:
    """Metadata assertions said what the shapes already say."""
    for node in list(graph.nodes):
        if node.target in (_aten._assert_tensor_metadata.default,) and not node.users:
            graph.erase_node(node)


def _source_name(node: fx.Node) -> str:
    """`L['self']._modules['norm']._parameters['weight']`, which is Dynamo's name, as `norm.weight`; inputs likewise."""
    grapharg = node.meta.get("grapharg")
    # `source.name` is a method up to torch 2.11 and a property after it.
    name = getattr(getattr(grapharg, "source", None), "name", node.name)
    name = name() if callable(name) else name
    for noise in ("L['self']", "L['kwargs']", "._modules", "._parameters", "._buffers", "L['args']"):
        name = name.replace(noise, "")
    name = name.replace("L['", "").replace("['", ".").replace("']", "")
    return str(name).strip(".")


def _is_state(node: fx.Node, example: torch.Tensor) -> bool:
    """Whether a placeholder is a parameter or buffer of a module, so that it is the same tensor at every call."""
    if isinstance(example, torch.nn.Parameter):
        return True
    grapharg = node.meta.get("grapharg")
    name = getattr(getattr(grapharg, "source", None), "name", "")
    name = name() if callable(name) else name
    return "_buffers[" in name or "_parameters[" in name or "_modules[" in name or name.startswith("L['self']")

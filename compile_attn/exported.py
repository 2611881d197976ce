"""How is an exported program served, as a model is?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.manifest import Manifest, stored_as
from compile_attn.one_graph import OneGraph
from compile_attn.options import Inner, Options
from compile_attn.passes.graph import placeholders
from compile_attn.passes.pipeline import Rewriting
from compile_attn.passes.report import Report

if TYPE_CHECKING:
    from compile_attn.cache import PagedKVCache
    from compile_attn.calling import Call

Run = Callable[[torch.Tensor, torch.Tensor], Any]


class Served(nn.Module):
    """An exported program in the place of a model: its tensors, by the program's names, and what it knows of itself."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.manifest = Manifest.attached(program)
        self.config = SimpleNamespace(vocab_size=self.manifest.vocabulary)
        self.graph = _with_writes(program)
        self.own: list[torch.Tensor] = []  # what the graph takes first
        for spec in program.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                continue
            kept = program.state_dict if spec.target in program.state_dict else program.constants
            tensor, name = kept[str(spec.target)], str(spec.target).replace(".", "__")
            self.own.append(tensor)
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.eval()

    def run_on(self, cache: PagedKVCache, inner: Inner) -> Run:
        """Called with packed token ids and positions, [1, T] both, it runs the cache's batch; logits [1, R, vocabulary]."""
        from compile_attn.backend import compile_paged

        told = self.manifest
        layers = tuple(told.layer(number, cache.device) for number in range(len(told.layers)))
        specs = [(site["kernel"], AttentionSpec.decode(site["encoded"])) for site in told.sites]
        report = Report("paged", max_positions=told.max_positions)
        rewriting = replace(Rewriting.of_graph(self.graph, report, layers), max_tokens=told.max_tokens)
        compiled = compile_paged(rewriting, inner)
        given = len(self.own) + 2  # the tensors, token ids and positions; then the step's inputs, as a rewritten model has them
        most = rewriting.most_tokens(given, cache.max_seqs, cache.max_pages_per_seq, 1 + cache.num_pages)
        cache.bind(layers, self, told.max_positions, most, specs)
        cache.report = report
        pools = cache.pools

        def step(input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
            cache.check_inputs(input_ids, position_ids)
            cache.proof.check((compiled,), self.own)
            batch = input_ids, position_ids, *cache.step_inputs()
            with torch.no_grad():
                return compiled(*self.own, *batch, *pools.k, *pools.v, *pools.k_scales, *pools.v_scales)

        return step


def opened(model: object) -> nn.Module:
    """A program as a module; a module as it is, without what torch.compile has wrapped it in. ValueError for anything else."""
    if isinstance(model, torch.export.ExportedProgram):
        return Served(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; PagedLM takes a torch.nn.Module, or what export() made of one")
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def run_of(model: nn.Module, options: Options, call: Call | None) -> Run:
    """What runs the batches of the options' cache. ValueError for what an exported program was not made with."""
    assert options.cache is not None
    if not isinstance(model, Served):
        return OneGraph(model, options, call)
    _check(model.manifest, options, options.cache, call)
    return model.run_on(options.cache, options.inner)


def _check(told: Manifest, options: Options, cache: PagedKVCache, call: Call | None) -> None:
    given = {"kernel": options.kernel != "auto", "block_sparse": options.block_sparse is not None, "call": call is not None}
    for name, wrong in given.items():
        if wrong:
            raise ValueError(f"{name}: it was chosen when the program was exported; leave it out, or export the model again")
    if cache.page_size != told.page_size:
        raise ValueError(f"page_size={cache.page_size}; the program was exported for pages of {told.page_size}")
    stored = stored_as(cache)
    if stored != told.kv_dtype:
        raise ValueError(f"kv_dtype: pages would be {stored}; the program was exported for {told.kv_dtype}")
    if cache.device.type != told.device:
        raise ValueError(f"the cache is on {cache.device}; the program was exported for {told.device}")


def _with_writes(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program's functional graph, in which what is new of an input is written to it, and no longer returned."""
    graph = fx.Graph()
    result = graph.graph_copy(program.graph, {})
    outputs: Sequence[Any] = result if isinstance(result, (tuple, list)) else (result,)
    inputs = {node.name: node for node in placeholders(graph)}
    left = []
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        if spec.kind == OutputKind.USER_INPUT_MUTATION:
            target = inputs[str(spec.target)]
            graph.call_function(torch.ops.aten.copy_.default, (target, node)).meta["val"] = target.meta["val"]
        else:
            left.append(node)
    graph.output(tuple(left))
    return fx.GraphModule(program.graph_module, graph)

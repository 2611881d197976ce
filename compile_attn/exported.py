"""How is an exported program served, as a model is?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from compile_attn.calling import Call, unwrapped
from compile_attn.manifest import Manifest, stored_as
from compile_attn.one_graph import OneGraph
from compile_attn.options import Inner, Options
from compile_attn.passes.graph import placeholders
from compile_attn.passes.pipeline import Rewriting
from compile_attn.passes.report import Report

if TYPE_CHECKING:
    from compile_attn.cache import PagedKVCache
    from compile_attn.passes.pipeline import LayerKV

Run = Callable[[torch.Tensor, torch.Tensor], Any]
# Made for the pages of a model's sites and an inner compiler: what is called with a program's tensors and then with what a step and
# a cache have, and how large these may be.
Code = Callable[[tuple["LayerKV", ...], Inner], tuple[Callable[..., Any], Mapping[str, int]]]


class Served(nn.Module):
    """A program in the place of a model: its tensors, by the program's names, and what it knows of itself."""

    def __init__(self, manifest: Manifest, tensors: Mapping[str, torch.Tensor], code: Code) -> None:
        super().__init__()
        self.manifest, self._code = manifest, code
        self.config = SimpleNamespace(vocab_size=manifest.vocabulary)
        self.own = list(tensors.values())  # what the code takes first
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.eval()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Served:
        """What `to`, `half` and `cuda` call. The code was made for the tensors as they are."""
        raise ValueError("a program's tensors keep their dtype and device; export the model again with others")

    @classmethod
    def of(cls, program: torch.export.ExportedProgram) -> Served:
        """ValueError where the program is not one of `export`."""
        manifest, tensors = Manifest.attached(program), tensors_of(program)

        def compiled(layers: tuple[LayerKV, ...], inner: Inner) -> tuple[Callable[..., Any], Mapping[str, int]]:
            from compile_attn.backend import compile_paged

            rewriting = rewriting_of(program, layers)
            return compile_paged(rewriting, inner), rewriting.assumed(steps_begin(len(tensors)))

        return cls(manifest, tensors, compiled)

    def run_on(self, cache: PagedKVCache, inner: Inner) -> Run:
        """Called with packed token ids and positions, [1, T] both, it runs the cache's batch; logits [1, R, vocabulary]."""
        told = self.manifest
        layers = told.layers_on(cache.device)
        compiled, assumed = self._code(layers, inner)
        cache.bind(layers, self, told.max_positions, told.max_tokens, told.computed(), assumed)
        cache.report = told.report()
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
        return Served.of(model)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; PagedLM takes a torch.nn.Module, or what export() made of one")
    inner: nn.Module = unwrapped(model)
    return inner


def run_of(model: nn.Module, options: Options, call: Call | None) -> Run:
    """What runs the batches of the options' cache. ValueError for what an exported program was not made with."""
    assert options.cache is not None
    if not isinstance(model, Served):
        return OneGraph(model, options, call)
    _check(model.manifest, options, options.cache, call)
    return model.run_on(options.cache, options.inner)


def _check(told: Manifest, options: Options, cache: PagedKVCache, call: Call | None) -> None:
    native = told.native is not None and options.inner != "inductor"
    given = {
        "kernel": options.kernel != "auto",
        "block_sparse": options.block_sparse is not None,
        "call": call is not None,
        "inner": native,
    }
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


def tensors_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors that a program's graph takes before its inputs, by names that a module may have."""
    own = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            kept = program.state_dict if spec.target in program.state_dict else program.constants
            own[str(spec.target).replace(".", "__")] = kept[str(spec.target)]
    return own


def steps_begin(own: int) -> int:
    """Where the inputs of a step stand, as a rewritten model has them: behind the model's own, token ids and positions."""
    return own + 2


def rewriting_of(program: torch.export.ExportedProgram, layers: tuple[LayerKV, ...]) -> Rewriting:
    """The program's graph, to be compiled: it takes the tensors of `tensors_of`, then the program's inputs."""
    return Rewriting.of_graph(_with_writes(program), Report("paged"), layers)


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

"""How does a model become a program that needs no Python of its own?

`export` captures the model as `torch.compile(model, backend="paged_attn")` does, runs the same passes, and hands the
rewritten graph to torch.export. What a cache would hand over at each step, the pages included, are then inputs of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from compile_attn.calling import Call, call_of, check_no_dropout, logits_of, unwrapped, vocabulary_of
from compile_attn.manifest import Manifest
from compile_attn.one_graph import OneGraph
from compile_attn.options import Options
from compile_attn.passes.graph import add_placeholder, placeholders
from compile_attn.passes.pipeline import STEP_INPUTS
from compile_attn.passes.report import RefusedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compile_attn.backend import Paged
    from compile_attn.cache import PagedKVCache

DIMS = ("tokens", "sequences", "rows", "max_pages", "pages")  # of a program's inputs, all dynamic
_FIRST_TOKENS = 4  # of the call that is captured; what is captured holds for any number


def export(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cache: PagedKVCache,
    dynamic_shapes: Mapping[str, Any] | None = None,
    kernel: str = "auto",
    merge_linears: bool = False,
) -> torch.export.ExportedProgram:
    """The paged form of a model as an ExportedProgram.

    args, kwargs    how the model is called: token ids [1, T] first (or as input_ids), position ids [1, T] second (or as
                    position_ids) where it is to be given them, whatever else is no tensor. Their values are not looked at.
                    Default: token ids alone, and positions where forward demands them, as PagedLM does
    cache           its page size and kv_dtype are the program's; it is left able to run it
    dynamic_shapes  by name, of tokens, sequences, rows, max_pages and pages: torch.export.Dim.DYNAMIC with a min and a max. Each
                    is dynamic, from 1 up (pages: from 2), unless said otherwise
    kernel, merge_linears    as in `Options`; merged weights are tensors of the program, and bear no name of the model

    Inputs, T new tokens of B sequences: input_ids, position_ids [1, T] int64; block_table [B, max_pages], seq_lens, query_lens [B]
    int32; logits_rows [R] int64; k_pages, v_pages, lists by attention site of [pages, page_size, heads, dim], which are written to,
    as the graph signature says; for fp8 pages k_scales and v_scales. All but the tokens are what `cache.step_inputs()`,
    `cache.k_pages` and `cache.v_pages` give. Output: logits [1, R, vocabulary].

    RefusedError where the model cannot be paged; ValueError for inputs that are neither. `cache.report` says what was done.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; export takes a torch.nn.Module")
    model = unwrapped(model)
    check_no_dropout(model)
    dims = _dims(dynamic_shapes)
    options = Options(kernel=kernel, cache=cache, merge_linears=merge_linears)
    paged = _captured(model, _with_logits(_call(model, args, kwargs)), cache, options)
    program = _Program(model, paged)
    inputs, shapes = _example(cache, dims)
    with torch.no_grad():
        exported: torch.export.ExportedProgram = torch.export.export(program, (), inputs, dynamic_shapes=shapes, strict=False)
        exported = exported.run_decompositions({})  # functional: the signature says what is written to
    logits = exported.graph_signature.user_outputs[0]
    width = next(node for node in exported.graph.nodes if node.name == logits).meta["val"].shape[-1]
    Manifest.of(paged.rewriting, vocabulary_of(model, int(width)), cache, merge_linears).attach(exported)
    return exported


def _dims(asked: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = sorted(set(asked or {}) - set(DIMS))
    if unknown:
        raise ValueError(f"dynamic_shapes: unknown {', '.join(map(repr, unknown))}; sizes of a program are {', '.join(DIMS)}")
    # No named Dim: torch would have to prove that guards such as T * min(8, 8 * T) == 8 * T hold in its range, and cannot.
    made = {name: torch.export.Dim.DYNAMIC(min=2 if name == "pages" else 1) for name in DIMS}
    return made | dict(asked or {})


def _call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Call:
    """The model's call as the inputs say, with the batch's own tensors in place of theirs."""
    if not args and not kwargs:
        return call_of(model)
    given = dict(zip(("input_ids", "position_ids"), args, strict=False))
    named = dict(kwargs or {})
    for name, value in (given | named).items():
        batch_s = name in ("input_ids", "position_ids")
        if len(args) > 2 or (isinstance(value, torch.Tensor) and not batch_s):
            what = f"{len(args)} arguments" if len(args) > 2 else f"a tensor {name!r}"
            raise ValueError(f"export: {what}; a paged model takes token ids and positions, and what else it takes is no tensor")
        if batch_s and not (isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[0] == 1):
            raise ValueError(
                f"export: {name} is {_described(value)}; give a tensor [1, T] of one sequence, whose values do not matter"
            )
    if "input_ids" not in given | named:
        raise ValueError("export: no token ids are given; put them first, or leave args and kwargs out")

    def call(compiled: Callable[..., Any], input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        ours = {"input_ids": input_ids, "position_ids": position_ids}
        return compiled(*[ours[name] for name in given], **{name: ours.get(name, value) for name, value in named.items()})

    return call


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _with_logits(call: Call) -> Call:
    def logits(model: Callable[..., Any], input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return logits_of(call(model, input_ids, position_ids))

    return logits


def _captured(model: nn.Module, call: Call, cache: PagedKVCache, chosen: Options) -> Paged:
    """The model's paged graph, and the cache bound to it; nothing is compiled and nothing runs."""
    from compile_attn.backend import raise_when_called, rewritten
    from compile_attn.cache import Chunk

    found: list[Paged] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any], *, options: Mapping[str, Any]) -> Callable[..., Any]:
        try:
            found.append(rewritten(gm, examples, Options.read(options), cache))
        except (ValueError, RefusedError) as wrong:
            return raise_when_called(wrong)
        return raise_when_called(_Captured())

    run = OneGraph(model, chosen, call, backend=backend)
    seq = cache.add()
    try:
        batch = cache.batch([Chunk(seq, [0] * min(_FIRST_TOKENS, cache.length_limit))])
        run(batch.input_ids, batch.position_ids)
    except _Captured:
        pass
    finally:
        cache.free(seq)
    [paged] = found
    paged.rewriting.verify()
    paged.bind(cache, paged.rewriting.report)
    return paged


class _Captured(Exception):
    """The graph was captured."""


class _Program(nn.Module):
    """The rewritten graph as a module: the model's own tensors by the model's names, all else as inputs."""

    def __init__(self, model: nn.Module, paged: Paged) -> None:
        super().__init__()
        graph = paged.rewriting.module.graph
        names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        nodes = placeholders(graph)
        length = nodes[paged.ids].meta["val"].shape[1]
        self._own: list[Any] = []  # of the graph's first inputs each: the name of a tensor, or a number
        for place, example in enumerate(paged.examples):
            if place in (paged.ids, paged.positions):
                self._own.append("input_ids" if place == paged.ids else "position_ids")
            elif not nodes[place].users:
                self._own.append(0)  # whatever it is; a weight that was merged with others, say
            elif isinstance(example, torch.Tensor):
                self._own.append(_registered(self, names.get(id(example), f"constant_{place}"), example))
            else:
                same = isinstance(nodes[place].meta["val"], torch.SymInt) and nodes[place].meta["val"].node.expr == length.node.expr
                self._own.append(None if same else int(example))

        merged = paged.rewriting.weights(paged.examples)
        given: list[tuple[str, torch.Tensor]]
        given = [(f"merged_{number}", nn.Parameter(weight, requires_grad=False)) for number, weight in enumerate(merged)]
        given += [(node.name, value) for node, value in _handed_in(paged.rewriting.module)]
        self._graph = fx.GraphModule(paged.rewriting.module, graph)  # holds what the graph still uses, and no more
        self._last = [_registered(self, name, tensor) for name, tensor in given]

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_lens: torch.Tensor,
        logits_rows: torch.Tensor,
        k_pages: list[torch.Tensor],
        v_pages: list[torch.Tensor],
        k_scales: list[torch.Tensor],
        v_scales: list[torch.Tensor],
    ) -> torch.Tensor:
        batch = {"input_ids": input_ids, "position_ids": position_ids}

        def own(each: Any) -> Any:
            if each is None:
                return input_ids.shape[1]
            return each if isinstance(each, int) else batch[each] if each in batch else getattr(self, each)

        sites = zip(k_pages, v_pages, *([k_scales, v_scales] if k_scales else []), strict=True)
        step = block_table, seq_lens, query_lens, logits_rows
        pools = [tensor for site in sites for tensor in site]
        (logits,) = self._graph(*map(own, self._own), *step, *pools, *map(own, self._last))
        return logits  # type: ignore[no-any-return]


def _handed_in(module: fx.GraphModule) -> list[tuple[fx.Node, torch.Tensor]]:
    """Tensors that the graph holds become its last inputs: torch.export loses those that a module inside another one holds."""
    found: list[tuple[fx.Node, torch.Tensor]] = []
    for node in list(module.graph.find_nodes(op="get_attr")):
        value = getattr(module, str(node.target))
        if isinstance(value, torch.Tensor):
            given = add_placeholder(module.graph, f"held_{len(found)}", node.meta["val"])
            node.replace_all_uses_with(given)
            module.graph.erase_node(node)
            found.append((given, value))
    return found


def _registered(module: nn.Module, name: str, tensor: torch.Tensor) -> str:
    """A name of the model, whose modules are not the program's, as one that a module may have."""
    flat = name.replace(".", "__")
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(flat, tensor)
    else:
        module.register_buffer(flat, tensor)
    return flat


def _example(cache: PagedKVCache, dims: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A program's inputs for a step of two sequences, and which of their sizes are dynamic."""
    from compile_attn.cache import Chunk

    seqs = [cache.add(), cache.add()]
    try:
        batch = cache.batch([Chunk(seqs[0], [0, 0, 0]), Chunk(seqs[1], [0, 0])])
        inputs = {name: tensor.clone() for name, tensor in inputs_of(cache, batch.input_ids, batch.position_ids)}
    finally:
        for seq in seqs:
            cache.free(seq)
    token, table = {1: dims["tokens"]}, {0: dims["sequences"], 1: dims["max_pages"]}
    sequence, row, page = {0: dims["sequences"]}, {0: dims["rows"]}, {0: dims["pages"]}
    pools: dict[str, Any] = {"k_pages": cache.k_pages, "v_pages": cache.v_pages}
    scales: dict[str, Any] = {"k_scales": cache.pools.k_scales, "v_scales": cache.pools.v_scales}
    shapes: dict[str, Any] = dict(zip(inputs, (token, token, table, sequence, sequence, row), strict=True))
    shapes |= {name: [page] * len(each) for name, each in pools.items()}
    shapes |= {name: [{}] * len(each) for name, each in scales.items()}
    return inputs | pools | scales, shapes


def inputs_of(cache: PagedKVCache, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A step's tensors by the names that a program has for them."""
    yield from (("input_ids", input_ids), ("position_ids", position_ids), *zip(STEP_INPUTS, cache.step_inputs(), strict=True))

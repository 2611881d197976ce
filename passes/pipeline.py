"""In what order is a captured graph rewritten?

Stateless: normalize, recognise, fuse, cleanup. Paged: the same, then the step's inputs, the proof of token independence, and
pages. Each step takes a graph and leaves a graph; the Report says what they did.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.passes import lower
from compile_attn.passes.cleanup import cleanup, relax_views
from compile_attn.passes.graph import Location, location, placeholders, same_size
from compile_attn.passes.imposed import check_lengths, impose, unnarrowed
from compile_attn.passes.lower import STEP_INPUTS, LayerKV, StepNodes
from compile_attn.passes.merge_linears import Merged, merge_linears
from compile_attn.passes.normalize import Normalized, normalize
from compile_attn.passes.once import compute_once
from compile_attn.passes.readable import readable
from compile_attn.passes.recognise import AttentionSite, recognise
from compile_attn.passes.report import LinearMerge, RefusedError, Rejected, Report, Rewritten
from compile_attn.passes.terms import Unreadable
from compile_attn.passes.tokens import TokensRefused, prove_tokens
from compile_attn.passes.verify import FreshInputs, assumed_bounds, excepted, verify
from compile_attn.passes.weights import JoinedWeights

__all__ = [
    "STEP_INPUTS",
    "LayerKV",
    "PagedGeometry",
    "RefusedError",
    "Rewriting",
    "graph_text",
    "rewrite_paged",
    "rewrite_stateless",
]


@dataclass(frozen=True)
class PagedGeometry:
    """Pages of a cache, PS tokens each, of the model's dtype or of kv_dtype. How many there are a graph does not know."""

    page_size: int
    kv_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Rewriting:
    """A rewritten graph and what was done. `inputs` are fake tensors to compile it with (paged only)."""

    module: fx.GraphModule
    report: Report
    layers: tuple[LayerKV, ...] = ()
    inputs: FreshInputs | None = None
    max_tokens: int | None = None  # most packed tokens that one call may hold, where the model itself limits it
    constants: tuple[torch.Tensor, ...] = ()  # tensors whose values a proof has read
    weights: JoinedWeights = field(default_factory=JoinedWeights)  # called with the model's inputs, it gives the last ones

    @classmethod
    def of_graph(cls, module: fx.GraphModule, report: Report, layers: tuple[LayerKV, ...]) -> Rewriting:
        """A paged graph that was rewritten before, to be compiled."""
        return cls(module, report, layers, FreshInputs(module.graph))

    def verify(self) -> None:
        """Run the paged graph on its fake inputs, as a compiler that traces does by itself."""
        assert self.inputs is not None
        verify(self.module, self.inputs)

    def excepted(self) -> list[tuple[int, int, int]]:
        """See `verify.excepted`: single sizes for which what was compiled may be wrong."""
        assert self.inputs is not None
        return excepted(self.inputs)

    def assumed(self, own_inputs: int) -> dict[str, int]:
        """How large sequences, max_pages, pages and tokens may be, where compiling has assumed it. Rows are tokens too.

        `own_inputs` is how many inputs of the model stand before those of the step.
        """
        assert self.inputs is not None
        bounds = assumed_bounds(self.inputs)
        block_table = self.inputs.values[own_inputs]
        pools = [x for x in self.inputs.values[own_inputs + len(STEP_INPUTS) :] if isinstance(x, torch.Tensor) and x.dim() == 4]
        pages = [pool.shape[0] for pool in pools if isinstance(pool.shape[0], torch.SymInt)]
        named = {"sequences": [block_table.shape[0]], "max_pages": [block_table.shape[1]], "pages": pages}
        found: dict[str, list[int]] = {}
        for name, sizes in named.items():
            found[name] = [bounds.pop(size.node.expr) for size in sizes if size.node.expr in bounds]
        found["tokens"] = list(bounds.values())
        return {name: min(most) for name, most in found.items() if most}


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def rewrite_stateless(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    kernel: str,
    needs_grad: bool = False,
    merge: bool = False,
    block_sparse: BlocksparseParams | None = None,
) -> Rewriting:
    """Replace every attention that can be read by a fused op; the rest of the graph stays, but for linears to `merge`."""
    clock = _Clock()
    try:
        with clock.phase("normalize"):
            normalized = normalize(gm, examples)
    except Exception as error:  # whatever torch raises while tracing: the graph then stays as it is, and the report says so
        return Rewriting(gm, Report("stateless", (), (_untraceable(error),), (), clock.seconds))
    relax_views(normalized.module.graph)
    with clock.phase("report"):
        before = _text(normalized)
    with clock.phase("recognise"):
        sites, rejected = recognise(normalized, paged=False, positions=frozenset())
        sites = impose(sites, block_sparse, rejected)
        check_lengths(sites, block_sparse)
    with clock.phase("lower"):
        rewritten, refused = _fuse_all(normalized, sites, kernel, None, needs_grad)
        if rewritten:
            cleanup(normalized.module.graph)
        refused += unnarrowed(normalized, sites, block_sparse)
    if normalized.flex and (rejected or refused or len(rewritten) < normalized.flex):
        return Rewriting(gm, Report("stateless", (), (*rejected, *refused), (), clock.seconds, before, before))
    with clock.phase("lower"):
        merged = _merge(normalized, needs_grad) if merge else Merged()
    normalized.module.recompile()
    with clock.phase("report"):
        after = _text(normalized)
    report = Report("stateless", rewritten, (*rejected, *refused), (), clock.seconds, before, after, tuple(merged.entries))
    return Rewriting(normalized.module, report, weights=JoinedWeights(merged.joined))


def _merge(normalized: Normalized, needs_grad: bool) -> Merged:
    if needs_grad:
        return Merged([LinearMerge("apart", Location(), "gradients are asked for, and they are the separate weights'")])
    return merge_linears(normalized)


def rewrite_paged(
    gm: fx.GraphModule,
    examples: Sequence[Any],
    *,
    kernel: str,
    geometry: PagedGeometry,
    token_ids: int,
    positions: int | None,
    merge: bool = True,
    block_sparse: BlocksparseParams | None = None,
) -> Rewriting:
    """Make the graph take packed new tokens of many sequences, keys and values in pages. Raises RefusedError.

    `token_ids` and `positions` are the places of those inputs among the examples. `merge`: linears that read one tensor become one.
    """
    clock = _Clock()
    _unify_lengths(gm, [token_ids, *([] if positions is None else [positions])])
    try:
        with clock.phase("normalize"):
            normalized = normalize(gm, examples)
    except Exception as error:
        raise refusal(Report("paged", seconds=clock.seconds), [_untraceable(error)]) from error
    module, graph = normalized.module, normalized.module.graph
    relax_views(graph)
    with clock.phase("report"):
        before = _text(normalized)
    inputs = placeholders(graph)
    tokens = [inputs[place] for place in (token_ids, positions) if place is not None]
    position_inputs = frozenset(tokens[1:])
    report = Report("paged", (), (), (), clock.seconds, before, "")
    _check_token_axis(tokens, normalized, report)
    with clock.phase("recognise"):
        sites, rejected = recognise(normalized, paged=True, positions=position_inputs)
        sites = impose(sites, block_sparse, rejected)
    with clock.phase("lower"):
        rewritten, refused = _fuse_all(normalized, sites, kernel, geometry, needs_grad=False)
        cleanup(graph)
        step_inputs, num_pages = _step_examples(tokens[0])
        step = lower.add_step_inputs(module, tokens[0], step_inputs, geometry.page_size)
    rejected = [*rejected, *refused]
    report = replace(report, sites=rewritten, rejected=tuple(rejected))
    proof = _prove(normalized, tokens, step, position_inputs, rejected, report, clock)
    with clock.phase("lower"):
        layers = lower.page(module, step, num_pages, geometry.page_size, geometry.kv_dtype)
        cleanup(graph)
        for node in graph.nodes:  # they name sizes by data (of torch.where, say) in symbols that the fresh inputs do not know
            node.meta.pop("unbacked_bindings", None)
        compute_once(graph, normalized.constants, [step.positions])
        merged = merge_linears(normalized) if merge else Merged()
    module.recompile()
    with clock.phase("report"):
        after = _text(normalized)
    report = replace(report, tokens=proof.rewrites, after=after, linears=tuple(merged.entries), max_positions=proof.max_positions)
    return Rewriting(module, report, layers, FreshInputs(graph), proof.max_tokens, weights=JoinedWeights(merged.joined))


def _prove(
    normalized: Normalized,
    tokens: list[fx.Node],
    step: StepNodes,
    position_inputs: frozenset[fx.Node],
    rejected: list[Rejected],
    report: Report,
    clock: _Clock,
) -> Any:
    try:
        with clock.phase("tokens"):
            return prove_tokens(
                normalized.module,
                tokens=tokens,
                positions=step.positions,
                rows=step.logits_rows,
                constants=normalized.constants,
                position_inputs=position_inputs,
                rejected=rejected,
            )
    except TokensRefused as refused:
        raise refusal(report, [*rejected, *refused.rejected]) from None


def refusal(report: Report, rejected: Sequence[Rejected]) -> RefusedError:
    """The error that says why a model cannot be paged: every reason, with node, module and source line."""
    unique = tuple(dict.fromkeys(rejected))
    lines = [f"{reason.reason}{_where(reason.where)}" + (f"; {reason.cure}" if reason.cure else "") for reason in unique]
    text = "paged_attn cannot page this model, and nothing was rewritten:\n" + "\n".join(f"  - {line}" for line in lines)
    return RefusedError(text, replace(report, sites=(), rejected=unique))


def _where(where: Location) -> str:
    parts = (where.node and f"node {where.node}", where.module, where.source)
    return f" [{', '.join(filter(None, parts))}]" if any(parts) else ""


def _fuse_all(
    normalized: Normalized, sites: Sequence[AttentionSite], kernel: str, geometry: PagedGeometry | None, needs_grad: bool
) -> tuple[tuple[Rewritten, ...], list[Rejected]]:
    """Fuse what a kernel serves; returns what was rewritten and what was not. Without a geometry: stateless."""
    rewritten, refused = [], []
    page_size, kv_dtype = (None, None) if geometry is None else (geometry.page_size, geometry.kv_dtype)
    graph = normalized.module.graph
    for site in reversed(sites):  # the last one first: it may read what an earlier one is replaced by
        choice = lower.choose_kernel(site, kernel, page_size, kv_dtype, needs_grad)
        if needs_grad and choice.kernel != "sdpa":
            why = f"kernel {choice.kernel!r} has no backward, and gradients are asked for"
            refused.append(Rejected(why, site.where, "call under torch.no_grad(), or use a mask and score that SDPA takes"))
            continue
        count = len(graph.nodes)
        lines = dict.fromkeys(location(node).source for node in graph.nodes if node in site.replaced)
        lower.fuse(graph, site, choice.kernel)
        added = len(graph.nodes) - count
        nodes = len(site.replaced), added
        told = (choice.passed_over, *nodes, choice.steps, site.asked, tuple(filter(None, lines)))
        rewritten.append(Rewritten(site.where, site.spec, choice.kernel, *told))
    return tuple(rewritten[::-1]), refused[::-1]


def graph_text(graph: fx.Graph, sources: Mapping[fx.Node, str]) -> str:
    """A graph as a report has it; `sources` says which input is which of the user's tensors."""
    return readable(graph, sources)


def _text(normalized: Normalized) -> str:
    return graph_text(normalized.module.graph, normalized.sources)


def _untraceable(error: Exception) -> Rejected:
    if isinstance(error, Unreadable):
        return error.rejected
    why = f"the captured graph cannot be traced to ATen: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
    return Rejected(why, Location(), "write attention with matmul and softmax, or F.scaled_dot_product_attention")


def _unify_lengths(gm: fx.GraphModule, places: Sequence[int]) -> None:
    """Token ids and position ids hold the same tokens: one symbol. Comparing backed symbols adds the guard that says so."""
    inputs = placeholders(gm.graph)
    lengths = [inputs[place].meta["example_value"].shape[-1] for place in places]
    for other in lengths[1:]:
        bool(lengths[0] == other)


def _check_token_axis(tokens: list[fx.Node], normalized: Normalized, report: Report) -> None:
    """Token inputs are [1, T] with one symbolic T."""
    length = None
    for node in tokens:
        shape = node.meta["val"].shape
        name = normalized.sources.get(node, node.name)
        if len(shape) != 2 or shape[0] != 1 or isinstance(shape[1], int):
            raise refusal(report, [_no_token_axis(node, name)])
        if length is not None and not same_size(length, shape[1]):
            why = f"input {name!r} has {shape[1]} tokens where the token ids have {length}"
            raise refusal(report, [Rejected(why, location(node), "pass batch.position_ids unchanged")])
        length = shape[1]


def _no_token_axis(node: fx.Node, name: str) -> Rejected:
    shape = node.meta["val"].shape
    fixed_at = _fixed_at(node) if len(shape) == 2 and shape[0] == 1 else None
    if fixed_at is None:
        why = f"input {name!r} has shape {tuple(shape)}; a paged model takes [1, T] with a dynamic T of at least 2"
        return Rejected(why, location(node), "call it with batch.input_ids and batch.position_ids")
    why = f"the number of tokens is made a constant ({shape[1]}), by a loop over tokens or an op that takes no symbol"
    cure = (
        "a recurrence cannot be paged; write positions with torch.arange, and for an einsum of three operands "
        "set torch.backends.opt_einsum.enabled = False"
    )
    return Rejected(why, replace(location(node), source=fixed_at), cure)


def _fixed_at(node: fx.Node) -> str | None:
    """The line at which a symbolic number of tokens became a constant; None where it was none to begin with."""
    value = node.meta["val"]
    env = value.fake_mode.shape_env
    # Private, fenced here: replacements_slocs is where ShapeEnv keeps the user's line of each specialization.
    lines = getattr(env, "replacements_slocs", {})
    fixed = (lines.get(symbol) for symbol, size in env.replacements.items() if size == value.shape[1])
    return next((str(line.maybe_user_loc or "") for line in fixed if line is not None), None)


def _step_examples(tokens: fx.Node) -> tuple[list[torch.Tensor], torch.SymInt]:
    """Fake tensors for the step's inputs in the graph's own fake mode, with symbols for B, R and max_pages; a symbol for P."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    mode = tokens.meta["val"].fake_mode
    env = mode.shape_env
    made = []
    for name, hint in (("sequences", 17), ("rows", 19), ("max_pages", 23), ("pages", 29)):
        source = ConstantSource(f"paged_attn_{name}")
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        made.append(env.create_symintnode(symbol, hint=hint, source=source))
    sequences, rows, max_pages, num_pages = made
    device = tokens.meta["val"].device
    with mode:
        examples = [
            torch.empty((sequences, max_pages), dtype=torch.int32, device=device),
            torch.empty((sequences,), dtype=torch.int32, device=device),
            torch.empty((sequences,), dtype=torch.int32, device=device),
            torch.empty((rows,), dtype=torch.int64, device=device),
        ]
    return examples, num_pages

"""What happens when torch.compile hands over a graph?

`paged_attn` is found through the entry-point group `torch_dynamo_backends`: `torch.compile(model, backend="paged_attn")`
works without an import. Without a cache the graph is rewritten statelessly; with one it is paged, or refused.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdRef

from compile_attn.cache import PagedKVCache
from compile_attn.options import Inner, Options
from compile_attn.passes.graph import placeholders
from compile_attn.passes.pipeline import PagedGeometry, Rewriting, rewrite_paged, rewrite_stateless
from compile_attn.passes.report import RefusedError, Rejected, Report

Compiled = Callable[..., Any]


def paged_attn(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """The torch.compile backend. Unknown options raise ValueError; see `Options` for the known ones."""
    try:
        chosen = Options.read(options)
        if chosen.cache is not None:
            return _paged(gm, example_inputs, chosen, chosen.cache)
        return _stateless(gm, example_inputs, chosen)
    except ValueError as wrong:  # bad input: it reaches the user as it is
        return raise_when_called(wrong)


def _stateless(gm: fx.GraphModule, examples: Sequence[Any], options: Options) -> Compiled:
    needs_grad = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in examples)
    sparse = options.block_sparse
    if sparse is not None and (broken := _graph_break(gm)) is not None:
        raise ValueError(f"block_sparse: the model does not compile as one graph ({broken}); remove the graph break")
    rewriting = rewrite_stateless(
        gm, examples, kernel=options.kernel, needs_grad=needs_grad, merge=options.merges, block_sparse=sparse
    )
    _emit(rewriting.report)
    rejected = rewriting.report.rejected
    if rejected and (options.on_rejected == "error" or sparse is not None):  # what was left as it was is not sparse
        whole = "" if sparse is None else "block_sparse takes a model of which all attention can be read; "
        return raise_when_called(RefusedError(whole + _summary(rewriting.report), rewriting.report))
    _check_narrowed(options, rewriting.report)
    if options.on_rejected == "warn" and rejected:
        warnings.warn(_summary(rewriting.report), stacklevel=2)
    weights = rewriting.weights
    if weights:
        compiled = _compile_inner(rewriting.module, [*examples, *weights(examples)], options.inner)
        return lambda *args: compiled(*args, *weights(args))
    return _compile_inner(rewriting.module if rewriting.report.sites else gm, examples, options.inner)


@dataclass(frozen=True)
class Paged:
    """A model's rewritten graph, what Dynamo calls it with, and which of that is the batch's own."""

    rewriting: Rewriting
    examples: Sequence[Any]
    ids: int
    positions: int | None

    def bind(self, cache: PagedKVCache, report: Report) -> None:
        """Have the cache hold the pages of this model, and know its limits."""
        rewriting = self.rewriting
        cache.bind(
            rewriting.layers,
            owner=_owner(self.examples),
            max_positions=report.max_positions,
            max_tokens=rewriting.max_tokens,
            assumed=rewriting.assumed(len(self.examples)),
            kernels=[(site.kernel, site.spec) for site in report.sites],
        )
        cache.report = report


def rewritten(gm: fx.GraphModule, examples: Sequence[Any], options: Options, cache: PagedKVCache) -> Paged:
    """The paged form of Dynamo's graph. RefusedError where there is none, and the cache's report says why."""
    _check_length(options, cache)
    try:
        ids, positions = _token_places(gm, examples, cache)
        rewriting = rewrite_paged(
            gm,
            examples,
            kernel=options.kernel,
            geometry=PagedGeometry(cache.page_size, cache.pools.fp8),
            token_ids=ids,
            positions=positions,
            merge=options.merges,
            block_sparse=options.block_sparse,
        )
        _check_narrowed(options, rewriting.report)
    except RefusedError as refused:
        _emit(refused.report)
        cache.report = refused.report
        raise
    return Paged(rewriting, examples, ids, positions)


def _paged(gm: fx.GraphModule, examples: Sequence[Any], options: Options, cache: PagedKVCache) -> Compiled:
    """The paged form: called with Dynamo's inputs, it adds the cache's own. A refusal is raised by the call, unwrapped."""
    try:
        paged = rewritten(gm, examples, options, cache)
    except RefusedError as refused:
        return raise_when_called(refused)
    rewriting, places = paged.rewriting, (paged.ids, paged.positions)
    begin = time.perf_counter()
    compiled = compile_paged(rewriting, options.inner)
    seconds = {**rewriting.report.seconds, "inner": time.perf_counter() - begin}
    report = replace(rewriting.report, seconds=seconds)
    _emit(report)
    weights = rewriting.weights
    weights(examples)
    paged.bind(cache, report)
    numbers, tensors = _what_makes_keys(gm, examples, [place for place in places if place is not None])

    # Dynamo would run this code for another model of the same class: its parameters are inputs like any other.
    parameters = [place for place, x in enumerate(examples) if isinstance(x, torch.nn.Parameter)]
    known = [(place, weakref.ref(examples[place])) for place in (*parameters[:1], *parameters[-1:])]

    def step(*args: Any) -> Any:
        if any(args[place] is not parameter() for place, parameter in known):
            raise ValueError(
                "this cache already serves a model with other parameters, and a cache serves one model; "
                "make another PagedKVCache for the second one, or after its parameters were replaced"
            )
        _check_length(options, cache)
        cache.check_inputs(args[places[0]], None if places[1] is None else args[places[1]])
        joined = weights(args)  # before they are compared: it moves what was replaced back to where it was
        cache.proof.check((compiled, *[_value(args[place]) for place in numbers]), [args[place] for place in tensors])
        with torch.no_grad():
            return compiled(*args, *cache.step_inputs(), *cache.pools.kept, *joined)

    return step


def compile_paged(rewriting: Rewriting, inner: Inner) -> Compiled:
    """Compile for every T, B, R >= 2, apart from what Dynamo assumed about the first call."""
    assert rewriting.inputs is not None
    if inner == "eager":
        rewriting.verify()
        return rewriting.module
    from torch._guards import TracingContext, tracing

    # A tracing context of our own: the graph is compiled with fresh symbols, whose guards are not Dynamo's business.
    with torch.no_grad(), tracing(TracingContext(rewriting.inputs.mode)):
        compiled = _compile_inner(rewriting.module, rewriting.inputs.values, inner)
    return _but_for(rewriting.excepted(), compiled, rewriting.module)


def _but_for(sizes: Sequence[tuple[int, int, int]], compiled: Compiled, module: Compiled) -> Compiled:
    """The compiled graph; the graph as it is where an input has one of these sizes, for which the other may be wrong."""
    if not sizes:
        return compiled

    def run(*args: Any) -> Any:
        odd = any(args[place].shape[dim] == size for place, dim, size in sizes)
        return module(*args) if odd else compiled(*args)

    return run


def _compile_inner(module: fx.GraphModule, inputs: Sequence[Any], inner: Inner) -> Compiled:
    if inner == "eager":
        return module.forward
    from compile_attn.inductor import by_inductor

    return by_inductor(module, inputs)


def _token_places(gm: fx.GraphModule, examples: Sequence[Any], cache: PagedKVCache) -> tuple[int, int | None]:
    """Which inputs are the current batch's own tensors: (place of input_ids, place of position_ids or None)."""
    broken = _graph_break(gm)
    if broken is not None:
        why = f"the model does not compile as one graph: {broken}"
        raise _refused(why, "remove the graph break (torch.compile(..., fullgraph=True) shows where it is)")
    batch = cache.current
    if batch is None:
        raise _refused("no batch has been made", "call cache.batch([...]) and pass its input_ids and position_ids")
    places: dict[str, int] = {}
    for place, example in enumerate(examples):
        for name in ("input_ids", "position_ids"):
            if isinstance(example, torch.Tensor) and example.data_ptr() == getattr(batch, name).data_ptr():
                places[name] = place
    if "input_ids" not in places:
        raise _refused("no input is the batch's input_ids", "call the model with batch.input_ids")
    return places["input_ids"], places.get("position_ids")


def _graph_break(gm: fx.GraphModule) -> str | None:
    """Why the graph ends before the model does; None where it does not."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    broken = getattr(reason, "graph_break", False)
    return str(getattr(reason, "reason", "graph break")).splitlines()[0] if broken else None


def _check_narrowed(options: Options, report: Report) -> None:
    if options.block_sparse is not None and not report.sites:
        raise ValueError("block_sparse is asked for, but no attention was found; leave it out, or write attention with a softmax")


def _check_length(options: Options, cache: PagedKVCache) -> None:
    sparse = options.block_sparse
    if sparse is not None and cache.max_seq_len > sparse.max_seqlen:
        raise ValueError(
            f"block_sparse: sequences of {cache.max_seq_len} tokens fit in the cache, and max_seqlen={sparse.max_seqlen}; "
            f"make it with PagedKVCache(max_seq_len={sparse.max_seqlen})"
        )


def _owner(examples: Sequence[Any]) -> frozenset[WeakIdRef]:
    """What makes two compilations the same model: the Parameters themselves, held weakly.

    Not where their data lie: `.data` may have been set between the two. Whether keys of before are still the model's is not asked
    here, but of their `Origin`, and another compilation is another origin.
    """
    return frozenset(WeakIdRef(x) for x in examples if isinstance(x, torch.nn.Parameter))


def _what_makes_keys(gm: fx.GraphModule, examples: Sequence[Any], tokens: Sequence[int]) -> tuple[list[int], list[int]]:
    """The places of inputs that are numbers, and of those that are tensors, without the batch's own and their sizes.

    A float that Dynamo has not made a constant comes as a new 0-dim tensor on the CPU with every call: it is a number, too.
    """
    inputs = [node.meta["example_value"] for node in placeholders(gm.graph)]
    lengths = {size.node.expr for place in tokens for size in inputs[place].shape if isinstance(size, torch.SymInt)}
    numbers, tensors = list[int](), list[int]()
    for place, x in enumerate(examples):
        if place in tokens or (isinstance(x, torch.SymInt) and x.node.expr in lengths):
            continue
        is_number = not isinstance(x, torch.Tensor) or (x.dim() == 0 and x.device.type == "cpu")
        (numbers if is_number else tensors).append(place)
    return numbers, tensors


def _value(number: Any) -> Any:
    return number.item() if isinstance(number, torch.Tensor) else number


def _refused(why: str, cure: str) -> RefusedError:
    from compile_attn.passes.graph import Location
    from compile_attn.passes.pipeline import refusal

    return refusal(Report("paged"), [Rejected(why, Location(), cure)])


def raise_when_called(error: Exception) -> Compiled:
    """Dynamo wraps what a backend raises; what the compiled function raises reaches the user as it is."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse


def _summary(report: Report) -> str:
    lines = [f"paged_attn left {len(report.rejected)} attention site(s) as they were:"]
    for site in report.rejected:
        where = ", ".join(part for part in (site.where.node, site.where.module, site.where.source) if part)
        lines.append(f"  {where}: {site.reason}" + (f"; {site.cure}" if site.cure else ""))
    return "\n".join(lines)


def _emit(report: Report) -> None:
    """Artefacts for TORCH_LOGS and TORCH_TRACE."""
    from compile_attn.logs import emit_report

    emit_report(report)

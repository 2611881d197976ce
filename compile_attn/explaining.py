"""What would the compiler do with this model?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from compile_attn.apart import compiled_apart
from compile_attn.calling import Call, unwrapped
from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.passes.pipeline import rewrite_stateless
from compile_attn.passes.report import RefusedError, Report


def explain(
    model: Callable[..., Any],
    *args: Any,
    kernel: str = "auto",
    paged: bool = False,
    call: Call | None = None,
    kv_dtype: torch.dtype | str = "auto",
    block_sparse: BlocksparseParams | None = None,
    **kwargs: Any,
) -> Report:
    """The report of a stateless compilation for the call model(*args, **kwargs), or with `paged` of the model's paged form.

    Stateless: the model runs once, unchanged, under no_grad; one with graph breaks gives the sites of all its graphs.
    Paged: what `PagedLM(model)` with kernel, call, kv_dtype and block_sparse as here would do, on a few tokens of its own; the
    inputs are not needed. A model that cannot be paged is no error here: the report's `rejected` says why.
    Compilations that exist already are left alone.
    """
    model = unwrapped(model)
    if paged:
        return _explain_paged(model, kernel, call, kv_dtype, block_sparse)
    reports: list[Report] = []
    wrong: list[ValueError] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        try:
            reports.append(rewrite_stateless(gm, examples, kernel=kernel, block_sparse=block_sparse).report)
        except ValueError as error:  # a kernel that is not there, or cannot: raised from here, Dynamo would wrap it
            wrong.append(error)
        return gm.forward

    with torch.no_grad():
        compiled_apart(model, backend=backend)(*args, **kwargs)
    if wrong:
        raise wrong[0]
    if not reports:
        raise RuntimeError(
            "torch.compile captured no graph of this call, so there is nothing to explain; look for torch.compiler.set_stance, "
            "@torch.compiler.disable or TORCH_COMPILE_DISABLE around the model, and for Dynamo's recompile limit "
            "(torch._dynamo.reset() lifts it)"
        )
    return _joined(reports)


def _explain_paged(
    model: Any, kernel: str, call: Call | None, kv_dtype: torch.dtype | str, block_sparse: BlocksparseParams | None
) -> Report:
    """The report of a PagedLM that is made for it, with few pages and no inner compiler, and closed again."""
    from compile_attn.lm import PagedLM

    try:
        with PagedLM(
            model, 256, max_seqs=2, kernel=kernel, kv_dtype=kv_dtype, inner="eager", call=call, block_sparse=block_sparse
        ) as lm:
            assert lm.report is not None
            return lm.report
    except RefusedError as refused:
        return refused.report


def _joined(reports: Sequence[Report]) -> Report:
    if len(reports) == 1:
        return reports[0]
    names = dict.fromkeys(name for report in reports for name in report.seconds)
    return Report(
        "stateless",
        tuple(site for report in reports for site in report.sites),
        tuple(one for report in reports for one in report.rejected),
        (),
        {name: sum(report.seconds.get(name, 0.0) for report in reports) for name in names},
        "\n\n".join(report.before for report in reports),
        "\n\n".join(report.after or report.before for report in reports),
    )

"""What would the compiler do with this model?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from compile_attn.passes.pipeline import rewrite_stateless
from compile_attn.passes.report import Report


def explain(model: nn.Module, *args: Any, kernel: str = "auto", **kwargs: Any) -> Report:
    """The report of a stateless compilation for this call; the model runs once, unchanged, to be captured.

    A model with graph breaks gives the sites of all its graphs. For what paging would do, see `PagedLM(model).report`.
    """
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, examples: Sequence[Any]) -> Any:
        reports.append(rewrite_stateless(gm, examples, kernel=kernel).report)
        return gm.forward

    with torch.no_grad():
        torch._dynamo.reset()  # a model that is compiled already would not be captured again
        torch.compile(model, backend=backend)(*args, **kwargs)
    return _joined(reports)


def _joined(reports: Sequence[Report]) -> Report:
    if len(reports) == 1:
        return reports[0]
    return Report(
        "stateless",
        tuple(site for report in reports for site in report.sites),
        tuple(one for report in reports for one in report.rejected),
        (),
        {name: sum(r.seconds.get(name, 0.0) for r in reports) for report in reports for name in report.seconds},
        "\n".join(report.before for report in reports),
        "\n".join(report.after for report in reports),
    )

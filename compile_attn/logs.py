"""How do TORCH_LOGS and TORCH_TRACE show what was done?

`TORCH_LOGS=compile_attn` prints the report of every compilation, `TORCH_LOGS=+compile_attn` the graphs as well. torch reads that
variable while it is imported, when no package can have registered a name; what it does take is the name of a module, and then
sets the level of the logger of that name. `TORCH_TRACE=folder` gets the same as artefacts that tlparse lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from compile_attn.passes.report import Report

log = logging.getLogger(__name__)


def emit_report(report: Report) -> None:
    """The report at INFO and the graphs at DEBUG; all of them to the trace. Nothing is rendered that nobody reads."""
    log.info("%s", report)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s graph before:\n%s", report.mode, report.before)
        log.debug("%s graph after:\n%s", report.mode, report.after or "(nothing was rewritten)")
    _trace("report", lambda: str(report))
    _trace("graph_before", lambda: report.before)
    _trace("graph_after", lambda: report.after)
    _trace("graph_diff", report.diff)


def _trace(name: str, text: Callable[[], str]) -> None:
    """One artefact of the compilation that is running."""
    # Private, fenced here and tested: the only way to write to TORCH_TRACE, and what other backends outside torch call.
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": f"paged_attn_{name}", "encoding": "string"}, payload_fn=text)

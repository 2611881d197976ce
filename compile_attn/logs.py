"""How do TORCH_LOGS and TORCH_TRACE show what was done?

`TORCH_LOGS=paged_attn` prints the report of every compilation, `TORCH_LOGS=+paged_attn` the graphs as well. torch reads that
variable while it is imported, when no package can have registered a name, and has no entry point for one. What it does take is the
name of a module that can be found, unimported: it sets the level of the logger of that name. So beside `compile_attn` there is a
module `paged_attn`, and what is said here is said to the loggers of both. `TORCH_TRACE=folder` gets the same as artefacts that
tlparse lists.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from compile_attn.passes.report import Report

_LOGS = (logging.getLogger("paged_attn"), logging.getLogger(__name__))


def emit_report(report: Report) -> None:
    """The report at INFO and the graphs at DEBUG; all of them to the trace. Nothing is rendered that nobody reads."""
    _log(logging.INFO, lambda: str(report))
    _log(logging.DEBUG, lambda: f"{report.mode} graph before:\n{report.before}")
    _log(logging.DEBUG, lambda: f"{report.mode} graph after:\n{report.after or '(nothing was rewritten)'}")
    _trace("report", lambda: str(report))
    _trace("graph_before", lambda: report.before)
    _trace("graph_after", lambda: report.after)
    _trace("graph_diff", report.diff)


def _log(level: int, text: Callable[[], str]) -> None:
    """To the first of the two that wants it: who asks for both reads it once."""
    for log in _LOGS:
        if log.isEnabledFor(level):
            log.log(level, "%s", text())
            return


@contextmanager
def untraced_by_pytest() -> Iterator[None]:
    """Where pytest hangs its handlers on torch's trace log, every compilation is traced, and a test that fails prints it all."""
    logger = logging.getLogger("torch.__trace")
    held = [handler for handler in logger.handlers if type(handler).__module__ == "_pytest.logging"]
    for handler in held:
        logger.removeHandler(handler)
    try:
        yield
    finally:
        for handler in held:
            logger.addHandler(handler)


def _trace(name: str, text: Callable[[], str]) -> None:
    """One artefact of the compilation that is running."""
    # Private, fenced here and tested: the only way to write to TORCH_TRACE, and what other backends outside torch call.
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": f"paged_attn_{name}", "encoding": "string"}, payload_fn=text)

"""How do TORCH_LOGS and TORCH_TRACE show what was done?"""

from __future__ import annotations

import logging

from compile_attn.passes.report import Report

log = logging.getLogger(__name__)


def emit_report(report: Report) -> None:
    """The report at INFO, the graphs at DEBUG."""
    log.info("%s", report)
    log.debug("before:\n%s\nafter:\n%s", report.before, report.after)

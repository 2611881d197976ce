"""What can be done from a shell?"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """`compile-attn demo` and `compile-attn explain MODULE:FACTORY`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        from compile_attn.demo import demo

        return 0 if demo(options.seconds, options.inner, options.html, options.device, options.tokens) else 1
    return _explain(options.target, options.html, options.diff)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="compile-attn", description="Read the attention a model computes, and page it.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a small GPT, page it, check it against recomputation")
    demo.add_argument("--seconds", type=float, default=30.0, help="training time (default 30)")
    demo.add_argument("--tokens", type=int, default=48, help="new tokens for each prompt (default 48)")
    demo.add_argument("--inner", choices=("inductor", "eager"), default="inductor", help="inner compiler")
    demo.add_argument("--device", default="cpu", help="torch device (default cpu)")
    demo.add_argument("--html", default="report.html", help="where the report is written (default report.html)")
    explain = commands.add_parser("explain", help="show what would be rewritten in a model, and why not the rest")
    explain.add_argument("target", metavar="MODULE:FACTORY", help="FACTORY() returns (model, args) or (model, args, kwargs)")
    explain.add_argument("--html", help="write the report as one HTML page")
    explain.add_argument("--diff", action="store_true", help="print the graph diff")
    return parser


def _explain(target: str, html: str | None, diff: bool) -> int:
    """Exit status 0: all attention was read; 1: some was not; 2: the target is no factory."""
    from rich.console import Console

    from compile_attn.explain import explain

    module, _, name = target.partition(":")
    sys.path.insert(0, "")
    try:
        model, args, *rest = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        print(
            f"compile-attn: {target!r} gave no model ({error}); name a function MODULE:FACTORY that returns (model, args)",
            file=sys.stderr,
        )
        return 2
    report = explain(model, *args, **(rest[0] if rest else {}))
    Console().print(report)
    if diff:
        print(report.diff())
    if html:
        report.to_html(html)
        print(f"the report is in {html}")
    return 1 if report.rejected else 0

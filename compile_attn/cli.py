"""What can be done from a shell?"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """`compile-attn demo` and `compile-attn explain MODULE:FACTORY`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        from compile_attn.demo import demo

        return 0 if demo(options.seconds, options.inner, options.html, options.device, options.tokens) else 1
    return _explain(options)


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
    explain.add_argument(
        "target", metavar="MODULE:FACTORY", help="FACTORY() returns a model, (model, args) or (model, args, kwargs)"
    )
    explain.add_argument("--paged", action="store_true", help="what a paged KV cache would do; the model alone is needed")
    explain.add_argument("--kernel", default="auto", help="one kernel for every site (default auto)")
    explain.add_argument("--html", help="write the report as one HTML page")
    explain.add_argument("--diff", action="store_true", help="print the graph diff")
    return parser


def _explain(options: argparse.Namespace) -> int:
    """Exit status 0: all attention was read; 1: some was not, or the model cannot be paged; 2: bad input."""
    from rich.console import Console

    from compile_attn.explaining import explain

    try:
        model, args, kwargs = _made(options.target)
        if not (options.paged or args or kwargs):
            raise ValueError(f"{options.target!r} returned a model without inputs; return (model, args), or ask for --paged")
        report = explain(model, *args, kernel=options.kernel, paged=options.paged, **kwargs)
    except ValueError as error:
        print(f"compile-attn: {error}", file=sys.stderr)
        return 2
    Console().print(report)
    if options.diff:
        print(report.diff())
    if options.html:
        report.to_html(options.html)
        print(f"the report is in {options.html}")
    return 1 if report.rejected else 0


def _made(target: str) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """What the factory returns, as model, args, kwargs. ValueError where it is not there or returns something else."""
    module, _, name = target.partition(":")
    cure = "name a function MODULE:FACTORY that returns (model, args), args being what the model is called with"
    if "" not in sys.path:  # a module of the working directory, as with python -m
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{target!r} was not found ({error}); {cure}") from None
    made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if 1 <= len(parts) <= 3 else (None, None, None)
    if not (callable(model) and isinstance(args, (tuple, list)) and isinstance(kwargs, dict)):
        raise ValueError(f"{target!r} returned {type(made).__name__}, not a model with its inputs; {cure}")
    return model, args, kwargs

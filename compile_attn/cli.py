"""What can be done from a shell?"""

from __future__ import annotations

import argparse
import ast
import importlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """`compile-attn demo`, `compile-attn explain MODULE:FACTORY`, `compile-attn bench`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        from compile_attn.demo import demo

        return 0 if demo(options.seconds, options.inner, options.html, options.device, options.tokens) else 1
    return _bench(options.name, options.rest) if options.command == "bench" else _explain(options)


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
    explain.add_argument(
        "--kernel", default="auto", help="one kernel for every site, or several: 'flash_attn|general' (default auto)"
    )
    explain.add_argument("--html", help="write the report as one HTML page")
    explain.add_argument("--diff", action="store_true", help="print the graph diff")
    bench = commands.add_parser("bench", help="run a measuring script of the checkout; without a name, list them")
    bench.add_argument("name", nargs="?", help="of a script in bench/")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments, such as --help")
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


def _bench(name: str | None, rest: Sequence[str]) -> int:
    """The scripts are in the checkout only: whoever measures wants their sources too."""
    root = Path(__file__).resolve().parent.parent
    scripts = {file.stem: ast.parse(file.read_text(encoding="utf-8")) for file in sorted((root / "bench").glob("*.py"))}
    scripts = {stem: tree for stem, tree in scripts.items() if any(getattr(node, "name", "") == "main" for node in tree.body)}
    if name in scripts:
        return subprocess.call([sys.executable, "-m", f"bench.{name}", *rest], cwd=root)
    for stem, tree in scripts.items():
        print(f"{stem:14} {(ast.get_docstring(tree) or '').splitlines()[0]}")
    if not scripts:
        print(f"compile-attn: no bench/ in {root}; it is part of the source checkout, where it runs", file=sys.stderr)
    elif name is not None:
        print(f"compile-attn: bench/ has no {name!r}; choose one of the above", file=sys.stderr)
    return 0 if scripts and name is None else 2


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

"""What can be done from a shell?"""

from __future__ import annotations

import argparse
import ast
import difflib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_TARGET = (
    "MODULE:FACTORY, where FACTORY() returns a model, (model, args) or (model, args, kwargs); or a config.json of transformers, or "
    "its folder, whose model gets random weights; or a program that compile_attn.save has written"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """`compile-attn demo`, `explain TARGET`, `diff A B`, `bench`; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        from compile_attn.demo import demo

        return 0 if demo(options.seconds, options.inner, options.html, options.device, options.tokens) else 1
    if options.command == "bench":
        return _bench(options.name, options.rest)
    try:
        return _diff(options) if options.command == "diff" else _explain(options)
    except ValueError as error:
        print(f"compile-attn: {error}", file=sys.stderr)
        return 2


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
    explain.add_argument("target", metavar="TARGET", help=_TARGET)
    _add_how(explain)
    explain.add_argument("--html", help="write the report as one HTML page")
    explain.add_argument("--diff", action="store_true", help="print the graph diff")
    diff = commands.add_parser("diff", help="compare two models or programs: exit status 0 where they are the same, 1 where not")
    diff.add_argument("before", metavar="A", help=_TARGET)
    diff.add_argument("after", metavar="B", help="the same")
    _add_how(diff)
    diff.add_argument("--graphs", action="store_true", help="compare the rewritten graphs, too")
    bench = commands.add_parser("bench", help="run a measuring script of the checkout; without a name, list them")
    bench.add_argument("name", nargs="?", help="of a script in bench/")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its own arguments, such as --help")
    return parser


def _add_how(command: argparse.ArgumentParser) -> None:
    command.add_argument("--paged", action="store_true", help="what a paged KV cache would do; the model alone is needed")
    command.add_argument(
        "--kernel", default="auto", help="one kernel for every site, or several: 'flash_attn|general' (default auto)"
    )


def _explain(options: argparse.Namespace) -> int:
    """Exit status 0: all attention was read; 1: some was not, or the model cannot be paged; 2: bad input."""
    from rich.console import Console

    from compile_attn.programs import is_program
    from compile_attn.targets import report_of

    if options.diff and is_program(options.target):
        raise ValueError(f"{options.target}: a saved program has no graph from before its rewriting; leave --diff out")
    report = report_of(options.target, options.kernel, options.paged)
    Console().print(report)
    if options.diff:
        print(report.diff())
    if options.html:
        report.to_html(options.html)
        print(f"the report is in {options.html}")
    return 1 if report.rejected else 0


def _diff(options: argparse.Namespace) -> int:
    """Exit status 0: nothing of what is printed differs; 1: something does; 2: bad input."""
    from rich.console import Console

    from compile_attn.passes.stable import stable_graph
    from compile_attn.targets import compared

    found, before, after = compared(options.before, options.after, options.kernel, options.paged, options.graphs)
    Console().print(found)
    if not options.graphs:
        return int(bool(found))
    old, new = (stable_graph(report.after or report.before) for report in (before, after))
    lines = list(difflib.unified_diff(old, new, options.before, options.after, lineterm=""))
    print("\n".join(lines) or "the graphs are the same")
    return int(bool(found or lines))


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

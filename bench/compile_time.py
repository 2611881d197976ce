"""How much longer does a model take to compile through paged_attn than through Inductor alone?

Each measurement is a process of its own without any compiler cache, the two kinds in turn; the least of each kind counts.

    python -m bench.compile_time [--repeat 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = 24


def measure(kind: str) -> dict[str, float]:
    """Seconds from the stock model to the first compiled logits; and for paged_attn the phases within them."""
    import torch

    from bench.naive_llama import SHAPES, NaiveLlama

    torch._inductor.config.force_disable_caches = True
    torch.manual_seed(0)
    model = NaiveLlama(SHAPES["tiny-32-layers"]).eval().requires_grad_(False)
    ids = torch.arange(TOKENS)[None]
    _start_compiler()
    if kind == "inductor":
        torch._dynamo.mark_dynamic(ids, 1)
        begin = time.perf_counter()
        with torch.no_grad():
            torch.compile(model, fullgraph=True)(ids)
        return {"total": time.perf_counter() - begin}
    from compile_attn import PagedLM

    begin = time.perf_counter()
    with PagedLM(model, kv_tokens=256, max_seqs=4) as lm:
        total = time.perf_counter() - begin
        assert lm.report is not None and len(lm.report.sites) == SHAPES["tiny-32-layers"].layers
        return {"total": total, **lm.report.seconds}


def _start_compiler() -> None:
    """Imports, worker processes and the C++ compiler's first run belong to neither side."""
    import torch

    import compile_attn.backend  # noqa: F401

    with torch.no_grad():
        torch.compile(torch.nn.Linear(4, 4), fullgraph=True)(torch.ones(3, 4))
    torch._dynamo.reset()


def run(repeat: int) -> dict[str, Any]:
    """All measurements, and the least of each kind with what follows from them."""
    found: dict[str, list[dict[str, float]]] = {"inductor": [], "paged_attn": []}
    for _ in range(repeat):
        for kind, results in found.items():
            command = [sys.executable, "-m", "bench.compile_time", "--measure", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    best = {kind: min(results, key=lambda one: one["total"]) for kind, results in found.items()}
    phases = {name: seconds for name, seconds in best["paged_attn"].items() if name != "total"}
    passes = sum(seconds for name, seconds in phases.items() if name not in ("normalize", "inner"))
    return {
        "measured": found,
        "ratio": best["paged_attn"]["total"] / best["inductor"]["total"],
        "phases": phases,
        "passes_after_normalization": passes / best["paged_attn"]["total"],
        "inductor": best["inductor"]["total"],
        "paged_attn": best["paged_attn"]["total"],
    }


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "seconds", "of the whole", title="Compiling a naive Llama of 32 layers")
    whole = result["paged_attn"]
    table.add_row("Inductor alone", f"{result['inductor']:.2f}", "")
    table.add_row("paged_attn", f"{whole:.2f}", "100 %")
    for name, seconds in result["phases"].items():
        table.add_row(f"  {name}", f"{seconds:.2f}", f"{100 * seconds / whole:.1f} %")
    rest = whole - sum(result["phases"].values())
    table.add_row("  Dynamo and the first step", f"{rest:.2f}", f"{100 * rest / whole:.1f} %")
    console = Console()
    console.print(table)
    console.print(f"ratio {result['ratio']:.3f}; passes after normalization {100 * result['passes_after_normalization']:.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="processes of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--measure", choices=("inductor", "paged_attn"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure(chosen.measure)))
        return
    result = run(chosen.repeat)
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    _print(result)


if __name__ == "__main__":
    main()

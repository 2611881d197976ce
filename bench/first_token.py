"""What takes the time from a server's process to its first token? `bench.start` runs this, once for each start.

    python -m bench.first_token BEGIN < request.json        # BEGIN: time.monotonic() when the process was asked for

The request says shape, device, PagedLM's options, the file of artefacts to load or to save, and whether to warm up. What was found
is the last line of the output. Nothing is imported above: that is what is measured first.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = 100  # tokens
ON_GPU = {"kv_tokens": 196_608, "max_seqs": 256, "max_batch_tokens": 8192}  # as bench.decode has it
ON_CPU = {"kv_tokens": 1024, "max_seqs": 4}
COUNTED = {
    "inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass", "triton_bundler_read_and_emit_kernel"),
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
}


class Phases:
    """Seconds by name, one after the other."""

    def __init__(self, begin: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = begin

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now


def measure(begin: float, request: dict[str, Any]) -> dict[str, Any]:
    phases = Phases(begin)
    phases.done("the interpreter")
    import torch

    phases.done("import torch")
    from bench.naive_llama import SHAPES, random_llama
    from compile_attn import PagedLM

    phases.done("import compile_attn")
    device = torch.device(request["device"])
    on_gpu = device.type == "cuda"
    model = random_llama(SHAPES[request["shape"]], device, torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        torch.cuda.synchronize()
    phases.done("weights")
    if request["load"] and Path(request["load"]).exists():  # not where nothing was compiled
        torch.compiler.load_cache_artifacts(Path(request["load"]).read_bytes())
        phases.done("artefacts loaded")
    lm = PagedLM(model, **{**(ON_GPU if on_gpu else ON_CPU), **request["options"]})
    phases.done("PagedLM")
    [[token]] = lm.generate([[7 * at % lm.vocab_size for at in range(PROMPT)]], max_new_tokens=1)
    phases.done("the first token")
    assert lm.report is not None
    found = {
        "seconds": dict(phases.seconds),
        "token": token,
        "of PagedLM": _parts(phases.seconds["PagedLM"], dict(lm.report.seconds)),
        "graphs": len(lm.cuda_graphs),
        "recording": sum(graph.seconds for graph in lm.cuda_graphs),
        "kernels": sorted({site.kernel for site in lm.report.sites}),
        "counters": _counters(),
    }
    if request["warm_up"]:
        lm.warm_up()
        phases.done("warm-up")
        found["seconds"], found["graphs of a warm-up"] = phases.seconds, len(lm.cuda_graphs)
    if request["save"]:
        saved = torch.compiler.save_cache_artifacts()
        if saved is not None:
            Path(request["save"]).write_bytes(saved[0])
    return found


def _parts(whole: float, ours: dict[str, float]) -> dict[str, float]:
    """PagedLM's time by who has spent it. torch's own timers are private; without one its part counts to the one around it."""
    from torch._dynamo.utils import compilation_time_metrics

    def timed(name: str) -> float:
        return float(sum(compilation_time_metrics.get(name, ())))

    inner = ours.pop("inner", 0.0)
    normalize = ours.pop("normalize", 0.0)
    waiting = min(inner, timed("async_compile.wait"))
    inductor = max(timed("compile_fx.<locals>.fw_compiler_base"), timed("AOTAutogradCache.inductor_load"))
    compiling = timed("_compile.compile_inner")
    found = {
        "Dynamo's capture": max(0.0, compiling - timed("OutputGraph.call_user_compiler")),
        "normalize (tracing to ATen)": normalize,
        "our passes": sum(ours.values()),
        "AOTAutograd": max(0.0, inner - inductor),
        "Inductor": max(0.0, inductor - waiting),
        "waiting for Inductor's kernels": waiting,
    }
    return found | {"the rest: pages, the first step": max(0.0, whole - sum(found.values()))}


def _counters() -> dict[str, int]:
    from torch._dynamo.utils import counters

    return {name: counters[group][name] for group, names in COUNTED.items() for name in names}


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]), json.load(sys.stdin))))

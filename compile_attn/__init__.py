"""Read the attention a PyTorch model computes, and serve it from a paged KV cache.

`torch.compile(model, backend="paged_attn")` needs no import. Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compile_attn.answers import Output
    from compile_attn.cache import Batch, Chunk, OutOfPages, PagedKVCache, StalePrefix
    from compile_attn.calibrating import calibrate
    from compile_attn.comparing import ReportDiff, compare
    from compile_attn.drafting import Drafter, PromptLookup
    from compile_attn.explaining import explain
    from compile_attn.exporting import export
    from compile_attn.kernels.blocksparse_params import BlocksparseParams
    from compile_attn.lm import PagedLM
    from compile_attn.manifest import Manifest, load, save
    from compile_attn.options import Options
    from compile_attn.packages import Package, load_package, package
    from compile_attn.passes.report import RefusedError, Rejected, Report, Rewritten
    from compile_attn.sampling import Sampling

_HOMES = {
    "answers": ("Output",),
    "cache": ("Batch", "Chunk", "OutOfPages", "PagedKVCache", "StalePrefix"),
    "calibrating": ("calibrate",),
    "comparing": ("ReportDiff", "compare"),
    "drafting": ("Drafter", "PromptLookup"),
    "explaining": ("explain",),
    "exporting": ("export",),
    "kernels.blocksparse_params": ("BlocksparseParams",),
    "lm": ("PagedLM",),
    "manifest": ("Manifest", "load", "save"),
    "options": ("Options",),
    "packages": ("Package", "load_package", "package"),
    "passes.report": ("RefusedError", "Rejected", "Report", "Rewritten"),
    "sampling": ("Sampling",),
}
__all__ = [
    "Batch",
    "BlocksparseParams",
    "Chunk",
    "Drafter",
    "Manifest",
    "Options",
    "OutOfPages",
    "Output",
    "Package",
    "PagedKVCache",
    "PagedLM",
    "PromptLookup",
    "RefusedError",
    "Rejected",
    "Report",
    "ReportDiff",
    "Rewritten",
    "Sampling",
    "StalePrefix",
    "calibrate",
    "compare",
    "explain",
    "export",
    "load",
    "load_package",
    "package",
    "save",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"compile_attn.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'compile_attn' has no attribute {name!r}; it has {', '.join(__all__)}")

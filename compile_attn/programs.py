"""What does a saved program say of itself, in the words of a report?

Its manifest tells the sites, and how its pages are stored; a graph from before the rewriting it does not have. A model that is
compared with a program is exported as that one was, so that both sides tell the same.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from compile_attn.comparing import Change, ReportDiff, compare
from compile_attn.manifest import Manifest, load
from compile_attn.passes.graph import placeholders
from compile_attn.passes.pipeline import graph_text
from compile_attn.passes.places import places
from compile_attn.passes.report import RefusedError, Report

if TYPE_CHECKING:
    from torch import nn

_COMPARED = "device", "page_size", "kv_dtype", "vocabulary", "max_tokens"  # max_positions is the report's
_PAGES = 8  # of the cache that a model is exported for; how many there are a program does not know


@dataclass(frozen=True)
class Told:
    """A program as a report, sites and rewritten graph alone, and its manifest; without one where a model cannot be paged."""

    report: Report
    manifest: Manifest | None


def is_program(name: str) -> bool:
    """Whether a word means a saved program, or a package of one: by its ending, or because it is a file of that kind."""
    return name.endswith(".pt2") or zipfile.is_zipfile(name)


def program_at(name: str, graphs: bool) -> Told:
    """Of a file, whose manifest alone is read unless its graph is asked for. ValueError for one that cannot be run here."""
    if not Path(name).is_file():
        raise ValueError(f"there is no {name}; name a program that compile_attn.save or compile_attn.package has written")
    manifest = Manifest.read(Path(name), native=None)
    if graphs and manifest.native is not None:
        raise ValueError(f"{name}: a package holds native code, and no graph; leave --graphs out")
    return _told(load(name), graphs) if graphs else Told(manifest.report(), manifest)


def exported_like(model: nn.Module, told: Manifest, kernel: str, graphs: bool) -> Told:
    """Of a model's program for a cache as the other one's."""
    from compile_attn.cache import PagedKVCache
    from compile_attn.exporting import export

    stored = told.stored or "auto"
    cache = PagedKVCache(_PAGES * told.page_size, told.page_size, max_seqs=2, device=told.device, kv_dtype=stored)
    try:
        return _told(export(model, cache=cache, kernel=kernel, merge_linears=told.merge_linears), graphs)
    except RefusedError as refused:
        return Told(Report("paged", rejected=refused.report.rejected), None)


def compare_programs(before: Told, after: Told) -> ReportDiff:
    """Sites, and what a server must give a program. By whom and with which versions it was made is no difference."""
    found = compare(before.report, after.report)
    if before.manifest is None or after.manifest is None:
        return found
    return replace(found, others=(*found.others, *_changes(before.manifest, after.manifest)))


def _told(program: torch.export.ExportedProgram, graphs: bool) -> Told:
    manifest = Manifest.attached(program)
    return Told(manifest.report(_text(program) if graphs else ""), manifest)


def _changes(before: Manifest, after: Manifest) -> Iterator[Change]:
    old, new = ({**{name: str(getattr(one, name)) for name in _COMPARED}, "pages": _pages(one)} for one in (before, after))
    yield from (Change(name, old[name], new[name]) for name in old if old[name] != new[name])


def _pages(told: Manifest) -> str:
    """The dtype of the keys that are handed to pages, by site where sites differ."""
    modules: dict[str, list[str]] = {}
    for site, layer in zip(told.sites, told.layers, strict=True):
        modules.setdefault(layer["dtype"], []).append(str(site.get("module", "")))
    return "; ".join(dtype if len(modules) == 1 else f"{places(each)}: {dtype}" for dtype, each in modules.items())


def _text(program: torch.export.ExportedProgram) -> str:
    """The graph of a program. It does not say which module a node is of: each stands under that of the weight last read."""
    signature = program.graph_signature
    kept = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = {node: kept[node.name].replace("__", ".") for node in placeholders(program.graph) if node.name in kept}
    module = ""
    for node in program.graph.nodes:
        read = next((names[one] for one in node.all_input_nodes if one in names), None)
        module = module if read is None else read.rpartition(".")[0]
        node.meta["nn_module_stack"] = {"": (module, "")}
        node.meta.pop("stack_trace", None)
    return graph_text(program.graph, names)

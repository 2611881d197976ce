"""Which model or saved program does a word on the command line mean, and what is to be said of it?"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compile_attn.comparing import ReportDiff, compare
from compile_attn.explaining import explain
from compile_attn.passes.report import Report

_TOKENS = 16  # of the call that a configuration's model is explained with
_CURE = "name a function MODULE:FACTORY that returns (model, args), args being what the model is called with"


def report_of(name: str, kernel: str = "auto", paged: bool = False) -> Report:
    """What `explain` says of the model that MODULE:FACTORY returns, or of the causal LM of a config.json of transformers.

    The latter is named by its path or its folder's. Its weights are random, float32, and take no memory where `explain` can do
    without: they are on the meta device first, and on the CPU with `paged`, or where something could not be read without them.
    Of a saved program it is what its manifest says, and of nothing else is the file read.
    ValueError where the target is not there, is something else, or has no inputs and needs them, and without transformers.
    """
    from compile_attn.programs import is_program, program_at

    if is_program(name):
        if kernel != "auto":
            raise ValueError(f"{name}: its kernel was chosen when it was exported; leave --kernel out")
        return program_at(name, graphs=False).report
    if (path := _configuration(name)) is not None:
        return _report_of_configuration(path, kernel, paged)
    model, args, kwargs = _made(name)
    if not (paged or args or kwargs):
        raise ValueError(f"{name!r} returned a model without inputs; return (model, args), or ask for --paged")
    return explain(model, *args, kernel=kernel, paged=paged, **kwargs)


def compared(before: str, after: str, kernel: str, paged: bool, graphs: bool) -> tuple[ReportDiff, Report, Report]:
    """What is different between two targets, and what is said of each; `graphs`: with their rewritten graphs.

    A model beside a saved program is exported as that was: for a cache of such pages, a configuration's in the dtype of its keys.
    """
    from compile_attn.programs import Told, compare_programs, exported_like, is_program, program_at

    names = before, after
    saved = {name: program_at(name, graphs) for name in names if is_program(name)}
    if not saved:
        reports = [report_of(name, kernel, paged) for name in names]
        return compare(*reports), reports[0], reports[1]
    if kernel != "auto" and all(name in saved for name in names):
        raise ValueError("the kernels of saved programs were chosen when they were exported; leave --kernel out")
    like = next(iter(saved.values())).manifest
    assert like is not None  # of a file it was read

    def told(name: str) -> Told:
        if name in saved:
            return saved[name]
        path = _configuration(name)
        dtype = getattr(torch, like.layers[0]["dtype"]) if like.layers else torch.float32
        model = _made(name)[0] if path is None else _configured(path, like.device, dtype)
        return exported_like(model, like, kernel, graphs)

    old, new = map(told, names)
    return compare_programs(old, new), old.report, new.report


def _configuration(name: str) -> Path | None:
    """The file of a target that is a configuration."""
    path = Path(name)
    return path / "config.json" if path.is_dir() else path if path.suffix == ".json" else None


def _made(name: str) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    module, _, factory_name = name.partition(":")
    if "" not in sys.path:  # a module of the working directory, as with python -m
        sys.path.insert(0, "")
    try:
        factory = getattr(importlib.import_module(module), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} was not found ({error}); {_CURE}") from None
    made = factory()
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if 1 <= len(parts) <= 3 else (None, None, None)
    if not (callable(model) and isinstance(args, (tuple, list)) and isinstance(kwargs, dict)):
        raise ValueError(f"{name!r} returned {type(made).__name__}, not a model with its inputs; {_CURE}")
    return model, args, kwargs


def _report_of_configuration(path: Path, kernel: str, paged: bool) -> Report:
    ids = torch.zeros(1, _TOKENS, dtype=torch.long)
    if not paged:
        try:
            report = explain(_configured(path, "meta"), input_ids=ids.to("meta"), use_cache=False, kernel=kernel)
            if not report.rejected:
                return report
        except RuntimeError:  # a model that makes tensors of its own on the CPU; Dynamo's errors are of that kind
            pass
    return explain(_configured(path, "cpu"), input_ids=ids, use_cache=False, kernel=kernel, paged=paged)


def _configured(path: Path, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """No code that comes with a configuration is run, and nothing is downloaded."""
    if not path.is_file():
        raise ValueError(f"there is no {path}; name a config.json of transformers, the folder with it, or MODULE:FACTORY")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise ValueError(f"{path} is a configuration of transformers, which is not installed: pip install transformers") from None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever transformers raises, it is about the file
        raise ValueError(f"{path} makes no causal LM: {error}") from error
    return model.eval()

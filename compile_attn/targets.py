"""Which model does a word on the command line mean, and what does `explain` say of it?"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compile_attn.explaining import explain
from compile_attn.passes.report import Report

_TOKENS = 16  # of the call that a configuration's model is explained with
_CURE = "name a function MODULE:FACTORY that returns (model, args), args being what the model is called with"


def report_of(name: str, kernel: str = "auto", paged: bool = False) -> Report:
    """What `explain` says of the model that MODULE:FACTORY returns, or of the causal LM of a config.json of transformers.

    The latter is named by its path or its folder's. Its weights are random, float32, and take no memory where `explain` can do
    without: they are on the meta device first, and on the CPU with `paged`, or where something could not be read without them.
    ValueError where the target is not there, is something else, or has no inputs and needs them, and without transformers.
    """
    path = Path(name)
    if path.suffix == ".json" or path.is_dir():
        return _report_of_configuration(path / "config.json" if path.is_dir() else path, kernel, paged)
    model, args, kwargs = _made(name)
    if not (paged or args or kwargs):
        raise ValueError(f"{name!r} returned a model without inputs; return (model, args), or ask for --paged")
    return explain(model, *args, kernel=kernel, paged=paged, **kwargs)


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


def _configured(path: Path, device: str) -> Any:
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
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # whatever transformers raises, it is about the file
        raise ValueError(f"{path} makes no causal LM: {error}") from error
    return model.eval()

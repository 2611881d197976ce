"""How is a stranger's model called, where are its logits, and what must be refused before it runs?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Call = Callable[[Callable[..., Any], torch.Tensor, torch.Tensor], Any]


# How transformers' models are asked for plain logits: no cache of their own, no tuple.
_PLAIN: Mapping[str, bool] = {"use_cache": False, "return_dict": True}


def call_of(model: nn.Module) -> Call:
    """How to call the model, by the names in its signature.

    Positions are passed only where forward demands them. The model's own default may be another than 0, 1, 2, ...
    (RoBERTa starts at its padding id + 1), and what is served is `model(input_ids)`.
    """
    accepted = _accepted(model)
    extra = {name: value for name, value in _PLAIN.items() if name in accepted}
    demands_positions = accepted.get("position_ids", False)

    def call(compiled: Callable[..., Any], input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        if demands_positions:
            return compiled(input_ids, position_ids=position_ids, **extra)
        return compiled(input_ids, **extra)

    return call


def unwrapped(model: Any) -> Any:
    """The model itself, where torch.compile has wrapped it already."""
    return getattr(model, "_orig_mod", model)


def position_cure(model: nn.Module) -> str | None:
    """What to try where a model was refused that makes its positions itself, though they could be given to it."""
    accepted = _accepted(model)
    if accepted.get("position_ids", True):
        return None
    more = "".join(f", {name}={value}" for name, value in _PLAIN.items() if name in accepted)
    return (
        "forward takes position_ids, and was called without: the model's own default was to be proven. If its positions are "
        f"0, 1, 2, ..., pass call=lambda model, ids, positions: model(ids, position_ids=positions{more})"
    )


def _accepted(model: nn.Module) -> dict[str, bool]:
    """Names that forward takes, and whether each is demanded; where forward hands **kwargs on, those of `base_model` too."""
    parameters = inspect.signature(model.forward).parameters
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {name: one.default is inspect.Parameter.empty for name, one in parameters.items() if one.kind in named}
    inner = getattr(model, "base_model", None)
    hands_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if hands_on and isinstance(inner, nn.Module) and inner is not model:
        names = _accepted(inner) | names
    return names


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model returned."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and not hasattr(output, "logits"):
        found = output[0] if output else None
    elif not isinstance(output, torch.Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, torch.Tensor) or not found.dtype.is_floating_point:
        raise ValueError(
            f"the model returned {_described(output)}, in which there are no logits; supported are a tensor of logits, "
            "a tuple that starts with it, or an object with .logits: use a model with a vocabulary head, or pass "
            "call=lambda model, input_ids, position_ids: ..., which returns the logits"
        )
    return found


def _described(output: Any) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of {output.dtype}"
    keys = list(output) if isinstance(output, Mapping) else []
    return type(output).__name__ + (f" with {', '.join(map(str, keys))}" if keys else "")


def device_of(model: nn.Module) -> torch.device:
    """The one device of the model's tensors; torch's default device if it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1 or devices == ["meta"]:
        raise ValueError(f"the model's tensors are on {', '.join(devices)}; one device is supported: model.to(device)")
    return tensors[0].device if tensors else torch.get_default_device()


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The dtype of the model's floating-point parameters, where they share one."""
    dtypes = {one.dtype for one in model.parameters() if one.dtype.is_floating_point}
    return dtypes.pop() if len(dtypes) == 1 else None


def check_no_dropout(model: nn.Module) -> None:
    """Refuse a model in training mode whose dropout is on: its logits would be random."""
    for path, module in model.named_modules():
        rate = _dropout(module) if module.training else None
        if rate is not None:
            where = f"{path or 'the model'} ({type(module).__name__})"
            raise ValueError(
                f"the model is in training mode and {where} has dropout {rate}; generation needs dropout off: "
                "call model.eval() first"
            )


def _dropout(module: nn.Module) -> float | None:
    """The dropout rate of this module: nn.Dropout's p, or a number kept under a name with "dropout" in it."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p or None
    for name, value in vars(module).items():
        if "dropout" in name and isinstance(value, float) and value > 0:
            return value
    return None


def vocabulary_of(model: nn.Module, width: int) -> int:
    """How many token ids the model knows; `width` is that of its logits.

    The input embedding says so where the model names it; else a table as long as the logits are wide, or the only one.
    """
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(getattr(table, "num_embeddings", None), int):
        return int(table.num_embeddings)
    sizes = {one.num_embeddings for one in model.modules() if isinstance(one, nn.Embedding)}
    configured = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(configured, int):
        return configured
    return width if width in sizes or len(sizes) != 1 else sizes.pop()

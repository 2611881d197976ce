"""How is a model compiled so that its other compilations neither notice nor limit it?

Dynamo keeps what it compiles with the code of `forward`, which all models of a class share, and stops after a number of
recompilations of it. A compilation of ours must not use up the user's number, nor another of ours this one's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # since torch 2.13


def compiled_apart(model: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    """torch.compile(model, **keywords), apart from every other compilation."""
    compiler: Any = torch.compile
    if CAN_ISOLATE:
        return compiler(model, isolate_recompiles=True, **keywords)  # type: ignore[no-any-return]
    compiled: dict[int, Callable[..., Any]] = {}  # by the number of positional arguments

    def call(*args: Any, **kwargs: Any) -> Any:
        if len(args) not in compiled:
            compiled[len(args)] = compiler(_alone(model, len(args)), **keywords)
        return compiled[len(args)](model, *args, **kwargs)

    return call


def _alone(model: Callable[..., Any], count: int) -> FunctionType:
    """What calls a model with so many positional arguments, with a code object that nobody else has.

    Its parameters have the names of the model's, by which reports then know the inputs.
    """
    code = _CALLS.get(count, _call).__code__.replace()
    named = [name for name, one in _parameters(model) if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)][:count]
    if count in _CALLS and len(named) == count and not {"self", "kwargs"} & set(named):
        code = code.replace(co_varnames=("self", *named, "kwargs"))
    return FunctionType(code, globals())


def _parameters(model: Callable[..., Any]) -> Sequence[tuple[str, inspect.Parameter]]:
    try:
        return list(inspect.signature(getattr(model, "forward", model)).parameters.items())
    except (TypeError, ValueError):  # some callables have no signature
        return []


# `self`: by that name a capture knows the model.


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return self(*args, **kwargs)


def _call_1(self: Callable[..., Any], first: Any, **kwargs: Any) -> Any:
    return self(first, **kwargs)


def _call_2(self: Callable[..., Any], first: Any, second: Any, **kwargs: Any) -> Any:
    return self(first, second, **kwargs)


_CALLS = {1: _call_1, 2: _call_2}

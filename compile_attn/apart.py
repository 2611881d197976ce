"""How is a model compiled so that its other compilations neither notice nor limit it?

Dynamo keeps what it compiles with the code of `forward`, which all models of a class share, and stops after a number of
recompilations of it. A compilation of ours must not use up the user's number, nor another of ours this one's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch

CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters  # since torch 2.13


def compiled_apart(model: Callable[..., Any], **keywords: Any) -> Callable[..., Any]:
    """torch.compile(model, **keywords), apart from every other compilation."""
    compiler: Any = torch.compile
    if CAN_ISOLATE:
        return compiler(model, isolate_recompiles=True, **keywords)  # type: ignore[no-any-return]
    alone = FunctionType(_call.__code__.replace(), globals())  # a code object that nobody else has
    return partial(compiler(alone, **keywords), model)


def _call(self: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # `self`: by that name a capture knows the model
    return self(*args, **kwargs)

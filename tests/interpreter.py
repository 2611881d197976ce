"""How is Triton's interpreter quick enough for tests?

At each call of a device function it looks through all of `triton.language` for what Python has to do instead. The launch that the
call is part of has done so already: looking again took a third of every launch.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any


def quicken() -> None:
    """Replace the words of the language once a launch."""
    if find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang  # private: launches and device functions have nothing else in common

    @functools.cache
    def languages(function: Callable[..., Any]) -> list[Any]:
        known = [each for each in function.__globals__.values() if isinstance(each, types.ModuleType)]
        return [each for each in (tl, tl.core) if each in known]

    def replace_once(function: Callable[..., Any]) -> Any:
        if any(tl.core.is_builtin(each.load) for each in languages(function)):
            return replace(function)
        return None  # a device function's: it is its launch that puts the words back

    interpreter._patch_lang = replace_once

"""How does a Triton function run again without the search for its compiled form?

Triton looks at every argument of every launch to find the form compiled for its type, alignment and constants: longer than
a short kernel runs. A caller that knows when all of that is the same says so with a key.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

_MOST = 4096  # forms that are remembered


class Relaunch:
    """Runs Triton functions, each form of them found once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, Any] = {}

    def __call__(
        self, key: Hashable | None, function: Any, grid: tuple[int, int, int], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        """`args` are all of the function's, constants included. Without a key Triton searches, as it always does."""
        compiled = None if key is None else self._found.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = function[grid](*args, **options)  # None in the interpreter
        if key is not None and compiled is not None:
            if len(self._found) >= _MOST:
                self._found.clear()
            self._found[key] = compiled

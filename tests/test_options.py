"""Are options read, and wrong ones named together with the right ones?"""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from compile_attn.options import Options


def test_defaults() -> None:
    assert Options.read(None) == Options.read({}) == Options("auto", "warn", None, "inductor")


def test_given() -> None:
    assert Options.read({"kernel": "reference", "on_rejected": "keep", "inner": "eager"}) == Options(
        "reference", "keep", None, "eager"
    )


def test_several_kernels() -> None:
    assert Options.read({"kernel": "flash_attn|general"}).kernel == "flash_attn|general"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"kernle": 1, "caches": 2},
            "unknown option 'caches', 'kernle'; known options are kernel, on_rejected, cache, inner, merge_linears, block_sparse$",
        ),
        ({"kernel": "fast"}, r"kernel='fast' is not known; choose one of 'auto', .*'reference'"),
        ({"kernel": "general|fast"}, r"kernel='fast' is not known; choose one of 'sdpa', .*'reference'"),
        ({"kernel": "auto|general"}, "kernel='auto' is not known; choose one of 'sdpa'"),
        ({"on_rejected": "ignore"}, "on_rejected='ignore' is not known; choose one of 'keep', 'warn', 'error'"),
        ({"merge_linears": "yes"}, "merge_linears='yes'; choose True, False, or None for the default"),
        ({"block_sparse": {"block_size": 64}}, "block_sparse={'block_size': 64}; give a compile_attn.BlocksparseParams"),
        ({"inner": "jit"}, "inner='jit' is not known; choose one of 'inductor', 'eager'"),
    ],
)
def test_wrong(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Options.read(options)


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Options().kernel = "sdpa"  # type: ignore[misc]

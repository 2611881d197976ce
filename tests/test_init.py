"""Is every public name there, loaded when it is first used, and is a wrong one told?"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compile_attn as ca


def test_names() -> None:
    assert ca.__all__ == sorted(ca.__all__)
    assert {name for names in ca._HOMES.values() for name in names} == set(ca.__all__)
    assert all(getattr(ca, name).__name__ == name for name in ca.__all__)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'compile_attn' has no attribute 'PagedML'; it has Batch, .*PagedLM"):
        _ = ca.PagedML


def test_no_module_takes_a_public_name() -> None:
    """Importing a submodule sets its name in the package, over a function of that name."""
    modules = {path.stem for path in Path(ca.__file__).parent.glob("*")}
    assert "cache" in modules and not modules & set(ca.__all__)


def test_run_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "compile_attn", "--help"], capture_output=True, text=True, check=True)
    assert "compile-attn" in done.stdout and "explain" in done.stdout and "demo" in done.stdout

"""Which kernel serves a site, and why not the others?"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compile_attn.kernels.backend import Backend, Request
from compile_attn.kernels.spec import AttentionSpec

# name -> (module, class), in the order in which "auto" prefers them. Modules are imported when first asked for.
_BACKENDS = {
    "sdpa": ("compile_attn.kernels.sdpa", "SdpaBackend"),
    "reference": ("compile_attn.kernels.reference", "ReferenceBackend"),
}


@dataclass(frozen=True)
class Choice:
    """The kernel taken, and for every other one the reasons against it."""

    kernel: str
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class UnsupportedError(ValueError):
    """A kernel that the user asked for cannot serve a site."""


def known_kernels() -> tuple[str, ...]:
    """The names that `kernel=` takes, beside "auto"."""
    return tuple(_BACKENDS)


@functools.cache
def backend(name: str) -> Backend:
    """The backend of that name. ValueError for an unknown one, with the known ones."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown kernel {name!r}; known kernels are {', '.join(known_kernels())}")
    module, attribute = _BACKENDS[name]
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def choose(
    spec: AttentionSpec, device: torch.device, dtype: torch.dtype, page_size: int | None, kernel: str = "auto"
) -> Choice:
    """The first backend that can, or the forced one. UnsupportedError says why a forced kernel cannot."""
    request = Request(spec, device, dtype, page_size)
    if kernel != "auto":
        reasons = backend(kernel).reasons(request)
        if reasons:
            raise UnsupportedError(f"kernel {kernel!r} was asked for, but it {'; '.join(reasons)}. The site: {spec.words()}")
        return Choice(kernel, {name: ("another kernel was asked for",) for name in known_kernels() if name != kernel})
    passed_over: dict[str, tuple[str, ...]] = {}
    taken = ""
    for name in known_kernels():
        if taken:
            passed_over[name] = (f"{taken!r} comes first",)
            continue
        reasons = backend(name).reasons(request)
        if reasons:
            passed_over[name] = reasons
        else:
            taken = name
    return Choice(taken, passed_over)

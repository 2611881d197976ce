"""Which kernel serves a site, and why not the others?"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compile_attn.kernels.backend import Backend, Request
from compile_attn.kernels.by_step import ByStep
from compile_attn.kernels.mask import Bidirectional, Causal
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.speeds import BETWEEN, parts_of, speeds
from compile_attn.kernels.visible import block_of

# name -> (module, class). Modules are imported when first asked for.
_BACKENDS = {
    "sdpa": ("compile_attn.kernels.sdpa", "SdpaBackend"),
    "flash_attn": ("compile_attn.kernels.flash_attn", "FlashAttentionBackend"),
    "general": ("compile_attn.kernels.general", "GeneralBackend"),
    "block_sparse": ("compile_attn.kernels.block_sparse", "BlocksparseFlashAttentionBackend"),
    "flashinfer": ("compile_attn.kernels.flashinfer", "FlashInferBackend"),
    "flashinfer_jit": ("compile_attn.kernels.flashinfer", "FlashInferJitBackend"),
    "reference": ("compile_attn.kernels.reference", "ReferenceBackend"),
}


@dataclass(frozen=True)
class Choice:
    """The kernel taken, or several of which each step takes one, and for every other one the reasons against it."""

    kernel: str
    passed_over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    steps: str = ""  # of several: which serves which steps


class UnsupportedError(ValueError):
    """A kernel that the user asked for cannot serve a site."""


def known_kernels() -> tuple[str, ...]:
    """The names that `kernel=` takes, beside "auto", and of which it takes several: "flash_attn|general"."""
    return tuple(_BACKENDS)


@functools.cache
def backend(name: str) -> Backend:
    """The backend of that name, in letters of either case. ValueError for an unknown one; ImportError without its library."""
    if name != name.lower():
        return backend(name.lower())
    parts = parts_of(name)
    for part in parts:
        if part not in _BACKENDS:
            known, inside = ", ".join(map(repr, known_kernels())), f" in {name!r}" if len(parts) > 1 else ""
            raise ValueError(f"unknown kernel {part!r}{inside}; known kernels are {known}, and 'auto' chooses among them")
    if len(parts) > 1:
        return ByStep([backend(part) for part in parts])
    module, attribute = _BACKENDS[name]
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def choose(
    spec: AttentionSpec,
    device: torch.device,
    dtype: torch.dtype,
    page_size: int | None,
    kernel: str = "auto",
    kv_dtype: torch.dtype | None = None,
    needs_grad: bool = False,
) -> Choice:
    """The best backend that can, or several where paged steps differ in which is, or the forced one.

    UnsupportedError says why a forced kernel cannot. Where gradients are needed, SDPA comes first: it alone has a backward.
    """
    request, kernel = Request(spec, device, dtype, page_size, kv_dtype), kernel.lower()
    if kernel != "auto":
        reasons = _reasons(kernel, request)
        if reasons:
            raise UnsupportedError(f"kernel {kernel!r} was asked for, but it {'; it '.join(reasons)}. The site: {spec.words()}")
        others = [name for name in known_kernels() if name not in parts_of(kernel)]
        return Choice(kernel, {name: (f"kernel={kernel!r} was asked for",) for name in others}, _steps(kernel, spec))
    order, measured = _preferred(request), None if needs_grad else speeds(request)
    if needs_grad:
        order = ("sdpa", *(name for name in order if name != "sdpa"))
    reasons_of = {name: _reasons(name, request) for name in order}
    able = [name for name in order if not reasons_of[name]]
    best = (able[0],) if measured is None else measured.several(able) if page_size is not None else (measured.best(able),)
    taken = BETWEEN.join(best)

    def why_not(name: str) -> str:
        """Against a kernel that could."""
        if needs_grad:
            return "could, but has no backward, and gradients are asked for; call under torch.no_grad()"
        slower = None if measured is None else measured.against(name, taken)
        return slower or f"could; {taken!r} is preferred on {device.type}"

    passed_over = {name: reasons or (why_not(name),) for name, reasons in reasons_of.items() if name not in best}
    return Choice(taken, passed_over, _steps(taken, spec))


def _steps(kernel: str, spec: AttentionSpec) -> str:
    run = backend(kernel)
    return run.words(spec) if isinstance(run, ByStep) else ""


def _preferred(request: Request) -> tuple[str, ...]:
    """All kernels, best first where nothing was measured. "reference" serves everything, so the first that can always exists."""
    if request.device.type == "cpu":  # "general" is compiled for GPUs; on a CPU it is interpreted, for tests
        return ("sdpa", "reference", "general", "block_sparse", "flash_attn", "flashinfer", "flashinfer_jit")
    if block_of(request.spec.mask) is not None:  # bench/results/block_sparse.md
        return ("block_sparse", "general", "flash_attn", "flashinfer", "sdpa", "reference", "flashinfer_jit")
    if _needs_mask_tensor(request.spec):  # which SDPA reads from memory, and the others compute
        return ("flash_attn", "general", "block_sparse", "flashinfer", "sdpa", "reference", "flashinfer_jit")
    return ("sdpa", "flash_attn", "general", "block_sparse", "flashinfer", "reference", "flashinfer_jit")


def _needs_mask_tensor(spec: AttentionSpec) -> bool:
    biased = bool(spec.features() & {Feature.BIAS, Feature.ALIBI})
    return biased or not isinstance(spec.mask, (Causal, Bidirectional))


def _reasons(name: str, request: Request) -> tuple[str, ...]:
    try:
        return backend(name).reasons(request)
    except ImportError as error:
        return (f"needs {error.name or 'a library'}, which cannot be imported here ({error}); install it",)

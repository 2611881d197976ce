"""How is a graph given to Inductor, what must its cache of compiled graphs know of our ops, and where does its native code run?

Inductor finds what it has compiled by the graph, in which an op is a name. What else of our ops goes into the code (shapes, what is
written, a lowering) is said by `kernels/ops.py` and here. So the text of both is part of the key.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
from torch import fx

from compile_attn.kernels import ops

# A dtype, layout or memory format of an op comes out as another one in native code: pytorch/pytorch#169157, mended in 2.12.
_MISREAD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)


def by_inductor(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph, compiled; found where another process has compiled the same one."""
    # Private, fenced here: the call that torch.compile's own "inductor" backend makes.
    from torch._inductor.compile_fx import compile_fx

    with _knowing_our_ops():
        compiled: Any = compile_fx(module, list(inputs))
    return compiled  # type: ignore[no-any-return]


def ahead_of_time(module: fx.GraphModule, inputs: Sequence[torch.Tensor], path: str) -> None:
    """The graph as AOTInductor's package, a file of native code that torch loads; all tensors are its inputs.

    ValueError where the code would call an op with other arguments than the graph does, or crash when it is loaded.
    """
    # Private, fenced here: what torch._inductor.aoti_compile_and_package does with a program, for a graph and fake inputs.
    from torch._inductor.compile_fx import compile_fx_aot
    from torch._inductor.package.package import package_aoti

    specs = {"aot_inductor.serialized_in_spec": "", "aot_inductor.serialized_out_spec": ""}
    with _knowing_our_ops(), _sound_calls() as wrong:
        files: Any = compile_fx_aot(module, list(inputs), config_patches={"aot_inductor.package": True, **specs})
    if wrong:
        raise ValueError(f"{wrong[0]}, for which native code of torch {_here()['torch']} puts another; newer torch does not")
    _check_runtime([file for file in files if str(file).endswith(".so")])
    package_aoti(path, files)


def native_code(path: str, device: torch.device) -> Callable[..., Any]:
    """What `ahead_of_time` has written, loaded: called with its inputs, on the current stream, it gives the first output.

    It waits for nothing, so that CUDA graphs can be recorded of it.
    """
    place = -1 if device.index is None else device.index
    # Private, fenced here: `boxed_run`, since the package as called by torch reads how its inputs nest from JSON, at every call.
    run = torch._inductor.aoti_load_package(path, run_single_threaded=True, device_index=place).loader.boxed_run
    return lambda *tensors: run(list(tensors))[0]


def needs_of_native_code(device: torch.device) -> dict[str, str]:
    """What must be the same where native code for this device that is compiled here is run."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa  # private, fenced here: what the compiler is told to use

    gpu = "" if device.type != "cuda" else ".".join(map(str, torch.cuda.get_device_capability(device)))
    return {**_here(), "ops": _what_ops_are(), "vectors": str(pick_vec_isa() or ""), "gpu": gpu}


def cannot_run(needs: Mapping[str, str]) -> str | None:
    """Why native code that needs this cannot be run here; None where it can."""
    here = _here()
    for name, what in (("system", "system"), ("machine", "processor"), ("torch", "torch")):
        if needs.get(name) != here[name]:
            return f"its code is for {what} {needs.get(name)}, and this is {here[name]}"
    if needs.get("ops") != _what_ops_are():
        return "its code calls ops of another version of paged_attn"
    missing = sorted(set(needs.get("vectors", "").split()) - _vectors())
    if missing:
        return f"its code uses {', '.join(missing)}, which this processor does not have"
    gpu = needs.get("gpu")
    found = ".".join(map(str, torch.cuda.get_device_capability())) if gpu else ""
    return f"its code is for GPUs of compute capability {gpu}, and this one has {found}" if gpu and gpu != found else None


def _here() -> dict[str, str]:
    release = ".".join(torch.__version__.split(".")[:2])
    return {"system": sys.platform, "machine": platform.machine(), "torch": release}


def _vectors() -> set[str]:
    # Private, fenced here: Inductor's names for what the processor has. Of an x86 without trying its compiler; of others it tells
    # nothing but which one it would take.
    from torch._inductor.cpu_vec_isa import pick_vec_isa, x86_isa_checker

    return set(x86_isa_checker()) or set(str(pick_vec_isa() or "").split())


def _knowing_our_ops() -> Any:
    _teach()
    config: Any = torch.compiler.config
    return config.patch(cache_key_tag=config.cache_key_tag + _what_ops_are())


@contextlib.contextmanager
def _sound_calls() -> Iterator[list[str]]:
    """Native code stops at an op that has failed, as of torch 2.13; that of 2.11 goes on. Gives what it would call wrongly."""
    # Private, fenced here: the lines that call an op which has no function in C of its own.
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    name, call = "generate_fallback_kernel_with_runtime_lookup_aot", "aoti_torch_proxy_executor_call_function("
    generate = getattr(CppWrapperCpu, name)
    wrong: list[str] = []

    def checked(self: Any, op: Any, given: Sequence[Any], *more: Any) -> None:
        begin = len(self.lines)
        generate(self, op, given, *more)
        for place, line in enumerate(self.lines[begin:], begin):
            if isinstance(line, str) and line.startswith(call):
                self.lines[place] = f"AOTI_TORCH_ERROR_CODE_CHECK({line.removesuffix(';')});"
        kinds = torch.dtype, torch.layout, torch.memory_format
        wrong.extend(f"{op} takes a {type(each).__name__}" for each in given if _MISREAD and isinstance(each, kinds))

    setattr(CppWrapperCpu, name, checked)
    try:
        yield wrong
    finally:
        setattr(CppWrapperCpu, name, generate)


def _check_runtime(libraries: Sequence[str]) -> None:
    """A C++ runtime of its own, beside torch's, crashes when it is first used: as soon as the code is loaded."""
    for library in libraries:
        text = Path(library).read_bytes()
        if sys.platform == "linux" and b"libstdc++.so" not in text and b"libc++.so" not in text:  # by name, as what it needs
            raise ValueError(
                f"the C++ compiler ({torch._inductor.config.cpp.cxx[-1]}) has put libstdc++ into the code, which would crash torch "
                "when it is loaded; set CXX to a compiler that links it dynamically"
            )


@functools.cache
def _teach() -> None:
    """`once` keeps its tensor in memory. Private, fenced here: without this lowering the op would copy the tensor."""
    from torch._inductor.lowering import register_lowering

    def keep(x: Any) -> Any:
        x.realize()
        return x

    register_lowering(torch.ops.paged_attn.once.default, type_promotion_kind=None)(keep)


@functools.cache
def _what_ops_are() -> str:
    text = "".join(inspect.getsource(module) for module in (ops, sys.modules[__name__]))
    return f"paged_attn-{hashlib.sha256(text.encode()).hexdigest()}"

"""What code would Inductor write for a GPU that is not there?

The graph is traced on the CPU, as it always is, and its fake tensors then say that they are on a GPU: Inductor's lowering, fusion
and code generation need no more of a GPU than a few of its properties. Nothing is compiled by Triton, and nothing runs.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._functorch.config
import torch._inductor.config
from torch import fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch.utils._pytree import tree_leaves

import compile_attn as ca
import compile_attn.backend
import compile_attn.inductor

GPU = torch.device("cuda:0")
H200 = types.SimpleNamespace(
    type="cuda", index=0, name="H200", major=9, minor=0, multi_processor_count=132, warp_size=32, total_memory=140 << 30,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, gcnArchName="",
    L2_cache_size=50 << 20, shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
)  # fmt: skip


class _Written(Exception):
    """The code has been written; stop there."""


def gpu_code(model: nn.Module, **options: Any) -> str:
    """The wrapper that Inductor would write for the paged form of this model, kernels included."""
    written: list[str] = []

    def instead(rewriting: Any, _: Any) -> Any:
        with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(rewriting.inputs.mode)):
            compile_fx(rewriting.module, rewriting.inputs.values, inner_compile=inner)

    def inner(module: fx.GraphModule, examples: list[Any], **keywords: Any) -> Any:
        _move(module, examples)
        with _pretended():
            return compile_fx_inner(module, examples, **keywords)

    def write(graph: GraphLowering) -> Any:
        code, _ = graph.codegen()
        written.append(code if isinstance(code, str) else code.value)
        raise _Written

    compile_attn.inductor._teach()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(compile_attn.backend, "compile_paged", instead))
        stack.enter_context(mock.patch.object(GraphLowering, "compile_to_module", write))
        stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        stack.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        try:
            ca.PagedLM(model, kv_tokens=64, max_seqs=2, **options)
        except Exception as error:
            if not written:
                raise AssertionError("no code was written") from error
    return written[0]


def _move(module: fx.GraphModule, examples: list[Any]) -> None:
    def there(argument: Any) -> Any:
        return GPU if isinstance(argument, torch.device) else argument

    for node in module.graph.nodes:
        node.args, node.kwargs = fx.node.map_aggregate(node.args, there), fx.node.map_aggregate(node.kwargs, there)
    for value in tree_leaves([[node.meta.get("val") for node in module.graph.nodes], examples]):
        if isinstance(value, torch.Tensor):
            value.fake_device = GPU  # type: ignore[attr-defined]
    module.recompile()


@contextmanager
def _pretended() -> Iterator[None]:
    """What Inductor asks a GPU."""

    def give(value: Any) -> Any:
        return staticmethod(lambda *_, **__: value)

    with ExitStack() as stack:
        for where in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(where, "get_device_properties", give(H200)))
            stack.enter_context(mock.patch.object(where, "current_device", give(0)))
        answers = {"is_available": True, "get_compute_capability": 90, "raise_if_triton_unavailable": None}
        for name, value in answers.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, give(value)))
        cuda = {"is_available": True, "is_initialized": True, "current_device": 0, "device_count": 1, "_exchange_device": 0}
        cuda |= {"_maybe_exchange_device": 0, "get_device_capability": (9, 0), "_lazy_init": None, "synchronize": None}
        cuda |= {"get_device_properties": H200, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None}
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, give(value).__func__))
        stack.enter_context(mock.patch.object(torch.version, "cuda", "13.0"))
        stack.enter_context(mock.patch.object(AsyncCompile, "triton", lambda *_, **__: None))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", lambda *_: True))
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch("torch.utils._triton.triton_hash_with_backend", lambda: "none"))
        yield

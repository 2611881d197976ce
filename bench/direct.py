"""How does a person call FlashAttention-3 and FlashInfer on pages without this project?

Each function names the ways that the library offers; a way plans, as an engine does once a step, and gives a call that returns
the outputs of every layer. ImportError says which library is missing.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.paged_case import PAGE_SIZE, Inputs

Call = Callable[[], Sequence[torch.Tensor]]
Ways = Mapping[str, Callable[[], Call]]
WORKSPACE = 256 << 20  # bytes; FlashInfer's documentation recommends 128 MiB, split prefills of long prompts take more
SPLITS = 32  # most parts of a sequence under a CUDA graph: vLLM's own default


def flash_attn(inputs: Inputs, captured: bool) -> Ways:
    """FA3 as vLLM builds it: the plan by the library's heuristic, and with vLLM's bound on splits."""
    _load_fa3()
    return {f"fa3, {splits or 'free'} splits": partial(_fa3, inputs, splits) for splits in (0, SPLITS)}


def _load_fa3() -> None:
    """From the file that PAGED_ATTN_FA3 names, or out of an installed vLLM."""
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        return
    told = os.environ.get("PAGED_ATTN_FA3")
    vllm = importlib.util.find_spec("vllm")
    found = Path(told) if told else None
    if found is None and vllm is not None and vllm.submodule_search_locations:
        found = Path(vllm.submodule_search_locations[0]) / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    if found is None or not found.exists():
        raise ImportError("FlashAttention-3 as vLLM builds it is not here; pip install vllm, or set PAGED_ATTN_FA3", name="vllm")
    torch.ops.load_library(found)


def _fa3(inputs: Inputs, splits: int) -> Call:
    ops, spec, case, at = torch.ops._vllm_fa3_C, inputs.spec, inputs.case, inputs.metadata
    starts, lengths = at.cu_seqlens_q, at.seq_lens
    plan = ops.get_scheduler_metadata(
        len(case.rows), case.most_new, case.longest, spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.head_dim_v,
        inputs.dtype, lengths, starts, None, None, None, None, PAGE_SIZE, 0, True, -1, -1, False, splits, None, 0,
    )  # fmt: skip

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = ops.fwd(
            inputs.q, k, v, None, None, None, None, starts, None, None, None, lengths, case.most_new, case.longest,
            at.block_table, None, None, None, None, None, None, None, None, spec.scale, True, -1, -1, 0.0, True,
            plan, splits, None, 0, None, 1, 0, None,
        )[0]  # fmt: skip
        return out

    return lambda: [attend(k, v) for k, v in inputs.layers]


def flashinfer(inputs: Inputs, captured: bool) -> Ways:
    """The decode wrapper with and without tensor cores, or the prefill wrapper over fa2 and fa3."""
    import flashinfer  # noqa: F401  missing: said before anything is planned

    if inputs.case.most_new == 1:
        return {
            f"decode, {'tensor' if cores else 'CUDA'} cores": partial(_decode, inputs, captured, cores) for cores in (False, True)
        }
    return {f"prefill, {kind}": partial(_prefill, inputs, captured, kind) for kind in ("fa2", "fa3")}


def _decode(inputs: Inputs, captured: bool, tensor_cores: bool) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper as Wrapper

    pages, names = _pages(inputs), ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
    held = _held(inputs, names, pages) if captured else {}
    wrapper = Wrapper(_workspace(inputs), "NHD", use_cuda_graph=captured, use_tensor_cores=tensor_cores, **held)
    wrapper.plan(*pages, *_sizes(inputs), **_kinds(inputs))
    return lambda: [wrapper.run(inputs.q, layer) for layer in inputs.layers]


def _prefill(inputs: Inputs, captured: bool, kind: str) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper as Wrapper

    where = (inputs.metadata.cu_seqlens_q.cpu(), *_pages(inputs))
    names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
    held = _held(inputs, names, where) if captured else {}
    wrapper = Wrapper(_workspace(inputs), "NHD", use_cuda_graph=captured, backend=kind, **held)
    wrapper.plan(*where, *_sizes(inputs), causal=True, **_kinds(inputs))
    return lambda: [wrapper.run(inputs.q, layer) for layer in inputs.layers]


def _pages(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First page of each sequence and page numbers, one after another, and the tokens in each last page."""
    lengths = inputs.metadata.seq_lens.cpu()
    counts = (lengths + PAGE_SIZE - 1) // PAGE_SIZE
    first = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)])
    numbers = torch.tensor([page for table in inputs.tables for page in table], dtype=torch.int32, device=inputs.device)
    return first, numbers, (lengths - 1) % PAGE_SIZE + 1


def _held(inputs: Inputs, names: Sequence[str], like: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Buffers whose addresses a CUDA graph may keep."""
    return {name: tensor.to(inputs.device, copy=True) for name, tensor in zip(names, like, strict=True)}


def _workspace(inputs: Inputs) -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=inputs.device)


def _sizes(inputs: Inputs) -> tuple[int, ...]:
    return inputs.spec.num_q_heads, inputs.spec.num_kv_heads, inputs.spec.head_dim, PAGE_SIZE


def _kinds(inputs: Inputs) -> dict[str, object]:
    return {"sm_scale": inputs.spec.scale, "q_data_type": inputs.dtype, "kv_data_type": inputs.dtype}


LIBRARIES: dict[str, Callable[[Inputs, bool], Ways]] = {"flash_attn": flash_attn, "flashinfer": flashinfer}

"""FlashInfer's wrappers as far as the backend uses them, in plain torch: what `plan` was told, `run` computes, loudly."""

from __future__ import annotations

import types
from typing import Any

import torch

_NAMES = ("qo_indptr", "kv_indptr", "indices", "last_page_len")


class Wrapper:
    """Keeps what it was made with and every call of `plan`. With a graph, arrays live in the buffers given to it."""

    made: list[Wrapper] = []  # noqa: RUF012  one list for all kinds, emptied by `module`

    def __init__(self, workspace: torch.Tensor, layout: str, *, use_cuda_graph: bool = False, backend: str, **options: Any) -> None:
        assert layout == "NHD"
        self.options, self.backend, self.graph = options, backend, use_cuda_graph
        self.workspaces = [workspace]
        self.plans: list[dict[str, Any]] = []
        self.arrays: dict[str, torch.Tensor] = {}
        self.planned: dict[str, torch.Tensor] = {}
        self.pinned: list[int] = []
        self._pin_memory_int_workspace_buffer = torch.zeros(8, dtype=torch.uint8)
        Wrapper.made.append(self)

    def workspace_size(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        return 100 << 20, 1000

    def reset_workspace_buffer(self, workspace: torch.Tensor, plan_bytes: torch.Tensor) -> None:
        assert workspace.numel() >= 100 << 20 and plan_bytes.numel() >= 1000
        self.workspaces += [workspace, plan_bytes]

    def take(self, arrays: tuple[torch.Tensor, ...], sizes: tuple[int, ...], keywords: dict[str, Any]) -> None:
        given = dict(zip(_NAMES[-len(arrays) :], arrays, strict=True))
        for name in ("qo_indptr", "kv_indptr", "last_page_len"):
            if name in given:
                assert given[name].device.type == "cpu" and given[name].dtype == torch.int32
        buffers = self.buffers() if self.graph else {}
        for name, value in given.items():
            if self.graph:
                buffers[name][: len(value)].copy_(value)
                self.arrays[name] = buffers[name]
            else:
                self.arrays[name] = value.clone()
        self.planned = {name: given[name].clone() for name in ("qo_indptr", "kv_indptr") if name in given}
        self.plans.append({"sizes": sizes, **keywords})
        self.pinned.append(self._pin_memory_int_workspace_buffer.data_ptr())

    def buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def attend(self, q: torch.Tensor, pools: tuple[torch.Tensor, ...], extra: tuple[Any, ...], out: torch.Tensor) -> None:
        arrays, plan = self.arrays, self.plans[-1]
        for name, planned in self.planned.items():
            assert torch.equal(planned, arrays[name]), f"a stale plan: {name}"
        starts = arrays["kv_indptr"].tolist()
        queries = arrays["qo_indptr"].tolist() if "qo_indptr" in arrays else list(range(len(starts)))
        assert (
            q.shape[0] == queries[-1] == out.shape[0] and plan["q_data_type"] == q.dtype and plan["kv_data_type"] == pools[0].dtype
        )
        for row, last in enumerate(arrays["last_page_len"].tolist()):
            pages = arrays["indices"][starts[row] : starts[row + 1]].long()
            length = (len(pages) - 1) * pools[0].shape[1] + last
            k, v = (pool[pages].flatten(0, 1)[:length].float() for pool in pools)
            span = slice(queries[row], queries[row + 1])
            out[span] = one(q[span].float(), k, v, plan, extra).to(out.dtype)


def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: dict[str, Any], extra: tuple[Any, ...] = ()) -> torch.Tensor:
    """One request, q [n, Hq, D] over k and v [L, Hkv, D]: the last query is aligned with the last key."""
    count, heads, length = q.shape[0], q.shape[1], k.shape[0]
    if length == 0:
        return torch.zeros(count, heads, v.shape[2])
    k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    sinks, scale = extra if extra else (None, plan["sm_scale"])
    score = torch.einsum("ihd,jhd->hij", q, k) * scale
    i, j = torch.arange(count)[:, None] + length - count, torch.arange(length)
    if plan["pos_encoding_mode"] == "ALIBI":
        slopes = torch.tensor([2.0 ** (-8 / heads * (h + 1)) for h in range(heads)])
        score = score + slopes[:, None, None] * (j - i)
    if plan["logits_soft_cap"] > 0:
        score = plan["logits_soft_cap"] * torch.tanh(score / plan["logits_soft_cap"])
    hidden = (j > i) & plan.get("causal", False)
    if plan["window_left"] >= 0:
        hidden = hidden | (i - j > plan["window_left"])
    score = score.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        score = torch.cat([score, sinks[:, None, None].expand(heads, count, 1)], -1)
    return torch.einsum("hij,jhd->ihd", score.softmax(-1)[..., :length], v)


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
        return dict(zip(_NAMES[1:], (self.options[name] for name in names), strict=True))

    def plan(self, kv_indptr: Any, indices: Any, last_page_len: Any, *sizes: int, **keywords: Any) -> None:
        self.take((kv_indptr, indices, last_page_len), sizes, keywords)

    def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, ...], *, out: torch.Tensor) -> None:
        self.attend(q, pools, (), out)


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def buffers(self) -> dict[str, torch.Tensor]:
        names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
        return dict(zip(_NAMES, (self.options[name] for name in names), strict=True))

    def plan(self, qo_indptr: Any, kv_indptr: Any, indices: Any, last_page_len: Any, *sizes: int, **keywords: Any) -> None:
        self.take((qo_indptr, kv_indptr, indices, last_page_len), sizes, keywords)

    def run(self, q: torch.Tensor, pools: tuple[torch.Tensor, ...], *extra: Any, out: torch.Tensor) -> None:
        assert bool(extra) == ("jit_args" in self.options)  # the plain kernels ignore sinks without a word
        self.attend(q, pools, extra, out)


class BatchPrefillWithRaggedKVCacheWrapper(Wrapper):
    def plan(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, *sizes: int, **keywords: Any) -> None:
        self.arrays = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr}
        self.plans.append({"sizes": sizes, **keywords})

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor) -> None:
        starts = [self.arrays[name].tolist() for name in ("qo_indptr", "kv_indptr")]
        for row in range(len(starts[0]) - 1):
            queries, keys = (slice(each[row], each[row + 1]) for each in starts)
            out[queries] = one(q[queries].float(), k[keys].float(), v[keys].float(), self.plans[-1])


def module() -> types.ModuleType:
    """A module to stand for `flashinfer`."""
    Wrapper.made.clear()
    made = types.ModuleType("flashinfer")
    for kind in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper):
        setattr(made, kind.__name__, kind)
    return made

"""How does a stateless call go through FlashInfer? Every sequence has the same lengths, so a plan follows from shapes alone."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from typing import Any

import torch

from compile_attn.kernels.flashinfer_plans import Problem, workspace

_KEPT = 8  # plans of shapes no longer called, which hold 16 MiB each
_Key = tuple[Problem, int, int, int, torch.device]


class RaggedPlans:
    """One plan for each problem and shapes, made once: a CUDA graph that holds a call never sees another."""

    def __init__(self) -> None:
        self._plans: OrderedDict[_Key, Any] = OrderedDict()
        self._recorded: dict[_Key, Any] = {}

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem: Problem) -> torch.Tensor:
        """q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D] -> [B, Hq, Tq, D]; i and j count from 0."""
        batch, _, tokens, _ = q.shape
        if problem.causal and k.shape[2] > tokens:  # the library aligns the last query with the last key; here the first ones are
            k, v = k[:, :, :tokens], v[:, :, :tokens]
        keys = k.shape[2]
        if problem.causal and tokens > keys:
            raise ValueError(
                f"flashinfer: a causal call without a cache has {tokens} queries and {keys} keys; "
                "it takes at most as many queries as keys; choose kernel='auto'"
            )
        out = q.new_empty((batch, tokens, *q.shape[1::2])).transpose(1, 2)
        if out.numel() == 0:
            return out
        packed = (_packed(each) for each in (q, k, v))
        wrapper = self._wrapper((problem, batch, tokens, keys, q.device))
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            wrapper.run(*packed, out=_packed(out))
        return out

    def _wrapper(self, key: _Key) -> Any:
        recording = key[-1].type == "cuda" and torch.cuda.is_current_stream_capturing()
        found = self._recorded.get(key) or self._plans.get(key)
        if found is None and recording:
            raise RuntimeError("flashinfer has no plan for a call in a CUDA graph; call the model once before it is recorded")
        if found is None:
            found = _planned(key)
        if recording:
            self._recorded[key] = found
        else:
            self._plans[key] = found
            self._plans.move_to_end(key)
            while len(self._plans) > _KEPT:
                self._plans.popitem(last=False)
        return found


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B * T, H, D], a view if the model lays tokens out one after the other."""
    return tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3])


def _planned(key: _Key) -> Any:
    problem, batch, tokens, keys, device = key
    library, kernel = importlib.import_module("flashinfer"), problem.for_many(tokens, device)
    room = workspace(device)
    with torch.cuda.device_of(room):  # type: ignore[no-untyped-call]
        wrapper = library.BatchPrefillWithRaggedKVCacheWrapper(room, "NHD", backend=kernel)
        sizes = (problem.num_q_heads, problem.num_kv_heads, problem.head_dim)
        starts = (torch.arange(batch + 1, dtype=torch.int32, device="cpu") * length for length in (tokens, keys))
        try:
            wrapper.plan(*starts, *sizes, causal=problem.causal, **problem.options())
        except RuntimeError as error:
            if not problem.goes_without_fa3(kernel, error):
                raise
            return _planned(key)
    return wrapper

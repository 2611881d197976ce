"""What may be asked of a `PagedLM`, and what does it come to?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from compile_attn.cache import PagedKVCache
from compile_attn.calling import device_of, dtype_of
from compile_attn.kv_dtype import Scales
from compile_attn.pages import at_least_one
from compile_attn.preempting import Preempting
from compile_attn.sampling import Sampling
from compile_attn.step import token_array
from compile_attn.swap_cost import SwapCost
from compile_attn.swapping import SwapSpace

Prompts = Sequence[Sequence[int] | torch.Tensor] | torch.Tensor
# A step of so many tokens takes long enough to keep every core busy, and decodes that share it do not wait much longer.
_BATCH_TOKENS = {"cpu": 512, "gpu": 8192}


def tokens_a_step(asked: int | None, device: torch.device) -> int:
    """Most new tokens in one step."""
    if asked is not None and (type(asked) is not int or asked < 1):
        raise ValueError(f"max_batch_tokens={asked!r}; it must be a whole number of at least 1, or None")
    return asked or _BATCH_TOKENS["gpu" if device.type == "cuda" else "cpu"]


def graphs_wanted(asked: str | bool, device: torch.device) -> str | bool:
    """Whether steps are to be replayed from CUDA graphs."""
    if asked not in ("auto", True, False):
        raise ValueError(f"cuda_graphs={asked!r}; choose 'auto', True or False")
    if asked is True and device.type != "cuda":
        raise ValueError(f"cuda_graphs=True, but the model is on {device}; move it to a GPU, or choose 'auto'")
    return device.type == "cuda" and asked


def preempting_for(model: nn.Module, cache: PagedKVCache, swap_tokens: int) -> Preempting:
    """Host memory for so many tokens of a cache that is bound to the model."""
    space = SwapSpace(cache, swap_tokens)
    parameters = sum(each.numel() for each in model.parameters())
    return Preempting(space, SwapCost.estimated(space.bytes_a_token, parameters, cache.device.type))


def cache_for(
    model: nn.Module,
    kv_tokens: int | None,
    budget: int,
    fraction: float,
    *,
    page_size: int,
    max_seqs: int,
    kv_dtype: torch.dtype | str,
    max_seq_len: int | None,
    kv_scales: Scales | None,
    poison: bool,
) -> PagedKVCache:
    """The cache of a model; for kv_tokens=None one that holds a full step of `budget` tokens, to be measured with."""
    device = device_of(model)
    if kv_tokens is None:
        _check_can_measure(device, fraction)
        size, most = at_least_one("page_size", page_size), at_least_one("max_seqs", max_seqs)
        kv_tokens = (-(-budget // size) + most) * size
    cache = PagedKVCache(kv_tokens, page_size, max_seqs, device, kv_dtype, max_seq_len, kv_scales=kv_scales, poison=poison)
    own, kept = dtype_of(model), cache.pools.kv_dtype
    if kept is not None and cache.pools.fp8 is None and own is not None and own != kept:  # not only after the compilation
        raise ValueError(f"kv_dtype={kept}, but the model's parameters are {own}; use kv_dtype='auto' or convert the model")
    return cache


def work_of(
    prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None, max_new_tokens: int | None, vocabulary: int
) -> list[tuple[list[int], Sampling]]:
    """The token ids of each prompt, and how it is sampled."""
    if isinstance(prompts, Sequence) and any(isinstance(one, int) for one in prompts):
        raise ValueError("prompts is one flat list; give a list of prompts, as in generate([[1, 2, 3]])")
    how = [sampling or Sampling()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
    if len(how) != len(prompts):
        raise ValueError(f"{len(how)} samplings for {len(prompts)} prompts; give one for all, or one for each")
    if max_new_tokens is not None:
        how = [replace(one, max_new_tokens=max_new_tokens) for one in how]
    return [(_token_ids(prompt, vocabulary), one) for prompt, one in zip(prompts, how, strict=True)]


def _token_ids(prompt: Sequence[int] | torch.Tensor, vocabulary: int) -> list[int]:
    ids = token_array(prompt)
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"token id {int(ids.max())} is outside the model's vocabulary of {vocabulary} (0 to "
            f"{vocabulary - 1}); use the model's own tokenizer"
        )
    plain: list[int] = ids.tolist()
    return plain


def _check_can_measure(device: torch.device, fraction: float) -> None:
    if device.type != "cuda":
        raise ValueError(f"kv_tokens=None sizes the cache from a GPU's memory, and the model is on {device}; give a number")
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction={fraction!r}; it must be above 0 and at most 1")

"""By which scales does a model's fp8 cache hold its keys and values?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from compile_attn.calling import Call
from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.kv_dtype import read_kv_dtype

# Keys and values up to this many times the largest of the calibration still fit. A factor of 2 takes one of the 15 (e5m2: 29)
# binary orders that fp8 has, from the smallest numbers, and costs no digit of the others.
HEADROOM = 2.0
PAGE_SIZE = 16


def calibrate(
    model: nn.Module,
    prompts: Sequence[Sequence[int] | torch.Tensor] | torch.Tensor,
    kv_dtype: torch.dtype | str = "fp8_e4m3",
    *,
    kernel: str = "auto",
    call: Call | None = None,
    block_sparse: BlocksparseParams | None = None,
) -> list[tuple[float, float]]:
    """Scales for `PagedLM(model, kv_dtype=..., kv_scales=...)`: a pair for K and V of each attention site, in order.

    The prompts are read once, with keys and values in the model's own dtype, and a scale is twice the largest of them over the
    largest number of fp8. Some dozen prompts like those to be served are enough. The result is plain numbers: keep them in a file.
    `kernel`, `call` and `block_sparse` as in PagedLM. The model is compiled for this alone, without an inner compiler.
    """
    from compile_attn.lm import PagedLM

    stored = read_kv_dtype(kv_dtype)
    if stored is None or stored.itemsize > 1:
        raise ValueError(f"kv_dtype={kv_dtype!r} takes no scales; calibrate for 'fp8_e4m3' or 'fp8_e5m2'")
    if not len(prompts):
        raise ValueError("no prompts to calibrate on; give a list of prompts, as in calibrate(model, [[1, 2, 3]])")
    tokens = -(-max(map(len, prompts)) // PAGE_SIZE) * PAGE_SIZE + PAGE_SIZE
    with PagedLM(
        model,
        tokens,
        PAGE_SIZE,
        max_seqs=1,
        kernel=kernel,
        cuda_graphs=False,
        inner="eager",
        call=call,
        block_sparse=block_sparse,
    ) as lm:
        pools = [*lm.cache.k_pages, *lm.cache.v_pages]
        for pool in pools:
            pool.zero_()  # the keys of PagedLM's own first call
        largest = torch.zeros(len(pools), device=lm.cache.device)
        for prompt in prompts:  # one at a time: pages are used again by the next
            lm.generate([prompt], max_new_tokens=1, progress=False)
            largest = torch.maximum(largest, torch.stack([pool.abs().amax().float() for pool in pools]))
    limit = torch.finfo(stored).max / HEADROOM
    scales = [value / limit if value else 1.0 for value in largest.tolist()]
    if not all(map(math.isfinite, scales)):
        raise ValueError("the model makes keys or values that are not finite on these prompts, so they have no scale")
    sites = len(scales) // 2
    return list(zip(scales[:sites], scales[sites:], strict=True))

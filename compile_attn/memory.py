"""How many tokens does a GPU hold beside the model?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compile_attn.cache import PagedKVCache


def tokens_that_fit(cache: PagedKVCache, profile: Callable[[], int], fraction: float) -> int:
    """Tokens whose keys and values fit into what the largest steps leave of `fraction` of the GPU's memory.

    `profile` runs the largest step there is against the cache as it is; its peak, less the cache's own pages, stays free, and so
    do the bytes it returns, which recorded steps hold for good. Never more than max_seqs sequences of the model's greatest
    length. ValueError where not even one sequence of one page fits.
    """
    torch.cuda.synchronize(cache.device)
    torch.cuda.reset_peak_memory_stats(cache.device)
    recorded = profile()
    torch.cuda.synchronize(cache.device)
    peak = torch.cuda.max_memory_allocated(cache.device)
    free, total = torch.cuda.mem_get_info(cache.device)
    others = total - free - torch.cuda.memory_reserved(cache.device)  # of other programs, and what torch did not allocate
    pools = sum(tensor.nbytes for tensor in cache.pools.kept)
    return tokens_in(int(total * fraction) - others - recorded - (peak - pools), pools // (1 + cache.num_pages), cache)


def tokens_in(room: int, page_bytes: int, cache: PagedKVCache) -> int:
    """Tokens in so many bytes, in whole pages, of which one is nobody's."""
    pages = room // page_bytes - 1
    if cache.max_positions is not None:
        pages = min(pages, cache.max_seqs * cache.pages_for(cache.max_positions))
    if pages < 1:
        raise ValueError(
            f"no memory is left for keys and values: a page of {cache.page_size} tokens takes {page_bytes / 2**20:.1f} MiB, and "
            f"{room / 2**30:.2f} GiB are free beside the model and a full step; lower max_batch_tokens, raise memory_fraction, or "
            "use a smaller dtype"
        )
    return pages * cache.page_size

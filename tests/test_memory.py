"""Is a cache sized by what is left of a GPU's memory, and does it serve what it then holds?"""

from __future__ import annotations

import pytest
import torch

from compile_attn.cache import Chunk, PagedKVCache
from compile_attn.lm import PagedLM
from compile_attn.memory import tokens_in
from compile_attn.sampling import Sampling
from tests.tiny import alone, by_hand, prompts_of, tiny


def test_whole_pages_up_to_what_the_model_can_use() -> None:
    cache = PagedKVCache(kv_tokens=64, page_size=4, max_seqs=3)
    assert tokens_in(1000, 96, cache) == 36  # ten pages, one of which is nobody's
    cache.max_positions = 8  # 3 sequences of 2 pages
    assert tokens_in(1000, 96, cache) == 24
    with pytest.raises(ValueError, match=r"a page of 4 tokens takes 1.0 MiB, and -0.50 GiB are free beside .*; lower max_batch"):
        tokens_in(-(1 << 29), 1 << 20, cache)


def test_a_cache_is_resized_under_its_model() -> None:
    model, cache = tiny(), PagedKVCache(kv_tokens=8, page_size=4, max_seqs=2, poison=True)
    step, prompt = by_hand(model, cache), prompts_of([30])[0]
    cache.resize(64)
    assert (cache.num_pages, cache.length_limit, cache.free_pages) == (16, 64, 16)
    assert all(pool.shape[0] == 1 + 16 for pool in (*cache.k_pages, *cache.v_pages)) and len(cache.pools.kept) == 4
    seq = cache.add()
    logits = step(cache.batch([Chunk(seq, prompt)]).input_ids)
    assert int(logits[0, 0].argmax()) == alone(model, prompt, Sampling(max_new_tokens=1))[0]
    with pytest.raises(ValueError, match="1 sequences are in the cache; free them before it is resized"):
        cache.resize(128)


def test_one_compilation_serves_caches_of_every_size() -> None:
    with PagedLM(tiny(), kv_tokens=16, page_size=16, max_seqs=1) as lm:
        assert lm.cache.max_pages_per_seq == 1
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        lm.cache.resize(64)
        prompts = prompts_of([30, 3])
        assert lm.generate(prompts, max_new_tokens=9) == [alone(tiny(), one, Sampling(max_new_tokens=9)) for one in prompts]
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.gpu
def test_the_rest_of_a_gpu_holds_keys_and_values() -> None:
    with PagedLM(tiny().cuda(), None, max_seqs=4, inner="eager", max_batch_tokens=32) as lm:
        assert lm.cache.kv_tokens == 4 * 64  # all that this model can use
        prompts = prompts_of([30, 3, 50, 17, 8])
        assert lm.generate(prompts, max_new_tokens=9) == [alone(tiny(), one, Sampling(max_new_tokens=9)) for one in prompts]
    free, total = torch.cuda.mem_get_info()
    cache = PagedKVCache(kv_tokens=64, page_size=4, max_seqs=3, device="cuda")
    by_hand(tiny().cuda(), cache)
    from compile_attn.memory import tokens_that_fit

    cache.max_positions = None
    held: list[torch.Tensor] = []

    def profile() -> int:
        held.append(torch.empty(1 << 30, dtype=torch.uint8, device="cuda"))
        held.clear()
        return 1 << 31

    page_bytes = sum(tensor.nbytes for tensor in cache.pools.kept) // (1 + cache.num_pages)
    found = tokens_that_fit(cache, profile, 0.5) // 4 * page_bytes
    assert total * 0.5 - (total - free) - 3.3 * 2**30 < found < total * 0.5 - 3 * 2**30

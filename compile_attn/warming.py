"""What is run before any request, so that no request waits for it, and the cache leaves room for it?

The steps are over tokens 0 of sequences of their own, which are gone afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from compile_attn.cache import CachedSequence, Chunk, PagedKVCache
from compile_attn.running import Runner
from compile_attn.sampling import Sampling, SamplingRows, sample


def full_step(runner: Runner, cache: PagedKVCache, budget: int) -> None:
    """The step that takes the most memory: all its tokens, over as many sequences as there can be, sampled at random.

    What is left of an even share goes to the first sequences, a token each.
    """
    count = min(cache.max_seqs, budget)
    each, left = divmod(budget, count)
    with _sequences(cache, count) as seqs:
        lengths = [min(each + (at < left), cache.length_limit) for at in range(count)]
        _step(runner, [Chunk(seq, [0] * length) for seq, length in zip(seqs, lengths, strict=True)], random=True)


def mixed_step(runner: Runner, cache: PagedKVCache, budget: int, width: int, random: bool) -> None:
    """A prompt beside as many decodes as there can be, after those decodes' own prompts, in a block table of so many pages a row.

    The prompt is as long as a step and the table allow. In a wide table it stands for a late chunk of a longer one.
    """
    each = cache.pages_for(2)
    decodes = min(cache.max_seqs - 1, budget // 2, cache.free_pages // each - 1) if cache.length_limit > 1 else 0
    room = (cache.free_pages - decodes * each) * cache.page_size
    with _sequences(cache, decodes + 1) as (first, *rest):
        if rest:
            _step(runner, [Chunk(seq, [0]) for seq in rest], random)
        prompt = [0] * min(budget - decodes, cache.length_limit, room, width * cache.page_size)
        _step(runner, [Chunk(first, prompt), *(Chunk(seq, [0]) for seq in rest)], random, width)


@contextmanager
def _sequences(cache: PagedKVCache, count: int) -> Iterator[list[CachedSequence]]:
    seqs = [cache.add() for _ in range(count)]
    try:
        yield seqs
    finally:
        for seq in seqs:
            cache.free(seq)


def _step(runner: Runner, chunks: list[Chunk], random: bool, width: int = 0) -> None:
    """With tokens sampled, and at random as well if it is wanted."""
    logits = runner.logits(chunks, width)
    sample(logits)
    if random:
        how = SamplingRows.of([Sampling(temperature=1.0, top_p=0.9)] * len(chunks), [(0, 0)] * len(chunks))
        sample(logits, how.to(logits.device))

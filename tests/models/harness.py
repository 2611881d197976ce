"""Does paged generation equal full recomputation?

The oracle is the stock model on the whole sequence, no cache, no compiler. The paged side is a `PagedLM` whose cache fills freed
pages with NaN, so that a stale read cannot pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compile_attn.cache import Chunk
from compile_attn.calling import Call, logits_of
from compile_attn.lm import PagedLM

PROMPTS = (5, 23, 41)
NEW_TOKENS = 7
TOLERANCE = 1e-4  # the bound of the project's promise; measured differences are about 5e-6
PAGE, KV_TOKENS, BUDGET = 4, 256, 16


@dataclass(frozen=True)
class Paged:
    """A model's paged form, and the prompts it is tried with."""

    model: nn.Module
    lm: PagedLM
    prompts: tuple[list[int], ...]


def prompts_of(vocabulary: int, seed: int = 1) -> tuple[list[int], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in PROMPTS)


def paged(model: nn.Module, vocabulary: int, max_seqs: int = 2, budget: int = BUDGET, call: Call | None = None) -> Paged:
    """A small cache; at most `budget` new tokens a step, so that prompts of 23 and 41 tokens go in by chunks."""
    lm = PagedLM(model, KV_TOKENS, PAGE, max_seqs, inner="eager", call=call, max_batch_tokens=budget, poison=True)
    return Paged(model, lm, prompts_of(vocabulary))


def full_logits(model: nn.Module, tokens: Sequence[int]) -> Tensor:
    """The stock model's logits for these tokens: [T, V], or [1, V] where the model gives the last token's only."""
    with torch.no_grad():
        output = _stock_call(model, torch.tensor([list(tokens)]))
    logits = logits_of(output)
    return logits.reshape(-1, logits.shape[-1])


def _stock_call(model: nn.Module, ids: Tensor) -> object:
    return model(ids, use_cache=False) if hasattr(model, "config") else model(ids)


def recomputed(model: nn.Module, prompt: list[int], count: int = NEW_TOKENS) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(full_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def assert_same_tokens(paged: Paged, count: int = NEW_TOKENS) -> list[list[int]]:
    """All prompts together; then no page may be left taken."""
    wanted = [recomputed(paged.model, prompt, count) for prompt in paged.prompts]
    found = paged.lm.generate(list(paged.prompts), max_new_tokens=count)
    assert found == wanted
    assert paged.lm.cache.pages_in_use == 0
    return found


def assert_same_logits(paged: Paged, answers: Sequence[Sequence[int]]) -> float:
    """Every sequence teacher-forced in ragged chunks that share their batches; returns the greatest difference.

    Chunks of 1, 3, 7, ... tokens of two sequences at a time: prefill, chunk and decode in one graph.
    """
    texts = [[*prompt, *answer] for prompt, answer in zip(paged.prompts, answers, strict=True)]
    pairs = [texts[:2], texts[1:]]
    return max(_compare(paged, pair) for pair in pairs)


def _compare(paged: Paged, texts: Sequence[Sequence[int]]) -> float:
    cache, worst = paged.lm.cache, 0.0
    wanted = [full_logits(paged.model, text) for text in texts]
    last_only = len(wanted[0]) < len(texts[0])
    seqs = [cache.add() for _ in texts]
    sizes = [(7, 1, 3, 1, 12), (1, 9, 2, 1, 15)]
    step = 0
    while any(seq.length < len(text) for seq, text in zip(seqs, texts, strict=True)):
        chunks, places = [], []
        for seq, text, size, want in zip(seqs, texts, sizes, wanted, strict=True):
            start, end = seq.length, min(len(text), seq.length + size[step % len(size)])
            if start < end:
                chunks.append(Chunk(seq, list(text[start:end]), "last" if last_only else "all"))
                places.append(full_logits(paged.model, text[:end])[-1:] if last_only else want[start:end])
        found = paged.lm._runner.logits(chunks)
        worst = max(worst, float((found - torch.cat(places)).abs().max()))
        step += 1
    for seq in seqs:
        cache.free(seq)
    assert worst <= TOLERANCE, worst
    return worst


def assert_short_prompts_and_neighbours(paged: Paged) -> None:
    """A graph compiled for T = 1 has lost its mask: llama reads as bidirectional there, BLOOM without its ALiBi.

    And positions 5 and 6 of two sequences side by side look like one document to the models' own detection (error 6.1).
    """
    prompts = [[7], [8], [9]]
    assert paged.lm.generate(prompts, max_new_tokens=4) == [recomputed(paged.model, prompt, 4) for prompt in prompts]
    texts = [list(range(10, 16)), list(range(30, 37))]
    seqs = [paged.lm.cache.add() for _ in texts]
    paged.lm._runner.logits([Chunk(seq, text[:-1]) for seq, text in zip(seqs, texts, strict=True)])
    found = paged.lm._runner.logits([Chunk(seq, text[-1:]) for seq, text in zip(seqs, texts, strict=True)])
    wanted = torch.stack([full_logits(paged.model, text)[-1] for text in texts])
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
    for seq in seqs:
        paged.lm.cache.free(seq)


def assert_context_matters(model: nn.Module, vocabulary: int, sees_all: bool) -> None:
    """Another first token (or, where the model cannot see so far, another recent one) moves the last logits."""
    tokens = prompts_of(vocabulary)[-1]
    place = 0 if sees_all else len(tokens) - 4
    other = list(tokens)
    other[place] = (other[place] + 7) % vocabulary
    moved = (full_logits(model, tokens)[-1] - full_logits(model, other)[-1]).abs().max()
    assert moved > 1e-3, f"token {place} moves the last logits by {float(moved):.1e} only; the test would prove nothing"


def sees_the_future(model: nn.Module, vocabulary: int) -> bool:
    """Whether another last token moves the first logits: then no cache of keys can serve the model."""
    tokens = prompts_of(vocabulary)[0]
    other = [*tokens[:-1], (tokens[-1] + 7) % vocabulary]
    first, second = (full_logits(model, text) for text in (tokens, other))
    return len(first) == len(tokens) and not torch.allclose(first[0], second[0], atol=1e-6)

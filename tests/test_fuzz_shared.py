"""Does any schedule of requests that share pages change a token, write a page of several, or lose one?

Prompts that begin alike, several samples, salts, forks, cancels, steps that fail, and pools too small for all of it: requests are
computed again, or wait in host memory. `SCHEDULES=1000 pytest tests/test_fuzz_shared.py` plays more of them.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from compile_attn.lm import PagedLM
from compile_attn.requests import Request
from compile_attn.sampling import Sampling
from compile_attn.swap_cost import SwapCost
from tests.test_shared_requests import masked
from tests.tiny import VOCAB, alone, as_on_a_gpu, prompts_of, tiny

SCHEDULES = int(os.environ.get("SCHEDULES", "125"))
GEOMETRIES = [
    {"kv_tokens": 40, "page_size": 4, "max_seqs": 4, "max_batch_tokens": 10},
    {"kv_tokens": 72, "page_size": 8, "max_seqs": 8, "max_batch_tokens": 64},
    {"kv_tokens": 36, "page_size": 1, "max_seqs": 3, "max_batch_tokens": 3},
    {"kv_tokens": 96, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17, "prefix_cache": False},
    {"kv_tokens": 40, "page_size": 4, "max_seqs": 4, "max_batch_tokens": 10, "swap_tokens": 40},
]
STEM, OTHER = prompts_of([20, 20], seed=11)
PROMPTS = [STEM[:13], STEM[:16], [*STEM[:9], 1, 2], OTHER[:8], [*OTHER[:8], *STEM[:9]], STEM[:1], STEM[:4], [*STEM[:12], 5]]
MODELS = {"all keys": tiny(), "window": masked("window")}


class Failed(Exception):
    """A step that was made to fail."""


@cache
def wanted(model: str, prompt: tuple[int, ...], how: Sampling) -> list[int]:
    return alone(MODELS[model], prompt, how)


class Play:
    """One server, whose every step is watched."""

    def __init__(self, lm: PagedLM, model: str = "all keys") -> None:
        self.lm, self.model, self.counted = lm, model, Counter[str]()
        self.failure: str | None = None  # of the next step
        self._run, lm._runner._run = lm._runner._run, self.run

    def run(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.lm.cache.proof._only_asking:  # before a step that a graph runs
            return self._run(ids, positions)
        failure, self.failure = self.failure, None
        if failure == "before":
            raise Failed
        if failure == "nothing is written":
            return torch.full((1, len(self.lm.cache.step_inputs()[3]), VOCAB), torch.nan)
        state = self.lm.cache._seqs
        every = range(1, self.lm.cache.num_pages + 1)
        pages = [page for page in every if state.pages.references(page) > 1 or page in state._index]
        pools = [*self.lm.cache.k_pages, *self.lm.cache.v_pages]
        before = [pool[pages].view(torch.int32) for pool in pools]
        logits: torch.Tensor = self._run(ids, positions)
        for pool, old in zip(pools, before, strict=True):
            assert torch.equal(pool[pages].view(torch.int32), old), "a page that is known, or of several, was written"
        self.counted["pages of several"] += sum(state.pages.references(page) > 1 for page in pages)
        if failure == "after":
            raise Failed
        return logits

    def step(self, draw: random.Random) -> None:
        if draw.random() < 0.03:
            self.failure = draw.choice(["before", "nothing is written", "after"])
        try:
            self.lm.step()
        except Failed:
            self.counted["failures"] += 1
        except RuntimeError as error:
            assert "are not finite" in str(error)
            self.counted["failures"] += 1
        else:
            return
        assert self.lm.cache.pages_in_use == 0 and not len(self.lm.cache._seqs._index), "nothing is trusted"

    def ask(self, draw: random.Random, asked: list[Request]) -> Request:
        how = Sampling(max_new_tokens=draw.choice([1, 3, 8, 14]), stop_ids=(draw.randrange(VOCAB),))
        if draw.random() < 0.6:
            how = replace(how, temperature=1.1, seed=draw.randrange(3), n=draw.choice([1, 2, 3, 5]))
        source = draw.choice(asked) if asked else None
        if source is not None and draw.random() < 0.2 and len(source.prompt) + len(source.new_tokens) < 20:
            self.counted["forks"] += 1
            return self.lm.fork(source, how)
        return self.lm.submit(draw.choice(PROMPTS), how, salt=draw.choice([None, None, "a"]))

    def schedule(self, draw: random.Random) -> None:
        """Requests come and are cancelled at random steps until all is done."""
        asked: list[Request] = []
        to_come, haste = draw.randint(2, 7), draw.choice([0.2, 0.6, 1.0])
        while to_come or self.lm.has_work:
            while to_come and draw.random() < haste:
                asked.append(self.ask(draw, asked))
                to_come -= 1
            if asked and draw.random() < 0.06:
                request = draw.choice(asked)
                self.lm.cancel(request, draw.choice([None, 0, len(request.samples) - 1]))
            self.step(draw)
        self.failure = None
        for one in (one for request in asked for one in request.samples):
            want = wanted(self.model, one.prompt, replace(one.sampling, n=1, seed=one.seed if one.sampling.temperature else None))
            got = one.new_tokens
            assert got == (want[: len(got)] if one.reason == "cancelled" else want), one
        assert self.lm.cache.pages_in_use == 0
        preempting = self.lm._scheduler.preempting
        assert preempting is None or preempting.space.free_tokens == self.lm.cache.num_pages * self.lm.cache.page_size
        if draw.random() < 0.3:
            self.lm.cache.forget_prefixes()
            assert len(self.lm.cache._seqs.pages._free) == self.lm.cache.num_pages


@pytest.mark.parametrize("way", ["one by one", "as on a GPU"])
@pytest.mark.parametrize("at", range(len(GEOMETRIES)))
def test_every_sample_equals_a_request_run_alone(at: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = GEOMETRIES[at]
    model = "window" if at % 2 == 0 else "all keys"
    moves = random.Random(at)  # now and then it is taken for slower
    monkeypatch.setattr(SwapCost, "prefers_swap", lambda *_: moves.random() < 0.7)
    with PagedLM(MODELS[model], inner="eager", poison=True, **geometry) as lm:  # type: ignore[arg-type]
        if way == "as on a GPU":
            as_on_a_gpu(lm)
        play = Play(lm, model)
        for seed in range(at, SCHEDULES, len(GEOMETRIES)):
            try:
                play.schedule(random.Random(seed))
            except BaseException as error:
                error.add_note(f"schedule {seed} of geometry {geometry}")
                raise
        assert play.counted["failures"] > 3 and play.counted["forks"] > 3 and lm.preemptions > 10
        assert play.counted["pages of several"] > 50 and (lm.cache.prefix_hits > 50) == geometry.get("prefix_cache", True)
        assert (lm.swaps > 10) == ("swap_tokens" in geometry) and lm.swaps <= lm.preemptions

"""Does any schedule of joins, leaves, cancels and preemptions change a token or leak a page?

Every freed page is filled with NaN, so a read of a stale slot, even one multiplied by zero, ends in an error.
"""

from __future__ import annotations

import random
from functools import cache

import pytest

from compile_attn.lm import PagedLM
from compile_attn.requests import Request
from compile_attn.sampling import Sampling
from tests.tiny import alone, as_on_a_gpu, prompts_of, tiny

SCHEDULES = 500
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 11, 4, 2, 15, 16, 6, 3, 22, 5, 1, 6, 10]
# Pools too small for their requests, pages of one token, budgets below a prompt: each runs a quarter of the schedules.
GEOMETRIES = [
    {"kv_tokens": 40, "page_size": 4, "max_seqs": 4, "max_batch_tokens": 10},
    {"kv_tokens": 40, "page_size": 8, "max_seqs": 8, "max_batch_tokens": 64},
    {"kv_tokens": 36, "page_size": 1, "max_seqs": 3, "max_batch_tokens": 3},
    {"kv_tokens": 48, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17},
]


@cache
def cases() -> list[tuple[list[int], Sampling, list[int]]]:
    """Requests and what they must say: greedy and drawn, with and without a stop token."""
    model, made = tiny(), []
    for at, prompt in enumerate(prompts_of(LENGTHS, seed=11)):
        how = Sampling(
            temperature=0.0 if at % 2 else 0.9,
            top_k=7 if at % 4 == 0 else None,
            top_p=0.9 if at % 3 == 0 else 1.0,
            seed=at,
            max_new_tokens=4 + (7 * at) % 23,
            stop_ids=(at, at + 10),
        )
        made.append((prompt, how, alone(model, prompt, how)))
    return made


def play(lm: PagedLM, draw: random.Random) -> None:
    """One schedule: requests join and are cancelled at random steps until all is done."""
    known = cases()
    asked: list[tuple[Request, list[int]]] = []
    to_come = draw.randint(2, 9)
    haste = draw.choice([0.2, 0.6, 1.0])
    while to_come or lm.has_work:
        while to_come and draw.random() < haste:
            prompt, how, want = draw.choice(known)
            asked.append((lm.submit(prompt, how), want))
            to_come -= 1
        if asked and draw.random() < 0.04:
            lm.cancel(draw.choice(asked)[0])
        lm.step()
    for request, want in asked:
        got = request.new_tokens
        assert got == (want[: len(got)] if request.reason == "cancelled" else want), request
    assert lm.cache.pages_in_use == 0


@pytest.mark.parametrize("way", ["one by one", "as on a GPU"])
@pytest.mark.parametrize("at", range(len(GEOMETRIES)))
def test_every_output_equals_the_request_run_alone(at: int, way: str) -> None:
    with PagedLM(tiny(), inner="eager", poison=True, **GEOMETRIES[at]) as lm:
        if way == "as on a GPU":
            as_on_a_gpu(lm)
        for seed in range(at, SCHEDULES if way == "one by one" else SCHEDULES // 4, len(GEOMETRIES)):
            try:
                play(lm, random.Random(seed))
            except BaseException as error:
                error.add_note(f"schedule {seed} of geometry {GEOMETRIES[at]}")
                raise
        assert lm.preemptions > 10
        assert (len({one.rows for one in lm.cuda_graphs}) > 1) == (way == "as on a GPU")


def test_the_cases_are_worth_running() -> None:
    """Every case says something of its own, and ends in both ways."""
    wants = [want for _, _, want in cases()]
    assert sum(len(want) < how.max_new_tokens for _, how, want in cases()) >= 2
    assert len({tuple(want) for want in wants}) > 15

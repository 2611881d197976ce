"""Do drafts change how many steps there are, and nothing else?

Whatever a drafter proposes, a request makes the tokens that it makes alone: `guessing` knows them, and errs as often as it is told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from compile_attn.cache import PagedKVCache
from compile_attn.drafting import Drafting, PromptLookup
from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.lm import PagedLM
from compile_attn.requests import Plan
from compile_attn.sampling import Sampling
from compile_attn.scheduler import Scheduler
from tests.sparse_decoder import HEADS, KV_HEADS, Sparse, decoder
from tests.sparse_decoder import POSITIONS as LONGEST
from tests.test_by_step_gpu import SMALL, check_greedy, model_on, needs
from tests.test_by_step_gpu import prompts_of as words
from tests.test_fuzz import GEOMETRIES, cases, play
from tests.test_fuzz_shared import GEOMETRIES as SHARED
from tests.test_fuzz_shared import MODELS
from tests.test_fuzz_shared import Play as Watched
from tests.test_general import interpreted
from tests.tiny import POSITIONS, VOCAB, alone, as_on_a_gpu, prompts_of, tiny

SETTINGS = {"kv_tokens": 256, "page_size": 4, "max_seqs": 8, "inner": "eager", "poison": True}
PROMPTS = prompts_of([5, 1, 9, 14, 2, 7], seed=3)
Way = Literal["one by one", "as on a GPU"]
WAYS = pytest.mark.parametrize("way", ["one by one", "as on a GPU"])


class Guessing:
    """Knows how texts go on, and says something else for each token with the chance `wrong`; sometimes nothing, or too much."""

    def __init__(self, texts: Sequence[Sequence[int]], wrong: float, vocabulary: int = VOCAB, steady: bool = True) -> None:
        self.texts, self.wrong, self.vocabulary, self.steady = [list(text) for text in texts], wrong, vocabulary, steady
        self.draw = random.Random(0)
        self.asked: list[tuple[list[int], int]] = []

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        known = list(tokens)
        self.asked.append((known, most))
        text = next((text for text in self.texts if text[: len(known)] == known), known)
        count = most if self.steady else self.draw.choice([0, 1, most, most + 3])
        true = [*text[len(known) :], *[0] * count][:count]
        return [(one + (self.draw.random() < self.wrong)) % self.vocabulary for one in true]


class Saying:
    """Proposes the same, whatever comes."""

    def __init__(self, drafts: Any) -> None:
        self.drafts = drafts

    def propose(self, tokens: Sequence[int], most: int) -> Any:
        if isinstance(self.drafts, BaseException):
            raise self.drafts
        return self.drafts


def greedy(count: int, **how: Any) -> list[list[int]]:
    return [alone(tiny(), prompt, Sampling(max_new_tokens=count, **how)) for prompt in PROMPTS]


def texts_of(prompts: Sequence[Sequence[int]], wants: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[*prompt, *want] for prompt, want in zip(prompts, wants, strict=True)]


def lm_of(drafter: Any, model: torch.nn.Module | None = None, way: Way = "one by one", **changes: Any) -> PagedLM:
    lm = PagedLM(model or tiny(), drafter=drafter, **{**SETTINGS, **changes})
    return as_on_a_gpu(lm) if way == "as on a GPU" else lm


# Right and wrong drafts


@WAYS
@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "top_k": 6, "seed": 4}], ids=str)
def test_right_drafts_save_steps(how: dict[str, Any], way: Way) -> None:
    """After the prompt's own token five a step: 21 tokens in five steps, instead of 21."""
    wants = greedy(21, **how)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 0.0), way=way) as lm:
        plans: list[Plan] = []
        send = lm._runner.send
        lm._runner.send = lambda plan: plans.append(plan) or send(plan)  # type: ignore[method-assign, func-returns-value]
        for count, prompt, want in zip(range(1, 7), PROMPTS, wants, strict=True):
            assert lm.generate([prompt], Sampling(max_new_tokens=21, **how)) == [want]
            assert (len(plans), lm.num_draft_tokens, lm.num_accepted_tokens) == (5 * count, 16 * count, 16 * count)
        plans.clear()
        assert lm.generate(PROMPTS, Sampling(max_new_tokens=21, **how)) == wants and len(plans) == 5


@WAYS
def test_wrong_drafts_cost_no_token(way: Way) -> None:
    wants = greedy(21, temperature=0.9, seed=3)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 1.0), way=way) as lm:
        assert lm.generate(PROMPTS, Sampling(max_new_tokens=21, temperature=0.9, seed=3)) == wants
        assert lm.num_accepted_tokens == 0 and lm.cache.pages_in_use == 0
        # As many as may come beside the token of the step: 4 in 16 steps, then 3, 2, 1. The prompt of one token has a step more.
        assert lm.num_draft_tokens == len(PROMPTS) * (16 * 4 + 3 + 2 + 1) + 4


@pytest.mark.parametrize("most", [1, 40])
def test_how_many_drafts_is_asked_for(most: int) -> None:
    wants = greedy(30)
    drafter = Guessing(texts_of(PROMPTS, wants), 0.3)
    with lm_of(drafter, draft_tokens=most) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=30) == wants
        assert max(count for _, count in drafter.asked) == min(most, 28)
        assert all(known in (text[: len(known)] for text in drafter.texts) for known, _ in drafter.asked)


@WAYS
@pytest.mark.parametrize(("at", "wrong"), [(0, 0.5), (1, 0.2), (2, 0.05), (3, 0.8)])
def test_any_schedule(at: int, wrong: float, way: Way) -> None:
    """Requests join, are cancelled, stop, and lose their pages: each says what it says alone."""
    drafter = Guessing(texts_of([prompt for prompt, _, _ in cases()], [want for _, _, want in cases()]), wrong, steady=False)
    with PagedLM(tiny(), inner="eager", poison=True, drafter=drafter, draft_tokens=3 + at, **GEOMETRIES[at]) as lm:
        if way == "as on a GPU":
            as_on_a_gpu(lm)
        for seed in range(20):
            try:
                play(lm, random.Random(seed))
            except BaseException as error:
                error.add_note(f"schedule {seed} of geometry {GEOMETRIES[at]}")
                raise
        assert 0 < lm.num_accepted_tokens < lm.num_draft_tokens
        assert any(one.wanted > one.rows for one in lm.cuda_graphs) == (way == "as on a GPU")


def test_a_prompt_that_repeats_itself() -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6] * 3
    with lm_of(PromptLookup()) as lm:
        want = alone(tiny(), prompt, Sampling(max_new_tokens=30))
        assert lm.generate([prompt], max_new_tokens=30) == [want] and lm.num_draft_tokens > 0


# Ends


def test_the_number_of_tokens_is_exact() -> None:
    wants = greedy(20)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 0.0)) as lm:
        for count in range(1, 12):
            assert lm.generate(PROMPTS, max_new_tokens=count) == [want[:count] for want in wants]
            assert lm.cache.pages_in_use == 0


def test_a_stop_token_among_the_drafts_is_the_last_one() -> None:
    [want] = greedy(12)[2:3]
    with lm_of(Guessing([[*PROMPTS[2], *want]], 0.0)) as lm:
        for stop in dict.fromkeys(want):
            how, made = Sampling(max_new_tokens=12, stop_ids=(stop,)), want[: want.index(stop) + 1]
            ends = [*[(False, None)] * (len(made) - 1), (True, "stop")]
            outs = list(lm.stream([PROMPTS[2]], how))
            assert [out.token for out in outs] == made and [(out.finished, out.reason) for out in outs] == ends
            lm.submit(PROMPTS[2], how)
            outs = []
            while lm.has_work:
                outs += lm.step()
            assert [out.token for out in outs] == made and [(out.finished, out.reason) for out in outs] == ends
            assert lm.cache.pages_in_use == 0


@pytest.mark.parametrize("kv_tokens", [256, 40])
def test_the_longest_text_ends_a_request(kv_tokens: int) -> None:
    limit = min(POSITIONS, kv_tokens)
    prompts = prompts_of(range(limit - 9, limit + 1))
    wants = [alone(tiny(), prompt, Sampling(max_new_tokens=50), limit) for prompt in prompts]
    drafter = Guessing([[*text, *[1] * 9] for text in texts_of(prompts, wants)], 0.0)
    with lm_of(drafter, kv_tokens=kv_tokens) as lm:
        for prompt, want in zip(prompts, wants, strict=True):
            outs = list(lm.stream([prompt], max_new_tokens=50))
            assert [out.token for out in outs] == want and outs[-1].reason == "length"


def test_what_a_wrong_draft_makes_means_nothing() -> None:
    """Neither its row, nor its keys, which no row before it sees: 0 times NaN is NaN, so the step is run again without it."""
    model = tiny()
    wants = [alone(tiny(), prompt, Sampling(max_new_tokens=15)) for prompt in PROMPTS[:3]]
    free = next(one for one in range(VOCAB) if all(one not in text for text in texts_of(PROMPTS[:3], wants)))
    model.tok.weight[free] = torch.nan
    with lm_of(Saying([free] * 4), model) as lm:
        assert lm.generate(PROMPTS[:3], max_new_tokens=15) == wants and lm.num_accepted_tokens == 0
    with lm_of(Saying([free] * 4), model) as lm:
        request = lm.submit(PROMPTS[0])
        lm.step()
        model.head.weight.fill_(torch.nan)
        assert lm.step() == [] and len(request.new_tokens) == 1, "it may be the drafts"
        with pytest.raises(RuntimeError, match="logits of request 0 after 6 tokens are not finite"):
            lm.step()
        assert lm.cache.pages_in_use == 0


# What drafters may not do


ERRORS: list[tuple[Any, str]] = [
    ([3, VOCAB], rf"the drafter proposed token id {VOCAB}, outside the model's vocabulary of {VOCAB}; a drafter must count"),
    ([-1], "the drafter proposed token id -1, outside"),
    ([1.5], r"the drafter proposed \[1.5\]; propose\(\) returns a list of token ids, \[\] for none"),
    (None, r"the drafter proposed None; propose\(\)"),
    (torch.tensor([0.5]), r"the drafter proposed tensor\(\[0.5000\]\); propose"),
    (KeyError("of the drafter"), "of the drafter"),
]


def test_a_drafter_that_errs_loses_nothing() -> None:
    [want] = greedy(9)[:1]
    drafter = Saying([])
    with lm_of(drafter) as lm:
        for drafts, why in ERRORS:
            request = lm.submit(PROMPTS[0], Sampling(max_new_tokens=9))
            lm.step()
            drafter.drafts = drafts
            for _ in range(2):
                with pytest.raises((ValueError, KeyError), match=why):
                    while lm.has_work:
                        lm.step()
                assert lm.cache.pages_in_use == 0 and not request.finished
            drafter.drafts = []
            while lm.has_work:
                lm.step()
            assert request.new_tokens == want


def test_forms_of_drafts() -> None:
    wants = greedy(9)
    known = Guessing(texts_of(PROMPTS, wants), 0.0)
    forms: list[Callable[[list[int]], Any]] = [list, tuple, torch.tensor, lambda ids: torch.tensor(ids).numpy(), iter]

    class Formed:
        def propose(self, tokens: Sequence[int], most: int) -> Any:
            return forms[0]([*known.propose(tokens, most), *[0] * 5])  # more than were asked for

    with lm_of(Formed(), prefix_cache=False) as lm:
        while forms:
            before = lm.num_accepted_tokens
            assert lm.generate(PROMPTS, max_new_tokens=9) == wants
            # Five tokens in a step, then three; the prompt of one token is decoded from the start.
            assert lm.num_accepted_tokens == lm.num_draft_tokens == before + 5 * (4 + 2) + (4 + 3)
            del forms[0]


def test_settings_are_checked_before_anything_is_compiled() -> None:
    for drafter in (object(), PromptLookup, "ngram"):
        with pytest.raises(ValueError, match=r"drafter=.* has no method propose\(tokens, most\); give PromptLookup\(\)"):
            PagedLM(tiny(), drafter=drafter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="draft_tokens=0"):
        PagedLM(tiny(), drafter=PromptLookup(), draft_tokens=0)


def test_what_a_drafter_is_given_is_its_own() -> None:
    class Spoiling:
        def propose(self, tokens: Any, most: int) -> list[int]:
            drafts = PromptLookup().propose(tokens, most)
            tokens.reverse()
            self.held = memoryview(tokens)  # an array that is looked at cannot grow
            return list(drafts)

    with lm_of(Spoiling()) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=15) == greedy(15)


# The scheduler


def scheduler_of(drafts: Any, max_batch_tokens: int = 64, **changes: int) -> Scheduler:
    cache = PagedKVCache(**{"kv_tokens": 64, "page_size": 4, "max_seqs": 4, **changes})
    return Scheduler(cache, max_batch_tokens, prefix_cache=False, drafting=Drafting(Saying(drafts), 4))


def run(scheduler: Scheduler, token: int = 7) -> list[list[int]]:
    """One step in which no draft is right; its chunks."""
    plan = scheduler.plan()
    assert plan is not None and plan.shape[2] == len(plan.draws) == len(plan.how)
    scheduler.cache.batch(plan.chunks)
    scheduler.cache.step_inputs()
    scheduler.sent(plan)
    scheduler.commit(plan, [token] * len(plan.sampled), {request: [] for request in plan.drafts})
    return [list(chunk.tokens) for chunk in plan.chunks]


def test_each_row_has_the_number_of_its_draw() -> None:
    scheduler = scheduler_of([1, 2, 3])
    first = scheduler.submit([5, 5], Sampling(seed=8, temperature=1.0))
    run(scheduler)
    run(scheduler)
    second = scheduler.submit([6, 6, 6], Sampling(seed=9))
    plan = scheduler.plan()
    assert plan is not None and plan.sampled == [second, first] and plan.drafts == {first: [1, 2, 3]}
    assert plan.draws == [(9, 0), (8, 2), (8, 3), (8, 4), (8, 5)] and plan.shape == (2, 7, 5)
    assert [one.seed for one in plan.how] == [9, 8, 8, 8, 8]
    assert [(list(chunk.tokens), chunk.logits) for chunk in plan.chunks] == [([6, 6, 6], "last"), ([7, 1, 2, 3], "all")]


def test_prompts_come_before_drafts() -> None:
    """Of the budget drafts get what is left, the oldest request first."""
    scheduler = scheduler_of([1, 2, 3, 4], max_batch_tokens=9)
    for _ in range(2):
        scheduler.submit([5], Sampling(max_new_tokens=20))
    assert run(scheduler) == [[5, 1, 2, 3, 4], [5, 1, 2, 3]]  # one token after one is decoded, too
    scheduler.submit([6] * 6, Sampling(max_new_tokens=20))
    assert run(scheduler) == [[6] * 6, [7, 1], [7]]


def test_drafts_take_no_page_that_another_needs() -> None:
    scheduler = scheduler_of([1, 2, 3, 4], kv_tokens=20)
    for _ in range(2):
        scheduler.submit([5] * 6, Sampling(max_new_tokens=20))
    assert run(scheduler) == [[5] * 6, [5] * 6]
    assert run(scheduler) == [[7, 1, 2, 3, 4], [7, 1]], "the older one in the page that is free"
    assert run(scheduler) == [[7, 1, 2, 3, 4], [7]] and not scheduler.preemptions
    assert run(scheduler) == [[7, 1, 2, 3, 4]] and scheduler.preemptions == 1, "as without drafts"
    plain = Scheduler(PagedKVCache(20, 4, 4), 64, prefix_cache=False)
    for _ in range(2):
        plain.submit([5] * 6, Sampling(max_new_tokens=20))
    assert [len(run(plain)) for _ in range(4)] == [2, 2, 2, 1]


def test_long_steps_have_no_drafts() -> None:
    """Beyond 256 new tokens or 128 requests a step has no graph, and computes for longer than it reads weights."""
    scheduler = scheduler_of([1, 2], max_batch_tokens=512, kv_tokens=2048, max_seqs=129)
    scheduler.submit([5], Sampling(max_new_tokens=100))
    run(scheduler)
    scheduler.submit([6] * 253, Sampling())
    assert sorted(map(len, run(scheduler))) == [3, 253]
    scheduler.submit([6] * 255, Sampling())
    sizes = [len(chunk) for chunk in run(scheduler)]
    assert sum(sizes) == 257 and max(sizes[1:]) == 1
    for _ in range(125):
        scheduler.submit([5], Sampling())
    run(scheduler)
    assert len(chunks := run(scheduler)) == 128 and sum(map(len, chunks)) == 256
    scheduler.submit([5], Sampling())
    run(scheduler)
    assert {len(chunk) for chunk in run(scheduler)} == {1}


def test_after_a_warm_up_nothing_is_recorded() -> None:
    wants = greedy(21)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 0.3), way="as on a GPU", max_batch_tokens=40) as lm:
        lm.warm_up(random=True)
        recorded = lm.cuda_graphs
        assert any(one.wanted > one.rows for one in recorded)
        assert lm.generate(PROMPTS, max_new_tokens=21) == wants
        assert lm.generate(PROMPTS, Sampling(max_new_tokens=21, temperature=0.9, seed=3)) == greedy(21, temperature=0.9, seed=3)
        assert lm.cuda_graphs == recorded


def test_steps_without_drafts_advance_by_themselves() -> None:
    """Nothing is written for a step of the same requests where nobody has a draft."""
    with lm_of(Saying([]), way="as on a GPU", prefix_cache=False) as lm:
        lm.generate(PROMPTS, max_new_tokens=20)
        writes: list[int] = []
        write = lm.cache.buffers.write
        lm.cache.buffers.write = lambda *args, **options: writes.append(1) or write(*args, **options)  # type: ignore[assignment, func-returns-value]
        assert lm.generate(PROMPTS, max_new_tokens=20) == greedy(20)
        assert len(writes) == 2


# Masks, kernels, pages


def dense() -> torch.nn.Module:
    return decoder(None, None)


def windowed() -> torch.nn.Module:
    return decoder(None, None, window=9)


def sparse() -> torch.nn.Module:
    return decoder(Sparse(4, 1, 4, 1), Sparse(4, 1, 4, 1))


PARAMS = BlocksparseParams(LONGEST, HEADS, KV_HEADS, 4, 1, 4)
KINDS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module], dict[str, Any]]] = {
    "causal": (dense, dense, {}),
    "window": (windowed, windowed, {}),
    "block sparse": (dense, sparse, {"block_sparse": PARAMS}),
}


def check_kind(kind: str, kernel: str, count: int, way: Way) -> None:
    """The first makes itself what the second has written out."""
    served, written, more = KINDS[kind]
    prompts = prompts_of([41, 3, 18], seed=3)
    how = [Sampling(max_new_tokens=count), Sampling(max_new_tokens=count, temperature=0.9, seed=5), Sampling(max_new_tokens=count)]
    wants = [alone(written(), prompt, one, LONGEST) for prompt, one in zip(prompts, how, strict=True)]
    drafter = Guessing(texts_of(prompts, wants), 0.3)
    with lm_of(drafter, served(), way, kernel=kernel, max_seqs=3, max_batch_tokens=24, kv_tokens=255, page_size=3, **more) as lm:
        assert lm.generate(prompts, how) == wants and {site.kernel for site in lm.report.sites} == {kernel}  # type: ignore[union-attr]
        assert 0 < lm.num_accepted_tokens < lm.num_draft_tokens


@WAYS
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind: str, way: Way) -> None:
    check_kind(kind, "reference", 20, way)


@interpreted
@pytest.mark.parametrize(("kind", "kernel"), [("causal", "general"), ("window", "general"), ("block sparse", "block_sparse")])
def test_kernels(kind: str, kernel: str) -> None:
    check_kind(kind, kernel, 6, "as on a GPU")


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_pages_of_fp8(dtype: str) -> None:
    """A server of such pages without drafts has made the same."""
    how = Sampling(max_new_tokens=20, temperature=0.7, seed=2)
    with lm_of(None, kv_dtype=dtype) as lm:
        wants = lm.generate(PROMPTS, how)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 0.3), kv_dtype=dtype) as lm:
        assert lm.generate(PROMPTS, how) == wants and 0 < lm.num_accepted_tokens < lm.num_draft_tokens
    assert wants != greedy(20, temperature=0.7, seed=2)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_one_compilation_takes_drafts(inner: str) -> None:
    with lm_of(Guessing(texts_of(PROMPTS, greedy(12)), 0.3), inner=inner) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=12) == greedy(12) and lm.cache.compilations == 1


# Beside shared pages


@WAYS
@pytest.mark.parametrize("wrong", [0.15, 0.7])
def test_drafts_in_shared_pages(wrong: float, way: Way) -> None:
    """Prompts that begin alike, some of them known, three answers to each, in a cache too small for all."""
    stem = prompts_of([13], seed=9)[0]
    prompts = [[*stem, *more] for more in prompts_of([1, 1, 6, 0, 3], seed=4)]
    how = Sampling(max_new_tokens=17, temperature=0.9, seed=6, n=3)
    wants = [[alone(tiny(), prompt, replace(how, n=1, seed=6 + k)) for k in range(3)] for prompt in prompts]
    drafter = Guessing([[*prompt, *want] for prompt, each in zip(prompts, wants, strict=True) for want in each], wrong)
    with lm_of(drafter, way=way, kv_tokens=72, max_seqs=6, max_batch_tokens=24) as lm:
        watched = Watched(lm)
        for _ in range(2):
            assert lm.generate(prompts, how) == [want for each in wants for want in each]
            assert lm.cache.pages_in_use == 0
        assert watched.counted["pages of several"] and lm.preemptions and lm.cache.prefix_hits
        assert 0 < lm.num_accepted_tokens < lm.num_draft_tokens


class Greedily:
    """The tiny model itself: of greedy requests most drafts are right, of others few."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], int] = {}
        self.draw = random.Random(0)

    def next(self, tokens: tuple[int, ...]) -> int:
        if tokens not in self.known:
            self.known[tokens] = int(MODELS["all keys"](torch.tensor([tokens]))[0, -1].argmax())
        return self.known[tokens]

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        text = list(tokens)
        while len(text) < len(tokens) + most:
            text.append(self.next(tuple(text)) if self.draw.random() < 0.9 else 0)
        return text[len(tokens) :]


@WAYS
@pytest.mark.parametrize("at", range(len(SHARED)))
def test_any_schedule_of_shared_pages(at: int, way: Way) -> None:
    """Every write is watched, steps fail, and the pages are too few."""
    with PagedLM(MODELS["all keys"], inner="eager", poison=True, drafter=Greedily(), **SHARED[at]) as lm:  # type: ignore[arg-type]
        watched = Watched(as_on_a_gpu(lm) if way == "as on a GPU" else lm)
        for seed in range(12):
            try:
                watched.schedule(random.Random(seed))
            except BaseException as error:
                error.add_note(f"schedule {seed} of geometry {SHARED[at]}")
                raise
        assert watched.counted["pages of several"] and watched.counted["failures"] and lm.preemptions
        assert 0 < lm.num_accepted_tokens < lm.num_draft_tokens


def test_what_drafts_have_written_is_not_found() -> None:
    """Where a wrong draft stood, and the token that came out ends the request, the next prompt computes that token's keys."""
    wants = greedy(12)
    with lm_of(Guessing(texts_of(PROMPTS, wants), 1.0), page_size=1) as lm:
        for prompt, want in zip(PROMPTS, wants, strict=True):
            assert lm.generate([prompt], Sampling(max_new_tokens=12, stop_ids=(want[6],))) == [want[: want.index(want[6]) + 1]]
            for count in range(1, 8):
                text, hits = [*prompt, *want[:count], 3], lm.cache.prefix_tokens
                assert lm.generate([text], max_new_tokens=4) == [alone(tiny(), text, Sampling(max_new_tokens=4))]
                assert lm.cache.prefix_tokens > hits


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_any_schedule_on_a_gpu(inner: str) -> None:
    drafter = Guessing(texts_of([prompt for prompt, _, _ in cases()], [want for _, _, want in cases()]), 0.3, steady=False)
    settings = {"kv_tokens": 48, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17, "poison": True}
    with PagedLM(tiny().cuda(), inner=inner, cuda_graphs=True, drafter=drafter, **settings) as lm:  # type: ignore[arg-type]
        for seed in range(40):
            play(lm, random.Random(seed))
        assert 0 < lm.num_accepted_tokens < lm.num_draft_tokens
        assert any(one.wanted > one.rows for one in lm.cuda_graphs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("kernel", ["general", "block_sparse", "flash_attn", "flashinfer"])
def test_kernels_on_a_gpu(kernel: str, graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks, decodes and drafts in one step, half of the drafts as a server without them has gone on."""
    needs(kernel)
    model, prompts = model_on("cuda"), words([3, 40, 200, 17, 130, 1])
    settings = {"kv_tokens": 8192, "max_seqs": 6, "max_batch_tokens": 256, "inner": "eager", "cuda_graphs": graphs}
    settings["kernel"] = kernel
    with PagedLM(model, **settings) as lm:  # type: ignore[arg-type]
        wants = lm.generate(prompts, max_new_tokens=40)
    with PagedLM(model, drafter=Guessing(texts_of(prompts, wants), 0.3, SMALL.vocabulary), **settings) as lm:  # type: ignore[arg-type]
        if graphs:
            monkeypatch.setattr(lm._runner, "_run_once", None)
        check_greedy(model, prompts, lm.generate(prompts, max_new_tokens=40))
        assert 0.1 < lm.num_accepted_tokens / lm.num_draft_tokens < 0.9
        assert any(one.wanted > one.rows for one in lm.cuda_graphs) == graphs

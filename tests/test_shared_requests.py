"""Do the requests of a server share what they can, and nothing that they may not: prefixes, samples of a prompt, forks?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from compile_attn.lm import PagedLM
from compile_attn.requests import Request
from compile_attn.sampling import Sampling
from tests.test_sharing_model import masked
from tests.tiny import VOCAB, alone, as_on_a_gpu, prompts_of, tiny

pytestmark = pytest.mark.usefixtures("no_grad")
TEXT = prompts_of([40], seed=5)[0]
GREEDY = Sampling(max_new_tokens=6)
DRAWN = Sampling(temperature=1.2, top_p=0.95, seed=3, max_new_tokens=6)
WAYS = ["one by one", "as on a GPU"]


def lm_of(model: torch.nn.Module | None = None, **changes: Any) -> PagedLM:
    settings = {"kv_tokens": 256, "page_size": 4, "max_seqs": 8, "inner": "eager", "poison": True, **changes}
    return PagedLM(model or tiny(), **settings)


@pytest.fixture(scope="module", params=WAYS)
def server(request: pytest.FixtureRequest) -> Iterator[PagedLM]:
    with lm_of() as lm:
        yield as_on_a_gpu(lm) if request.param == "as on a GPU" else lm


@pytest.fixture
def lm(server: PagedLM) -> Iterator[PagedLM]:
    """A server that knows nothing yet, and is left without work."""
    server.generate([[1, 2]], GREEDY)  # compiles anew after torch was reset
    server.cache.forget_prefixes()
    yield server
    assert not server.has_work and server.cache.pages_in_use == 0
    server.cache.forget_prefixes()
    assert len(server.cache._seqs.pages._free) == server.cache.num_pages, "no page is lost"


def tokens_run(lm: PagedLM) -> list[int]:
    """Filled with the number of new tokens of each step from now on."""
    counts: list[int] = []
    send = lm._runner.send

    def counted(plan: Any) -> Any:
        counts.append(sum(len(chunk.tokens) for chunk in plan.chunks))
        return send(plan)

    lm._runner.send = counted  # type: ignore[method-assign]
    return counts


def run(lm: PagedLM, *requests: Request) -> list[list[int]]:
    while lm.has_work:
        lm.step()
    return [one.new_tokens for one in requests]


def each_alone(prompt: list[int], how: Sampling, model: torch.nn.Module | None = None) -> list[list[int]]:
    """What the n answers must be: those of n requests with seeds of their own."""
    return [alone(model or tiny(), prompt, replace(how, n=1, seed=(how.seed or 0) + k)) for k in range(how.n)]


# Prefixes


def test_a_later_request_runs_only_what_is_new(lm: PagedLM) -> None:
    prompts = [TEXT[:22], TEXT[:30], TEXT[:22], [*TEXT[:13], 1, 2, 3], TEXT[:4]]
    new = [22, 30 - 20, 22 - 20, 16 - 12, 1]  # of 22 tokens 5 pages are full; of 4 known ones the last one is run again
    counts = tokens_run(lm)
    for prompt, wanted in zip(prompts, new, strict=True):
        del counts[:]
        assert lm.generate([prompt], GREEDY) == [alone(tiny(), prompt, GREEDY)]
        assert counts == [wanted, *[1] * 5], prompt


def test_what_was_made_is_found_as_well(lm: PagedLM) -> None:
    """A conversation: the next prompt holds the last answer."""
    [made] = lm.generate([TEXT[:9]], Sampling(max_new_tokens=12))
    longer = [*TEXT[:9], *made, 5, 6]
    counts = tokens_run(lm)
    assert lm.generate([longer], GREEDY) == [alone(tiny(), longer, GREEDY)]
    known = 20 if lm._ahead == 0 else 16  # 20 tokens were run; where tokens are read a step late, the last page's are not known
    assert counts[0] == len(longer) - known


def test_a_request_finds_what_a_running_one_has_loaded(lm: PagedLM) -> None:
    counts = tokens_run(lm)
    first = lm.submit(TEXT[:17], GREEDY)
    lm.step()
    second = lm.submit(TEXT[:19], GREEDY)
    lm.step()
    assert counts == [17, 19 - 16 + 1]
    assert lm.cache.pages_in_use == 5 + 1, "four pages are shared"
    assert run(lm, first, second) == [alone(tiny(), prompt, GREEDY) for prompt in (TEXT[:17], TEXT[:19])]


def test_chunks_are_known_one_by_one() -> None:
    """Also those of a prompt that was cancelled before its end."""
    with lm_of(max_batch_tokens=8) as lm:
        counts = tokens_run(lm)
        first = lm.submit(TEXT[:30], GREEDY)
        lm.step()
        lm.step()
        lm.cancel(first)
        assert lm.generate([TEXT[:30]], GREEDY) == [alone(tiny(), TEXT[:30], GREEDY)]
        assert counts == [8, 8, 8, 6, *[1] * 5]


def test_it_can_be_turned_off() -> None:
    with lm_of(prefix_cache=False) as lm:
        counts = tokens_run(lm)
        for _ in range(2):
            assert lm.generate([TEXT[:22]], GREEDY) == [alone(tiny(), TEXT[:22], GREEDY)]
        assert counts == [22, *[1] * 5] * 2 and lm.cache.prefix_hits == 0 and not len(lm.cache._seqs._index)


def test_a_preempted_request_goes_on_from_its_own_pages() -> None:
    """Also from those of tokens that it made; only what others have taken meanwhile is computed again."""
    how, ran = Sampling(max_new_tokens=20), {}
    for prefix_cache in (True, False):
        with lm_of(kv_tokens=48, prefix_cache=prefix_cache) as lm:
            counts = tokens_run(lm)
            requests = [lm.submit(prompt, how) for prompt in (TEXT[:9], TEXT[20:29])]
            assert run(lm, *requests) == [alone(tiny(), prompt, how) for prompt in (TEXT[:9], TEXT[20:29])]
            assert lm.preemptions
            ran[prefix_cache] = sum(counts) + lm.cache.prefix_tokens
    assert ran[True] == ran[False] and lm.cache.prefix_tokens == 0
    assert ran[True] > 2 * (9 + 19), "some of it twice"


@pytest.mark.parametrize("name", ["window", "block sparse"])
def test_hits_are_right_under_any_mask(name: str) -> None:
    model = masked(name)
    with lm_of(model) as lm:
        for prompt in (TEXT[:22], TEXT[:30], [*TEXT[:21], 7]):
            assert lm.generate([prompt], GREEDY) == [alone(model, prompt, GREEDY)]
        assert lm.cache.prefix_tokens == 20 + 20
        drawn = replace(DRAWN, n=3)
        assert lm.generate([TEXT[:26]], drawn) == each_alone(TEXT[:26], drawn, model)


def test_pages_of_fp8_are_shared() -> None:
    settings: dict[str, Any] = {"kv_dtype": "fp8_e4m3", "kv_scales": [(0.1, 0.1)] * 2}
    prompts, drawn = [TEXT[:22], TEXT[:30], TEXT[:22]], replace(DRAWN, n=2)
    with lm_of(**settings) as lm, lm_of(prefix_cache=False, **settings) as apart:
        for prompt in prompts:
            assert lm.generate([prompt], drawn) == apart.generate([prompt], drawn)
        assert lm.cache.prefix_tokens == 20 + 20 and not apart.cache.prefix_hits, "and the second samples are forks"


# Salts


def test_no_tenant_meets_another(lm: PagedLM) -> None:
    """What runs, step by step, is the same whatever another one has left."""
    want = [alone(tiny(), TEXT[:22], GREEDY)]
    seen = []
    for others in ([], [None, "b", b"a"]):
        lm.cache.forget_prefixes()
        for salt in others:
            assert lm.generate([TEXT[:22]], GREEDY, salt=salt) == want
        counts = tokens_run(lm)
        assert lm.generate([TEXT[:22]], GREEDY, salt="a") == want
        assert [out.token for out in lm.stream([TEXT[:22]], GREEDY, salt="a")] == want[0]
        assert run(lm, lm.submit(TEXT[:22], GREEDY, salt="a")) == want
        seen.append(list(counts))
    assert seen[0] == seen[1] == [22, *[1] * 5, *[2, *[1] * 5] * 2]


def test_a_salt_that_is_none_is_refused_before_anything_waits(lm: PagedLM) -> None:
    for asked in (
        lambda: lm.submit([1], salt=7),  # type: ignore[arg-type]
        lambda: lm.generate([[1]], salt=["a"]),  # type: ignore[arg-type]
        lambda: lm.stream([[1]], salt=1.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"salt=.*; a cache salt is a str, bytes or None"):
            asked()
    assert not lm.has_work


# Samples


@pytest.mark.parametrize("prompt", [TEXT[:1], TEXT[:4], TEXT[:5], TEXT[:16], TEXT[:23]], ids=len)
def test_samples_run_their_prompt_once(prompt: list[int], lm: PagedLM) -> None:
    how = replace(DRAWN, n=4)
    want = each_alone(prompt, how)
    assert len({tuple(one) for one in want}) > 1
    counts = tokens_run(lm)
    assert lm.generate([prompt], how) == want
    assert counts[:3] == [len(prompt), 4, 4] and sum(counts) == len(prompt) + 3 + 4 * 5, "its last token once for each"


def test_samples_share_pages_also_without_a_prefix_cache() -> None:
    with lm_of(prefix_cache=False) as lm:
        how = replace(DRAWN, n=4)
        request = lm.submit(TEXT[:22], how)
        lm.step()
        lm.step()
        assert lm.cache.pages_in_use == 5 + 4, "five full pages, and one for each"
        run(lm)
        assert [one.new_tokens for one in request.samples] == each_alone(TEXT[:22], how)


def test_samples_of_many_prompts_beside_others(lm: PagedLM) -> None:
    """More of them than rows: they wait their turn. A list for each, one after the other."""
    prompts = [TEXT[:22], TEXT[5:9], TEXT[:20]]
    how = [replace(DRAWN, n=5), GREEDY, replace(DRAWN, n=11, seed=50, stop_ids=(3, 4))]
    want = [one for prompt, each in zip(prompts, how, strict=True) for one in each_alone(prompt, each)]
    assert any(len(one) < 6 for one in want[6:]), "some stop"
    assert lm.generate(prompts, how) == want
    outs = list(lm.stream(prompts, how))
    keys = [(at, k) for at, each in enumerate(how) for k in range(each.n)]
    assert [[out.token for out in outs if (out.index, out.sample) == key] for key in keys] == want
    assert sum(out.finished for out in outs) == len(keys)


def test_samples_without_a_seed_differ_and_follow_torchs(lm: PagedLM) -> None:
    how = Sampling(temperature=2.0, max_new_tokens=6, n=3)
    runs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        runs.append(lm.generate([TEXT[:6], TEXT[:6]], how))
    assert runs[0] == runs[1] != runs[2] and len({tuple(one) for one in runs[0]}) == 6


def test_samples_of_one_token_and_of_a_full_cache(lm: PagedLM) -> None:
    """The first one has ended before the others begin."""
    how = replace(DRAWN, n=4, max_new_tokens=1)
    assert lm.generate([TEXT[:22]], how) == each_alone(TEXT[:22], how)
    longest = prompts_of([64], seed=8)[0]
    assert lm.generate([longest], replace(DRAWN, n=3)) == each_alone(longest, replace(DRAWN, n=3))


@pytest.mark.parametrize("settings", [{"kv_tokens": 48}, {"kv_tokens": 28, "page_size": 1}], ids=str)
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_that_run_out_of_pages(settings: dict[str, int], prefix_cache: bool) -> None:
    how = replace(DRAWN, n=6, max_new_tokens=14)
    with lm_of(prefix_cache=prefix_cache, **settings) as lm:
        assert lm.generate([TEXT[:13]], how) == each_alone(TEXT[:13], how)
        assert lm.preemptions and lm.cache.pages_in_use == 0


def test_one_sample_is_cancelled_or_all(lm: PagedLM) -> None:
    how = replace(DRAWN, n=4, max_new_tokens=12)
    want = each_alone(TEXT[:10], how)
    request = lm.submit(TEXT[:10], how)
    while not request.samples[3].new_tokens:
        lm.step()
    lm.cancel(request, 2)
    lm.cancel(request.samples[1], 0)
    run(lm)
    for one, whole in zip(request.samples, want, strict=True):
        assert one.reason == ("cancelled" if one.sample in (0, 2) else "length")
        assert one.new_tokens == whole if one.reason == "length" else one.new_tokens == whole[: len(one.new_tokens)]
    request = lm.submit(TEXT[:10], how)
    lm.step()
    lm.cancel(request.samples[1])
    assert not lm.has_work and all(one.reason == "cancelled" for one in request.samples)


def test_the_next_sample_runs_the_prompt_if_the_first_is_cancelled() -> None:
    """Before it has begun, between two chunks, and after the last one."""
    how = replace(DRAWN, n=3)
    with lm_of(max_batch_tokens=8) as lm:
        for steps in range(4):
            lm.cache.forget_prefixes()
            request, other = lm.submit(TEXT[:22], how), lm.submit(TEXT[25:30], GREEDY)
            for _ in range(steps):
                lm.step()
            lm.cancel(request, 0)
            lm.cancel(request, 1)
            run(lm)
            assert request.samples[2].new_tokens == each_alone(TEXT[:22], how)[2]
            assert other.new_tokens == alone(tiny(), TEXT[25:30], GREEDY) and lm.cache.pages_in_use == 0


# Forks


def test_requests_of_another_server_are_refused(lm: PagedLM) -> None:
    """Its fork was taken in once, and no step ran ever after."""
    with lm_of() as other:
        theirs, mine = other.submit(TEXT[:9], GREEDY), lm.submit(TEXT[:9], GREEDY)
        for asked, why in ((theirs, "request 0 belongs to another PagedLM"), ([1, 2], "pass a request that submit")):
            for refused in (lm.fork, lm.cancel):
                with pytest.raises(ValueError, match=why):
                    refused(asked)  # type: ignore[operator]
        with pytest.raises(ValueError, match="which has samples 0 to 0"):
            lm.cancel(mine, 1)
        assert run(lm, mine) == run(other, theirs) == [alone(tiny(), TEXT[:9], GREEDY)]


def test_a_fork_goes_on_from_what_is_there(lm: PagedLM) -> None:
    first = lm.submit(TEXT[:10], Sampling(max_new_tokens=20))
    while len(first.new_tokens) < 6:
        lm.step()
    prompt = [*first.prompt, *first.new_tokens]
    counts = tokens_run(lm)
    forked, drawn = lm.fork(first, GREEDY), lm.fork(first, replace(DRAWN, n=2))
    lm.step()
    assert counts == [3], "the last token of each, and a new one of the first; the other sample waits for that"
    run(lm)
    assert first.new_tokens == alone(tiny(), TEXT[:10], Sampling(max_new_tokens=20))
    assert forked.new_tokens == alone(tiny(), prompt, GREEDY)
    assert [one.new_tokens for one in drawn.samples] == each_alone(prompt, replace(DRAWN, n=2))
    late = lm.fork(first, GREEDY)
    assert run(lm, late) == [alone(tiny(), [*first.prompt, *first.new_tokens], GREEDY)], "it has ended, and is asked anew"


# Failures


def of_requests(lm: PagedLM) -> bool:
    """Whether this is a step of requests, and not one of pads that is recorded."""
    return lm.cache.current is not None and lm.cache.current.num_tokens > 0


def unwritten(lm: PagedLM, at: int) -> None:
    """From now on the step with this number runs without writing a key, and says nothing that could be used."""
    whole, left = lm._runner._run, [at]

    def failing(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        left[0] -= of_requests(lm)
        if left[0] or not of_requests(lm):
            return whole(ids, positions)
        rows = lm.cache.step_inputs()[3]
        return torch.full((1, len(rows), VOCAB), torch.nan)

    lm._runner._run = failing


def interrupted(lm: PagedLM, at: int) -> None:
    """From now on the step with this number ends in an interrupt."""
    whole, left = lm._runner._run, [at]

    def failing(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        left[0] -= of_requests(lm)
        if not left[0] and of_requests(lm):
            raise KeyboardInterrupt
        return whole(ids, positions)

    lm._runner._run = failing


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("failure", [unwritten, interrupted])
def test_no_page_of_a_step_that_failed_is_found(failure: Callable[[PagedLM, int], None], way: str) -> None:
    """Nor does a request begin with what another one, which failed as well, should have written."""
    how = replace(DRAWN, n=2)
    with lm_of() as lm:
        if way == "as on a GPU":
            as_on_a_gpu(lm)
        whole = lm._runner._run
        for at in (1, 2, 3, 5):
            failure(lm, at)
            requests = [lm.submit(TEXT[:22], how), lm.submit([*TEXT[:16], 1, 2], GREEDY)]
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                run(lm)
            assert lm.cache.pages_in_use == 0 and not len(lm.cache._seqs._index)
            lm._runner._run = whole
            run(lm)
            assert [one.new_tokens for one in requests[0].samples] == each_alone(TEXT[:22], how)
            assert requests[1].new_tokens == alone(tiny(), [*TEXT[:16], 1, 2], GREEDY)


def test_a_warm_up_beside_known_pages(lm: PagedLM) -> None:
    lm.generate([TEXT[:22]], GREEDY)
    assert len(lm.cache._seqs._index) and lm.cache.pages_in_use == 0
    lm.warm_up(random=True)
    assert lm.generate([TEXT[:22]], GREEDY) == [alone(tiny(), TEXT[:22], GREEDY)]


def test_other_weights_are_asked_anew() -> None:
    model = tiny()
    with lm_of(model) as lm:
        for seed in (1, 2):
            assert lm.generate([TEXT[:22]], GREEDY) == [alone(model, TEXT[:22], GREEDY)]
            model.load_state_dict(tiny(seed=seed).state_dict())
        assert not lm.cache.prefix_hits


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_prefixes_and_samples_on_a_gpu(graphs: bool) -> None:
    """Replayed from graphs, a hit is no more than a longer context."""
    model, how = tiny().cuda(), replace(DRAWN, n=5)
    with lm_of(model, kv_tokens=1024, page_size=16, cuda_graphs=graphs, inner="inductor") as lm:
        counts = tokens_run(lm)
        for prompt, new in ((TEXT[:38], 38), (TEXT[:40], 8), ([*TEXT[:33], 5], 2)):
            del counts[:]
            assert lm.generate([prompt], GREEDY) == [alone(tiny(), prompt, GREEDY)]
            assert counts[0] == new
        assert lm.generate([TEXT[:40]], how) == each_alone(TEXT[:40], how)
        assert lm.cache.pages_in_use == 0

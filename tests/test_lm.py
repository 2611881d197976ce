"""Does a paged model say what the model alone says, whatever shares its batches, and does it leave nothing behind?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import compile_attn.lm as runtime
from compile_attn.lm import Output, PagedLM
from compile_attn.sampling import Sampling
from tests.tiny import POSITIONS, VOCAB, TinyDecoder, alone, as_on_a_gpu, prompts_of, tiny

PROMPTS = prompts_of([5, 23, 41, 1, 2, 17])


def lm_of(model: torch.nn.Module | None = None, **changes: Any) -> PagedLM:
    settings = {"kv_tokens": 256, "page_size": 4, "max_seqs": 8, "inner": "eager", "poison": True, **changes}
    return PagedLM(model or tiny(), **settings)


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    return [alone(tiny(), prompt, Sampling(max_new_tokens=count)) for prompt in prompts]


@pytest.fixture(scope="module")
def shared() -> Iterator[PagedLM]:
    """One model for the tests that leave it as they found it."""
    with lm_of() as lm:
        yield lm


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "shared" in request.fixturenames:
        lm: PagedLM = request.getfixturevalue("shared")
        assert lm.cache.pages_in_use == 0 and not lm.has_work


def test_ragged_prompts_equal_recomputation(shared: PagedLM) -> None:
    assert shared.generate(PROMPTS, max_new_tokens=12) == greedy(PROMPTS, 12)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_seqs": 2},
        {"max_seqs": 1},
        {"max_batch_tokens": 7},
        {"max_batch_tokens": 1},
        {"kv_tokens": 64, "page_size": 8},
    ],
    ids=str,
)
def test_no_setting_changes_the_tokens(changes: dict[str, int]) -> None:
    with lm_of(**changes) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=12) == greedy(PROMPTS, 12)
        assert (lm.preemptions > 0) == ("kv_tokens" in changes) and lm.cache.pages_in_use == 0


def test_one_compilation_serves_everything() -> None:
    torch._dynamo.reset()
    counters.clear()
    with lm_of(max_batch_tokens=9) as lm:
        lm.generate(PROMPTS, max_new_tokens=5)
        lm.generate([[1]], max_new_tokens=3)
        lm.generate([[1]] * 8, max_new_tokens=3)
    assert counters["stats"]["unique_graphs"] == 1


def test_seeds_decide_whatever_else_runs(shared: PagedLM) -> None:
    how = [
        Sampling(temperature=0.8 + 0.2 * i, top_k=(None, 5, 9)[i % 3], top_p=(1.0, 0.8)[i % 2], seed=i, max_new_tokens=8 + i)
        for i in range(6)
    ]
    want = [alone(tiny(), prompt, one) for prompt, one in zip(PROMPTS, how, strict=True)]
    assert shared.generate(PROMPTS, how) == want
    assert shared.generate(PROMPTS[::-1], how[::-1]) == want[::-1]
    assert shared.generate(PROMPTS[3:4], how[3]) == want[3:4]
    assert len({tuple(one) for one in shared.generate([PROMPTS[0]] * 8, Sampling(temperature=2.0, max_new_tokens=6))}) > 1


def test_torchs_seed_decides_where_none_is_given(shared: PagedLM) -> None:
    how = Sampling(temperature=1.5, max_new_tokens=8)
    runs = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        runs.append(shared.generate(PROMPTS, how))
    assert runs[0] == runs[1] != runs[2]


def test_stop_ids_end_a_request_and_are_returned(shared: PagedLM) -> None:
    [whole] = greedy(PROMPTS[:1], 12)
    stop = whole[4]
    want = whole[: whole.index(stop) + 1]
    assert shared.generate(PROMPTS[:1], Sampling(stop_ids=(stop,), max_new_tokens=12)) == [want]


def test_stream_gives_every_token_in_order(shared: PagedLM) -> None:
    outs = list(shared.stream(PROMPTS, Sampling(max_new_tokens=6)))
    assert [[out.token for out in outs if out.index == i] for i in range(6)] == greedy(PROMPTS, 6)
    last = [[out for out in outs if out.index == i][-1] for i in range(6)]
    assert [(out.finished, out.reason) for out in last] == [(True, "length")] * 6
    assert sum(out.finished for out in outs) == 6 and isinstance(outs[0], Output)
    assert outs[0] in {Output(outs[0].index, outs[0].token, False, None)}


def test_leaving_a_stream_gives_pages_back(shared: PagedLM) -> None:
    for seen, out in enumerate(shared.stream(PROMPTS, Sampling(max_new_tokens=30))):
        if seen == 9:
            assert shared.cache.pages_in_use > 0 and not out.finished
            break
    assert shared.cache.pages_in_use == 0 and not shared.has_work
    unused = shared.stream(PROMPTS)
    assert not shared.has_work
    del unused


def test_two_streams_at_once(shared: PagedLM) -> None:
    a, b = shared.stream(PROMPTS[:1], max_new_tokens=9), shared.stream(PROMPTS[1:2], max_new_tokens=9)
    first, second = [], []
    for x, y in zip(a, b, strict=True):
        first.append(x.token)
        second.append(y.token)
    assert [first, second] == greedy(PROMPTS[:2], 9)


def test_requests_join_and_leave_between_steps(shared: PagedLM) -> None:
    want = greedy(PROMPTS, 10)
    requests = [shared.submit(PROMPTS[0], Sampling(max_new_tokens=10))]
    shared.step()
    requests.append(shared.submit(torch.tensor(PROMPTS[1]), Sampling(max_new_tokens=10)))
    outs = shared.step()
    assert [out.index for out in outs] == [requests[1].id, requests[0].id]  # prefills come first
    shared.cancel(requests[0])
    assert requests[0].reason == "cancelled" and requests[0].new_tokens == want[0][:2]
    requests.append(shared.submit(PROMPTS[2], Sampling(max_new_tokens=10)))
    while shared.has_work:
        shared.step()
    assert [one.new_tokens for one in requests[1:]] == want[1:3] and shared.step() == []


def test_the_position_table_ends_a_request(shared: PagedLM) -> None:
    prompt = prompts_of([POSITIONS - 3])[0]
    outs = list(shared.stream([prompt], max_new_tokens=20))
    assert [out.token for out in outs] == alone(tiny(), prompt, Sampling(max_new_tokens=20))
    assert len(outs) == 4 and outs[-1].reason == "length"


def test_a_failing_step_leaks_nothing(shared: PagedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = shared._runner._run
    left = [5]

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(shared._runner, "_run", failing)
    with pytest.raises(KeyboardInterrupt):
        shared.generate(PROMPTS, max_new_tokens=12)
    assert shared.cache.pages_in_use == 0 and not shared.has_work
    left[0] = 4
    request = shared.submit(PROMPTS[0], Sampling(max_new_tokens=7))
    with pytest.raises(KeyboardInterrupt):
        while shared.has_work:
            shared.step()
    while shared.has_work:
        shared.step()
    assert [request.new_tokens] == greedy(PROMPTS[:1], 7)


@pytest.mark.parametrize("ahead", [False, True], ids=["one by one", "as on a GPU"])
@pytest.mark.parametrize("place", ["when it lets a request in", "when a request ends"])
def test_an_interrupt_in_the_scheduler_loses_no_request(place: str, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    want = greedy(PROMPTS[:2], 12)
    with lm_of() as lm:
        if ahead:
            as_on_a_gpu(lm)
        requests = [
            lm.submit(prompt, Sampling(max_new_tokens=12, stop_ids=(made[-1],)))
            for prompt, made in zip(PROMPTS, want, strict=False)
        ]
        owner, name = (lm.cache, "add") if place == "when it lets a request in" else (lm._scheduler, "_drop")
        monkeypatch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            while lm.has_work:
                lm.step()
        monkeypatch.undo()
        for _ in range(60):
            lm.step()
        assert not lm.has_work and lm.cache.pages_in_use == 0
        for request, made in zip(requests, want, strict=True):
            assert request.finished and request.new_tokens == made[: made.index(made[-1]) + 1]


def test_useless_logits_are_an_error() -> None:
    model = tiny()
    with lm_of(model) as lm:
        model.head.weight.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="logits of request 0 after 5 tokens are not finite"):
            lm.generate(PROMPTS[:1])
        assert lm.cache.pages_in_use == 0


def test_a_model_that_ran_unpaged_is_caught(shared: PagedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared._runner, "_run", lambda ids, positions: tiny()(ids))
    with pytest.raises(RuntimeError, match="the model ran, but not as its paged graph"):
        shared.generate(PROMPTS[:1])


def test_progress_shows_on_a_terminal_only(shared: PagedLM, capsys: pytest.CaptureFixture[str]) -> None:
    shared.generate(PROMPTS[:2], max_new_tokens=3)
    shared.generate(PROMPTS[:2], max_new_tokens=3, progress=False)
    assert capsys.readouterr() == ("", "")
    shared.generate(PROMPTS[:2], max_new_tokens=3, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "tokens" in err


def test_progress_reaches_its_end(shared: PagedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(runtime, "bar_if", lambda wanted, total: _Counting(seen, total))
    stop = greedy(PROMPTS[:1], 12)[0][4]
    shared.generate(PROMPTS, Sampling(stop_ids=(stop,), max_new_tokens=12))
    assert seen[0] == 6 * 12 == sum(seen[1:])


class _Counting:
    def __init__(self, seen: list[int], total: int) -> None:
        self.seen = seen
        seen.append(total)

    def __enter__(self) -> Any:
        return self.seen.append

    def __exit__(self, *_: object) -> None:
        return None


def test_what_is_known_of_the_model(shared: PagedLM) -> None:
    assert shared.vocab_size == VOCAB and shared.cache.max_positions == POSITIONS
    assert shared.report is not None and len(shared.report.sites) == 2 and shared.report.mode == "paged"


class Styled(torch.nn.Module):
    """The tiny model behind another signature and output."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.inner = tiny()
        self.style = style

    def forward(self, ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = True) -> Any:
        assert not use_cache and position_ids.shape == ids.shape
        logits = self.inner(ids)
        if self.style == "tuple":
            return logits, None
        return {"loss": None, "logits": logits} if self.style == "dict" else logits


@pytest.mark.parametrize("style", ["tuple", "dict", "plain"])
def test_signatures_and_outputs(style: str) -> None:
    with lm_of(Styled(style)) as lm:
        assert lm.generate(PROMPTS[:3], max_new_tokens=6) == greedy(PROMPTS[:3], 6)


class Unusual(TinyDecoder):
    def forward(self, scale: float, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"scores": super().forward(batch["ids"]) * scale}


def test_call_serves_any_other_shape() -> None:
    def call(model: Any, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(1.0, {"ids": input_ids})["scores"]
        return logits

    with lm_of(Unusual().eval(), call=call) as lm:
        assert lm.generate(PROMPTS[:3], max_new_tokens=6) == greedy(PROMPTS[:3], 6)


@torch._dynamo.config.patch(recompile_limit=2)
def test_many_models_of_one_class_in_one_process() -> None:
    for seed in range(4):  # more than torch.compile's limit of compilations of one function, which is 8 if nobody changes it
        with lm_of(tiny(layers=1, seed=seed)) as lm:
            assert lm.generate(PROMPTS[:1], max_new_tokens=3) == [
                alone(tiny(layers=1, seed=seed), PROMPTS[0], Sampling(max_new_tokens=3))
            ]

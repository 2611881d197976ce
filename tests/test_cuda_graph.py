"""Do replayed steps say what eager ones say, whoever joins and leaves?"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compile_attn.cache import Chunk
from compile_attn.cuda_graph import Kind
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling, SamplingRows, sample
from compile_attn.step import Logits, StepBuffers
from tests.test_fuzz import cases, play
from tests.tiny import alone, as_on_a_gpu, prompts_of, tiny

PROMPTS = prompts_of([5, 1, 9, 14, 2, 7], seed=3)
SETTINGS = {"kv_tokens": 256, "page_size": 4, "max_seqs": 8, "poison": True}


def greedy(count: int) -> list[list[int]]:
    return [alone(tiny(), prompt, Sampling(max_new_tokens=count)) for prompt in PROMPTS]


def test_a_step_that_is_repeated_sends_nothing() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        writes: list[int] = []
        write = lm.cache.buffers.write
        lm.cache.buffers.write = lambda *args, **options: writes.append(1) or write(*args, **options)  # type: ignore[assignment, func-returns-value]
        assert lm.generate(PROMPTS, max_new_tokens=20) == greedy(20)
        # The prompts and the first decode, and before either what records its graph: all others only get new pages.
        assert len(writes) == 4 and lm.cache.steps_run >= 20


def test_sizes_grow_with_the_batch() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs
        assert graphs is not None
        assert [graphs.sizes(rows, rows, rows) for rows in (1, 2, 3, 5, 8)] == [(size,) * 3 for size in (2, 2, 4, 8, 8)]
        lm.cache.max_seqs, lm.cache.max_tokens = 300, None
        assert [graphs.sizes(rows, rows, rows) for rows in (9, 17, 128, 129, 300)] == [
            (size,) * 3 for size in (16, 32, 128, 160, 300)
        ]
        lm.cache.max_tokens = 100
        assert graphs.sizes(100, 100, 100) is None and graphs.sizes(96, 96, 96) == (96, 96, 96)


def test_sizes_of_steps_with_prompts() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", max_batch_tokens=300, **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs
        assert graphs is not None
        lm.cache.max_tokens = None
        for rows, tokens, size in [(1, 2, (2, 16)), (3, 3, (8, 16)), (8, 255, (8, 256)), (8, 257, None)]:
            assert graphs.sizes(rows, tokens, 0) == (size and (*size, size[0])), (rows, tokens)
        assert graphs.sizes(3, 20, 4) == (8, 32, 32) and graphs.sizes(3, 33, 4) == (8, 64, 64)
        lm.cache.max_tokens = 100  # of which a model may take no more in a step
        assert [graphs.sizes(8, tokens, 2) for tokens in (65, 101)] == [(8, 100, 8), None]
        graphs.forget_prompts()
        assert graphs.sizes(1, 2, 0) is None and graphs.sizes(2, 2, 2) == (2, 2, 2)


@pytest.mark.parametrize("random_", [False, True])
def test_every_token_of_some_rows_is_sampled(random_: bool) -> None:
    """As when drafts are verified: several rows of logits of a sequence, beside decodes and others' chunks."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", max_batch_tokens=40, **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs, cache = lm._runner.graphs, lm.cache
        assert graphs is not None
        how = Sampling(temperature=0.8 if random_ else 0.0, seed=5)
        seqs = [cache.add() for _ in PROMPTS[:4]]
        known = [prompt + greedy(6)[at] for at, prompt in enumerate(PROMPTS[:4])]
        asked: list[tuple[int, Logits]] = [(1, "last"), (4, "all"), (3, "none"), (5, "all")]
        chunks = []
        for seq, tokens, (count, logits) in zip(seqs, known, asked, strict=True):
            lm._runner.logits([Chunk(seq, tokens[:-count])])
            chunks.append(Chunk(seq, tokens[-count:], logits))
        sizes = graphs.sizes(4, 13, 10)
        assert sizes == (8, 16, 16)
        kind = Kind(*sizes, cache.width_of(chunks), random_)
        graphs.prepare(kind, again=False)
        batch = cache.batch(chunks, recorded=sizes)
        if random_:
            graphs.set_sampling(SamplingRows.of([how] * 10, [(7, at) for at in range(10)]))
        graphs.replay(kind, batch)
        expected = []
        for tokens, (count, logits) in zip(known, asked, strict=True):
            rows = tiny()(torch.tensor([tokens]))[0][-count:]
            expected.append(rows[:0] if logits == "none" else rows)
        rows = torch.cat(expected)
        drawn = sample(rows, SamplingRows.of([how] * 10, [(7, at) for at in range(10)]) if random_ else None)
        assert cache.buffers.recent[:10].tolist() == drawn.tolist()


def test_prompts_are_replayed_beside_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of them too, and whatever the pads of the last step of that size held."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", max_batch_tokens=20, prefix_cache=False, **SETTINGS)) as lm:  # type: ignore[arg-type]
        monkeypatch.setattr(lm._runner, "_run_once", None)  # not one step runs without a graph
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        how = Sampling(max_new_tokens=9, temperature=0.9, seed=4)
        assert lm.generate(PROMPTS[::-1], how) == [alone(tiny(), prompt, how) for prompt in PROMPTS[::-1]]
        kinds = {(one.rows, one.new_tokens) for one in lm.cuda_graphs if one.new_tokens > one.rows}
        assert kinds == {(8, 20)}


def test_decodes_keep_their_graphs_where_prompts_can_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs
        assert graphs is not None
        lm._runner._strict = False
        body = graphs._body

        def fail(batch: Any, random: bool) -> Callable[[], None]:
            if batch.shape[1] > batch.shape[0]:
                raise RuntimeError("operation not permitted when stream is capturing")
            return body(batch, random)

        lm.warm_up(rows=2)
        monkeypatch.setattr(graphs, "_body", fail)
        with pytest.warns(UserWarning, match="steps with prompts run without CUDA graphs") as warned:
            lm.warm_up()
        assert len(warned) == 1 and {(one.rows, one.new_tokens) for one in lm.cuda_graphs} == {(8, 8), (4, 4), (2, 2)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)


def test_a_graph_is_for_its_own_sizes() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs
        assert graphs is not None
        lm.warm_up(rows=4, tokens=8)
        kinds = list(graphs._steps)
        assert len({kind.sizes for kind in kinds}) == len(kinds) > 3
        for kind in kinds:
            batch = lm.cache.dead_batch(kind.sizes, kind.width)
            graphs.replay(kind, batch)
            for other in (lm.cache.dead_batch(kind.sizes, kind.width + 1), lm.cache.dead_batch((7, 15, 7), kind.width)):
                with pytest.raises(RuntimeError, match="is not what this graph is for"):
                    graphs.replay(kind, other)


def test_the_largest_are_recorded_first() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        lm._runner.record(8, 64, True, largest=True)
        assert [(one.rows, one.new_tokens, one.tokens, one.random) for one in lm.cuda_graphs] == [
            (8, 63, 256, True),
            (8, 8, 256, True),
        ]


def test_block_tables_grow_with_the_longest_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = StepBuffers(4, 5000, 64, torch.device("cpu"))
    assert [buffers.width(pages, 16) for pages in (1, 16, 17, 64, 65, 257, 4097, 5000)] == [16, 16, 64, 64, 256, 1024, 5000, 5000]
    assert [StepBuffers(4, 3, 64, torch.device("cpu")).width(pages, 2048) for pages in (1, 3)] == [2, 3]

    monkeypatch.setattr(StepBuffers, "width", lambda self, pages, page_size: -(-pages // 3) * 3)  # widths change often
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        assert lm.generate(PROMPTS, max_new_tokens=30) == greedy(30) == lm.generate(PROMPTS, max_new_tokens=30)
        assert {one.tokens for one in lm.cuda_graphs} == {24, 36, 48}


@pytest.mark.parametrize("count", [1, 9, 300], ids=["one step", "into the next page", "to the end of all tables"])
def test_steps_too_many_write_to_no_page_of_another(count: int) -> None:
    """The host counts every step. Behind its back, a replay takes rows past their pages, their tables and their positions."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", kv_tokens=256, page_size=4, max_seqs=8)) as lm:
        for prompt in PROMPTS:
            lm.submit(prompt, Sampling(max_new_tokens=20))
        for _ in range(5):
            lm.step()
        runner, owned = lm._runner, [(seq.length, list(seq.pages)) for seq in lm.cache._in_batch]
        assert runner.graphs is not None and runner._steady is not None and len(owned) == len(PROMPTS)
        own = {page: length - at * 4 for length, pages in owned for at, page in enumerate(pages)}  # tokens that are in it
        before = [pool.clone() for pool in (*lm.cache.k_pages, *lm.cache.v_pages)]
        for _ in range(count):
            runner.graphs.replay(runner._steady[0], runner._steady[2])
        assert 0 not in own, "what a table does not show is page 0, which is nobody's"
        for old, new in zip(before, (*lm.cache.k_pages, *lm.cache.v_pages), strict=True):
            for page in range(1, len(new)):
                assert torch.equal(old[page, : own.get(page, 4)], new[page, : own.get(page, 4)]), page
            assert not torch.equal(old, new)


def test_a_step_that_cannot_be_recorded_runs_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs

        def fail(*_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graphs, "prepare", fail)
        with pytest.raises(RuntimeError, match="not permitted"):
            lm.generate(PROMPTS, max_new_tokens=3)
        lm._runner._strict = False
        with pytest.warns(UserWarning) as warned:
            assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        why = "run without CUDA graphs: one could not be recorded: operation not permitted when stream is capturing"
        assert [str(each.message) for each in warned] == [f"steps with prompts {why}", f"steps {why}"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9) and lm.cuda_graphs == ()


def test_what_a_failed_recording_ran_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is run once before it is recorded: over pad rows, in the buffer that holds tokens which the host has not read."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        graphs, sampled = lm._runner.graphs, list[torch.Tensor]()
        assert graphs is not None

        def fail(step: Callable[[], None]) -> None:
            before = lm.cache.buffers.recent.clone()
            step()
            sampled.extend((before, lm.cache.buffers.recent.clone()))
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(graphs, "_on_gpu", True)
        monkeypatch.setattr(graphs, "_reserved", lambda: 0)
        monkeypatch.setattr(graphs, "_record", fail)
        lm._runner._strict = False
        with pytest.warns(UserWarning, match="one could not be recorded"):
            assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        assert len(sampled) == 4, "once for a prompt, once for a decode"
        assert not all(map(torch.equal, sampled[::2], sampled[1::2])), "what was run has sampled something else"


def test_a_model_that_was_changed_is_recorded_anew() -> None:
    model = tiny()
    with as_on_a_gpu(PagedLM(model, inner="eager", prefix_cache=False, **SETTINGS)) as lm:  # type: ignore[arg-type]
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        recorded = lm.cuda_graphs
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9) and lm.cuda_graphs == recorded
        model.pos.weight.data = model.pos.weight.data.flip(0).contiguous()
        want = [alone(model, prompt, Sampling(max_new_tokens=9)) for prompt in PROMPTS]
        assert want != greedy(9)
        assert lm.generate(PROMPTS, max_new_tokens=9) == want
        assert len(lm.cuda_graphs) == len(recorded) and not set(lm.cuda_graphs) & set(recorded), "the old ones are gone"


def test_a_cache_that_was_resized_is_recorded_anew() -> None:
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        lm.cache.resize(128)
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)


def test_a_batch_made_by_hand_between_two_steps_is_noticed() -> None:
    from compile_attn.cache import Chunk

    with as_on_a_gpu(PagedLM(tiny(), inner="eager", **SETTINGS)) as lm:  # type: ignore[arg-type]
        stream = lm.stream(PROMPTS, max_new_tokens=20)
        made = [next(stream) for _ in range(30)]
        seq = lm.cache.add()
        lm._runner._run(*(lambda batch: (batch.input_ids, batch.position_ids))(lm.cache.batch([Chunk(seq, [1, 2, 3])])))
        lm.cache.free(seq)
        made += stream
        assert [[out.token for out in made if out.index == at] for at in range(len(PROMPTS))] == greedy(20)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32")  # torch's advice, which would change the tokens
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_random_schedules_on_a_gpu(inner: str) -> None:
    settings = {"kv_tokens": 48, "page_size": 2, "max_seqs": 6, "max_batch_tokens": 17, "poison": True}
    with PagedLM(tiny().cuda(), inner=inner, cuda_graphs=True, **settings) as lm:  # type: ignore[arg-type]
        for seed in range(40):
            play(lm, random.Random(seed))
        assert lm.preemptions > 10
        assert {one.rows for one in lm.cuda_graphs if one.rows == one.new_tokens} == {2, 4, 6}
        assert {(one.rows, one.new_tokens) for one in lm.cuda_graphs if one.rows < one.new_tokens} == {
            (2, 16), (6, 16), (2, 17), (6, 17),
        }  # fmt: skip
        assert {one.random for one in lm.cuda_graphs} == {False, True}


@pytest.mark.gpu
@pytest.mark.parametrize("first", [True, False], ids=["the first graph", "a later one"])
def test_after_an_interrupted_recording_the_next_one_succeeds(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes while the graph is recorded: no other is recorded into the pool that it leaves."""
    with PagedLM(tiny().cuda(), inner="eager", cuda_graphs=True, **SETTINGS) as lm:  # type: ignore[arg-type]
        graphs = lm._runner.graphs
        assert graphs is not None
        if not first:
            lm.warm_up(rows=2)
        body = graphs._body

        def interrupted(*args: Any) -> Callable[[], None]:
            step, calls = body(*args), iter((False, True))

            def run() -> None:
                step()
                if next(calls):
                    raise KeyboardInterrupt

            return run

        monkeypatch.setattr(graphs, "_body", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lm.generate(PROMPTS, max_new_tokens=9)
        monkeypatch.undo()
        assert lm.generate(PROMPTS, max_new_tokens=9) == greedy(9)
        assert {one.rows for one in lm.cuda_graphs} >= {8}


@pytest.mark.gpu
def test_a_steady_step_never_waits_for_the_device() -> None:
    prompts = [case[0] for case in cases()[:6]]
    with PagedLM(tiny().cuda(), inner="eager", kv_tokens=512, page_size=4, max_seqs=8, cuda_graphs=True) as lm:
        requests = [lm.submit(prompt, Sampling(max_new_tokens=30)) for prompt in prompts]
        for _ in range(4):
            lm.step()
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                lm.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["reserved_bytes.all.current"] > 0 and allocated > 0
        while lm.has_work:
            lm.step()
        assert [one.new_tokens for one in requests] == [alone(tiny(), p, Sampling(max_new_tokens=30)) for p in prompts]

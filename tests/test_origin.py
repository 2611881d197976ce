"""Is what two requests share always what the second one would compute, however the model was changed between them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.cache import CachedSequence, Chunk, PagedKVCache, StalePrefix
from compile_attn.lm import PagedLM
from compile_attn.origin import Origin
from compile_attn.sampling import Sampling
from tests.tiny import WIDTH, TinyDecoder, alone, as_on_a_gpu, prompts_of

pytestmark = pytest.mark.usefixtures("no_grad")
TEXT = prompts_of([14], seed=5)[0]
TOLERANCE = 1e-4  # the gains amplify float32 rounding
SETTINGS: dict[str, Any] = {"kv_tokens": 256, "page_size": 4, "max_seqs": 4, "inner": "eager", "poison": True}


class Varied(TinyDecoder):
    """What a model may be made of beside parameters: numbers, a buffer, a plain tensor, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(1, -1, WIDTH))
        self.table, self.scale = torch.linspace(-1, 1, WIDTH).sin(), 1.0

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = x * self.scale + self.table + self.shift
        if self.training:
            x = x * 2
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(torch.nn.functional.layer_norm(x, (WIDTH,)))
            x = x + torch.sin(3 * mlp(x))
        return self.head(self.norm(x))


def varied() -> Varied:
    model = Varied().eval()
    model.requires_grad_(False)
    return model


def tensors_of(model: Varied) -> list[Tensor]:
    """Whoever holds these keeps alive what is replaced, so that nobody can notice that it has gone."""
    return [*model.parameters(), *model.buffers(), model.table]


Change = Callable[[Varied], object]
REPLACED: dict[str, Change] = {
    "a parameter": lambda model: setattr(model.mlp[0], "weight", nn.Parameter(-model.mlp[0].weight, requires_grad=False)),
    "a module": lambda model: model.mlp.__setitem__(1, nn.Linear(WIDTH, WIDTH).requires_grad_(False)),
    "a buffer": lambda model: setattr(model, "shift", model.shift.flip(0)),
    "a plain tensor": lambda model: setattr(model, "table", model.table.flip(0)),
    "a number": lambda model: setattr(model, "scale", 3.0 - model.scale),
    "a flag": lambda model: setattr(model, "training", not model.training),
}
COUNTED: dict[str, Change] = {
    "in place": lambda model: model.attention[0].qkv.bias.mul_(1.5),
    "its data": lambda model: setattr(model.mlp[0].weight, "data", -model.mlp[0].weight),
    "its dtype and back": lambda model: model.half().float(),
}


class Served:
    """One text asked for again and again, and its logits compared with those of the model as it is."""

    def __init__(self, model: Varied, cache: PagedKVCache, logits: Callable[[list[Chunk]], Tensor]) -> None:
        self.model, self.cache, self._logits = model, cache, logits

    def begin(self) -> CachedSequence:
        return self.cache.add(TEXT)

    def go_on(self, seq: CachedSequence) -> None:
        held = seq.length
        found = self._logits([Chunk(seq, TEXT[held:], "all")])
        torch.testing.assert_close(found, self.model(torch.tensor([TEXT]))[0, held:], atol=TOLERANCE, rtol=0)
        self.end(seq)

    def end(self, seq: CachedSequence) -> None:
        self.cache.keep(seq, TEXT)
        self.cache.free(seq)

    def hits(self) -> int:
        """Tokens that the text begins with, right as they are."""
        seq = self.begin()
        held = seq.length
        self.go_on(seq)
        return held


def by_lm(model: Varied, **changes: Any) -> Served:
    lm = PagedLM(model, **{**SETTINGS, **changes})
    return Served(model, lm.cache, lm._runner.logits)


def by_hand(model: Varied, **changes: Any) -> Served:
    cache = PagedKVCache(kv_tokens=256, page_size=4, max_seqs=4, poison=True)
    run = torch.compile(model, backend="paged_attn", options={"cache": cache, "inner": "eager", **changes})

    def logits(chunks: list[Chunk]) -> Tensor:
        batch = cache.batch(chunks)
        return batch.rows(run(batch.input_ids))

    return Served(model, cache, logits)


@pytest.mark.parametrize("serve", [by_lm, by_hand], ids=["PagedLM", "torch.compile"])
@pytest.mark.parametrize("name", list(REPLACED))
def test_what_another_model_has_computed_is_refused(name: str, serve: Callable[[Varied], Served]) -> None:
    """`add` cannot know of the change; the step does, before it writes anything. The old tensors are alive all the time."""
    model = varied()
    served, held = serve(model), tensors_of(model)
    assert (served.hits(), served.hits()) == (0, 12)
    for _ in range(3):  # with a number or a flag to and fro: between two compilations that there are already
        stale = served.begin()
        beside = served.cache.add()
        assert stale.length == 12
        REPLACED[name](model)
        before = [pool.clone() for pool in served.cache.k_pages]
        with pytest.raises(StalePrefix, match="begins with keys that it found, and the model has changed"):
            served._logits([Chunk(beside, [1, 2, 3]), Chunk(stale, TEXT[12:])])
        for old, new in zip(before, served.cache.k_pages, strict=True):
            kept = [page for page in range(len(old)) if page in stale.pages]
            assert torch.equal(old[kept], new[kept]) and new[[p for p in range(len(new)) if p not in kept]].isnan().all()
        assert (stale.length, beside.length, beside.unrun) == (12, 0, False)
        served.cache.free(stale)
        served.go_on(beside)
        assert served.hits() == 12
    assert held


@pytest.mark.parametrize("merge", [True, False], ids=["merged linears", "as they are"])
@pytest.mark.parametrize("name", list(COUNTED))
def test_a_change_that_torch_counts_is_seen_when_a_text_is_added(name: str, merge: bool) -> None:
    model = varied()
    served = by_lm(model, merge_linears=merge)
    assert (served.hits(), served.hits()) == (0, 12)
    for _ in range(3):
        COUNTED[name](model)
        assert (served.hits(), served.hits()) == (0, 12)
        stale = served.begin()
        COUNTED[name](model)
        with pytest.raises(StalePrefix):  # between its beginning and its first step
            served.go_on(stale)
        served.cache.free(stale)
        assert (served.hits(), served.hits()) == (0, 12)


@pytest.mark.parametrize("serve", [by_lm, by_hand], ids=["PagedLM", "torch.compile"])
@pytest.mark.parametrize("name", list(COUNTED))
def test_the_same_parameters_with_other_data_are_the_same_model(name: str, serve: Callable[[Varied], Served]) -> None:
    """Compiled again, which a number asks for, and by then their data lie elsewhere: none of the old keys is found."""
    model = varied()
    served = serve(model)
    assert (served.hits(), served.hits(), served.cache.compilations) == (0, 12, 1)
    for compilations in (2, 2, 2):
        stale = served.begin()
        COUNTED[name](model)
        REPLACED["a number"](model)
        with pytest.raises(StalePrefix):
            served.go_on(stale)
        served.cache.free(stale)
        assert (served.hits(), served.hits(), served.cache.compilations) == (0, 12, compilations)


@pytest.mark.parametrize("serve", [by_lm, by_hand], ids=["PagedLM", "torch.compile"])
def test_other_parameters_are_another_model_when_it_is_compiled_again(serve: Callable[[Varied], Served]) -> None:
    """One of them was replaced: with one graph that is seen, with another it is told from a second model by nothing."""
    model = varied()
    served = serve(model)
    assert served.hits() == 0
    REPLACED["a parameter"](model)
    REPLACED["a number"](model)
    with pytest.raises(ValueError, match=r"it has other Parameters, and so .*: keep those it had, and write into them"):
        served.hits()


@pytest.mark.parametrize("name", list(REPLACED))
def test_what_was_computed_in_part_by_another_model_is_not_kept(name: str) -> None:
    """The first chunk by the model, the second by another one, and then it is the first one again."""
    model = varied()
    served = by_lm(model)
    state = dict(model._buffers), dict(vars(model)), dict(model.mlp._modules), dict(model.mlp[0]._parameters)
    assert served.hits() == 0
    served.cache.forget_prefixes()
    seq = served.cache.add()
    served._logits([Chunk(seq, TEXT[:6])])
    REPLACED[name](model)
    served._logits([Chunk(seq, TEXT[6:10])])
    for place, old in zip((model._buffers, vars(model), model.mlp._modules, model.mlp[0]._parameters), state, strict=True):
        place.update(old)  # type: ignore[arg-type]
    served._logits([Chunk(seq, TEXT[10:])])
    served.end(seq)
    assert (served.hits(), served.hits()) == (0, 12)


def test_linears_that_another_server_has_joined_again_are_other_weights() -> None:
    """Two servers of one model, whose merged weights lie in the same memory: what a user has replaced comes back to it."""
    model = varied()
    model.attention[0].q, model.attention[0].k, model.attention[0].v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self: Any, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (each(x).view(b, t, 2, c // 2).transpose(1, 2) for each in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(~self.seen[:t, :t], float("-inf"))
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, c))

    model.attention[0].forward = forward.__get__(model.attention[0])  # type: ignore[method-assign]
    model.requires_grad_(False)
    first, second = by_lm(model), by_lm(model)
    assert first.cache.report is not None and "merged" in {entry.kind for entry in first.cache.report.linears}
    assert (first.hits(), first.hits(), second.hits(), second.hits()) == (0, 12, 0, 12)
    model.attention[0].k.weight.data = -model.attention[0].k.weight.data
    assert second.hits() == 0 and first.hits() == 0


def test_weights_of_which_no_changes_are_counted_are_not_trusted() -> None:
    with torch.inference_mode():
        model = varied()
    served = by_lm(model, merge_linears=False)
    assert [served.hits() for _ in range(3)] == [0, 0, 0]


def test_a_server_starts_over_when_what_was_found_is_of_another_model() -> None:
    """No request is lost, and none is answered from old keys."""
    model = varied()
    held = tensors_of(model)
    with PagedLM(model, **SETTINGS) as lm:
        how = Sampling(max_new_tokens=7)
        for hits, change in enumerate([None, None, "a number", None, "a flag", "a number", None, "a parameter"]):
            if change is not None:
                REPLACED[change](model)
            assert lm.generate([TEXT], how) == [alone(model, TEXT, how)]
            assert lm.cache.prefix_hits == hits, "one a request; after a change it comes to nothing"
        assert lm.preemptions == 4 and held, "by requests that started over"


@pytest.mark.parametrize("name", [*REPLACED, *COUNTED])
def test_a_step_from_a_graph_asks_the_model_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay runs no guards and looks at no inputs: before it runs a batch with hits, the model says by what it would run it."""
    model = varied()
    held = tensors_of(model)
    with as_on_a_gpu(PagedLM(model, **SETTINGS)) as lm:
        how, graphs, check = Sampling(max_new_tokens=6), lm._runner.graphs, lm.cache.proof.check
        assert graphs is not None
        replay, replaying, refused = graphs.replay, list[int](), list[int]()

        def silent(*args: Any) -> None:
            replaying.append(1)
            replay(*args)
            replaying.clear()

        def spied(*args: Any) -> None:
            try:
                check(*args)
            except StalePrefix:
                assert not replaying, "a GPU would have gone on"
                refused.append(1)
                raise

        assert lm.generate([TEXT], how) == [alone(model, TEXT, how)] and lm.cache.prefix_hits == 0
        monkeypatch.setattr(lm._runner, "_run_once", None)  # not one step runs without a graph
        monkeypatch.setattr(graphs, "replay", silent)
        monkeypatch.setattr(lm.cache.proof, "check", spied)
        assert lm.generate([TEXT], how) == [alone(model, TEXT, how)] and lm.cache.prefix_hits == 1
        (REPLACED | COUNTED)[name](model)
        assert lm.generate([TEXT], how) == [alone(model, TEXT, how)]
        asked = name in ("a plain tensor", "a number", "a flag")
        assert bool(refused) == asked, "others are seen when the text is added, or when the step is recorded anew"
        assert lm.cache.prefix_hits == 1 + (name in REPLACED) and held


def test_an_origin_knows_its_tensors() -> None:
    weight, other = torch.ones(4), torch.ones(4)
    origin = Origin(("graph", 1), [weight])
    assert origin.same(("graph", 1), [weight]) and origin.stands()
    assert (
        not origin.same(("graph", 2), [weight])
        and not origin.same(("another", 1), [weight])
        and not origin.same(("graph", 1), [other])
    )
    weight.mul_(2)
    assert origin.same(("graph", 1), [weight]) and not origin.stands()
    origin.renew()
    assert origin.stands()
    weight.data = other
    assert not origin.same(("graph", 1), [weight]) and not origin.stands()
    origin.renew()
    assert origin.stands()
    del weight
    assert not origin.stands()


def test_other_data_at_the_same_address_are_other_data() -> None:
    """An allocator gives the memory that was freed to the next who asks; torch counts no change where `.data` is set."""
    memory = np.ones(4, dtype=np.float32)
    weight = nn.Parameter(torch.from_numpy(memory), requires_grad=False)
    origin, address, version = Origin("graph", [weight]), weight.data_ptr(), weight._version
    assert origin.stands()
    memory[:] = 2
    weight.data = torch.from_numpy(memory)
    assert (weight.data_ptr(), weight._version) == (address, version) and not origin.stands()


def test_what_cannot_be_watched_never_stands() -> None:
    class Own(torch.Tensor):
        pass

    with torch.inference_mode():
        made = torch.ones(2)
    for tensor in (made, torch.ones(2).as_subclass(Own), torch.eye(2).to_sparse()):
        origin = Origin("graph", [torch.ones(1), tensor])
        assert not origin.stands() and not origin.same("graph", [torch.ones(1), tensor])


def test_the_error_is_public() -> None:
    assert ca.StalePrefix is StalePrefix and issubclass(StalePrefix, RuntimeError)

"""Does each trap that experiments found stay shut?

Every test is one way in which a rewrite looked right and was wrong: a graph of one token, strides, positions from nowhere,
keys that are not the sequence's own, symbolic floats, silence. Prompts of one token, and neighbours in a batch, are tried with
whole families (`test_families`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compile_attn as ca
from compile_attn.kernels.mask import Causal
from compile_attn.passes.report import Report
from tests.models.families import FAMILIES, VOCAB, build, enliven
from tests.models.handwritten import HEADS, WIDTH, Decoder, heads
from tests.models.handwritten_more import Block, MoeBlock, SortedMoeBlock, decoder
from tests.models.harness import assert_same_logits, assert_same_tokens, full_logits, paged, recomputed
from tests.models.refused import MemoryKeysBlock

TOLERANCE = 1e-5


def _ready(model: nn.Module) -> nn.Module:
    enliven(model)
    return model.eval().requires_grad_(False)


def _family(name: str, form: str = "eager") -> nn.Module:
    return build(next(one for one in FAMILIES if one.name == name), form)


def _check_paged(model: nn.Module) -> ca.PagedLM:
    case = paged(model, VOCAB)
    assert_same_logits(case, assert_same_tokens(case))
    return case.lm


class CausalBlock(Block):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT) * 0.3
        return scores.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf).softmax(-1) @ v


# One token


def test_one_compilation_serves_everything() -> None:
    """Prefill chunks, decode, mixed batches, one token and one sequence: at most 2 compilations, counted by Dynamo."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = _ready(decoder("nanogpt"))
    case = paged(model, VOCAB)
    assert_same_tokens(case)
    case.lm.generate([[5]], max_new_tokens=3)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_one_token_stateless() -> None:
    """T = 1, then longer, then 1 again, through the stateless backend."""
    model = _family("bloom")
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager"})
    with torch.no_grad():
        for length in (1, 9, 1, 2, 30):
            ids = torch.arange(3, 3 + length)[None]
            torch.testing.assert_close(fast(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-4, rtol=0)


# Strides


class StridedBlock(Block):
    """`view` after SDPA is legal only because SDPA returns [B, T, H, D] memory here."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (heads(t) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).view(b, n, c))


@pytest.mark.parametrize("dynamic", [None, True])
def test_views_of_sdpa_strides(dynamic: bool | None) -> None:
    model = _ready(Decoder(StridedBlock))
    ids = torch.arange(3, 20)[None]
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager", "on_rejected": "error"}, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids), atol=TOLERANCE, rtol=TOLERANCE)
    torch._dynamo.reset()
    _check_paged(model)


# Hidden sources of positions


class QueryGrowthBlock(Block):
    """Llama 4 by hand: queries grow with arange(T), floor by 4."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        growth = torch.log(torch.floor((place.float() + 1.0) / 4.0) + 1.0) * 0.5 + 1.0
        return F.scaled_dot_product_attention(q * growth.view(1, 1, -1, 1), k, v, is_causal=True)


class CountedPositions(Decoder):
    """OPT: positions by a cumulative sum of ones, with an offset of 2."""

    def __init__(self) -> None:
        super().__init__(CausalBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = torch.ones_like(input_ids)
        places = (torch.cumsum(mask, dim=1) * mask - 1) + 2
        x = self.tok(input_ids) + self.pos(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SlicedTable(Decoder):
    """A learned table cut to [:T], as a parameter and without an index."""

    def __init__(self) -> None:
        super().__init__(CausalBlock)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos.weight[None, : input_ids.size(1), :]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class GivenPositions(Decoder):
    """Takes position_ids, and makes a second arange of its own all the same."""

    def __init__(self) -> None:
        super().__init__(QueryGrowthBlock)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        x = self.tok(input_ids) + self.pos(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@pytest.mark.parametrize("model", [CountedPositions, SlicedTable, GivenPositions], ids=lambda model: model.__name__)
def test_hidden_positions(model: type[nn.Module]) -> None:
    lm = _check_paged(_ready(model()))
    assert lm.report is not None and lm.report.tokens


def test_query_growth_matters() -> None:
    """The growth of llama4's queries is no rounding error here: without it the logits are others."""
    model = _family("llama4_text")
    tokens = list(range(3, 44))
    before = full_logits(model, tokens)
    for module in model.modules():
        if hasattr(module, "attn_temperature_tuning"):
            module.attn_temperature_tuning = False
    assert (full_logits(model, tokens) - before).abs().max() > 1e-2


# Keys that are not the sequence's own


def test_memory_keys_keep_their_meaning_when_stateless() -> None:
    """Once taken for a plain causal attention (error 1.2): kv_len is not q_len."""
    model = _ready(Decoder(MemoryKeysBlock))
    ids = torch.arange(3, 20)[None]
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager", "on_rejected": "keep"})
    with torch.no_grad():
        torch.testing.assert_close(fast(ids), model(ids), atol=TOLERANCE, rtol=TOLERANCE)


# Symbolic floats, and silence


@pytest.mark.parametrize(
    "name", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.every_form) for name in ("llama", "gemma2", "deepseek_v3"))]
)
def test_dynamic_true(name: str) -> None:
    """dynamic=True makes Python floats inputs: once 15 fragments and no layer rewritten, silently."""
    model = _family(name)
    reports = _reports(model, dynamic=True)
    assert sum(len(report.sites) for report in reports) == model.config.num_hidden_layers
    assert len(reports) == 1


def _reports(model: nn.Module, **how: Any) -> list[Report]:
    """Compile and run at two lengths, compare with the model itself; the reports of all compilations."""
    from compile_attn import backend

    found: list[Report] = []
    emit, backend._emit = backend._emit, found.append
    try:
        fast = torch.compile(model, backend="paged_attn", options={"inner": "eager"}, **how)
        with torch.no_grad():
            for length in (9, 21):
                ids = torch.arange(3, 3 + length)[None]
                wanted = model(ids, use_cache=False).logits
                torch.testing.assert_close(fast(ids, use_cache=False).logits, wanted, atol=1e-4, rtol=0)
    finally:
        backend._emit = emit
    return found


def test_exp_over_sum_is_found() -> None:
    """A softmax anchor alone does not see it: no site and no word about it."""
    model = _ready(decoder("exp_sum"))
    report = ca.explain(model, torch.arange(3, 20)[None])
    assert len(report.sites) == 2 and not report.rejected
    assert all(isinstance(site.spec.mask, Causal) and site.spec.num_q_heads == HEADS for site in report.sites)


def test_nothing_rewritten_is_loud() -> None:
    """A stateless compilation that leaves an attention warns; one that finds none at all leaves an empty report."""

    class Odd(Block):
        def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT).softmax(-2) @ v

    model, ids = _ready(Decoder(Odd)), torch.arange(3, 20)[None]
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager"})
    with torch.no_grad(), pytest.warns(UserWarning, match="left 2 attention"):
        fast(ids)
    torch._dynamo.reset()
    strict = torch.compile(model, backend="paged_attn", options={"inner": "eager", "on_rejected": "error"})
    with torch.no_grad(), pytest.raises(ca.RefusedError):
        strict(ids)


# Experts


@pytest.mark.parametrize("block", [MoeBlock, SortedMoeBlock])
def test_expert_permutations(block: type[nn.Module]) -> None:
    """With top-1 routing the permutation's arange is arange(T) too, and no position."""
    _check_paged(_ready(Decoder(block)))


# Caches, tuples, half-made tensors


class ShortcutBlock(Block):
    """transformers' SDPA layers with a window: no mask of a window while the input is shorter than it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        if length < 8:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        gap = torch.arange(length)[:, None] - torch.arange(length)
        return F.scaled_dot_product_attention(q, k, v, (gap >= 0) & (gap < 8))


def test_a_branch_on_the_length_bounds_the_positions() -> None:
    """What was captured for three tokens holds up to seven, in a sequence and in a step; beyond, nothing is computed."""
    case = paged(_ready(Decoder(ShortcutBlock)), VOCAB)
    assert case.lm.cache.max_positions == case.lm.cache.max_tokens == 7
    with pytest.raises(ValueError, match=r"a prompt of 8 tokens; .* holds at most 7"):
        case.lm.generate([[3] * 8], max_new_tokens=1)
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    assert case.lm.generate(prompts, max_new_tokens=2) == [recomputed(case.model, prompt, 2) for prompt in prompts]


class InPlaceBlock(Block):
    """Everything written into what was there: masked scores, clipped channels, the residual into what dropout returned."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.up = nn.Dropout(0.1), nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * 0.3
        scores[:, :, torch.ones(q.shape[2], q.shape[2]).triu(1).bool()] = -1e9
        return scores.softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        y = self.up(x)
        y[y < 0] = 0
        y = self.drop(y)
        y += x
        return y


def test_writing_in_place() -> None:
    _check_paged(_ready(Decoder(InPlaceBlock)))


class Linspaced(Decoder):
    """Positions from 0 to 1 in as many steps as there are tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + torch.linspace(0, 1, input_ids.shape[1])[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_length_made_constant_is_refused_with_its_line() -> None:
    with pytest.raises(ca.RefusedError) as caught:
        paged(_ready(Linspaced(CausalBlock)), VOCAB)
    [rejected] = caught.value.report.rejected
    assert rejected.reason.startswith("the number of tokens is made a constant (3)")
    assert "torch.linspace(0, 1, input_ids.shape[1])" in rejected.where.source


class TupleOutput(Decoder):
    """Returns (logits, keys) and a dictionary of odds and ends, as models with use_cache on do."""

    def __init__(self) -> None:
        super().__init__(CausalBlock)

    def forward(self, input_ids: Tensor) -> Any:
        logits = super().forward(input_ids)
        return logits, logits.argmax(-1)


def test_more_outputs_than_logits() -> None:
    _check_paged(_ready(TupleOutput()))


class AssembledBlock(Block):
    """DeepSeek's first code: keys made by new_empty and two slice assignments."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.new_empty(k.shape)
        keys[..., :3] = k[..., :3]
        keys[..., 3:] = k[:, :1, :, 3:]
        return F.scaled_dot_product_attention(q, keys, v, is_causal=True)


def test_assembled_keys() -> None:
    _check_paged(_ready(Decoder(AssembledBlock)))


# Gradients


def test_gradients_are_those_of_the_model() -> None:
    """Under autograd a site goes through SDPA or is left; the gradients are the same either way."""
    model = Decoder(StridedBlock).eval()
    enliven(model)
    ids = torch.arange(3, 20)[None]
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager", "on_rejected": "keep"})
    wanted = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()), allow_unused=True)
    found = torch.autograd.grad(fast(ids).square().mean(), list(model.parameters()), allow_unused=True)
    assert any(one is not None and one.abs().max() > 0 for one in wanted) and WIDTH
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)

"""Does a model whose sequences share pages say what it says of each alone, whatever its mask?"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compile_attn.cache import CachedSequence, Chunk
from compile_attn.lm import PagedLM
from tests.tiny import HEADS, VOCAB, TinyAttention, TinyDecoder, prompts_of, tiny

Seen = Callable[[Tensor, Tensor, Tensor], Tensor]  # of query, key and head
MASKS: dict[str, tuple[Seen, str]] = {
    "causal": (lambda i, j, h: j <= i, "Causal"),
    "window": (lambda i, j, h: (j <= i) & (i - j < 6), "Window"),
    "block sparse": (lambda i, j, h: (j <= i) & ((i // 4 - j // 4 < 1) | ((j // 4 + h + 1) % 3 == 0)), "BlockSparse"),
}
pytestmark = pytest.mark.usefixtures("no_grad")
TOLERANCE = 1e-4  # the gains amplify float32 rounding
TEXT = prompts_of([40], seed=5)[0]


class Masked(TinyAttention):
    """A tiny attention under a mask that is written down."""

    def __init__(self, mask: Seen) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        at = torch.arange(t, device=x.device)
        seen = self.mask(at[None, :, None], at[None, None, :], torch.arange(HEADS, device=x.device)[:, None, None])
        scores = (q @ k.transpose(-2, -1) / math.sqrt(c // HEADS)).masked_fill(~seen, float("-inf"))
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, c))


def masked(name: str) -> TinyDecoder:
    model = tiny()
    for at, attention in enumerate(model.attention):
        model.attention[at] = Masked(MASKS[name][0])
        model.attention[at].load_state_dict(attention.state_dict())
    return model.eval().requires_grad_(False)


def lm_of(model: torch.nn.Module, **changes: Any) -> PagedLM:
    return PagedLM(model, **{"kv_tokens": 256, "page_size": 4, "max_seqs": 4, "inner": "eager", "poison": True, **changes})


class Play:
    """Sequences of one paged model beside the model alone."""

    def __init__(self, lm: PagedLM, model: TinyDecoder) -> None:
        self.lm, self.model, self.cache = lm, model, lm.cache
        self.tokens: dict[CachedSequence, list[int]] = {}

    def add(self, tokens: Sequence[int], salt: str | None = None) -> CachedSequence:
        seq = self.cache.add(list(tokens), salt=salt)
        self.tokens[seq] = list(tokens[: seq.length])
        return seq

    def run(self, *parts: tuple[CachedSequence, Sequence[int]]) -> None:
        """One step; the logits of every new token are those of the whole text, computed anew."""
        found = self.lm._runner.logits([Chunk(seq, list(new), "all") for seq, new in parts])
        wanted = []
        for seq, new in parts:
            self.tokens[seq] += new
            wanted.append(self.model(torch.tensor([self.tokens[seq]]))[0, -len(new) :])
        torch.testing.assert_close(found, torch.cat(wanted), atol=TOLERANCE, rtol=0)

    def fork(self, seq: CachedSequence, length: int | None = None) -> CachedSequence:
        other = self.cache.fork(seq, length)
        self.tokens[other] = self.tokens[seq][: other.length]
        return other

    def truncate(self, seq: CachedSequence, length: int) -> None:
        self.cache.truncate(seq, length)
        del self.tokens[seq][length:]

    def keep(self, seq: CachedSequence) -> None:
        self.cache.keep(seq, self.tokens[seq])

    def free(self, seq: CachedSequence) -> None:
        del self.tokens[seq]
        self.cache.free(seq)


def a_prefix_hit_goes_on_as_the_whole_prompt(play: Play) -> None:
    first, stranger = play.add(TEXT[:21]), play.add(TEXT[20:27])
    play.run((first, TEXT[:9]))
    play.run((first, TEXT[9:21]), (stranger, TEXT[20:27]))
    play.keep(first)
    play.free(first)
    longer, other, again = play.add(TEXT[:30]), play.add([*TEXT[:13], 3, 1, 4]), play.add(TEXT[:20])
    assert [seq.length for seq in (longer, other, again)] == [20, 12, 19]
    play.run((longer, TEXT[20:23]), (other, [TEXT[12], 3]), (again, TEXT[19:20]), (stranger, [5]))
    play.run((longer, TEXT[23:30]), (other, [1, 4]), (again, [7]), (stranger, [6]))
    assert len({seq.pages[:3] for seq in (longer, other, again)}) == 1, "in the same pages"


def forks_go_their_own_ways(play: Play) -> None:
    first = play.add(TEXT[:14])
    play.run((first, TEXT[:14]))
    second, third = play.fork(first), play.fork(first, 13)
    play.run((third, TEXT[13:14]), (second, [1]), (first, [2]))
    play.run((first, [3, 4, 5]), (third, [6]), (second, [7, 8]))
    assert (
        len({seq.pages[:3] for seq in (first, second, third)}) == 1 and len({seq.pages[3] for seq in (first, second, third)}) == 3
    )


def tokens_that_are_taken_back_are_never_seen(play: Play) -> None:
    seq = play.add(TEXT[:18])
    play.run((seq, TEXT[:18]))
    play.keep(seq)
    play.truncate(seq, 14)  # into a page that is known
    play.run((seq, [1, 2, 3, 4, 5]))
    play.truncate(seq, 15)
    play.run((seq, [9]))
    hit = play.add(TEXT[:18])
    assert hit.length == 16
    play.run((hit, TEXT[16:18]))


def any_play(play: Play) -> None:
    """Random joins, forks, cuts and ends under pressure for pages; every step is compared."""
    draw, seen = random.Random(7), Counter[str]()
    stems = [TEXT[:24], [*TEXT[:10], *TEXT[20:34]], TEXT[8:30]]
    for _ in range(110):
        told = list(play.tokens)
        what = draw.choice(["add", "add", "run", "run", "run", "fork", "truncate", "end"])
        if what == "add" or not told:
            text = draw.choice(stems)[: draw.randint(2, 22)]
            seq = play.add(text)
            seen["hits"] += seq.length > 0
            play.run((seq, text[seq.length :]))
        elif what == "run":
            chosen = [seq for seq in draw.sample(told, min(3, len(told))) if seq.length < 40]
            if chosen:
                play.run(*[(seq, [draw.randrange(VOCAB) for _ in range(draw.choice((1, 1, 4)))]) for seq in chosen])
        elif what == "fork":
            play.fork(draw.choice(told))
        elif what == "truncate":
            seq = draw.choice(told)
            play.truncate(seq, draw.randint(1, seq.length))
        if what == "end" or len(told) > 9 or play.cache.free_pages < 16:
            seq = draw.choice(list(play.tokens))
            play.keep(seq)
            play.free(seq)
            seen["ends"] += 1
    assert seen["hits"] > 15 and seen["ends"] > 10


@pytest.mark.parametrize("name", list(MASKS))
def test_sharing_changes_no_logits(name: str) -> None:
    """One compilation for all; each begins with a cache that knows nothing, and leaves no page behind."""
    model = masked(name)
    with lm_of(model) as lm:
        assert lm.report is not None
        assert {type(site.spec.mask).__name__ for site in lm.report.sites} == {MASKS[name][1]}
        for plays in (
            a_prefix_hit_goes_on_as_the_whole_prompt,
            forks_go_their_own_ways,
            tokens_that_are_taken_back_are_never_seen,
            any_play,
        ):
            play = Play(lm, model)
            plays(play)
            for seq in list(play.tokens):
                play.free(seq)
            assert lm.cache.pages_in_use == 0
            lm.cache.forget_prefixes()


def test_pages_of_fp8_are_shared_as_bytes() -> None:
    """A hit, and a copy, hold the very numbers that were kept: the logits are those without sharing."""
    with lm_of(tiny(), kv_dtype="fp8_e4m3", kv_scales=[(0.1, 0.1)] * 2) as lm:
        whole = lm.cache.add()
        wanted = lm._runner.logits([Chunk(whole, TEXT[:20], "all")])
        lm.cache.keep(whole, TEXT[:20])
        forked, hit = lm.cache.fork(whole, 18), lm.cache.add(TEXT[:20])
        assert hit.length == 19
        found = lm._runner.logits([Chunk(hit, TEXT[19:20], "all"), Chunk(forked, TEXT[18:20], "all")])
        torch.testing.assert_close(found, wanted[[19, 18, 19]], atol=TOLERANCE, rtol=0)
        assert hit.pages[:4] == forked.pages[:4] == whole.pages[:4] and len({hit.pages[4], forked.pages[4], whole.pages[4]}) == 3


@pytest.mark.parametrize("merge", [True, False], ids=["merged linears", "as they are"])
def test_prefixes_of_old_weights_are_forgotten(merge: bool) -> None:
    """An update in place between two equal prompts: the second one is computed anew, with the new weights."""
    model = tiny()
    with lm_of(model, merge_linears=merge) as lm:
        play = Play(lm, model)
        for change in (lambda: model.load_state_dict(tiny(seed=1).state_dict()), lambda: model.attention[0].qkv.bias.mul_(1.5)):
            for length in (0, 12):
                seq = play.add(TEXT[:14])
                assert seq.length == length
                play.run((seq, TEXT[length:14]))
                play.keep(seq)
                play.free(seq)
            change()
        seq = play.add(TEXT[:14])
        assert seq.length == 0
        play.run((seq, TEXT[:14]))
        play.keep(seq)
        assert play.add(TEXT[:14]).length == 12
        model.tok.weight.data = tiny(seed=2).tok.weight.data  # its data has moved
        assert play.add(TEXT[:14]).length == 0


@pytest.mark.gpu
def test_sharing_on_a_gpu() -> None:
    """Hits, forks and copies through the kernels of a GPU, with pages of 16 tokens."""
    model = tiny().cuda()
    with lm_of(model, kv_tokens=1024, page_size=16, inner="inductor") as lm:
        text, cache = TEXT[:40], lm.cache

        def run(*parts: tuple[CachedSequence, list[int]]) -> Tensor:
            return lm._runner.logits([Chunk(seq, new, "all") for seq, new in parts]).cpu()

        wanted = tiny()(torch.tensor([text]))[0]
        first = cache.add(text)
        torch.testing.assert_close(run((first, text)), wanted, atol=1e-3, rtol=0)
        cache.keep(first, text)
        hit, again, forked = cache.add(text), cache.add(text[:32]), cache.fork(first, 39)
        assert (hit.length, again.length) == (32, 31)
        found = run((hit, text[32:]), (again, text[31:32]), (forked, text[39:]))
        torch.testing.assert_close(found, wanted[[*range(32, 40), 31, 39]], atol=1e-3, rtol=0)
        more = [*text, 5, 6]
        wanted = tiny()(torch.tensor([more]))[0]
        torch.testing.assert_close(run((first, [5]), (forked, [5, 6])), wanted[[40, 40, 41]], atol=1e-3, rtol=0)
        before = first.pages
        cache.truncate(first, 20)
        torch.testing.assert_close(run((first, more[20:42])), wanted[20:42], atol=1e-3, rtol=0)
        assert before[:1] == first.pages[:1] and before[1] != first.pages[1]

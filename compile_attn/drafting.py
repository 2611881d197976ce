"""Which tokens may come next, at a guess that a step can verify?

Speculative decoding, verified exactly: the model runs over the last token and its drafts in one step, each row is sampled as it
would be alone (a draw follows from the seed and the number of draws made), and drafts are kept as far as they are what came
out. So the tokens are those of decoding one by one, greedy or random; only their number a step differs.

Drafts follow a token that the host has read. So where there is a drafter, no step is sent before the tokens of the one before are
read: to let requests take turns would have each step read all weights for half of them.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Sequence
from itertools import islice
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet

from compile_attn.pages import at_least_one
from compile_attn.requests import Plan, Request


class Drafter(Protocol):
    """Guesses how a request goes on."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most `most` token ids to follow these (the prompt and all that was made); none where nothing suggests itself.

        Of more, the first `most` are taken. Any are right: wrong ones cost time only.
        """


class PromptLookup:
    """What followed when the last few tokens occurred before, as it does in quotes, code and tables; no second model.

    ngram   tokens that must have occurred; fewer where so many did not, down to `least`
    """

    def __init__(self, ngram: int = 3, least: int = 1) -> None:
        self.ngram, self.least = at_least_one("ngram", ngram), at_least_one("least", least)
        if least > ngram:
            raise ValueError(f"least={least} tokens of ngram={ngram}; it must be at most ngram")

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        held = array("q", tokens)
        text, size = held.tobytes(), held.itemsize
        for count in range(min(self.ngram, len(held) - 1), self.least - 1, -1):
            begin = _last(text, held[len(held) - count :].tobytes(), size)
            if begin is not None:
                return held[begin + count : begin + count + most].tolist()
        return []


class Drafting:
    """A drafter at work: what it proposes is checked before a step takes it.

    drafter       who guesses
    draft_tokens  most drafts of one request in one step
    """

    def __init__(self, drafter: Drafter, draft_tokens: int) -> None:
        if isinstance(drafter, type) or not callable(getattr(drafter, "propose", None)):
            raise ValueError(f"drafter={drafter!r} has no method propose(tokens, most); give PromptLookup(), or one that has")
        self._drafter, self._most = drafter, at_least_one("draft_tokens", draft_tokens)
        self._resting: WeakSet[Request] = WeakSet()
        self._texts: WeakKeyDictionary[Request, array[int]] = WeakKeyDictionary()
        self.vocabulary: int | None = None  # ids from 0 up to this, not included, can come out

    def propose(self, request: Request, most: int) -> list[int]:
        """At most so many drafts to follow the newest token of this request."""
        if request in self._resting:
            self._resting.discard(request)
            return []
        drafts = self._drafter.propose(self._text(request), most := min(most, self._most))
        try:
            listed = [operator.index(draft) for draft in islice(drafts, most)]
        except TypeError as error:
            raise ValueError(f"the drafter proposed {drafts!r:.80}; propose() returns a list of token ids, [] for none") from error
        for draft in listed:
            if draft < 0 or (self.vocabulary is not None and draft >= self.vocabulary):
                raise ValueError(
                    f"the drafter proposed token id {draft}, outside the model's vocabulary of {self.vocabulary}; "
                    "a drafter must count tokens as the model does"
                )
        return listed

    def rest(self, request: Request) -> None:
        """Propose nothing for its next step."""
        self._resting.add(request)

    def _text(self, request: Request) -> array[int]:
        """The prompt and all that was made, the drafter's to keep; from a list it would take a hundred times as long."""
        text = self._texts.get(request)
        if text is None:
            text = self._texts[request] = array("q", request.prompt)
        text.extend(request.new_tokens[len(text) - len(request.prompt) :])
        return text[:]


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many drafts are what came out: sampled[n] follows the first n of them, and means nothing behind a wrong one."""
    if len(sampled) != len(drafts) + 1:
        raise ValueError(f"{len(sampled)} sampled tokens of {len(drafts)} drafts; give one before the drafts and one after each")
    return next((n for n, draft in enumerate(drafts) if draft != sampled[n]), len(drafts))


def verified(plan: Plan, sampled: list[int]) -> tuple[dict[Request, Sequence[int]], list[int]]:
    """The drafts that came out, of each request that has any in this step, and the token that follows them, of every request.

    sampled: the token of each row. A draft that ends its request is followed by nothing: it is the token that follows.
    """
    if not plan.drafts:
        return {}, sampled
    kept: dict[Request, Sequence[int]] = {}
    tokens, begin = [], 0
    for request in plan.sampled:
        drafts = plan.drafts.get(request, ())
        end, stops = begin + len(drafts) + 1, request.sampling.stop_ids
        count = accepted(drafts, sampled[begin:end])
        count = next((at for at in range(count) if drafts[at] in stops), count)
        tokens.append(sampled[begin + count])
        if drafts:
            kept[request] = drafts[:count]
        begin = end
    return kept, tokens


def _last(text: bytes, pattern: bytes, size: int) -> int | None:
    """Where the pattern occurs last before the end, in items of `size` bytes."""
    end = len(text) - size  # not itself; it may reach into itself
    while (at := text.rfind(pattern, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + len(pattern) - 1
    return None

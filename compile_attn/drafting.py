"""Which tokens may come next, at a guess that a step can verify?

Speculative decoding, verified exactly: the model runs over the last token and its drafts in one step, each row is sampled as it
would be alone (a draw follows from the seed and the number of draws made), and drafts are kept as far as they are what came
out. So the tokens are those of decoding one by one, greedy or random; only their number a step differs.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Protocol

from compile_attn.pages import at_least_one


class Drafter(Protocol):
    """Guesses how a request goes on."""

    def propose(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """At most `most` token ids to follow these (the prompt and all that was made); none where nothing suggests itself."""


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


def accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many drafts are what came out: sampled[n] follows the first n of them, and means nothing behind a wrong one."""
    return next((n for n, draft in enumerate(drafts) if draft != sampled[n]), len(drafts))


def _last(text: bytes, pattern: bytes, size: int) -> int | None:
    """Where the pattern occurs last before the end, in items of `size` bytes."""
    end = len(text) - size  # not itself; it may reach into itself
    while (at := text.rfind(pattern, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + len(pattern) - 1
    return None

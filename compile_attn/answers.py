"""How do the tokens of requests come back to who asked for them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compile_attn.requests import Reason, Request


# Not frozen: there is one for every token, and freezing takes three times as long as making it.
@dataclass(slots=True, unsafe_hash=True)
class Output:
    """One new token. `index`: which prompt (from `step()`: which request); `reason` says why it was the last one.

    sample: of which of the prompt's n answers, whose ends `finished` and `reason` speak of.
    """

    index: int
    token: int
    finished: bool
    reason: Reason | None
    sample: int = 0


def streamed(requests: Sequence[Request], step: Callable[[], object]) -> Iterator[Output]:
    """The tokens of all samples of these requests as they are made; `step` makes more."""
    live = [(index, one) for index, request in enumerate(requests) for one in request.samples]
    read = dict.fromkeys(live, 0)
    while live:
        for index, request in live:
            for token in request.new_tokens[read[index, request] :]:
                read[index, request] += 1
                last = request.finished and read[index, request] == len(request.new_tokens)
                yield Output(index, token, last, request.reason if last else None, request.sample)
        live = [each for each in live if not each[1].finished or read[each] < len(each[1].new_tokens)]
        if not all(one.finished for _, one in live):
            step()

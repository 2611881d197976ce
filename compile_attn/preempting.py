"""What becomes of the keys and values of a request that makes room for older ones?

They wait in host memory, if that is estimated to take less time than computing them again and there is room.
"""

from __future__ import annotations

from functools import partial

from compile_attn.cache import CachedSequence
from compile_attn.requests import Request
from compile_attn.sharing import Beginning
from compile_attn.swap_cost import SwapCost
from compile_attn.swapping import SwapSpace


class Preempting:
    """Moves the pages of requests out and back; `swaps` counts those that went out."""

    def __init__(self, space: SwapSpace, cost: SwapCost) -> None:
        self.space, self.cost = space, cost
        self.swaps = 0

    def out(self, request: Request) -> bool:
        """Whether its pages were moved out; if not, nothing has changed.

        Prefixes that are known of it are not counted as kept: pages are short, so they are evicted next.
        """
        seq = request.seq
        if seq is None or not self.cost.prefers_swap(seq.length, seq.length):
            return False
        request.swapped = self.space.out(seq)
        if request.swapped is None:
            return False
        request.seq = None
        self.swaps += 1
        return True

    def beginning(self, request: Request) -> Beginning:
        """What going on comes to, for one whose pages are out: none is shared."""
        return Beginning(self.space.pages_for(request.length), partial(self._back, request))

    def drop(self, request: Request) -> None:
        """Let go of what is out."""
        if request.swapped is not None:
            self.space.drop(request.swapped)
            request.swapped = None

    def _back(self, request: Request) -> CachedSequence:
        assert request.swapped is not None
        seq = self.space.back(request.swapped)
        request.swapped = None
        return seq

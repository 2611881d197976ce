"""Which tokens of which requests run in the next step?

Continuous batching on the host, no tensor in sight: requests join and leave between steps, long prompts are cut into
chunks under a token budget, and the youngest request gives its pages back when they run out: it is computed again later, or its
pages wait in host memory (`Preempting`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from compile_attn.cache import OutOfPages, PagedKVCache
from compile_attn.drafting import Drafting
from compile_attn.preempting import Preempting
from compile_attn.prefixes import Salt, check_salt
from compile_attn.requests import Plan, Reason, Request, asked
from compile_attn.sampling import NOT_FINITE, Sampling
from compile_attn.sharing import Sharing
from compile_attn.step_sizes import MOST_DRAFTED, MOST_DRAFTED_ROWS


class Made(NamedTuple):
    """Who got which token, and why it was the last; in the order of the plan's rows. Three lists, for there are many."""

    requests: list[Request]
    tokens: list[int]
    reasons: list[Reason | None]


class Scheduler:
    """Requests wait in order, run together, and leave. Running requests are always older than waiting ones.

    Of the samples of one prompt the first one runs it; the others then wait before all else, and begin where it ends.
    """

    def __init__(
        self, cache: PagedKVCache, max_batch_tokens: int, prefix_cache: bool = True, drafting: Drafting | None = None
    ) -> None:
        self.cache, self.drafting = cache, drafting
        self._sharing = Sharing(cache, prefix_cache)
        self.preempting: Preempting | None = None  # without it, who is preempted is computed again
        self.preemptions = self.num_draft_tokens = self.num_accepted_tokens = 0
        self._max_batch_tokens = max_batch_tokens
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._ending: list[Request] = []  # their last token was sampled, and is not read yet
        self._last: Plan | None = None  # that was sent
        self._unread = 0  # plans that were sent and whose tokens are still to come
        self._turned_away: Request | None = None  # who was the first to wait when all pages and rows were given out,
        self._free = 0  # and how many pages were free then
        self._spare = 0  # how often the last plan can be sent again before a request ends by its length
        self._count = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ending)

    @property
    def budget(self) -> int:
        """Most new tokens in one step."""
        most = self.cache.max_tokens
        return self._max_batch_tokens if most is None else min(self._max_batch_tokens, most)

    def submit(self, prompt: Sequence[int], sampling: Sampling, salt: Salt = None, source: Request | None = None) -> Request:
        """Queue a request. One whose prompt can never fit is refused now, not when its turn comes. See `asked`."""
        self.check_length(len(prompt))
        check_salt(salt)
        request = asked(self._count, prompt, sampling, salt, source)
        for one in request.samples:
            one.server = self
        self._count += 1
        self._waiting.append(request)
        return request

    def check_mine(self, request: Request) -> None:
        """Refuse what is no request of this server."""
        if not isinstance(request, Request):
            raise ValueError(f"{request!r} is a {type(request).__name__}; pass a request that submit() has made")
        if request.server is not self:
            raise ValueError(f"request {request.id} belongs to another PagedLM; pass it to the one whose submit() has made it")

    def check_length(self, length: int) -> None:
        """Refuse a prompt that can never fit."""
        if length > self.cache.length_limit:
            limit, by_model = self.cache.length_limit, self.cache.length_limit == self.cache.max_positions
            what = "the model's position table" if by_model else "the cache"
            cure = "shorten the prompt" + ("" if by_model else ", or make kv_tokens larger")
            raise ValueError(f"a prompt of {length} tokens; {what} holds at most {limit} a sequence: {cure}")

    def cancel(self, request: Request) -> None:
        """End a request now, which other samples outlive; its pages come back. A finished one stays as it is."""
        if request.finished:
            return
        self._drop(request)
        request.reason = "cancelled"
        if request.behind:  # the next sample runs the prompt
            heir, *heir.behind = request.behind
            request.behind = []
            self._waiting.appendleft(heir)

    def plan(self) -> Plan | None:
        """Choose the next step, oldest request first; None without work."""
        if self._repeats():
            return self._last
        running = self._running
        if len(running) <= min(self.budget, self.cache.free_pages) and all(one.missing == 1 for one in running):
            picked, preempted = [(one, 1) for one in running], False  # what follows would say the same, in more time
            left = self.cache.free_pages
            if self._waiting:
                left -= sum(self._pages_wanted(one, 1) for one in running)
        else:
            picked, preempted, left = self._pick_running()
        if not preempted:
            self._admit(picked, self.budget - sum(count for _, count in picked), left)
        first = self._waiting[0] if self._waiting and not preempted else None
        self._turned_away, self._free = None if first is None or first.pending else first, self.cache.free_pages
        if not picked and self._waiting and not self._waiting[0].pending:
            raise OutOfPages(
                f"the oldest request ({self._waiting[0].length} tokens) does not fit in {self.cache.free_pages} free "
                f"pages of {self.cache.page_size} tokens, and no other request holds any; free the other sequences"
            )
        return self._as_plan(picked, self._drafts(picked)) if picked else None

    def _repeats(self) -> bool:
        """Whether the last plan is the next one, too: most steps of most servers, which is why it is asked first."""
        last, running = self._last, self._running
        if last is None or not last.settled or self._unread != 1 or last.sampled != running:
            return False
        free = self.cache.free_pages
        if len(running) > free:
            return False
        # Whoever was turned away still is: nobody has left.
        return not self._waiting or (self._waiting[0] is self._turned_away and free <= self._free)

    def _pick_running(self) -> tuple[list[tuple[Request, int]], bool, int]:
        """How many tokens of each running request; whether any was preempted; the pages then free."""
        picked: list[tuple[Request, int]] = []
        budget, free = self.budget, self.cache.free_pages
        at, preempted = 0, False
        while at < len(self._running):
            request = self._running[at]
            room = budget - (len(self._running) - at - 1)  # every later one keeps a token of the budget
            count = min(request.missing, room)
            while (fits := min(count, self._fitting(request, free))) < count and request is not self._running[-1]:
                free += self._preempt_youngest()
                preempted = True
            if fits < 1:
                free += self._preempt_youngest()
                preempted = True
                break
            free -= self._pages_wanted(request, fits)
            budget -= fits
            picked.append((request, fits))
            at += 1
        return picked, preempted, free

    def sent(self, plan: Plan) -> None:
        """The step was handed to the device; the next one can be planned before its tokens are read.

        A request that this step brings to its end gives its pages back now: what is sent later runs later.
        """
        self._unread += 1
        if plan is self._last and self._spare:
            self._spare -= 1
            for request in plan.sampled:
                request.pending += 1
            return
        self._last, soonest = plan, sys.maxsize
        for row, request in enumerate(plan.sampled):
            request.pending, request.row = request.pending + 1, row
            left = self._left(request)
            soonest = min(soonest, left)
            if request.behind:
                self._waiting.extendleft(reversed(request.behind))
                request.behind = []
            if left <= 0:
                self._end(request)
        self._spare = max(0, soonest - 1)

    def commit(self, plan: Plan, tokens: Sequence[int], accepted: Mapping[Request, Sequence[int]] | None = None) -> Made:
        """Give each sampled request its token, and let go of those that end.

        accepted: of a plan with drafts, those that come before the token
        """
        self._unread -= 1
        made = Made([], [], [])
        given = zip(plan.sampled, tokens, strict=True)
        for request, token in self._accepting(given, plan, accepted, made) if accepted else given:
            if request.reason is not None:  # stopped or cancelled after this step was sent
                continue
            request.pending -= 1
            request.new_tokens.append(token)
            if token in request.sampling.stop_ids:
                request.reason = "stop"
            elif not request.pending and request in self._ending:
                request.reason = "length"
            made.requests.append(request)
            made.tokens.append(token)
            made.reasons.append(request.reason)
            if request.reason is not None:
                self._drop(request)
        return made

    def abandon(self) -> None:
        """After a step that failed: give all pages back, trust none of them, and let every unfinished request start over."""
        self._last, self._unread = None, 0
        self.cache.forget_prefixes()
        while self._running:
            self._preempt_youngest(trusted=False)
        self._waiting.extendleft(reversed(self._ending))
        self._ending.clear()
        self._waiting = deque(request for request in self._waiting if not request.finished)
        for request in self._waiting:
            request.pending = 0
            self._release(request)

    def _admit(self, picked: list[tuple[Request, int]], budget: int, free: int) -> None:
        """Let waiting requests in while their known tokens fit beside what the running ones still have to load."""
        most = min(self.cache.max_seqs, self.budget)
        if not self._waiting or len(self._running) >= most:
            return
        self._sharing.keep(self._running)
        for request, count in picked:
            if count < request.missing:
                free -= self._pages_wanted(request, request.missing) - self._pages_wanted(request, count)
        while self._waiting and len(self._running) < most and budget > 0:
            request = self._waiting[0]
            if request.pending:  # preempted in the plan before this one: its newest token is still being read
                break
            out = self.preempting if request.swapped is not None else None
            pages, make = self._sharing.beginning(request) if out is None else out.beginning(request)
            if pages > free - len(self._running):  # each running one keeps a page to grow into
                break
            self._waiting.popleft()
            self._running.append(request)
            request.seq = make()
            count = min(request.missing, budget)
            picked.append((request, count))
            budget -= count
            free -= pages

    def _drafts(self, picked: list[tuple[Request, int]]) -> dict[Request, list[int]]:
        """What may follow the newest tokens of those that decode, in the pages and the budget that the others leave.

        In steps that a graph holds: up to about so many tokens, those of drafts cost little.
        """
        if self.drafting is None or len(picked) > MOST_DRAFTED_ROWS:
            return {}
        room = min(self.budget, MOST_DRAFTED) - sum(count for _, count in picked)
        assert not self._unread, "drafts follow a token that was read"
        free = self.cache.free_pages - sum(self.cache.pages_wanted(one.seq, count) for one, count in picked if one.seq is not None)
        drafts: dict[Request, list[int]] = {}
        for request, _ in picked:
            own = self._pages_wanted(request, 1)
            most = min(room, self._left(request) - 1, self._fitting(request, free + own) - 1) if request.missing == 1 else 0
            found = self.drafting.propose(request, most) if most > 0 else []
            if found:
                drafts[request] = found
                room -= len(found)
                free -= self._pages_wanted(request, 1 + len(found)) - own
        return drafts

    def _accepting(
        self, given: Iterable[tuple[Request, int]], plan: Plan, accepted: Mapping[Request, Sequence[int]], made: Made
    ) -> Iterator[tuple[Request, int]]:
        """Give requests the drafts that came out, and from the cache take back all others; what is still to be given."""
        assert self.drafting is not None
        for request, token in given:
            drafts = accepted.get(request)
            if drafts is None or request.seq is None:  # cancelled meanwhile
                yield request, token
                continue
            request.new_tokens.extend(drafts)
            made.requests.extend([request] * len(drafts))
            made.tokens.extend(drafts)
            made.reasons.extend([None] * len(drafts))
            self.num_draft_tokens += len(plan.drafts[request])
            self.num_accepted_tokens += len(drafts)
            spoilt = token == NOT_FINITE  # by keys of wrong drafts: they are hidden, but 0 times NaN is NaN
            if spoilt:
                request.pending -= 1
                self.drafting.rest(request)
                self.cache.forget_prefixes()  # its own keys, which later prompts would find, may be no better
            self.cache.truncate(request.seq, request.length - 1)
            if not spoilt:
                if self._left(request) <= 0:
                    self._end(request)
                yield request, token

    def _preempt_youngest(self, trusted: bool = True) -> int:
        """Send the youngest running request back to wait; returns the pages that this frees.

        trusted: what its pages hold is what was to be computed
        """
        request = self._running.pop()
        before = self.cache.free_pages
        self._sharing.keep([request])
        if not trusted or self.preempting is None or not self.preempting.out(request):
            self._release(request)
        self._waiting.appendleft(request)
        self.preemptions += 1
        return self.cache.free_pages - before

    def _drop(self, request: Request) -> None:
        """Take a request out of wherever it is."""
        for queue in (self._running, self._ending, self._waiting, *(one.behind for one in request.samples)):
            if request in queue:
                queue.remove(request)
        self._release(request)
        request.kin = ()

    def _end(self, request: Request) -> None:
        """Its last token was sampled: it needs no pages any more."""
        self._running.remove(request)
        self._release(request)
        self._ending.append(request)

    def _left(self, request: Request) -> int:
        """How many tokens it has still to make; one past the length limit could not be fed back."""
        made = len(request.new_tokens) + request.pending
        return min(request.sampling.max_new_tokens - made, self.cache.length_limit + 1 - len(request.prompt) - made)

    def _release(self, request: Request) -> None:
        if self.preempting is not None:
            self.preempting.drop(request)
        if request.seq is not None:
            self._sharing.keep([request])
            self.cache.free(request.seq)
            request.seq = None

    def _pages_wanted(self, request: Request, count: int) -> int:
        """Pages to take for `count` more tokens of this request."""
        held = 0 if request.seq is None else request.seq.length
        return self.cache.pages_for(held + count) - self.cache.pages_for(held)

    def _fitting(self, request: Request, free: int) -> int:
        """Most tokens that this request can add with so many free pages."""
        held = 0 if request.seq is None else request.seq.length
        return (self.cache.pages_for(held) + free) * self.cache.page_size - held

    @staticmethod
    def _as_plan(picked: list[tuple[Request, int]], drafts: Mapping[Request, Sequence[int]]) -> Plan:
        ordered = sorted(picked, key=lambda one: one[1] == 1)  # stable: prefills first, then decodes
        chunks = [request.chunk(count, drafts.get(request, ())) for request, count in ordered]
        sampled = [request for (request, _), chunk in zip(ordered, chunks, strict=True) if chunk.logits != "none"]
        settled = all(chunk.carried == row and len(chunk.tokens) == 1 for row, chunk in enumerate(chunks))
        return Plan(chunks, sampled, settled, drafts)

"""How does a person generate text ids with their own model?

`PagedLM` compiles the model once against a paged cache, then runs a loop: the scheduler plans a step, the model makes
logits, sampling makes tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch
from torch import nn

from compile_attn.answers import Output, streamed
from compile_attn.asking import Prompts, cache_for, graphs_wanted, preempting_for, tokens_a_step, work_of
from compile_attn.cache import Chunk, StalePrefix
from compile_attn.calling import Call, check_no_dropout, device_of, position_cure, vocabulary_of
from compile_attn.cuda_graph import Recorded
from compile_attn.drafting import Drafter, Drafting, verified
from compile_attn.exported import opened, run_of
from compile_attn.kernels.blocksparse_params import BlocksparseParams
from compile_attn.kv_dtype import Scales
from compile_attn.memory import tokens_that_fit
from compile_attn.modes import in_own_modes
from compile_attn.options import Inner, Options
from compile_attn.pages import at_least_one, page_count
from compile_attn.passes.report import RefusedError, Report
from compile_attn.prefixes import Salt, check_salt
from compile_attn.progress import bar_if
from compile_attn.requests import Plan, Request
from compile_attn.running import Runner, Sent
from compile_attn.sampling import NOT_FINITE, Sampling
from compile_attn.scheduler import Made, Scheduler
from compile_attn.warming import full_step, mixed_step

# Length of the first call, which compiles: any length serves, but torch.compile specialises sizes 0 and 1.
_FIRST_TOKENS = 3


class PagedLM:
    """A language model that keeps keys and values in pages: many ragged requests at once, only new tokens computed.

    model             takes token ids [1, T]; returns logits, a tuple that starts with them, or an object with .logits. Or what
                      export() made of such a model, or load_package() read
    kv_tokens, page_size, max_seqs, kv_dtype, kv_scales, poison    as in PagedKVCache; more requests than max_seqs wait their turn
    kernel, inner, merge_linears, block_sparse    as in Options; with block_sparse no request is longer than its max_seqlen
    cuda_graphs       decodes, and steps of few new tokens, are replayed from CUDA graphs: "auto" where that can be, True or an
                      error, False never
    call              call(model, input_ids, position_ids) for a model of another signature or output; compiled with it.
                      Both are [1, T]; positions count from 0 in each sequence. Without it the model is called with the
                      ids alone, and with position_ids where forward demands them
    max_batch_tokens  most new tokens in one step; longer prompts are loaded in chunks. None: 8192 on a GPU, 512 on a CPU
    prefix_cache      a request begins with the pages of earlier ones that began with the same tokens, under the same salt; what
                      they hold stays until the pages are needed
    drafter           guesses how requests go on, such as PromptLookup(). A step verifies up to draft_tokens guesses a request: the
                      tokens stay what they were, right guesses save steps
    swap_tokens       whole pages of host memory for so many tokens: who must make room for older requests is moved there and back
                      where that is estimated to take less time than computing it again. 0: it is always computed again
    memory_fraction   with kv_tokens=None the cache takes what a full step leaves of this much of the GPU's memory

    The model is compiled here: one that cannot be paged soundly raises RefusedError. `report` says what was done.
    """

    def __init__(
        self,
        model: nn.Module | torch.export.ExportedProgram,
        kv_tokens: int | None = 65_536,
        page_size: int = 16,
        max_seqs: int = 64,
        kernel: str = "auto",
        kv_dtype: torch.dtype | str = "auto",
        cuda_graphs: str | bool = "auto",
        inner: Inner = "inductor",
        call: Call | None = None,
        max_batch_tokens: int | None = None,
        poison: bool = False,
        kv_scales: Scales | None = None,
        memory_fraction: float = 0.9,
        merge_linears: bool = True,
        block_sparse: BlocksparseParams | None = None,
        prefix_cache: bool = True,
        drafter: Drafter | None = None,
        draft_tokens: int = 4,
        swap_tokens: int = 0,
    ) -> None:
        self._model = opened(model)
        check_no_dropout(self._model)
        device = device_of(self._model)
        budget, graphs = tokens_a_step(max_batch_tokens, device), graphs_wanted(cuda_graphs, device)
        if swap_tokens != 0:
            page_count(swap_tokens, at_least_one("page_size", page_size), "swap_tokens")
        drafting = None if drafter is None else Drafting(drafter, draft_tokens)
        options = Options(kernel=kernel, inner=inner, merge_linears=merge_linears, block_sparse=block_sparse)
        cache = cache_for(
            self._model,
            kv_tokens,
            budget,
            memory_fraction,
            page_size=page_size,
            max_seqs=max_seqs,
            kv_dtype=kv_dtype,
            max_seq_len=None if block_sparse is None else block_sparse.max_seqlen,
            kv_scales=kv_scales,
            poison=poison,
        )
        options = replace(options, cache=cache)
        self.cache = cache
        self._own_call = call is not None
        self._runner = Runner(run_of(self._model, options, call), cache, self._model, graphs, budget, drafting is not None)
        self._scheduler = Scheduler(cache, budget, prefix_cache, drafting)
        self._sent: deque[Sent] = deque()
        # Steps that are sent before the tokens of the oldest are read; none where drafts follow these tokens.
        self._ahead = 1 if device.type == "cuda" and drafting is None else 0
        self._closed = False
        self._vocabulary = self._first_call()
        if drafting is not None:
            drafting.vocabulary = self._vocabulary
        if kv_tokens is None:
            self._take_the_rest(memory_fraction)
        if swap_tokens:
            self._scheduler.preempting = preempting_for(self._model, cache, swap_tokens)

    # Requests

    def generate(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_new_tokens: int | None = None,
        progress: bool | None = None,
        salt: Salt = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, a stop token included; where it is asked for n answers, n lists, one after the other.

        Greedy unless `sampling` says otherwise, which is one for all or one a prompt; `max_new_tokens` replaces theirs. A progress
        bar shows on a terminal only (`progress` forces it on or off). `salt` as in `submit`.
        """
        work = self._checked(prompts, sampling, max_new_tokens, salt)
        most = sum(how.max_new_tokens * how.n for _, how in work)
        with self._submitted(work, salt) as asked, bar_if(progress, most) as advance:
            requests = [one for request in asked for one in request.samples]
            shown, left = 0, requests[::-1]
            while left:
                self._advance()
                while left and left[-1].finished:
                    left.pop()
                if advance is not None:
                    unused = sum(one.sampling.max_new_tokens - len(one.new_tokens) for one in requests if one.reason is None)
                    advance(most - unused - shown)
                    shown = most - unused
        return [one.new_tokens for one in requests]

    def stream(
        self,
        prompts: Prompts,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        max_new_tokens: int | None = None,
        salt: Salt = None,
    ) -> Iterator[Output]:
        """Tokens as they are made. Leaving the loop early cancels what is left and gives its pages back."""
        return self._stream(self._checked(prompts, sampling, max_new_tokens, salt), salt)

    def submit(self, prompt: Sequence[int] | torch.Tensor, sampling: Sampling | None = None, *, salt: Salt = None) -> Request:
        """Queue one request; `step()` until it is finished. Where n answers are asked for, `samples` are all of them, it the first.

        salt: whose request it is. It begins with what requests of the same salt have left in the cache, and with nothing else.
        """
        [(tokens, how)] = self._checked([prompt], sampling, None, salt)
        return self._scheduler.submit(tokens, how, salt)

    def fork(self, request: Request, sampling: Sampling | None = None) -> Request:
        """Queue a second request that goes on from what the first one has so far: its prompt is all tokens of that one.

        It is sampled anew, as `submit` does; while the first one runs, both hold the same pages.
        """
        self._scheduler.check_mine(request)
        [(tokens, how)] = self._checked([[*request.prompt, *request.new_tokens]], sampling, None, request.salt)
        return self._scheduler.submit(tokens, how, request.salt, request)

    def cancel(self, request: Request, sample: int | None = None) -> None:
        """End a request with all its samples now, or one of them alone; the pages come back at once."""
        self._check_open()
        self._scheduler.check_mine(request)
        if sample is not None and sample not in range(len(request.samples)):
            raise ValueError(f"sample={sample!r} of request {request.id}, which has samples 0 to {len(request.samples) - 1}")
        for one in request.samples[::-1] if sample is None else [request.samples[sample]]:
            self._scheduler.cancel(one)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self._scheduler.has_work

    @property
    def preemptions(self) -> int:
        """How often a request lost its pages to an older one, and was computed again or had them moved to host memory."""
        return self._scheduler.preemptions

    @property
    def swaps(self) -> int:
        """How many of the preemptions moved pages to host memory."""
        preempting = self._scheduler.preempting
        return 0 if preempting is None else preempting.swaps

    @property
    def num_draft_tokens(self) -> int:
        """Guesses of the drafter that steps have verified."""
        return self._scheduler.num_draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        """Those of them that came out, and so took no step of their own."""
        return self._scheduler.num_accepted_tokens

    def step(self) -> list[Output]:
        """Run one batch; tokens that were made. After an error every request starts over with the next step.

        On a GPU the tokens are those of the batch before, so that it never waits for the host: the first call returns none. With
        a drafter they are the batch's own, on a GPU too.
        """
        made = zip(*self._advance(), strict=True)
        return [Output(one.id, token, reason is not None, reason, one.sample) for one, token, reason in made]

    @in_own_modes
    def _advance(self) -> Made:
        """`step()`, for who reads the tokens from the requests."""
        self._check_open()
        try:
            try:
                plan = self._send()
            except StalePrefix:  # nothing is known now: every request starts over, and none begins with what was known
                self._sent.clear()
                self._scheduler.abandon()
                plan = self._send()
            if not self._sent or (plan is not None and len(self._sent) <= self._ahead):
                return Made([], [], [])
            return self._read(self._sent.popleft())
        except BaseException:
            self._sent.clear()
            self._scheduler.abandon()
            raise

    def _send(self) -> Plan | None:
        """Hand the next step to the device, if there is one."""
        plan = self._scheduler.plan()
        if plan is not None:
            self._sent.append(self._runner.send(plan))
            self._scheduler.sent(plan)
        return plan

    def _read(self, sent: Sent) -> Made:
        accepted, tokens = verified(sent.plan, sent.read())
        for request, token in zip(sent.plan.sampled, tokens, strict=True) if NOT_FINITE in tokens else ():
            if token == NOT_FINITE and not request.finished and request not in accepted:  # drafts may be to blame
                raise RuntimeError(
                    f"the logits of request {request.id} after {request.length - 1} tokens are not finite; "
                    "look for overflow in the model (a half-precision dtype?) or NaN in its weights"
                )
        return self._scheduler.commit(sent.plan, tokens, accepted)

    # Life

    @in_own_modes
    def warm_up(self, rows: int | None = None, tokens: int | None = None, random: bool = False) -> None:
        """Do now what would otherwise be done when it is first needed, in the middle of serving.

        A prompt beside decodes is run in block tables of each width, so that kernels are compiled. On a GPU the steps of up to
        `rows` requests (default: max_seqs) of up to `tokens` tokens each (default: the longest there may be) that run from graphs
        are recorded; with `random` those in which a request draws at random, too. What was recorded before stays. `cuda_graphs`
        says how long it took.
        """
        self._check_open()
        if self.has_work:
            raise ValueError("warm_up() while requests are unfinished; call it before the first, or after the last")
        if self.cache.pages_in_use:
            raise ValueError(f"warm_up() while {self.cache.pages_in_use} pages of the cache are in use; free their sequences first")
        most = {"rows": self.cache.max_seqs, "tokens": self.cache.length_limit}
        asked = {"rows": rows, "tokens": tokens}
        for name, value in asked.items():
            if value is not None and at_least_one(name, value) > most[name]:
                raise ValueError(f"{name}={value}; at most {most[name]} can be served")
        longest = tokens or most["tokens"]
        for width in self.cache.buffers.widths(self.cache.pages_for(longest), self.cache.page_size):
            mixed_step(self._runner, self.cache, self._scheduler.budget, width, random)
        self._runner.record(rows or most["rows"], longest, random)

    @property
    def device(self) -> torch.device:
        """Where the model and the cache are."""
        return self.cache.device

    @property
    def report(self) -> Report | None:
        """What the compiler did: sites, specs, kernels and reasons, token rewrites, the graph before and after."""
        return self.cache.report

    @property
    def cuda_graphs(self) -> tuple[Recorded, ...]:
        """The steps that were recorded so far, with seconds and bytes."""
        return tuple(self._runner.recorded)

    @property
    def vocab_size(self) -> int:
        """Token ids from 0 up to this, not included, are valid."""
        return self._vocabulary

    def close(self) -> None:
        """Drop the cache's memory. Every later use is an error."""
        self._closed = True
        self._sent.clear()
        self._runner.close()
        if self._scheduler.preempting is not None:
            self._scheduler.preempting.space.close()
        self.cache.close()

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # One step

    @in_own_modes
    def _take_the_rest(self, fraction: float) -> None:
        """Size the cache by what the largest steps leave of the GPU's memory."""

        def record() -> int:
            return self._runner.record(self.cache.max_seqs, self.cache.length_limit, random=True, largest=True)

        def profile() -> int:
            full_step(self._runner, self.cache, self._scheduler.budget)
            return record()

        self.cache.resize(tokens_that_fit(self.cache, profile, fraction))
        record()  # again, over the new pages: those that are recorded later find room in its memory

    @in_own_modes
    def _first_call(self) -> int:
        """Compile with a first call, so that a refusal and the model's limits are known before any request."""
        seq = self.cache.add()
        try:
            try:
                logits = self._runner.logits([Chunk(seq, [0] * min(_FIRST_TOKENS, self.cache.length_limit))])
            except RefusedError as refused:
                cure = None if self._own_call else position_cure(self._model)
                if cure is not None:
                    refused.add_note(cure)
                raise
            if not self.cache.k_pages:
                raise ValueError("the model has no attention that could be paged; run it as it is")
        finally:
            self.cache.free(seq)
        return vocabulary_of(self._model, logits.shape[-1])

    @contextmanager
    def _submitted(self, work: list[tuple[list[int], Sampling]], salt: Salt) -> Iterator[list[Request]]:
        """Requests that end with the block, one way or another."""
        self._check_open()
        requests: list[Request] = []
        try:
            requests.extend(self._scheduler.submit(tokens, how, salt) for tokens, how in work)
            yield requests
        finally:
            for request in requests:
                if not self._closed:
                    self.cancel(request)

    def _stream(self, work: list[tuple[list[int], Sampling]], salt: Salt) -> Iterator[Output]:
        with self._submitted(work, salt) as requests:
            yield from streamed(requests, self._advance)

    # Checks

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this PagedLM is closed; make a new one")

    def _checked(
        self, prompts: Prompts, sampling: Sampling | Sequence[Sampling] | None, max_new_tokens: int | None, salt: Salt
    ) -> list[tuple[list[int], Sampling]]:
        self._check_open()
        check_no_dropout(self._model)
        check_salt(salt)
        work = work_of(prompts, sampling, max_new_tokens, self._vocabulary)
        for tokens, _ in work:
            self._scheduler.check_length(len(tokens))
        return work

"""What is a request on its way, and what is one step of several?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from compile_attn.cache import CachedSequence, Chunk
from compile_attn.prefixes import Salt
from compile_attn.sampling import Sampling, draw_seed
from compile_attn.swapping import Swapped

Reason = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Request:
    """One answer to a prompt on its way: `new_tokens` grows until `reason` says why it ended.

    Of a prompt that was asked for n answers each is a request, and `samples` are all of them.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    new_tokens: list[int] = field(default_factory=list)
    reason: Reason | None = None
    seq: CachedSequence | None = None
    pending: int = 0  # tokens sampled by steps that were sent, and not read yet; at most 1 when a step is planned
    row: int = 0  # among the sampled rows of the step that made the last one
    server: object = field(default=None, repr=False)  # the scheduler that serves it
    swapped: Swapped | None = None  # its pages, while they wait in host memory
    salt: Salt = None
    sample: int = 0  # which of the samples
    samples: tuple[Request, ...] = field(default=(), repr=False)
    behind: list[Request] = field(default_factory=list, repr=False)  # samples that wait until this one's prompt was run
    kin: tuple[Request, ...] = field(default=(), repr=False)  # requests whose tokens begin with this one's prompt

    @property
    def finished(self) -> bool:
        return self.reason is not None

    @property
    def length(self) -> int:
        """Tokens so far: the prompt and what was made, read or not."""
        return len(self.prompt) + len(self.new_tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose keys and values are not in the cache: 1 while decoding."""
        return self.length - (0 if self.seq is None else self.seq.length)

    def ids(self, start: int, end: int) -> list[int]:
        """Its tokens from one place to another, as far as the host has read them."""
        prompt = len(self.prompt)
        return [*self.prompt[start:end], *self.new_tokens[max(0, start - prompt) : max(0, end - prompt)]]

    def chunk(self, count: int, drafts: Sequence[int] = ()) -> Chunk:
        """The next `count` tokens for the cache; the pending one stands in as 0, and says where the device has it.

        drafts: guesses at what follows the newest token, which then is the only one; what comes out after each is asked for.
        """
        assert self.seq is not None
        start, read = self.seq.length, len(self.prompt) + len(self.new_tokens)
        last = start + count == read + self.pending
        carried = self.row if last and self.pending else None
        tokens = self.ids(start, start + count) if start < read else []
        if carried is not None:
            tokens.append(0)
        tokens += drafts
        return Chunk(self.seq, tokens, "all" if drafts else "last" if last else "none", carried)


def asked(number: int, prompt: Sequence[int], sampling: Sampling, salt: Salt = None, source: Request | None = None) -> Request:
    """The first of the n samples of a prompt, the others behind it. Sample k draws as one of its own with the seed + k does.

    source: a request that has all the tokens of the prompt.
    """
    tokens, seed = tuple(prompt), draw_seed() if sampling.seed is None else sampling.seed
    samples = tuple(Request(number, tokens, sampling, seed + k, salt=salt, sample=k) for k in range(sampling.n))
    for one in samples:
        one.samples = samples
        one.kin = (*(samples if sampling.n > 1 else ()), *(() if source is None else (source,)))
    samples[0].behind += samples[1:]
    return samples[0]


@dataclass(frozen=True)
class Plan:
    """One step: a chunk per request, prefills first; `sampled`: whose next token comes out, in row order.

    drafts: what follows the newest token of some of them, at a guess; a row comes out after each, too.
    settled: every new token is the one that the step before has sampled in the same row, so that the step can be planned again
    as it is.
    """

    chunks: list[Chunk]
    sampled: list[Request]
    settled: bool = False
    drafts: Mapping[Request, Sequence[int]] = field(default_factory=dict)

    @property
    def rows(self) -> Iterator[tuple[Request, int]]:
        """Of each sampled row, whose it is, and how many drafts it follows."""
        for request in self.sampled:
            for after in range(1 + len(self.drafts.get(request, ()))):
                yield request, after

    @property
    def how(self) -> list[Sampling]:
        return [request.sampling for request, _ in self.rows]

    @property
    def draws(self) -> list[tuple[int, int]]:
        """Seed and number of the draw of each sampled row; see `sampling.uniform`."""
        return [(request.seed, len(request.new_tokens) + request.pending + after) for request, after in self.rows]

    @cached_property
    def random(self) -> bool:
        """Whether any row draws at random."""
        return any(request.sampling.temperature > 0 for request in self.sampled)

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Rows, new tokens, and tokens that come out. All three are alike in a step of decodes, and in no other."""
        wanted = len(self.sampled) + sum(map(len, self.drafts.values()))
        return len(self.chunks), sum(len(chunk.tokens) for chunk in self.chunks), wanted

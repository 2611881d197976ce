"""Which token comes next?

`Sampling` says how, `sample` does it on the device. A draw depends on the request's seed and on how many tokens it has
made, on nothing else: the same logits give the same token whatever shares their batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ALL = 2**31 - 1  # more tokens than any vocabulary has
NOT_FINITE = -1  # what `sample` returns for a row whose largest logit is NaN or infinite


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends.

    temperature     0 (default): the token with the largest logit, exactly; above 0: drawn from softmax(logits / it)
    top_k           draw among the k likeliest only; None: all
    top_p           draw among the likeliest tokens that together reach this share of what top_k left; 1.0: all. On a GPU
                    the share is known to about 1e-6, so a token that just reaches or just misses it may fall on the other side
    seed            None: taken from torch's default generator, so torch.manual_seed decides
    max_new_tokens  most new tokens; fewer when the cache or the model's position table ends first
    stop_ids        a token that ends the request; it is still returned
    n               answers to a prompt, which is run once. Answer k draws as a request of its own with the seed + k would

    Of tokens with equal logits the one with the lower id counts as the likelier, so top_k=1 is exactly greedy.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    n: int = 1

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more")
        _check_number("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1 (1: off)")
        if self.top_k is not None:
            _check_whole("top_k", self.top_k, 1, " (None: off)")
        if self.seed is not None:
            _check_whole("seed", self.seed, 0, "")
        _check_whole("max_new_tokens", self.max_new_tokens, 1, "")
        object.__setattr__(self, "stop_ids", _ids(self.stop_ids))
        _check_whole("n", self.n, 1, "")
        if self.n > 1 and not self.temperature:
            raise ValueError(f"n={self.n} answers at temperature=0 are all alike; choose a temperature above 0, or n=1")


def draw_seed() -> int:
    """A seed from torch's default generator."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def uniform(seeds: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Numbers in [0, 1), float64, each of which depends on its seed (see `mixed`) and count only; int64 of one shape both.

    SplitMix64: constants from Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Products of
    int64 wrap in torch, on every device, as those of unsigned numbers do.
    """
    z = seeds + (counts + 1) * _signed(_GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return _shifted(z ^ _shifted(z, 31), 11).double() / 2.0**53  # the 53 bits that a float keeps


def mixed(seed: int) -> int:
    """A seed as `uniform` takes it: near seeds are far apart."""
    mask = 2**64 - 1
    z = seed & mask
    z = ((z ^ (z >> 30)) * _FIRST) & mask
    z = ((z ^ (z >> 27)) * _SECOND) & mask
    return _signed(z ^ (z >> 31))


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted right as unsigned numbers are: zeros come in."""
    shifted: torch.Tensor = (words >> bits) & (2 ** (64 - bits) - 1)
    return shifted


@dataclass(frozen=True)
class SamplingRows:
    """`Sampling` of R rows as tensors [R]: temperature and top_p float64, top_k int64 (0: all), and for `uniform` int64 both."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    seeds: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, how: Sequence[Sampling], draws: Sequence[tuple[int, int]]) -> SamplingRows:
        """On the CPU, from what is asked and each row's seed and number of draws made."""
        real = torch.tensor([(one.temperature, one.top_p) for one in how], dtype=torch.float64, device="cpu")
        whole = [(min(one.top_k or 0, _ALL), mixed(seed), count) for one, (seed, count) in zip(how, draws, strict=True)]
        top_k, seeds, counts = torch.tensor(whole, dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(1)
        return cls(*(each.contiguous() for each in (real[:, 0], top_k, real[:, 1], seeds, counts)))

    @classmethod
    def idle(cls, rows: int) -> SamplingRows:
        """Of rows that nobody asked for."""
        return cls.of([Sampling()] * rows, [(0, 0)] * rows)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.temperature, self.top_k, self.top_p, self.seeds, self.counts

    def to(self, device: torch.device) -> SamplingRows:
        """On that device, without waiting for it."""
        pinned = device.type == "cuda"
        return SamplingRows(*((t.pin_memory() if pinned else t).to(device, non_blocking=True) for t in self.tensors()))

    def first(self, rows: int) -> SamplingRows:
        """Views of the first rows."""
        return SamplingRows(*(tensor[:rows] for tensor in self.tensors()))


def sample(logits: torch.Tensor, how: SamplingRows | None = None, draws: torch.Tensor | None = None) -> torch.Tensor:
    """One token per row of logits [R, V]: [R] int64 on the same device; NOT_FINITE where the logits are unusable.

    Without `how` each row's largest logit is taken. `draws` [R] float64 in [0, 1) stands in for `uniform` of its seeds.
    """
    if logits.is_cuda and logits.dtype != torch.float64:
        return _on_gpu(logits, how, draws)
    best, tokens = logits.max(dim=-1)
    if how is not None:
        points = uniform(how.seeds, how.counts) if draws is None else draws
        tokens = torch.where(how.temperature > 0, _draw(logits, how, points), tokens)
    return torch.where(best.isfinite(), tokens, NOT_FINITE)


def _on_gpu(logits: torch.Tensor, how: SamplingRows | None, draws: torch.Tensor | None) -> torch.Tensor:
    """The same by Triton; tests hold it against `_draw`."""
    if how is None:
        from compile_attn.kernels.greedy_triton import greedy

        return greedy(logits, NOT_FINITE)
    from compile_attn.kernels.draw_triton import draw

    return draw(logits, how.tensors(), draws, NOT_FINITE)


def _draw(logits: torch.Tensor, how: SamplingRows, draws: torch.Tensor) -> torch.Tensor:
    """Inverse of the cumulated distribution at each row's draw, over the kept tokens in the order of their ids."""
    temperature = torch.where(how.temperature > 0, how.temperature, 1.0)  # of greedy rows nothing is read
    exact = logits.double()
    scaled = (exact - exact.amax(dim=-1, keepdim=True)) / temperature[:, None]
    probs = scaled.softmax(dim=-1)
    if how.top_k.is_cuda or bool(((how.top_k > 0) | (how.top_p < 1)).any()):  # a GPU is not waited for
        probs = probs.masked_fill(~_kept(scaled, how), 0.0)
    reached = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
    last = (reached < reached[:, -1:]).sum(dim=-1, keepdim=True)  # the last token that still adds probability
    return torch.minimum(chosen, last).squeeze(1)


def _kept(scaled: torch.Tensor, how: SamplingRows) -> torch.Tensor:
    """Which tokens top_k, then top_p, leave."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    most = torch.where(how.top_k > 0, how.top_k, scaled.shape[-1])[:, None]
    kept = torch.arange(scaled.shape[-1], device=scaled.device) < most
    probs = ordered.masked_fill(~kept, -math.inf).softmax(dim=-1)
    likelier = probs.cumsum(dim=-1) - probs  # the probability of all that come before
    kept &= (likelier < how.top_p[:, None]) | (how.top_p >= 1)[:, None]
    return torch.zeros_like(kept).scatter(1, order, kept)


def _check_number(name: str, value: float, good: bool, limit: str) -> None:
    if not good or not math.isfinite(value):
        raise ValueError(f"{name}={value!r}; it must be {limit}")


def _check_whole(name: str, value: int, least: int, note: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; it must be a whole number of at least {least}{note}")


def _ids(given: Sequence[int] | int) -> tuple[int, ...]:
    ids = (given,) if isinstance(given, int) else tuple(given)
    for one in ids:
        _check_whole("stop_ids", one, 0, "")
    return ids

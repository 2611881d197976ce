"""Which token comes next?

`Sampling` says how, `sample` does it on the device. A draw depends on the request's seed and on how many tokens it has
made, on nothing else: the same request gets the same tokens whatever shares its batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

NOT_FINITE = -1  # what `sample` returns for a row whose largest logit is NaN or infinite


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends.

    temperature     0 (default): the token with the largest logit, exactly; above 0: drawn from softmax(logits / it)
    top_k           draw among the k likeliest only; None: all
    top_p           draw among the likeliest tokens that together reach this probability (after top_k); 1.0: all
    seed            None: taken from torch's default generator, so torch.manual_seed decides
    max_new_tokens  most new tokens; fewer when the cache or the model's position table ends first
    stop_ids        a token that ends the request; it is still returned
    n               answers per prompt; 1 for now
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
        if self.n != 1:
            raise ValueError(f"n={self.n!r}: several answers per prompt are not supported yet; repeat the prompt instead")


def draw_seed() -> int:
    """A seed from torch's default generator."""
    return int(torch.randint(2**62, (), dtype=torch.int64, device="cpu"))


def uniform(seed: int, count: int) -> float:
    """A number in [0, 1) that depends on the two numbers only.

    SplitMix64: constants from Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    mask = 2**64 - 1
    z = (_mix(seed & mask) + (count + 1) * 0x9E3779B97F4A7C15) & mask
    return (_mix(z) >> 11) / 2.0**53  # the 53 bits that a float keeps


def _mix(z: int) -> int:
    mask = 2**64 - 1
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def sample(logits: torch.Tensor, how: Sequence[Sampling], draws: Sequence[float]) -> torch.Tensor:
    """One token per row of logits [R, V]: [R] int64 on the same device; NOT_FINITE where the logits are unusable.

    `draws` holds one number in [0, 1) per row, read where that row's temperature is above 0.
    """
    best, tokens = logits.max(dim=-1)
    random = [row for row, one in enumerate(how) if one.temperature > 0]
    if random:
        place = torch.tensor(random, device=logits.device)
        tokens = tokens.index_copy(0, place, _draw(logits[place], [how[r] for r in random], [draws[r] for r in random]))
    return torch.where(best.isfinite(), tokens, NOT_FINITE)


def _draw(logits: torch.Tensor, how: Sequence[Sampling], draws: Sequence[float]) -> torch.Tensor:
    """Inverse of the cumulated distribution at each row's draw, likeliest token first."""
    vocab = logits.shape[-1]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    ordered, order = logits.double().sort(dim=-1, descending=True, stable=True)
    scaled = (ordered - ordered[:, :1]) / column([one.temperature for one in how])
    rank = torch.arange(vocab, device=logits.device)
    cut = rank >= column([min(one.top_k or vocab, vocab) for one in how])
    probs = scaled.masked_fill(cut, -math.inf).softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens
    out = (before >= column([one.top_p for one in how])) & column([one.top_p < 1 for one in how]).bool()
    kept = probs.masked_fill(out, 0.0).cumsum(dim=-1)
    chosen = torch.searchsorted(kept, column(draws) * kept[:, -1:], right=True)
    last = (kept < kept[:, -1:]).sum(dim=-1, keepdim=True)  # the last token that still adds probability
    return order.gather(1, torch.minimum(chosen, last)).squeeze(1)


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

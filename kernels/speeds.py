"""Which kernel serves a site fastest, as far as it was measured?

A kernel is chosen when a model is compiled, before any length is known. So kernels are compared over a fixed mix of batches, by
the weighted geometric mean of their times: a short step counts as much as a long one. `bench/speeds.py` measures the mix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from compile_attn.kernels import measured
from compile_attn.kernels.backend import Request
from compile_attn.kernels.mask import Bidirectional, Causal, Window

AS_GOOD = 1.03  # what two runs of one kernel differ by
Key = tuple[str, int, int, int, int]  # phase, head size, group, sequences, length


@dataclass(frozen=True)
class Point:
    """A batch of the mix. decode: the last token of each sequence is new; prefill and stateless: all are."""

    phase: str
    sequences: int
    length: int
    weight: int


# Paged: four fifths decoding, as a sequence spends most of its steps.
PAGED = (
    Point("decode", 1, 1024, 1),
    Point("decode", 1, 8192, 1),
    Point("decode", 32, 128, 1),
    Point("decode", 32, 1024, 2),
    Point("decode", 32, 8192, 1),
    Point("decode", 128, 1024, 2),
    Point("prefill", 1, 2048, 1),
    Point("prefill", 1, 8192, 1),
)
STATELESS = (Point("stateless", 1, 512, 1), Point("stateless", 8, 1024, 1), Point("stateless", 1, 8192, 1))


@dataclass(frozen=True)
class Speeds:
    """Mean microseconds of each kernel that was measured on the whole mix, for the nearest head size and group."""

    head_dim: int
    group: int
    means: Mapping[str, float]

    def best(self, kernels: Sequence[str]) -> str:
        """The fastest; among those as good as it, the first. One without a measurement only where none was measured."""
        least = min((self.means[name] for name in kernels if name in self.means), default=math.inf)
        return next((name for name in kernels if self.means.get(name, math.inf) <= least * AS_GOOD), kernels[0])

    def against(self, other: str, taken: str) -> str | None:
        """Why the one is passed over for the other; None where both were not measured."""
        if other not in self.means or taken not in self.means:
            return None
        times, at = self.means[other] / self.means[taken], f"at head size {self.head_dim}, group {self.group}"
        if times <= AS_GOOD:
            return f"could; measured no faster than {taken!r} {at}, which comes first"
        return f"could; {taken!r} measured {times:.2f}x faster {at}"


def speeds(request: Request) -> Speeds | None:
    """None where the measurements say nothing: they are of plain attention in half precision on a GPU."""
    spec, paged = request.spec, request.page_size is not None
    masks = (Causal, Bidirectional, Window) if paged else (Causal, Bidirectional)  # a window costs SDPA a mask in memory
    if not isinstance(spec.mask, masks) or spec.bias is not None or spec.score is not None or request.device.type != "cuda":
        return None
    if request.dtype not in (torch.bfloat16, torch.float16) or request.kv_dtype not in (None, request.dtype):
        return None
    points = PAGED if paged else STATELESS
    group = spec.num_q_heads // spec.num_kv_heads
    sizes = {key[1:3] for key in measured.MICROSECONDS if key[0] == points[0].phase}
    if not sizes:
        return None
    dim, near = min(sorted(sizes), key=lambda size: abs(math.log2(size[0] / spec.head_dim)) + abs(math.log2(size[1] / group)))
    return Speeds(dim, near, means(points, dim, near, measured.MICROSECONDS))


def means(points: tuple[Point, ...], dim: int, group: int, times_at: Mapping[Key, Mapping[str, float]]) -> dict[str, float]:
    """By kernel, those that were measured at every point."""
    found = [times_at.get((each.phase, dim, group, each.sequences, each.length), {}) for each in points]
    total = sum(each.weight for each in points)
    return {
        kernel: math.exp(sum(each.weight * math.log(times[kernel]) for each, times in zip(points, found, strict=True)) / total)
        for kernel in found[0]
        if all(kernel in times for times in found)
    }

"""Which kernel serves a site fastest, and which of several a step of some shapes, as far as it was measured?

A kernel is chosen when a model is compiled, before any length is known. So kernels are compared over a fixed mix of batches, by
the weighted geometric mean of their times: a short step counts as much as a long one. Where several are kept, each step takes
the one that was fastest at the points nearest to the step's shapes. `bench/speeds.py` measures the mix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from compile_attn.kernels import measured
from compile_attn.kernels.backend import Request, Shape
from compile_attn.kernels.batch import table_width
from compile_attn.kernels.mask import Bidirectional, Causal, Window
from compile_attn.kernels.spec import AttentionSpec

AS_GOOD = 1.03  # what two runs of one kernel differ by
WORTH = 1.05  # a further kernel must be that much faster in some steps: it is one more to load, and to compile
BETWEEN = "|"  # in the name of several kernels
Key = tuple[str, int, int, int, int]  # phase, head size, group, sequences, length


@dataclass(frozen=True)
class Point:
    """A batch of the mix.

    decode: the last token of each sequence is new; prefill and stateless: all are; mixed: decodes, and the latter half of one
    more prompt.
    """

    phase: str
    sequences: int
    length: int
    weight: int

    @property
    def shape(self) -> Shape:
        """Of such a step, which says less than the lengths: points may have the same."""
        tokens = {"decode": self.sequences, "mixed": self.sequences - 1 + self.length // 2}
        return Shape(tokens.get(self.phase, self.sequences * self.length), self.sequences, table_width(self.length, 1))


# Paged: four fifths decoding, as a sequence spends most of its steps.
PAGED = (
    Point("decode", 1, 1024, 2),
    Point("decode", 8, 128, 1),
    Point("decode", 8, 1024, 1),
    Point("decode", 32, 128, 1),
    Point("decode", 32, 1024, 2),
    Point("decode", 128, 128, 1),
    Point("decode", 128, 1024, 2),
    Point("decode", 256, 128, 1),
    Point("decode", 256, 512, 1),
    Point("decode", 8, 4096, 1),
    Point("decode", 32, 4096, 1),
    Point("decode", 1, 8192, 2),
    Point("decode", 8, 8192, 1),
    Point("decode", 32, 8192, 2),
    Point("prefill", 16, 128, 1),
    Point("prefill", 1, 2048, 1),
    Point("prefill", 1, 8192, 1),
    Point("mixed", 32, 1024, 1),
    Point("mixed", 32, 4096, 1),
)
STATELESS = (Point("stateless", 1, 512, 1), Point("stateless", 8, 1024, 1), Point("stateless", 1, 8192, 1))


@dataclass(frozen=True)
class Speeds:
    """Microseconds for one head size and group: at every point that was measured, of the kernels that were measured at all."""

    head_dim: int
    group: int
    times: Mapping[Point, Mapping[str, float]]

    @staticmethod
    def of(points: Iterable[Point], dim: int, group: int, times_at: Mapping[Key, Mapping[str, float]]) -> Speeds:
        """What a table holds for exactly these sizes."""
        keys = {point: (point.phase, dim, group, point.sequences, point.length) for point in points}
        found = {point: times_at[key] for point, key in keys.items() if times_at.get(key)}
        everywhere = [name for name in next(iter(found.values()), ()) if all(name in times for times in found.values())]
        return Speeds(dim, group, {point: {name: times[name] for name in everywhere} for point, times in found.items()})

    def mean(self, kernel: str) -> float | None:
        """Over the mix; of several kernels, each counts where it serves. None where one was not measured."""
        parts = parts_of(kernel)
        if len(self._measured(parts)) < len(parts):
            return None
        return _mean((times[self.fastest(parts, point.shape)], point.weight) for point, times in self.times.items())

    def best(self, kernels: Sequence[str]) -> str:
        """The fastest over the mix; among those as good as it, the first. An unmeasured one only where none was measured."""
        means = {name: mean for name in kernels if (mean := self.mean(name)) is not None}
        return _first(kernels, means)

    def several(self, kernels: Sequence[str]) -> tuple[str, ...]:
        """The best over the mix, and every kernel that in some steps is faster by `WORTH` than all before it."""
        taken, shapes = [self.best(kernels)], tuple(self._by_shape)
        others = set(self._measured(kernels))
        while others := others - set(taken):
            gains = {name: max(self._faster(name, taken, shape) for shape in shapes) for name in sorted(others)}
            name = max(gains, key=gains.__getitem__)
            if gains[name] < WORTH:
                break
            taken.append(name)
        serving = {self.fastest(taken, shape) for shape in shapes}
        return tuple(name for name in taken if name in serving) or (taken[0],)

    def fastest(self, kernels: Sequence[str], shape: Shape) -> str:
        """The kernel for a step: the first of those as fast as the fastest at the points nearest to it."""
        return _first(kernels, self._near(kernels, shape))

    def against(self, other: str, taken: str) -> str | None:
        """Why the one is passed over for the other; None where both were not measured."""
        mean, least = self.mean(other), self.mean(taken)
        if mean is None or least is None:
            return None
        at = f"at head size {self.head_dim}, group {self.group}"
        if mean <= least * AS_GOOD:
            return f"could; measured no faster than {taken!r} {at}, which comes first"
        return f"could; {taken!r} measured {mean / least:.2f}x faster {at}"

    def words(self, kernels: Sequence[str]) -> str:
        """Which steps each of several kernels serves."""
        shapes = sorted(self._by_shape, key=lambda shape: (shape.room, shape.sequences, shape.tokens))
        out = []
        for name in kernels[1:]:
            served = [shape for shape in shapes if self.fastest(kernels, shape) == name]
            out.append(f"{name} where it measured faster: steps nearest to {_listed(served)}" if served else f"{name} in no step")
        return "; ".join([*out, f"{kernels[0]} in all others"])

    def _measured(self, kernels: Sequence[str]) -> list[str]:
        times = next(iter(self.times.values()), {})
        return [name for name in kernels if name in times]

    @functools.cached_property
    def _by_shape(self) -> dict[Shape, dict[str, float]]:
        """Means over the points that shapes do not tell apart: in a table of 1024 tokens lengths may be 300 or 1024."""
        alike: dict[Shape, list[Mapping[str, float]]] = {}
        for point, times in self.times.items():
            alike.setdefault(point.shape, []).append(times)
        return {shape: {name: _mean((times[name], 1) for times in all_) for name in all_[0]} for shape, all_ in alike.items()}

    def _near(self, kernels: Sequence[str], shape: Shape) -> dict[str, float]:
        """By kernel, the mean time at the nearest of the measured shapes; none where nothing measured is like this step."""
        near = [self._by_shape[shape]] if shape in self._by_shape else self._nearest(shape)
        return {name: _mean((times[name], 1) for times in near) for name in self._measured(kernels)} if near else {}

    def _nearest(self, shape: Shape) -> list[dict[str, float]]:
        apart = {each: _apart(each, shape) for each in self._by_shape}
        least = min(apart.values(), default=math.inf)
        return [] if math.isinf(least) else [self._by_shape[each] for each, far in apart.items() if far < least + 1e-6]

    def _faster(self, name: str, taken: Sequence[str], shape: Shape) -> float:
        times = self._near([name, *taken], shape)
        return min((times[each] for each in taken if each in times), default=0.0) / times[name]


def speeds(request: Request) -> Speeds | None:
    """None where the measurements say nothing: they are of plain attention in half precision on a GPU."""
    spec, paged = request.spec, request.page_size is not None
    masks = (Causal, Bidirectional, Window) if paged else (Causal, Bidirectional)  # a window costs SDPA a mask in memory
    if not isinstance(spec.mask, masks) or spec.bias is not None or spec.score is not None or request.device.type != "cuda":
        return None
    if request.dtype not in (torch.bfloat16, torch.float16) or request.kv_dtype not in (None, request.dtype):
        return None
    return nearest(spec, paged)


def parts_of(kernel: str) -> tuple[str, ...]:
    """The names in a kernel's name: one, or of several those that share the steps (`by_step.ByStep`)."""
    return tuple(kernel.lower().split(BETWEEN))


def nearest(spec: AttentionSpec, paged: bool = True) -> Speeds | None:
    """Of the nearest head size and group that were measured."""
    points = PAGED if paged else STATELESS
    group, phases = spec.num_q_heads / spec.num_kv_heads, {point.phase for point in points}
    sizes = sorted({key[1:3] for key in measured.MICROSECONDS if key[0] in phases})
    if not sizes:
        return None
    dim, near = min(sizes, key=lambda size: abs(math.log2(size[0] / spec.head_dim)) + abs(math.log2(size[1] / group)))
    return Speeds.of(points, dim, near, measured.MICROSECONDS)


def _first(kernels: Sequence[str], times: Mapping[str, float]) -> str:
    """The first of those as good as the fastest; the first of all where none was measured."""
    least = min(times.values(), default=math.inf)
    return next((name for name in kernels if times.get(name, math.inf) <= least * AS_GOOD), kernels[0])


def _mean(times: Iterable[tuple[float, int]]) -> float:
    """Geometric, of (time, weight)."""
    weighted = [(math.log(time) * weight, weight) for time, weight in times]
    return math.exp(sum(log for log, _ in weighted) / sum(weight for _, weight in weighted))


def _apart(a: Shape, b: Shape) -> float:
    """How many doublings of the sequences, of the tokens of each, and of the table lead from one to the other.

    Those of the table count twice: long sequences tell kernels apart more than many do. A step of one token a sequence is computed
    in another way than all others: nothing leads to it.
    """
    if (a.tokens == a.sequences) != (b.tokens == b.sequences):
        return math.inf
    tokens, sequences, room = (math.log2(max(1, one) / max(1, other)) for one, other in zip(a, b, strict=True))
    return abs(sequences) + abs(tokens - sequences) + 2 * abs(room)


def _listed(shapes: Sequence[Shape]) -> str:
    """Steps in words, those that differ in the number of sequences alone together."""
    alike: dict[str, list[str]] = {}
    for tokens, sequences, room in shapes:
        kind = "decodes of" if tokens == sequences else f"{tokens} new tokens in"
        alike.setdefault(f"{kind} %s in tables of {room} tokens", []).append(str(sequences))
    out = []
    for words, numbers in alike.items():
        *most, last = numbers
        count = f"{', '.join(most)} or {last}" if most else last
        out.append(words % f"{count} sequence{'' if count == '1' else 's'}")
    return ", ".join(out)

"""Which of several kernels serves a step?

How long sequences are is known on the device alone, but the shapes of a step are known to the host, and fixed where a CUDA graph
holds it. They decide (`kernels/speeds.py`), and say the same before the step, in its plan and in all its layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from compile_attn.kernels import speeds
from compile_attn.kernels.backend import Backend, DeviceStep, HostStep, Paged, PlannedSite, Request, Shape, plan_size, planners
from compile_attn.kernels.spec import AttentionSpec


class ByStep(Backend):
    """Several kernels under one name, in order of preference. Each step is served by one of them, and planned by no other."""

    phases = frozenset({"paged"})

    def __init__(self, parts: Sequence[Backend]) -> None:
        self.parts = {part.name: part for part in parts}
        if len(self.parts) < len(parts):
            raise ValueError(f"kernel {speeds.BETWEEN.join(part.name for part in parts)!r} names one twice; name each once")
        self.name = speeds.BETWEEN.join(self.parts)
        self.features = frozenset.intersection(*(part.features for part in parts))
        self.plan_numbers = max(part.plan_numbers for part in parts)

    def reasons(self, request: Request) -> tuple[str, ...]:
        """What is against any of the parts: whichever is chosen must be able to."""
        if request.page_size is None:
            return ("chooses by the shapes of a paged step, and a stateless call is none; name one kernel",)
        against = {name: part.reasons(request) for name, part in self.parts.items()}
        return tuple(f"is {name!r} in some steps, which {why}" for name, reasons in against.items() for why in reasons)

    def serving(self, spec: AttentionSpec, shape: Shape) -> Backend:
        return self.parts[_fastest(self.name, *_told_apart(spec), *shape)]

    def plan_on_host(self, step: HostStep, sites: Sequence[PlannedSite]) -> None:
        for part, its in planners([(self, site) for site in sites], step.shape).items():
            part.plan_on_host(step, its)

    def drop_plans(self, block_table: torch.Tensor) -> None:
        """Of whichever part made them."""
        for part in self.parts.values():
            part.drop_plans(block_table)

    def planned(self, spec: AttentionSpec) -> AttentionSpec | None:
        """What the parts that plan have in common, as long as it chooses the same part as the spec itself."""
        shared = {made for part in self.parts.values() if (made := part.planned(spec)) is not None}
        if not shared:
            return None
        made = shared.pop()
        return spec if shared or _told_apart(made) != _told_apart(spec) else made

    def plan(self, step: DeviceStep, spec: AttentionSpec) -> torch.Tensor:
        """The chosen part's; memory that nobody reads where that part makes none."""
        part, size = self.serving(spec, step.shape), plan_size(step.block_table.shape[0], self.plan_numbers)
        its = part.planned(spec)
        if its is None:
            return torch.empty(size, dtype=torch.int32, device=step.token_seq.device)
        made = part.plan(step, its)
        return made if made.shape[0] == size else torch.nn.functional.pad(made, (0, size - made.shape[0]))

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        (sequences, width), page_size = kv.block_table.shape, kv.k_pages.shape[1]
        return self.serving(spec, Shape(q.shape[0], sequences, width * page_size)).attend(q, kv, captured, spec)

    def words(self, spec: AttentionSpec) -> str:
        """Which steps each part serves."""
        names, known, window = tuple(self.parts), speeds.nearest(spec), spec.mask.window()
        if known is None:
            return f"{names[0]} in all steps, as nothing was measured"
        return known.words(names) + ("" if window is None else f"; tables count for the {window + 1} keys that a query sees")


def _told_apart(spec: AttentionSpec) -> tuple[int, int, int, int | None]:
    """All of a spec that the choice depends on."""
    return spec.num_q_heads, spec.num_kv_heads, spec.head_dim, spec.mask.window()


@functools.lru_cache(maxsize=4096)
def _fastest(
    kernels: str,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None,
    tokens: int,
    sequences: int,
    room: int,
) -> str:
    """A table counts for no more than a window lets a query see of it."""
    names, known = speeds.parts_of(kernels), _known(num_q_heads, num_kv_heads, head_dim)
    seen = room if window is None else min(room, window + 1)
    return names[0] if known is None else known.fastest(names, Shape(tokens, sequences, seen))


@functools.lru_cache(maxsize=64)
def _known(num_q_heads: int, num_kv_heads: int, head_dim: int) -> speeds.Speeds | None:
    return speeds.nearest(AttentionSpec(num_q_heads, num_kv_heads, head_dim, head_dim))


def forget() -> None:
    """What was chosen is chosen anew: for who has changed what was measured."""
    _fastest.cache_clear()
    _known.cache_clear()

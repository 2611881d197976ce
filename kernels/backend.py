"""What must a kernel backend say of itself, and what must it compute?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compile_attn.kernels.spec import AttentionSpec, Feature


@dataclass(frozen=True)
class Request:
    """What a site asks of a kernel. `page_size` is None for a stateless call."""

    spec: AttentionSpec
    device: torch.device
    dtype: torch.dtype
    page_size: int | None


@dataclass(frozen=True)
class Paged:
    """Where the keys and values of `attend` are. Shapes and dtypes as in the op `paged_attn::attend`."""

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    positions: torch.Tensor
    token_seq: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class Backend:
    """One provider of kernels. Meaning it does not declare is refused, with a reason (Law 4)."""

    name: str
    features: frozenset[Feature]
    phases: frozenset[str] = frozenset({"stateless", "paged"})

    def limits(self, request: Request) -> tuple[str, ...]:
        """Reasons beyond features: shapes, dtypes, devices, a library that is not installed. Empty: none."""
        return ()

    def reasons(self, request: Request) -> tuple[str, ...]:
        """Why this backend cannot serve the request; empty when it can."""
        phase = "stateless" if request.page_size is None else "paged"
        missing = sorted(feature.name.lower() for feature in request.spec.features() - self.features)
        reasons = [f"does not serve {phase} calls"] if phase not in self.phases else []
        reasons += [f"does not compute {', '.join(missing)}; choose kernel='auto'"] if missing else []
        return (*reasons, *self.limits(request))

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, captured: Sequence[torch.Tensor], spec: AttentionSpec
    ) -> torch.Tensor:
        """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] -> [B, Hq, Tq, Dv]; i and j count rows from 0."""
        raise NotImplementedError(f"{self.name} does not serve stateless calls")

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        """q [T, Hq, D] -> [T, Hq, Dv]; pad tokens give 0."""
        raise NotImplementedError(f"{self.name} does not serve paged calls")

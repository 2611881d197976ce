"""Which kernel serves a spec that no library knows?"""

from __future__ import annotations

from compile_attn.kernels.triton_launch import TritonBackend


class GeneralBackend(TritonBackend):
    """Serves every spec."""

    name = "general"

"""How fast was each kernel? Written by `python -m bench.speeds`, not by hand."""

from __future__ import annotations

WHERE = ""  # on what, with which versions, and when
# phase, head size, query heads a KV head, sequences, length: microseconds by kernel
MICROSECONDS: dict[tuple[str, int, int, int, int], dict[str, float]] = {}

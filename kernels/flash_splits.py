"""Among how many programs should FlashAttention divide the keys of a long sequence?

The number is a bound that follows from shapes: how many really share a sequence is decided on the device, by the lengths. But that
they may costs a second kernel, and a first one that is some percent slower. So where the host has said what is coming, a step
whose sequences keep the device busy undivided is not told to divide them. See bench/flash_splits.py, and what the library's own
ways take in bench/results/attend.json.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from compile_attn.kernels.mask import Bidirectional
from compile_attn.kernels.spec import AttentionSpec

_MOST = 128
_KEYS = 512  # of a part, at least: with fewer, writing and combining the parts costs as much as reading the keys
_DECODED = 32  # parts of few tokens, of which that is not so: this bound was as fast as any smaller one, or faster
_PARTS = 128 << 20  # bytes that the float32 parts of a call may take
_TILE = 128  # queries, of all heads that share a KV head; and keys that are read at a time
_MOST_ROWS = 992  # that the scheduler divides; more fill a device by themselves


def even(spec: AttentionSpec, queries: Any, keys: Any, multiprocessors: int) -> bool:
    """Does no sequence keep a program busy much longer than its share of all? By int arrays [B] of new tokens and of all."""
    real = queries > 0
    queries, keys = (each[real].astype(np.int64) for each in (queries, keys))
    if not len(keys):
        return False
    window = spec.mask.window()
    seen = keys if window is None else np.minimum(keys, window + queries)
    tiles = -(-queries * (spec.num_q_heads // spec.num_kv_heads) // _TILE)
    # Of a causal prefill the first queries see few keys, so that its tiles have half of the keys on average.
    average = seen if isinstance(spec.mask, Bidirectional) else seen - np.minimum(queries, seen) / 2
    work = float((tiles * average).sum()) * spec.num_kv_heads
    return bool(int(seen.max()) * multiprocessors <= 1.3 * work)


def splits(spec: AttentionSpec, tokens: int, sequences: int, most_keys: int, multiprocessors: int, even: bool) -> int:
    """Most programs that may share one tile. A long sequence among short ones may have them all."""
    if even or sequences >= _MOST_ROWS:
        return 1
    window = spec.mask.window()
    keys = most_keys if window is None else min(most_keys, window + 1)
    share = -(-10 * multiprocessors // (11 * spec.num_kv_heads))  # the scheduler leaves a tenth free, and asks no more
    memory = _PARTS // max(1, tokens * spec.num_q_heads * spec.head_dim_v * 4)
    few = sequences * spec.num_kv_heads <= multiprocessors // 2
    wanted = min(share, keys // (_KEYS if few else 2 * _KEYS))
    if few and tokens == sequences and wanted > 1:
        # The scheduler asks for no more parts than a sequence has blocks of keys, but does not know of windows.
        wanted = max(share, _DECODED) if window is None else min(share, keys // _TILE)
    return max(1, min(_MOST, memory, wanted))

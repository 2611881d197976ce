"""Are keys divided where a few programs would keep the others waiting, and not where that only costs?"""

from __future__ import annotations

import numpy as np
import pytest

from compile_attn.kernels import flash_splits
from compile_attn.kernels import mask as m
from compile_attn.kernels.spec import AttentionSpec

PLAIN, WINDOW = AttentionSpec(32, 8, 128, 128), AttentionSpec(32, 8, 128, 128, m.Window(1023))


@pytest.mark.parametrize(
    ("tokens", "sequences", "keys", "spec", "wanted"),
    [
        (32, 32, 131_072, PLAIN, 15),  # a KV head has a share of the device
        (8, 8, 131_072, AttentionSpec(16, 1, 128, 128), 120),
        (8, 8, 131_072, WINDOW, 8),  # as many parts as a query sees blocks of keys
        (8, 8, 131_072, AttentionSpec(32, 8, 128, 128, m.Window(127)), 1),
        (9, 8, 131_072, PLAIN, 15),  # no decode
        (9, 8, 1_024, PLAIN, 2),
        (8, 8, 1_023, PLAIN, 1),
        (512, 2, 131_072, AttentionSpec(32, 1, 128, 128), 16),
        (32, 32, 4_096, PLAIN, 4),
        (8, 8, 1_000, PLAIN, 1),
        (512, 512, 131_072, AttentionSpec(32, 4, 128, 128), 16),  # by the memory that parts take
        (8192, 4, 131_072, PLAIN, 1),
        (1000, 1000, 131_072, PLAIN, 1),
    ],
)
def test_splits(tokens: int, sequences: int, keys: int, spec: AttentionSpec, wanted: int) -> None:
    assert flash_splits.splits(spec, tokens, sequences, keys, 132, even=False) == wanted
    assert flash_splits.splits(spec, tokens, sequences, keys, 132, even=True) == 1


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("keys", "wanted"),
    [(256, (1, 1, 1, 1)), (1_024, (32, 32, 1, 1)), (16_384, (32, 32, 15, 15)), (65_536, (32, 32, 15, 15))],
    ids=["128 keys", "1024 keys", "8192 keys", "32768 keys"],
)
def test_decodes_as_the_library_is_fastest(keys: int, wanted: tuple[int, ...], dim: int) -> None:
    """In the tables that a cache makes for them: what each row of bench/results/attend.json says of the library's own ways."""
    spec = AttentionSpec(32, 8, dim, dim)
    assert tuple(flash_splits.splits(spec, rows, rows, keys, 132, even=False) for rows in (1, 8, 32, 128)) == wanted


def is_even(spec: AttentionSpec, rows: list[tuple[int, int]]) -> bool:
    """By (context, new) tokens."""
    before, new = (np.array(each, dtype=np.int32) for each in zip(*rows, strict=True))
    return flash_splits.even(spec, new, before + new, 132)


@pytest.mark.parametrize(
    ("rows", "even"),
    [  # as measured on an H200, in bench/flash_splits.py
        ([(8191, 1)], False),
        ([(8191, 1)] * 8, False),
        ([(1023, 1)] * 8, False),
        ([(1023, 1)] * 32, True),
        ([(4095, 1)] * 32, True),
        ([(32_000, 1)] + [(200, 1)] * 63, False),
        ([(0, 2048)], True),
        ([(0, 128)] * 16, True),
        ([(16_000, 512)], True),
        ([(2000, 1)] * 64 + [(0, 512)], True),
        ([(32_000, 1), (0, 2048)], False),
        ([(8000, 1)] * 8 + [(0, 512)], False),
    ],
    ids=lambda value: f"{len(value)} rows, {value[0]}" if isinstance(value, list) else None,
)
def test_even_steps_are_not_divided(rows: list[tuple[int, int]], even: bool) -> None:
    assert is_even(PLAIN, rows) == even


def test_a_window_bounds_what_a_long_sequence_takes() -> None:
    rows = [(100_000, 1)] + [(900, 1)] * 63
    assert not is_even(PLAIN, rows)
    assert is_even(WINDOW, rows)


def test_nothing_is_not_even() -> None:
    assert not is_even(PLAIN, [(9, 0), (0, 0)])

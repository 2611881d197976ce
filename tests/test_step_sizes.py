"""Is every step padded to a size of which there is a graph, and to none that is much larger?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compile_attn.step_sizes import decode_size, mixed_size, mixed_sizes, token_steps, with_logits, worth_recording

COUNTS = st.integers(1, 600)


@pytest.mark.parametrize(
    ("rows", "tokens", "most_rows", "most", "size"),
    [
        (1, 2, 8, 256, (2, 16)), (2, 16, 8, 256, (2, 16)), (2, 17, 8, 256, (2, 32)), (3, 3, 8, 256, (8, 16)),
        (8, 200, 8, 256, (8, 256)), (8, 257, 8, 256, None), (3, 3, 300, 256, (16, 32)), (16, 130, 300, 256, (16, 256)),
        (17, 20, 300, 256, (128, 256)), (128, 256, 300, 256, (128, 256)), (129, 200, 300, 256, None),
        (2, 65, 300, 100, (2, 100)), (2, 101, 300, 100, None), (17, 99, 300, 100, None),
        (1, 257, 256, 1024, (256, 384)), (129, 200, 256, 1024, (256, 384)), (129, 200, 384, 1024, (384, 512)),
        (255, 385, 256, 1024, (256, 512)), (200, 1000, 256, 1024, (256, 1024)), (200, 1025, 256, 1024, None),
        (9, 600, 256, 640, (256, 640)), (9, 630, 256, 632, (256, 632)), (300, 900, 2048, 1024, (512, 1024)),
        (513, 900, 2048, 1024, None), (1, 2, 2, 2, None), (1, 2, 2, 3, (2, 3)),
    ],
)  # fmt: skip
def test_sizes(rows: int, tokens: int, most_rows: int, most: int, size: tuple[int, int] | None) -> None:
    assert mixed_size(rows, tokens, most_rows, most) == size


@given(COUNTS, COUNTS, st.integers(2, 600), st.integers(1, 1100))
def test_a_step_fits_its_size(rows: int, more: int, most_rows: int, most: int) -> None:
    """And a step of that very size has the same one, or it would be recorded twice."""
    size = mixed_size(rows, rows + more, most_rows, most)
    if size is None:
        assert rows + more > most or rows > min(most_rows, 512) or most <= min(most_rows, 512)
        return
    assert rows <= size[0] <= most_rows and size[0] < size[1] <= most and rows + more <= size[1]
    assert size[1] <= 256 or size[1] < max(rows + more, size[0] + 1) + 128, "few pad tokens where they cost"
    assert mixed_size(*size, most_rows, most) == size


@given(st.integers(1, 40), st.integers(1, 500), st.integers(2, 40), st.integers(1, 1100))
def test_all_sizes_that_steps_ask_for(rows: int, tokens: int, most_rows: int, most: int) -> None:
    rows = min(rows, most_rows)
    steps = (1, 16, 17, 33, 65, 129, 257, 385, 700, most)
    counts = [(count, max(count, new)) for count in range(1, rows + 1) for new in steps if max(count, new) <= count * tokens]
    asked = {mixed_size(*count, most_rows, most) for count in counts} - {None}
    assert asked <= mixed_sizes(rows, tokens, most_rows, most)


def test_sizes_of_decodes() -> None:
    found = [decode_size(rows, 300) for rows in (1, 2, 3, 5, 8, 9, 17, 128, 129, 300)]
    assert found == [2, 2, 4, 8, 8, 16, 32, 128, 160, 300] and decode_size(7, 7) == 7


def test_logits_of_each_token() -> None:
    assert with_logits((16, 64), False) == (16, 64, 16) and with_logits((16, 64), True) == (16, 64, 64)
    assert with_logits((256, 384), True) is None, "384 rows of logits take more memory than drafts are worth"


def test_steps_ascend_to_the_most() -> None:
    assert token_steps(20) == [16, 20] and token_steps(256) == [16, 32, 64, 128, 256]
    assert token_steps(600) == [16, 32, 64, 128, 256, 384, 512, 600]


def of(parameters: int) -> nn.Module:
    return nn.Embedding(parameters >> 10, 1 << 10, device="meta")


def test_up_to_how_many_tokens() -> None:
    """Of 8 billion parameters, 3, 1.2, and of a model whose products take no time."""
    found = [
        worth_recording(of(int(billions * 1e9)), layers) for billions, layers in ((8.03, 32), (3.21, 28), (1.24, 16), (1e-3, 2))
    ]
    assert found == [256, 768, 1024, 1024]

"""Do rows cover every token, with the keys that its sequence has, by torch and by Triton alike?"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_attn.kernels import flash_rows
from compile_attn.kernels.flash_rows import Rows
from compile_attn.kernels.metadata import AttentionMetadata
from tests.test_general import interpreted


def batch(sequences: list[tuple[int, int]], tokens: int, device: str = "cpu") -> AttentionMetadata:
    table = torch.zeros((len(sequences), 9), dtype=torch.int32)
    lengths = torch.tensor([context + new for context, new in sequences], dtype=torch.int32)
    news = torch.tensor([new for _, new in sequences], dtype=torch.int32)
    return AttentionMetadata.build(*(each.to(device) for each in (table, lengths, news)), tokens, 16)


def rows_of(sequences: list[tuple[int, int]], pads: int, causal: bool = True, device: str = "cpu") -> Rows:
    tokens = sum(new for _, new in sequences) + pads
    return flash_rows.read(flash_rows.build(batch(sequences, tokens, device), causal), tokens, len(sequences))


def lists(rows: Rows) -> tuple[list[int], list[int], list[int], int]:
    assert not rows.zeros.any()
    assert rows.zeros.shape == rows.lengths.shape
    return rows.starts.tolist(), rows.lengths.tolist(), rows.of_table.tolist(), rows.most_queries


def test_a_decode_has_a_row_a_token() -> None:
    assert lists(rows_of([(9, 1), (0, 0), (4, 1)], 1)) == ([0, 1, 2, 3], [10, 5, 0], [0, 2, 2], 1)


def test_so_has_any_batch_of_as_many_tokens_as_sequences() -> None:
    """Two drafts for one of them, of which the first must not see the second."""
    assert lists(rows_of([(9, 2), (4, 0)], 0)) == ([0, 1, 2], [10, 11], [0, 0], 1)
    assert lists(rows_of([(9, 2), (4, 0)], 0, causal=False)) == ([0, 1, 2], [11, 11], [0, 0], 1)


def test_other_batches_keep_their_rows_and_pads_are_one_more() -> None:
    assert lists(rows_of([(9, 4), (0, 0), (5, 1)], 2)) == ([0, 4, 4, 5, 7], [13, 0, 6, 0], [0, 1, 2, 0], 7)
    assert lists(rows_of([(9, 4), (5, 1)], 0)) == ([0, 4, 5, 5], [13, 6, 0], [0, 1, 0], 5)


SEQUENCES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), min_size=1, max_size=9)


@given(SEQUENCES, st.integers(0, 9), st.booleans())
def test_every_token_stands_in_one_row_at_its_position(sequences: list[tuple[int, int]], pads: int, causal: bool) -> None:
    tokens = sum(new for _, new in sequences) + pads
    at = batch(sequences, tokens)
    starts, lengths, of_table, most_queries = lists(rows_of(sequences, pads, causal))
    assert (starts[0], starts[-1]) == (0, tokens)
    for row, length in enumerate(lengths):
        assert 0 <= starts[row + 1] - starts[row] <= most_queries
        for token in range(starts[row], starts[row + 1]):
            if token >= at.cu_seqlens_q[-1]:
                assert length == 0
                continue
            assert of_table[row] == at.token_seq[token]
            after = starts[row + 1] - 1 - token
            assert at.positions[token] + 1 + after <= length <= at.seq_lens[of_table[row]]
            assert not causal or length - after == at.positions[token] + 1


def check_triton(sequences: list[tuple[int, int]], pads: int, causal: bool, device: str) -> None:
    from compile_attn.kernels.flash_rows_triton import build_rows

    tokens = sum(new for _, new in sequences) + pads
    at, size = batch(sequences, tokens, device), flash_rows.part(len(sequences))
    out = torch.full((4 * size,), -9, dtype=torch.int32, device=device)
    build_rows(at, causal, out, size)
    assert lists(flash_rows.read(out, tokens, len(sequences))) == lists(rows_of(sequences, pads, causal))


@interpreted
@settings(max_examples=40, deadline=None)
@given(SEQUENCES, st.integers(0, 9), st.booleans())
def test_triton_builds_the_same(sequences: list[tuple[int, int]], pads: int, causal: bool) -> None:
    check_triton(sequences, pads, causal, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sequences", [[(9, 1), (0, 0), (4, 1)], [(7, 3)] * 200, [(100, 1)] * 511, [(1, 0), (5, 2)]], ids=len)
def test_triton_builds_the_same_on_a_gpu(sequences: list[tuple[int, int]], causal: bool) -> None:
    for pads in (0, 1, 300):
        check_triton(sequences, pads, causal, "cuda")

"""Which token ids are accepted, and in which types?"""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from compile_attn.step import Chunk, token_array


@pytest.mark.parametrize(
    "given",
    [
        [3, 1],
        (3, 1),
        torch.tensor([3, 1]),
        torch.tensor([3, 1], dtype=torch.int32),
        np.array([3, 1]),
        array("i", [3, 1]),
    ],
)
def test_vectors_of_whole_numbers(given: object) -> None:
    got = token_array(given)  # type: ignore[arg-type]
    assert got.dtype == np.int64 and got.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "no token ids"),
        (torch.tensor([], dtype=torch.int64), "no token ids"),
        ([1.5, 2.0], "type float64; they must be whole"),
        ([True, False], "type bool"),
        (["a"], "whole numbers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (torch.tensor(3), r"shape \(\)"),
        ([4, -1], "token id -1 is negative"),
    ],
)
def test_anything_else_is_refused(given: object, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        token_array(given)  # type: ignore[arg-type]


def test_a_chunk_says_which_logits() -> None:
    with pytest.raises(ValueError, match="logits='some'; choose one of 'last', 'all', 'none'"):
        Chunk(None, [1], "some")  # type: ignore[arg-type]

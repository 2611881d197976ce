"""Which token ids are accepted, in which types, and which pages does the device's block table show?"""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import torch

from compile_attn.step import Chunk, StepBuffers, token_array


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


class Shown:
    """A block table of two rows of four pages."""

    def __init__(self) -> None:
        self.buffers = StepBuffers(2, 4, 64, torch.device("cpu"))
        self.sent: list[int] = []
        put = self.buffers._put
        self.buffers._put = lambda width, places, pages: self.sent.append(len(places)) or put(width, places, pages)  # type: ignore[method-assign, func-returns-value]

    def after(self, *rows: array[int]) -> list[list[int]]:
        self.buffers.write_table(rows, 4)
        table: list[list[int]] = self.buffers._tables[4].on_device.tolist()
        return table


def test_a_row_that_grows_sends_its_new_pages_alone() -> None:
    shown, row = Shown(), array("i", [3, 1])
    assert shown.after(row) == [[3, 1, 0, 0], [0, 0, 0, 0]]
    row.append(7)
    assert shown.after(row) == [[3, 1, 7, 0], [0, 0, 0, 0]]
    assert shown.after(row) == [[3, 1, 7, 0], [0, 0, 0, 0]]
    row.append(2)
    shown.buffers.add_pages([0], 4)
    assert shown.after(row) == [[3, 1, 7, 2], [0, 0, 0, 0]] and shown.sent == [2, 1, 0, 1, 0]


def test_a_page_that_is_replaced_is_shown() -> None:
    """In an array of its own: see `step._Table`."""
    shown, row = Shown(), array("i", [3, 1])
    shown.after(row, array("i", [5]))
    assert shown.after(array("i", [3, 9]), array("i", [5])) == [[3, 9, 0, 0], [5, 0, 0, 0]]


def test_a_page_that_came_where_another_was_taken_off_is_shown() -> None:
    shown, row = Shown(), array("i", [3, 1, 4])
    shown.after(row)
    shorter = row[:1]
    shorter.extend([8, 6])
    assert shown.after(shorter) == [[3, 8, 6, 0], [0, 0, 0, 0]]
    assert shown.after(shorter[:1]) == [[3, 0, 0, 0], [0, 0, 0, 0]], "what a row shows no more is cleared"

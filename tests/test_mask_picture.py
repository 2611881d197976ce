"""Is the picture of a mask true to its predicate?"""

from __future__ import annotations

import re

import pytest
import sympy

from compile_attn.kernels import mask as m
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.passes.mask_picture import picture

CELLS = 32


def cells(svg: str, kind: str) -> set[tuple[int, int]]:
    """The (query, key) cells that a picture fills."""
    path = re.search(rf"<path class={kind} d='([^']*)'", svg)
    bars = re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z", path[1]) if path else []
    assert all(length == back for _, _, length, _, back in bars)
    return {
        (int(y) // int(height), x // int(height))
        for left, y, length, height, _ in bars
        for x in range(int(left), int(left) + int(length), int(height))
    }


@pytest.mark.parametrize(
    ("mask", "step"),
    [
        (m.Causal(), 1),
        (m.Bidirectional(), 1),
        (m.Window(5), 1),
        (m.Window(4095), 256),
        (m.Chunked(8), 1),
        (m.Prefix(6), 1),
        (m.BlockSparse(64, 2, 8), 64),
        (m.General(sympy.Le(J, I) & sympy.Eq(sympy.Mod(I - J, 3), 0)), 1),
    ],
    ids=lambda value: str(value),
)
def test_a_cell_is_filled_where_the_predicate_holds(mask: m.Mask, step: int) -> None:
    svg = picture(mask)
    holds = sympy.lambdify((B, H, I, J), mask.predicate(), "math")
    wanted = {(i, j) for i in range(CELLS) for j in range(CELLS) if holds(0, 0, i * step, j * step)}
    assert cells(svg, "seen") == wanted
    assert ("a cell is a position" if step == 1 else f"a cell stands for {step} positions") in svg
    assert "pale" not in svg


def test_what_a_tensor_decides_is_pale() -> None:
    svg = picture(m.All(m.Causal(), m.SameDocument(0)))
    assert cells(svg, "maybe") == {(i, j) for i in range(CELLS) for j in range(i + 1)}
    assert not cells(svg, "seen") and "pale: a tensor decides" in svg
    padded = m.General(sympy.Le(J, I) & (sympy.Eq(I, J) | sympy.Ne(Load(0, B, J), 0)))
    assert cells(picture(padded), "seen") == {(i, i) for i in range(CELLS)}

"""Is a guard on the length read as the bound that it is?"""

from __future__ import annotations

import pytest
import sympy

from compile_attn.passes.bounds import NotABound, exception, upper_bound

T, R = sympy.symbols("T R", integer=True, positive=True)


@pytest.mark.parametrize(
    ("condition", "bound"),
    [
        (T < 8, 7),
        (T <= 8, 8),
        (3 * T < 1000, 333),
        (14336 * T <= 2**31 - 1, 149796),
        (sympy.Not(T >= 131), 130),
        (T >= 2, None),
        (sympy.Ne(T, 1), None),
        (sympy.Ge(T + 5, 3), None),
    ],
)
def test_bound(condition: sympy.Basic, bound: int | None) -> None:
    assert upper_bound(condition, T) == bound


@pytest.mark.parametrize("condition", [sympy.Eq(T, 67), T > 2, sympy.Ne(T, 64), sympy.Eq(sympy.Mod(T, 2), 0), T < R, R < 8])
def test_what_is_no_bound(condition: sympy.Basic) -> None:
    with pytest.raises(NotABound):
        upper_bound(condition, T)


@pytest.mark.parametrize(
    ("condition", "length"),
    [
        (sympy.Ne(T, 64), 64),
        (sympy.Ne(4 * T, 12), 3),
        (sympy.Ne(192, 32 * T), 6),
        (sympy.Ne(4 * T + 8, 20), 3),
        (sympy.Ne(T, 1), None),
        (sympy.Ne(4 * T, 13, evaluate=False), None),
    ],
)
def test_single_lengths(condition: sympy.Basic, length: int | None) -> None:
    assert exception(condition, T) == length
    failing = [n for n in range(2, 200) if not condition.subs(T, n)]
    assert failing == ([] if length is None else [length])


@pytest.mark.parametrize(
    "condition", [sympy.Ne(T, R), sympy.Ne(T**2, 16), sympy.Ne(sympy.Mod(T, 2), 0), sympy.Ne(sympy.floor(T / 3), 2), T < 8]
)
def test_what_is_no_single_length(condition: sympy.Basic) -> None:
    with pytest.raises(NotABound):
        exception(condition, T)

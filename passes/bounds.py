"""For which lengths does a condition on a size hold?"""

from __future__ import annotations

from typing import Any

import sympy

# Every length to 130, then doubling: lengths at which models branch are small multiples of a window, or powers of two.
_PROBES: list[int] = [*range(2, 131), *(2**power + extra for power in range(8, 41) for extra in (-1, 0, 1))]


class NotABound(ValueError):
    """The condition holds for some lengths only, and they are not all up to one."""


def exception(condition: Any, symbol: sympy.Symbol) -> int | None:
    """The one length of at least 2 for which `a * symbol + b != c` fails; None where it fails for none.

    Raises NotABound for any other condition.
    """
    if not isinstance(condition, sympy.Ne) or condition.free_symbols != {symbol}:
        raise NotABound(str(condition))
    difference = sympy.expand(condition.lhs - condition.rhs)
    slope = difference.coeff(symbol)
    rest = difference - slope * symbol
    if not slope.is_number or not rest.is_number or slope == 0:
        raise NotABound(str(condition))
    root = -rest / slope
    return int(root) if root.is_integer and root >= 2 else None


def upper_bound(condition: Any, symbol: sympy.Symbol) -> int | None:
    """The greatest length for which the condition holds; None where it holds for every one of at least 2.

    Raises NotABound for a condition that a shorter length fails, or that speaks of another symbol too.
    """
    if condition == sympy.true:
        return None
    if condition.free_symbols != {symbol}:
        raise NotABound(str(condition))
    holds = [bool(condition.subs(symbol, probe)) for probe in _PROBES]
    if all(holds):
        return None
    first = holds.index(False)
    if first == 0 or any(holds[first:]):
        raise NotABound(str(condition))
    low, high = _PROBES[first - 1], _PROBES[first]  # the bound is between them
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bool(condition.subs(symbol, middle)) else (low, middle)
    return low

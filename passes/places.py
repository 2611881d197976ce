"""How are the places of many equal entries written down, shortly and exactly?"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")  # a whole component of a module path


def places(modules: Iterable[str]) -> str:
    """`layers.[0-31].attn`: module paths that differ in their numbers together; `2 x` before those that come twice."""
    families: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for module, times in Counter(modules).items():
        numbers = tuple(map(int, NUMBER.findall(module)))
        families.setdefault((NUMBER.sub("{}", module) or "(the model itself)", times), []).append(numbers)
    return ", ".join(_family(name, times, numbers) for (name, times), numbers in families.items())


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs = itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def _family(name: str, times: int, numbers: Sequence[tuple[int, ...]]) -> str:
    """All combinations of some numbers as ranges; other paths one by one."""
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) == len(numbers):
        shown = [name.format(*(ranges(column) if len(column) == 1 else f"[{ranges(column)}]" for column in columns))]
    else:
        shown = [name.format(*path) for path in numbers]
    return ", ".join(one if times == 1 else f"{times} x {one}" for one in shown)

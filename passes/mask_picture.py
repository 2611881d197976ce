"""How does a mask look?"""

from __future__ import annotations

import html
import itertools
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational

from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.expr import Load
from compile_attn.kernels.mask import BlockSparse, Mask

_CELLS = 32  # a picture has 32 x 32 cells
_PIXELS = 6  # of that many pixels each


def picture(mask: Mask) -> str:
    """A figure with the mask for head 0 as an SVG: queries downwards, keys to the right. Pale where a tensor decides."""
    step = _step(mask)
    surely, perhaps = _cells(mask.predicate(), step)
    size = _CELLS * _PIXELS
    drawn = _path("seen", surely) + _path("maybe", perhaps & ~surely)
    label = html.escape(f"keys to the right, queries downwards: {mask.words()}")
    notes = ["a cell is a position" if step == 1 else f"a cell stands for {step} positions"]
    notes += ["pale: a tensor decides"] if bool((perhaps & ~surely).any()) else []
    notes += ["head 0"] if "h" in {symbol.name for symbol in mask.predicate().free_symbols} else []
    svg = f"<svg width={size} height={size} viewBox='0 0 {size} {size}' role=img aria-label='{label}'>{drawn}</svg>"
    return f"<figure>{svg}<figcaption>keys →, queries ↓; {'; '.join(notes)}</figcaption></figure>"


def _step(mask: Mask) -> int:
    """Positions a cell stands for: as many as show the longest reach of the mask twice."""
    if isinstance(mask, BlockSparse):
        return mask.block_size
    numbers = [int(number) for number in mask.predicate().atoms(sympy.Integer)]
    reach = max([mask.window() or 0, *map(abs, numbers)])
    return max(1, -(-2 * (reach + 1) // _CELLS))


def _cells(predicate: Any, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where keys are visible whatever the tensors hold, and where they are visible for some contents.

    Comparisons that read a tensor are taken for free truth values.
    """
    places = torch.arange(_CELLS) * step
    env = {"b": torch.tensor(0), "h": torch.tensor(0), "i": places[:, None], "j": places[None], "captured": []}
    atoms = [atom for atom in predicate.atoms(Relational) if atom.has(Load)]
    seen = []
    for values in itertools.product((sympy.true, sympy.false), repeat=min(len(atoms), 6)):
        known = predicate.xreplace(dict(zip(atoms, values, strict=False)))
        try:
            cells = torch.as_tensor(evaluator(known)(env)).expand(_CELLS, _CELLS)
        except IndexError:  # a tensor is read elsewhere than in a comparison: nothing is known
            return torch.zeros(_CELLS, _CELLS, dtype=torch.bool), torch.ones(_CELLS, _CELLS, dtype=torch.bool)
        seen.append(cells.bool())
    return torch.stack(seen).all(0), torch.stack(seen).any(0)


def _path(kind: str, cells: torch.Tensor) -> str:
    """The cells as one path: a bar for each run of a row."""
    bars = []
    for row, line in enumerate(cells.tolist()):
        place = 0
        for filled, run in itertools.groupby(line):
            length = len(list(run))
            if filled:
                bars.append(f"M{place * _PIXELS} {row * _PIXELS}h{length * _PIXELS}v{_PIXELS}h-{length * _PIXELS}z")
            place += length
    return f"<path class={kind} d='{''.join(bars)}'/>" if bars else ""

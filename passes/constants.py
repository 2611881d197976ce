"""Which function of its index is a buffer whose values are known?

A mask buffer such as a lower triangle becomes a predicate, by comparing every element; what fits no closed form stays a tensor.
"""

from __future__ import annotations

import sympy
import torch

from compile_attn.passes.indices import Index

_RUNS = 4  # a band with more edges than this is better left a tensor


def read_constant(tensor: torch.Tensor, index: Index) -> sympy.Basic | None:
    """The element of a known tensor as an expression, proven on every element; None where no closed form is found."""
    if tensor.is_meta or (isinstance(tensor, torch.nn.Parameter) and tensor.numel() > 64):
        return None  # a weight: never a closed form, and its values may be trained
    fixed = [place if place.is_Integer else None for place in index]
    part = tensor.detach()
    for dim in range(len(index) - 1, -1, -1):
        if fixed[dim] is not None:
            if not -part.shape[dim] <= int(index[dim]) < part.shape[dim]:
                return None
            part = part.select(dim, int(index[dim]))
    free = tuple(place for place in index if not place.is_Integer)
    if part.numel() == 0:
        return None
    first = part.flatten()[0]
    if bool((part == first).all()):
        return _value(first)
    if len(free) == 1:
        return _line(part, free[0])
    return _band(part, *free) if len(free) == 2 else None


def _value(element: torch.Tensor) -> sympy.Basic:
    value = element.item()
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, float):
        if value in (float("inf"), float("-inf")):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)
    return sympy.Integer(value)


def _line(part: torch.Tensor, place: sympy.Expr) -> sympy.Basic | None:
    """start + step * index, for integers."""
    if part.dtype == torch.bool or part.shape[0] < 3:
        return None
    start, step = part[0].item(), (part[1] - part[0]).item()
    line = start + step * torch.arange(part.shape[0], device=part.device, dtype=torch.float64)
    exact = float(start).is_integer() and float(step).is_integer() and bool((part.double() == line).all())
    return sympy.Integer(int(start)) + sympy.Integer(int(step)) * place if exact else None


def _band(part: torch.Tensor, row: sympy.Expr, column: sympy.Expr) -> sympy.Basic | None:
    """A matrix whose element depends on row - column alone and takes few values: a triangle, a window, a band."""
    rows, columns = part.shape
    difference = torch.arange(rows, device=part.device)[:, None] - torch.arange(columns, device=part.device)
    profile = torch.cat([part[0].flip(0), part[1:, 0]])  # by row - column, from -(columns - 1) to rows - 1
    if not bool((profile[difference + columns - 1] == part).all()):
        return None
    edges = (profile[1:] != profile[:-1]).nonzero()[:, 0].tolist()
    if len(edges) > _RUNS:
        return None
    values = [_value(profile[0]), *(_value(profile[edge + 1]) for edge in edges)]
    starts = [edge + 1 - (columns - 1) for edge in edges]  # the difference at which each later run begins
    if all(value in (sympy.true, sympy.false) for value in values):
        return _runs(values, starts, row - column)
    result = values[-1]
    pieces = [(value, sympy.Lt(row - column, start)) for value, start in zip(values, starts, strict=False)]
    return sympy.Piecewise(*pieces, (result, True))


def _runs(values: list[sympy.Basic], starts: list[int], difference: sympy.Expr) -> sympy.Basic:
    parts = []
    for number, value in enumerate(values):
        if value is sympy.true:
            low = sympy.Ge(difference, starts[number - 1]) if number else sympy.true
            high = sympy.Lt(difference, starts[number]) if number < len(starts) else sympy.true
            parts.append(sympy.And(low, high))
    return sympy.Or(*parts)


def is_affine(tensor: torch.Tensor) -> bool:
    """Whether every element is exactly first + (second - first) * place along the last axis, as in a table of ALiBi biases."""
    if isinstance(tensor, torch.nn.Parameter) or tensor.dim() < 2 or tensor.shape[-1] < 3 or not tensor.is_floating_point():
        return False
    exact = tensor.detach().double()
    place = torch.arange(tensor.shape[-1], dtype=torch.float64, device=tensor.device)
    line = exact[..., :1] + (exact[..., 1:2] - exact[..., :1]) * place
    return bool((line == exact).all())

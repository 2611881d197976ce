"""What do the ops mean that make tensors, index them, join them, or reduce over an axis?"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from compile_attn.kernels.expr import Load
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Index, argument, as_expr, broadcast, dim_of, shape_of
from compile_attn.passes.terms import Dot
from compile_attn.passes.values import boolean, cast, choose, constant, is_boolean, number


def _all(value: Any) -> Any:
    return lambda reader, node, index: _typed(node, value)


def _typed(node: fx.Node, value: Any) -> sympy.Basic:
    made = constant(value) if not isinstance(value, sympy.Basic) else value
    return boolean(made) if val(node).dtype == torch.bool else number(made)


def _full(place: int) -> Any:
    def rule(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
        return _typed(node, reader.at(argument(node, place, "fill_value"), ()))

    return rule


def _arange(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    numbers = [as_expr(a) for a in node.args if not isinstance(a, torch.dtype)]
    start = numbers[0] if len(numbers) > 1 else sympy.Integer(0)
    step = numbers[2] if len(numbers) > 2 else sympy.Integer(1)
    return start + step * index[0]


def _scalar(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    return _typed(node, reader.at(node.args[0], ()))


def _triangle(lower: bool) -> Any:
    def rule(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
        diagonal = as_expr(argument(node, 1, "diagonal", 0))
        difference = index[-1] - index[-2]
        inside = sympy.Le(difference, diagonal) if lower else sympy.Ge(difference, diagonal)
        value = reader.at(node.args[0], index)
        return choose(inside, value, sympy.false if is_boolean(value) else sympy.Integer(0))

    return rule


def _cat(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = dim_of(argument(node, 1, "dim", 0), len(index))
    start: sympy.Expr = sympy.Integer(0)
    pieces = []
    for part in parts:
        end = start + shape_of(part)[dim]
        place = (*index[:dim], index[dim] - start, *index[dim + 1 :])
        if reader.bounds.below(index[dim] - start, shape_of(part)[dim]):
            return reader.at(part, place)
        pieces.append((reader.at(part, place), sympy.Lt(index[dim], end)))
        start = end
    result = pieces[-1][0]
    for value, when in reversed(pieces[:-1]):
        result = choose(when, value, result)
    return result


def _stack(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    dim = dim_of(argument(node, 1, "dim", 0), len(index))
    rest = (*index[:dim], *index[dim + 1 :])
    if index[dim].is_Integer:
        return reader.at(parts[int(index[dim])], rest)
    raise NotImplementedError


def _index(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """x[i0, None, i1, ...] with index tensors: adjacent ones stand where the first stood, else in front."""
    source, places = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    if any(p is not None and val(p).dtype == torch.bool for p in places):
        raise NotImplementedError
    rank = val(source).dim()  # type: ignore[arg-type]
    places += [None] * (rank - len(places))
    given = [dim for dim, place in enumerate(places) if place is not None]
    width = len(index) - (rank - len(given))
    adjacent = given == list(range(given[0], given[-1] + 1))
    begin = given[0] if adjacent else 0
    inner = index[begin : begin + width]
    rest = iter((*index[:begin], *index[begin + width :]))
    shape = shape_of(source)  # type: ignore[arg-type]
    chosen = [next(rest) if p is None else _wrap(reader, reader.operand(p, inner), n) for p, n in zip(places, shape, strict=True)]
    return reader.at(source, tuple(chosen))


def _index_put(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """x[.., mask, ..] = number, with one mask of bools."""
    source, places, value = node.args[:3]
    masks = [(dim, place) for dim, place in enumerate(places) if place is not None]  # type: ignore[arg-type]
    if len(masks) != 1 or val(masks[0][1]).dtype != torch.bool or argument(node, 3, "accumulate", False):
        raise NotImplementedError
    ((dim, mask),) = masks
    if not is_tensor(value) or any(size != 1 for size in shape_of(value)):  # type: ignore[arg-type]
        raise NotImplementedError
    filled = reader.at(value, tuple(sympy.Integer(0) for _ in shape_of(value)))  # type: ignore[arg-type]
    return choose(boolean(reader.at(mask, index[dim : dim + val(mask).dim()])), filled, reader.at(source, index))


def _wrap(reader: Any, place: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """A negative index counts from the end."""
    least, most = _range(reader, place)
    if least is not None and least >= 0:
        return place
    if place.is_negative or (most is not None and most < 0):
        return place + size
    return sympy.Piecewise((place + size, sympy.Lt(place, 0)), (place, True))


def _range(reader: Any, place: sympy.Expr) -> tuple[sympy.Expr | None, sympy.Expr | None]:
    """The least and the greatest value that an index is sure to stay within; None where there is no bound."""
    if place.is_Integer:
        return place, place
    if isinstance(place, sympy.Add):
        ends = list(zip(*(_range(reader, part) for part in place.args), strict=True))
        return tuple(None if None in end else sympy.Add(*end) for end in ends)  # type: ignore[return-value]
    if isinstance(place, sympy.Mul) and place.args[0].is_Integer:
        factor, rest = place.as_coeff_Mul()
        bounds = [None if end is None else factor * end for end in _range(reader, rest)]
        return (bounds[0], bounds[1]) if factor > 0 else (bounds[1], bounds[0])
    if isinstance(place, (sympy.Max, sympy.Min)):
        lows, highs = zip(*(_range(reader, part) for part in place.args), strict=True)
        some, every = (lows, highs) if isinstance(place, sympy.Max) else (highs, lows)
        known = [end for end in some if end is not None]
        one = place.func(*known) if known else None
        all_ = None if None in every else place.func(*every)
        return (one, all_) if isinstance(place, sympy.Max) else (all_, one)
    leaf = reader.captured[int(place.args[0])] if isinstance(place, Load) else None
    table = reader.constants.get(leaf)
    if table is not None and table.numel():
        reader.read_constants.add(leaf)
        return sympy.Integer(int(table.min())), sympy.Integer(int(table.max()))
    return (sympy.Integer(0), None) if place.is_nonnegative else (None, None)


def _index_select(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    dim = dim_of(argument(node, 1, "dim"), len(index))
    place = reader.at(node.args[2], (index[dim],))
    return reader.at(node.args[0], (*index[:dim], place, *index[dim + 1 :]))


def _gather(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    dim = dim_of(argument(node, 1, "dim"), len(index))
    place = reader.at(node.args[2], index)
    return reader.at(node.args[0], (*index[:dim], place, *index[dim + 1 :]))


def _embedding(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    row = reader.at(node.args[1], index[:-1])
    return reader.at(node.args[0], (row, index[-1]))


def _diff(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """First difference of prepend ++ x; the element at place t is (prepend ++ x)[t + 1] - (prepend ++ x)[t]."""
    source, order = node.args[0], argument(node, 1, "n", 1)
    dim, prepend = dim_of(argument(node, 2, "dim", -1), len(index)), argument(node, 3, "prepend")
    if order != 1 or argument(node, 4, "append") is not None:
        raise NotImplementedError

    def move(by: int) -> Index:
        return (*index[:dim], index[dim] + by, *index[dim + 1 :])

    if prepend is None:
        return reader.at(source, move(1)) - reader.at(source, index)
    if shape_of(prepend)[dim] != 1:
        raise NotImplementedError
    first = (*index[:dim], sympy.Integer(0), *index[dim + 1 :])
    here = reader.at(source, index)
    before = sympy.Piecewise((reader.at(prepend, first), sympy.Eq(index[dim], 0)), (reader.at(source, move(-1)), True))
    difference = sympy.Piecewise(*((sympy.expand(here - part), when) for part, when in before.args))
    at_start = sympy.expand((here - reader.at(prepend, first)).subs(index[dim], 0)) if index[dim].is_Symbol else None
    later = sympy.expand(here - reader.at(source, move(-1)))
    return later if at_start == later else difference


def _cumsum(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """The running sum of something constant along the axis."""
    dim = dim_of(argument(node, 1, "dim"), len(index))
    step = sympy.Dummy("step", integer=True, nonnegative=True)
    value = number(reader.at(node.args[0], (*index[:dim], step, *index[dim + 1 :])))
    if value.has(step) or value.has(Dot):
        raise NotImplementedError
    return value * (index[dim] + 1)


def _row_reduction(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """A reduction: only that it is free of the axis it runs over is known."""
    return reader.opaque_at(node, index)


def _reduction(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    source = node.args[0]
    dims = argument(node, 1, "dim")
    if not is_tensor(source) or dims is None:
        raise NotImplementedError
    return _row_reduction(reader, node, index)


def _slice_scatter(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    base, source = node.args[0], node.args[1]
    dim = dim_of(argument(node, 2, "dim", 0), len(index))
    size = shape_of(base)[dim]  # type: ignore[arg-type]
    start = as_expr(argument(node, 3, "start", 0) or 0)
    start = start + size if start.is_negative else start
    if argument(node, 5, "step", 1) != 1:
        raise NotImplementedError
    length = shape_of(source)[dim]  # type: ignore[arg-type]
    place = (*index[:dim], index[dim] - start, *index[dim + 1 :])
    inside = sympy.And(sympy.Ge(index[dim], start), sympy.Lt(index[dim], start + length))
    if start == 0 and length == size:
        return reader.at(source, index)
    return choose(inside, reader.at(source, place), reader.at(base, index))


def _copy(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    source: fx.Node = node.args[1]  # type: ignore[assignment]
    return cast(reader.at(source, broadcast(index, source)), val(source).dtype, val(node).dtype)


def _pad(reader: Any, node: fx.Node, index: Index) -> sympy.Basic:
    """Constant padding of the last dims: pairs (before, after), last dim first."""
    source, widths = node.args[0], list(argument(node, 1, "pad"))
    fill = _typed(node, argument(node, 2, "value", 0) or 0)
    shape, place, inside = shape_of(source), list(index), sympy.true  # type: ignore[arg-type]
    for pair in range(len(widths) // 2):
        dim, before, after = len(index) - 1 - pair, as_expr(widths[2 * pair]), as_expr(widths[2 * pair + 1])
        place[dim] = place[dim] - before
        inside = inside if before == 0 or before.is_negative else sympy.And(inside, sympy.Ge(index[dim], before))
        inside = inside if after == 0 or after.is_negative else sympy.And(inside, sympy.Lt(index[dim], before + shape[dim]))
    return choose(inside, reader.at(source, tuple(place)), fill)


RULES: dict[str, Any] = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _all(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _all(1)),
    "full": _full(1),
    "full_like": _full(1),
    "new_full": _full(2),
    "scalar_tensor": _scalar,
    "arange": _arange,
    "tril": _triangle(True),
    "triu": _triangle(False),
    **dict.fromkeys(("cat", "concat"), _cat),
    "stack": _stack,
    "index": _index,
    "index_put": _index_put,
    "index_select": _index_select,
    "gather": _gather,
    "embedding": _embedding,
    "diff": _diff,
    "cumsum": _cumsum,
    **dict.fromkeys(("amax", "amin", "logsumexp", "mean"), _reduction),
    "slice_scatter": _slice_scatter,
    "copy": _copy,
    "constant_pad_nd": _pad,
    "pad": _pad,
}
__all__ = ["RULES"]

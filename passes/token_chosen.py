"""Which ops take some of the rows, by a condition, and put them back?

`torch.where(ids == expert)` and `x[mask]` choose rows, as many as the data say. Whatever is chosen by one condition stands
in the order of the tokens, so it is one space of rows: working row by row and writing back by the same condition keeps every
token by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.token_context import BY_ITSELF, Context, bind, is_row, op_key, rule
from compile_attn.passes.token_rules import pointwise
from compile_attn.passes.token_values import Axis, Free, Index, Mixed, Space, Tok, Value, is_one

Arguments = dict[str, Any]


def is_mask(node: object) -> bool:
    return is_tensor(node) and val(node).dtype in (torch.bool, torch.uint8)  # type: ignore[arg-type]


@rule("where", "nonzero_numpy")
def where(c: Context, node: fx.Node, args: Arguments) -> Value:
    """With one argument, the places where a condition holds: a tensor of row numbers, and others of what else they are."""
    if "other" in args:
        return pointwise(c, node, args)
    condition: fx.Node = args["condition"] if "condition" in args else args["self"]
    found = _chosen(c, node, condition)
    if isinstance(found, Mixed):
        return found
    rows, held = found
    numbers = Index(0, rows, held.axis, once=_once_a_row(condition, held.dim))
    return tuple(numbers if dim == held.dim else Tok(0, rows) for dim in range(val(condition).dim()))


@rule("nonzero")
def nonzero(c: Context, node: fx.Node, args: Arguments) -> Value:
    condition = args["self"]
    found = _chosen(c, node, condition)
    if isinstance(found, Mixed):
        return found
    if val(condition).dim() != 1:
        return c.mixed(node, "names rows and channels in one tensor", "write rows, channels = torch.where(condition)")
    rows, held = found
    return Index(0, rows, held.axis, once=True)


def _chosen(c: Context, node: fx.Node, condition: fx.Node) -> tuple[Axis, Tok] | Mixed:
    """The rows that a condition chooses, and the rows from which it does."""
    value = c.of(condition)
    if not isinstance(value, Tok):
        return c.mixed(node, "finds places whose number is data, by something else than a condition on each token")
    return Axis(Space("chosen", node=condition)), value


def _once_a_row(condition: fx.Node, dim: int) -> bool:
    """Whether no row is chosen twice: there is one element of it, or one of its top k ids can be the one asked for."""
    if all(is_one(size) for place, size in enumerate(val(condition).shape) if place != dim):
        return True
    args = bind(condition)
    compared = args.get("self")
    if op_key(condition) != "aten::eq" or is_tensor(args["other"]) or not isinstance(compared, fx.Node):
        return False
    return from_topk(compared)


def from_topk(node: fx.Node) -> bool:
    """Indices of a topk along the last dim: no index twice in a row."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or op_key(source) != "aten::topk" or node.args[1] != 1:
        return False
    return bool(bind(source)["dim"] % val(node).dim() == val(node).dim() - 1)


def masked_read(c: Context, node: fx.Node, x: fx.Node, first: int, mask: fx.Node) -> Value:
    """x[mask]: rows of x where a mask of rows holds. The mask's dims are those of x from `first` on."""
    found = _rows_of_mask(c, node, x, first, mask)
    return found if isinstance(found, Mixed) else Tok(first, found[0])


def masked_write(c: Context, node: fx.Node, x: fx.Node, first: int, mask: fx.Node, values: object) -> Value:
    """x with rows written where a mask of rows holds: each from its own row of the values, or all from what they share."""
    found = _rows_of_mask(c, node, x, first, mask)
    if isinstance(found, Mixed):
        return found
    rows, held = found
    if is_tensor(values) and not isinstance(c.of(values), Free):
        assert isinstance(values, fx.Node)
        given = c.payload(node, values)
        if isinstance(given, Mixed):
            return given
        place = given.dim + val(x).dim() - val(mask).dim() + 1 - val(values).dim()
        if place != first or given.axis != rows:
            return c.mixed(node, f"writes rows that another condition chose; {BY_ITSELF}")
    return Tok(held.dim, held.axis)


def _rows_of_mask(c: Context, node: fx.Node, x: fx.Node, first: int, mask: fx.Node) -> tuple[Axis, Tok] | Mixed:
    """The rows that a mask chooses from x, and the rows that x has."""
    found = _chosen(c, node, mask)
    if isinstance(found, Mixed):
        return found
    rows, by = found
    held = c.payload(node, x) if is_row(c.of(x)) else c.of(x)
    if isinstance(held, Mixed):
        return held
    if not isinstance(held, Tok) or held.dim != first + by.dim or held.axis != by.axis:
        return c.mixed(node, f"chooses rows by a mask of other rows; {BY_ITSELF}")
    return rows, held

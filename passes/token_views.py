"""Which ops move values about, and when does the token axis stay whole?

Views, slices, selections, splits, joins, repeats and new tensors. Here the last token is found, and the table that is cut to
the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compile_attn.passes.graph import val
from compile_attn.passes.token_context import (
    BY_ITSELF,
    CURE_LENGTH,
    ON_LENGTH,
    Context,
    is_row,
    op_key,
    rule,
)
from compile_attn.passes.token_values import (
    LAST,
    TOKENS,
    Axis,
    Free,
    Index,
    Iota,
    Mixed,
    Row,
    Size,
    Tok,
    Value,
    is_one,
    reshaped_axis,
    row_axis,
)

Arguments = dict[str, Any]
_CUT = f"cuts the token axis or merges it with an axis of unknown size; {BY_ITSELF}"


def relabel(c: Context, node: fx.Node, value: Row, dim: int, axis: Axis) -> Value:
    """The same numbers with the axis elsewhere, or grown by repeating each, or shrunk to fewer merged dims."""
    if isinstance(value, Tok):
        return replace(value, dim=dim, axis=axis)
    if axis == row_axis(value):
        return replace(value, dim=dim)
    if isinstance(value, Iota):
        if value.count == 1 and value.is_row_number:
            return Index(dim, axis, Axis())
        tok = c.payload(node, node.args[0])  # type: ignore[arg-type]
        return replace(tok, dim=dim, axis=axis) if isinstance(tok, Tok) else tok
    if axis.count < value.axis.count and value.target != Axis():
        return c.mixed(node, "cuts a list of row numbers")
    return replace(value, dim=dim, axis=axis, bijective=False, once=False)


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "view_copy", "squeeze_copy", lengths=True)
def view(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    if not isinstance(value, Row):
        return value
    if op_key(node).startswith("aten::view") and "dtype" in args:
        return c.mixed(node, "reinterprets bits")
    before, after = c.shape(node.args[0]), c.shape(node)  # type: ignore[arg-type]
    found = reshaped_axis(c.sizes, before, value.dim, row_axis(value), after)
    return c.mixed(node, _CUT) if found is None else relabel(c, node, value, *found)


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    assert isinstance(value, Row)
    return replace(value, dim=value.dim + (args["dim"] % val(node).dim() <= value.dim))


@rule(
    "permute",
    "transpose",
    "t",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "numpy_T",
    "mT",
    "adjoint",
    "permute_copy",
)
def permute(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    assert isinstance(value, Row)
    return replace(value, dim=_order(node, args).index(value.dim))


def _order(node: fx.Node, args: Arguments) -> list[int]:
    """Input dim of each output dim, found by moving a small tensor whose sizes are its dims."""
    rank = val(node).dim()
    probe = torch.empty([2 + dim for dim in range(rank)], device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in moved.shape]


@rule("expand", "broadcast_to", "expand_copy", lengths=True)
def expand(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    shape = c.shape(node)
    if isinstance(value, Row):
        dim = value.dim + len(shape) - val(node.args[0]).dim()  # type: ignore[arg-type]
        if row_axis(value).space is LAST and not is_one(shape[dim]):
            return c.mixed(node, "repeats the last token along a new axis")
        return replace(value, dim=dim)
    return _uniform(c, node, None)


@rule("expand_as", lengths=True)
def expand_as(c: Context, node: fx.Node, args: Arguments) -> Value:
    value, other = c.of(args["self"]), c.of(args["other"])
    if isinstance(other, Tok) and other.axis.space is LAST:
        return replace(value, dim=other.dim) if isinstance(value, Tok) else replace(other, uniform=True, fill=None)
    if isinstance(value, Tok) and value.axis.space is LAST:
        return c.mixed(node, "repeats the last token along a new axis")
    return expand(c, node, args)


def _uniform(c: Context, node: fx.Node, fill: float | None) -> Value:
    """A tensor made with T in its shape, the same for every row."""
    shape = c.shape(node)
    dims = [dim for dim, size in enumerate(shape) if c.sizes.depends(size)]
    if not dims:
        return Free()
    count = c.sizes.count(shape[dims[0]])
    if len(dims) > 1 or count is None:
        return c.mixed(node, f"makes a tensor whose shape {ON_LENGTH} in another way than one row per token")
    return Tok(dims[0], Axis(TOKENS, 1, count), True, fill)


_FILLS = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}


@rule(*_FILLS, "full", "new_full", "full_like", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided",
      "empty_permuted", lengths=True)  # fmt: skip
def create(c: Context, node: fx.Node, args: Arguments) -> Value:
    name = op_key(node).removeprefix("aten::")
    fill = args.get("fill_value", _FILLS.get(name))
    if isinstance(fill, fx.Node):
        if not isinstance(c.of(fill), (Free, Size)) or getattr(c.of(fill), "on_tokens", False):
            return c.mixed(node, ON_LENGTH, CURE_LENGTH)
        fill = None
    number = fill if isinstance(fill, (int, float)) else None
    like = c.of(args.get("self"))
    if name.endswith("_like") and isinstance(like, Row):
        return Tok(like.dim, row_axis(like), True, number)
    return _uniform(c, node, number)


@rule("arange", lengths=True)
def arange(c: Context, node: fx.Node, args: Arguments) -> Value:
    """start + step * t with as many rows as tokens; whatever else T does to it depends on the length."""
    start, step = args.get("start", 0), args.get("step", 1)
    count = c.sizes.count(c.shape(node)[0])
    numbers = isinstance(start, (int, float)) and isinstance(step, (int, float))
    if count is None or not numbers or (count > 1 and (start, step) != (0, 1)):
        return c.mixed(node, ON_LENGTH, CURE_LENGTH)
    return Iota(0, count, start, step)


@rule("repeat", "tile")
def repeat(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    assert isinstance(value, Row)
    times = list(args["repeats"] if "repeats" in args else args["dims"])
    rank = val(node).dim()
    times = [1] * (rank - len(times)) + times
    dim = value.dim + rank - val(node.args[0]).dim()  # type: ignore[arg-type]
    return _repeated(c, node, value, dim, times[dim], inner=False)


@rule("repeat_interleave")
def repeat_interleave(c: Context, node: fx.Node, args: Arguments) -> Value:
    value, times = c.of(node.args[0]), args["repeats"]
    if not isinstance(value, Row) or not isinstance(times, int):
        return c.mixed(node, "repeats rows a number of times that is data")
    rank = val(node.args[0]).dim()  # type: ignore[arg-type]
    if args["dim"] is None and rank != 1:
        return c.mixed(node, _CUT)
    dim = 0 if args["dim"] is None else args["dim"] % rank
    return _repeated(c, node, value, value.dim, times if dim == value.dim else 1, inner=True)


def _repeated(c: Context, node: fx.Node, value: Row, dim: int, times: int, *, inner: bool) -> Value:
    axis = row_axis(value)
    if times != 1 and (axis.space is LAST or (isinstance(value, Iota) and value.count > 1)):
        return c.mixed(node, "repeats rows that are not tokens")
    grown = replace(axis, post=axis.post * times) if inner else replace(axis, pre=axis.pre * times)
    return relabel(c, node, value, dim, grown)


@rule("select", "select_copy", lengths=True, counts=True)
def select(c: Context, node: fx.Node, args: Arguments) -> Value:
    value, index = c.of(args["self"]), args["index"]
    if isinstance(value, Mixed):
        return replace(value, counts=None)
    number = index.meta["val"] if isinstance(index, fx.Node) else index
    if not isinstance(value, Row):
        return c.mixed(node, ON_LENGTH, CURE_LENGTH) if c.sizes.depends(number) else value
    dim = args["dim"] % val(args["self"]).dim()
    if dim != value.dim:
        return replace(value, dim=value.dim - (dim < value.dim))
    if row_axis(value) == Axis(LAST):
        return view(c, node, args)
    if not c.sizes.is_last(number):
        return c.mixed(node, f"picks token {number} of the sequence; only the last one can be picked")
    return last_token(c, node, args["self"], dim)


def last_token(c: Context, node: fx.Node, x: fx.Node, dim: int) -> Value:
    """One row a sequence, on a dim that has size 1 in P."""
    value = c.payload(node, x)
    if isinstance(value, Mixed):
        return value
    if value.axis != Axis():
        return c.mixed(node, "picks the last row of an axis that is not of one row per token")
    before = list(c.shape(x))
    before[dim] = 1
    found = reshaped_axis(c.sizes, before, dim, Axis(LAST), c.shape(node))
    if found is None or not found[1].plain:
        cure = "keep the token axis: x[:, -1:] in place of x[:, -1]"
        return c.mixed(node, "leaves no axis of size 1 to hold one row per sequence", cure)
    c.lasts[node] = dim
    return Tok(found[0], found[1], value.uniform)


@rule("slice", "narrow", "slice_copy", lengths=True)
def slice_(c: Context, node: fx.Node, args: Arguments) -> Value:
    value, x = c.of(args["self"]), args["self"]
    dim = args["dim"] % val(x).dim()
    start = args.get("start") or 0
    if not isinstance(value, Row):
        return _table(c, node, x, dim, start, args.get("step", 1))
    if dim != value.dim:
        return value
    had, kept = c.shape(x)[dim], c.shape(node)[dim]
    number = start.meta["val"] if isinstance(start, fx.Node) else start
    if args.get("step", 1) == 1 and (c.sizes.same(had, kept) or (is_one(had) and is_one(kept))):
        return value
    if is_one(kept) and c.sizes.is_last(number):
        return last_token(c, node, x, dim)
    return c.mixed(node, f"keeps only some of the tokens (from {number}); only the last one can be picked")


def _table(c: Context, node: fx.Node, x: fx.Node, dim: int, start: object, step: int) -> Value:
    """A slice of what no token has touched: a table cut to the length of the sequence, row t for token t."""
    length = c.shape(node)[dim]
    if not c.sizes.depends(length) and not isinstance(start, fx.Node):
        return Free()
    rows = c.shape(x)[dim]
    if c.sizes.count(length) != 1 or not isinstance(start, int) or start < 0 or step != 1 or not isinstance(rows, int):
        return c.mixed(node, f"takes rows of a table in a way that {ON_LENGTH}", CURE_LENGTH)
    c.tables[node] = (dim, start)
    c.bounds.append(rows - start)
    return Tok(dim)


@rule("split", "chunk", "split_with_sizes", "unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes", "tensor_split",
      "split_copy", "hsplit", "vsplit", "dsplit", lengths=True)  # fmt: skip
def split(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(node.args[0])
    if not isinstance(value, Row) or "dim" not in args:
        return c.mixed(node, ON_LENGTH, CURE_LENGTH)
    parts = node.meta["val"]
    if args["dim"] % val(node.args[0]).dim() != value.dim:  # type: ignore[arg-type]
        return tuple(value for _ in parts)
    groups = [c.of(size) for size in args.get("split_sizes", ())]
    space = row_axis(value).space
    if _are_all_groups(c, groups, space.node) and isinstance(value, Tok) and value.axis.plain:
        c.groups[space.node] = len(groups)  # type: ignore[index]
        return tuple(replace(value, axis=Axis(replace(space, kind="part", group=g))) for g in range(len(groups)))
    return c.mixed(node, f"splits the token axis; {BY_ITSELF}")


def _are_all_groups(c: Context, sizes: Sequence[Value], sort: fx.Node | None) -> bool:
    """Whether sizes are those of every group of a sorted space, in order."""
    from compile_attn.passes.token_moe import sort_key

    if sort is None or not sizes:
        return False
    key = sort_key(c, sort)
    number = len(sizes)
    return key is not None and all(isinstance(s, Size) and s.group == (key, g, number) for g, s in enumerate(sizes))


@rule("unbind", "unbind_copy")
def unbind(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(args["self"])
    assert isinstance(value, Row)
    dim = args["dim"] % val(args["self"]).dim()
    if dim == value.dim:
        return c.mixed(node, f"takes the tokens one by one; {BY_ITSELF}")
    return tuple(replace(value, dim=value.dim - (dim < value.dim)) for _ in node.meta["val"])


@rule("cat", "concat", "concatenate", "stack")
def join_tensors(c: Context, node: fx.Node, args: Arguments) -> Value:
    parts = args["tensors"]
    rank = val(node).dim()
    dim = args["dim"] % rank
    if op_key(node) == "aten::stack":
        places: list[int | None] = [place + (place >= dim) for place in range(rank - 1)]
        return c.aligned(node, [(part, places) for part in parts], strict=True)
    values = [c.of(part) for part in parts]
    spaces = {row_axis(value).space for value in values if isinstance(value, Row) and value.dim == dim}
    if spaces:
        return _joined_groups(c, node, values, dim)
    return c.aligned(node, [(part, list(range(rank))) for part in parts], strict=True)


def _joined_groups(c: Context, node: fx.Node, values: Sequence[Value], dim: int) -> Value:
    """All groups of a sorted space, joined again in order; anything else joined to tokens is refused."""
    axes = [value.axis if isinstance(value, Tok) and value.dim == dim else Axis() for value in values]
    sort = axes[0].space.node
    whole = sort is not None and len(axes) == c.groups.get(sort)
    if whole and all(
        axis.space.kind == "part" and axis.space.node is sort and axis.space.group == g for g, axis in enumerate(axes)
    ):
        return Tok(dim, Axis(replace(axes[0].space, kind="sorted", group=-1)))
    return c.mixed(node, f"joins other rows to the token axis; {BY_ITSELF}")


@rule("slice_scatter", "select_scatter")
def scatter_slice(c: Context, node: fx.Node, args: Arguments) -> Value:
    x, src = args["self"], args["src"]
    rank = val(x).dim()
    dim = args["dim"] % rank
    whole: list[int | None] = [None if place == dim else place for place in range(rank)]
    part = whole if val(src).dim() == rank else [place for place in whole if place is not None]
    return c.aligned(node, [(x, whole), (src, part)], strict=True)


@rule("pad", "constant_pad_nd")
def pad(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.payload(node, args["self"]) if is_row(c.of(args["self"])) else c.of(args["self"])
    if not isinstance(value, Tok):
        return value
    amounts = args["pad"]
    behind = val(node).dim() - 1 - value.dim
    if any(amount != 0 for amount in amounts[2 * behind : 2 * behind + 2]):
        return c.mixed(node, f"pads, and so shifts, the token axis; {BY_ITSELF}")
    return replace(value, fill=None)


@rule("view_as_complex", "view_as_real", "view_as_real_copy", "view_as_complex_copy")
def complex_view(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.payload(node, args["self"])
    last = val(args["self"]).dim() - 1 if "complex" in op_key(node) else -1
    return c.mixed(node, _CUT) if isinstance(value, Tok) and value.dim == last else value


@rule("unfold")
def unfold(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.payload(node, args["self"])
    if isinstance(value, Tok) and args["dimension"] % val(args["self"]).dim() == value.dim:
        return c.mixed(node, f"takes windows of tokens; {BY_ITSELF}")
    return value

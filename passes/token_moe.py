"""Which ops move rows by row numbers, as mixtures of experts do?

Sorting expert ids makes a permutation of rows; gathering by it, working row by row, and scattering by it again keeps every
token by itself, whatever the order. A product by groups is such work only if its group offsets count the very ids that made
the order; that is proven here, by following both back to one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.token_axes import along, reduction
from compile_attn.passes.token_chosen import from_topk, is_mask, masked_read, masked_write
from compile_attn.passes.token_context import BY_ITSELF, Context, bind, for_each_result, is_row, names, op_key, rule
from compile_attn.passes.token_rules import bound_positions, pointwise
from compile_attn.passes.token_values import (
    TOKENS,
    Axis,
    Free,
    Index,
    Iota,
    Mixed,
    Row,
    Size,
    Space,
    Tok,
    Value,
    is_one,
    row_axis,
)
from compile_attn.passes.token_views import last_token

Arguments = dict[str, Any]
_COMPUTED = f"gathers tokens by computed indices; {BY_ITSELF}"


def names_rows_of(c: Context, user: fx.Node, index: object, axis: Axis) -> Index | None:
    """The index as row numbers of this axis, where it surely holds them."""
    value = c.of(index)
    if isinstance(value, Iota) and value.is_row_number and value.count == axis.count and not axis.space.by_data:
        c.as_rows.add((user, index))  # type: ignore[arg-type]
        return Index(value.dim, axis, axis, True)
    if isinstance(value, Index) and value.target == axis:
        c.as_rows.add((user, index))  # type: ignore[arg-type]
        return value
    return None


def gathered(c: Context, node: fx.Node, x: fx.Node, index: Index, dim: int) -> Value:
    """Rows of x taken by an index that names them: they now stand as the index's own rows do."""
    value = c.of(x)
    if isinstance(value, Tok):
        return Tok(dim, index.axis, value.uniform)
    if isinstance(value, Iota):  # row numbers of the axis that the index points at
        return replace(index, dim=dim)
    assert isinstance(value, Index)
    return Index(dim, index.axis, value.target, index.bijective and value.bijective)


@rule("index", "_unsafe_index")
def index(c: Context, node: fx.Node, args: Arguments) -> Value:
    x, indices = args["self"], args["indices"]
    used = {dim: each for dim, each in enumerate(indices) if each is not None}
    if any(is_mask(each) for each in used.values()):
        [(first, mask), *more] = used.items()
        return c.mixed(node, "chooses by several masks at once") if more else masked_read(c, node, x, first, mask)
    rank = max(val(each).dim() for each in used.values())
    dims = sorted(used)
    front = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    value = c.of(x)
    if isinstance(value, Row) and value.dim in used:
        return _index_rows(c, node, x, used, front, rank)
    placed = [(each, [front + rank - val(each).dim() + d for d in range(val(each).dim())]) for each in used.values()]
    if isinstance(value, Row):
        kept = [dim for dim in range(val(x).dim()) if dim not in used]
        place = kept.index(value.dim)
        moved = place + (rank if kept[place] > dims[0] or (front == 0 and dims[0] > 0) else 0)
        if any(is_row(c.of(each)) for each in used.values()):
            return c.mixed(node, f"pairs tokens with each other; {BY_ITSELF}")
        return replace(value, dim=moved)
    for dim, each in used.items():
        bound_positions(c, each, c.shape(x)[dim])
    return c.aligned(node, placed)


def _index_rows(c: Context, node: fx.Node, x: fx.Node, used: dict[int, fx.Node], front: int, rank: int) -> Value:
    """Indexing along the token axis: by row numbers, or with -1."""
    value = c.of(x)
    assert isinstance(value, Row)
    by = used[value.dim]
    found = names_rows_of(c, node, by, row_axis(value))
    if found is None:
        literal = c.constant(by)
        if literal is None or literal.numel() != 1 or is_row(c.of(by)):
            return c.mixed(node, _COMPUTED)
        if int(literal) != -1:
            return c.mixed(node, f"picks token {int(literal)} of the sequence; only the last one can be picked")
        others = [dim for dim in used if dim != value.dim]
        if any(not is_one(c.shape(x)[dim]) or not isinstance(c.of(used[dim]), Free) for dim in others):
            return c.mixed(node, _COMPUTED)
        return last_token(c, node, x, value.dim)
    own = front + rank - val(by).dim() + found.dim
    others_placed: list[tuple[object, Sequence[int | None]]] = []
    for dim, each in used.items():
        if dim != value.dim:
            others_placed.append((each, [front + rank - val(each).dim() + d for d in range(val(each).dim())]))
    aligned = c.aligned(node, others_placed)
    if isinstance(aligned, Mixed):
        return aligned
    if isinstance(aligned, Tok) and (aligned.dim, aligned.axis) != (own, found.axis):
        return c.mixed(node, "combines rows that stand in different orders")
    return gathered(c, node, x, found, own)


@rule("index_select", "gather", "take_along_dim")
def gather(c: Context, node: fx.Node, args: Arguments) -> Value:
    x, by = args["self"], args.get("index", args.get("indices"))
    rank = val(x).dim()
    dim = args["dim"] % rank if rank and args["dim"] is not None else 0
    value = c.of(x)
    flat = op_key(node) == "aten::index_select"
    if isinstance(value, Row) and value.dim == dim:
        found = names_rows_of(c, node, by, row_axis(value))
        if found is None and flat and (literal := c.constant(by)) is not None and literal.tolist() == [-1]:
            return last_token(c, node, x, dim)
        return c.mixed(node, _COMPUTED) if found is None else gathered(c, node, x, found, dim)
    if isinstance(value, Row) and flat:
        return c.mixed(node, f"pairs tokens with each other; {BY_ITSELF}") if is_row(c.of(by)) else value
    places: list[int | None] = [dim] if flat else list(range(rank))
    if isinstance(value, Free):
        bound_positions(c, by, c.shape(x)[dim])
        return c.aligned(node, [(by, places)])
    return c.aligned(node, [(x, places), (by, places)], strict=True)


@rule("index_put", "_unsafe_index_put")
def index_put(c: Context, node: fx.Node, args: Arguments) -> Value:
    used = {dim: each for dim, each in enumerate(args["indices"]) if each is not None}
    base = c.of(args["self"])
    if len(used) == 1 and is_mask(*used.values()) and not args["accumulate"]:
        [(first, mask)] = used.items()
        return masked_write(c, node, args["self"], first, mask, args["values"])
    if not isinstance(base, Row) or list(used) != [base.dim] or val(used[base.dim]).dim() != 1:
        return c.mixed(node, f"writes to computed places; {BY_ITSELF}")
    return _put(c, node, args["self"], base.dim, used[base.dim], args["values"], args["accumulate"])


@rule("index_add", "index_copy", "index_fill")
def index_add(c: Context, node: fx.Node, args: Arguments) -> Value:
    dim = args["dim"] % val(args["self"]).dim()
    src = args.get("source", args.get("value"))
    return _put(c, node, args["self"], dim, args["index"], src, op_key(node) == "aten::index_add")


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(c: Context, node: fx.Node, args: Arguments) -> Value:
    x, by, src = args["self"], args["index"], args.get("src", args.get("value"))
    dim = args["dim"] % val(x).dim()
    base = c.of(x)
    if isinstance(base, Row) and base.dim == dim:
        return _put(c, node, x, dim, by, src, op_key(node) != "aten::scatter" or "reduce" in args)
    whole: list[int | None] = [None if place == dim else place for place in range(val(x).dim())]
    return c.aligned(node, [(x, whole), (by, whole), (src, whole)], strict=True)


def _put(c: Context, node: fx.Node, x: fx.Node, dim: int, by: fx.Node, src: object, accumulate: bool) -> Value:
    """Rows put, or added, where row numbers say. Without adding, every place must be named once."""
    base, found = c.of(x), c.of(by)
    if isinstance(found, Iota) and isinstance(base, Row):
        found = names_rows_of(c, node, by, row_axis(base)) or found
    if (
        not isinstance(base, Tok)
        or not isinstance(found, Index)
        or base.dim != dim
        or not (base.uniform or base.axis == found.target)
    ):
        return c.mixed(node, f"writes to computed places; {BY_ITSELF}")
    if base.axis.count != found.target.count or not (accumulate or found.bijective or found.once):
        return c.mixed(node, f"writes several rows to one place; {BY_ITSELF}")
    c.as_rows.add((node, by))
    if not is_tensor(src) or isinstance(c.of(src), Free):
        return Tok(dim, found.target, base.uniform and found.bijective)
    assert isinstance(src, fx.Node)
    value, place = c.of(src), dim + val(src).dim() - val(x).dim()
    if isinstance(value, Iota) and value.is_row_number and found.bijective and value.dim == place and not accumulate:
        c.as_rows.add((node, src))  # numbers of the rows in their new order: the inverse permutation
        return Index(dim, found.target, found.axis, True)
    value = c.payload(node, src)
    if isinstance(value, Mixed):
        return value
    if value.dim != place or not (value.uniform or value.axis == found.axis):
        return c.mixed(node, "combines rows that stand in different orders")
    return Tok(dim, found.target)


@rule("floor_divide", "div", "remainder", "fmod", "__rshift__", "bitwise_right_shift", lengths=True)
def divide(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Row numbers of T x K or K x T rows, split into their two parts."""
    value, other = c.of(node.args[0]), args.get("other")
    name = op_key(node).removeprefix("aten::")
    whole = name in ("floor_divide", "remainder", "fmod") or args.get("rounding_mode") in ("floor", "trunc")
    number = other.meta["val"] if isinstance(other, fx.Node) and isinstance(c.of(other), Size) else other
    target = value.target if isinstance(value, Index) else None
    if isinstance(value, Iota) and value.is_row_number and value.count > 1:
        by_t = c.sizes.count(number) == 1
        axis = Axis(TOKENS, value.count, 1) if by_t else Axis(TOKENS, 1, value.count)
        value, target = Index(value.dim, axis, axis, True), axis
    if whole and isinstance(value, Index) and isinstance(number, int) and number == 1:  # one expert a token
        return value if name in ("floor_divide", "div") else Tok(value.dim, value.axis, fill=0)
    if whole and isinstance(value, Index) and target is not None and target.space is TOKENS and not target.plain:
        quotient = name in ("floor_divide", "div")
        if number == target.post and target.pre == 1 and isinstance(number, int):
            return replace(value, target=Axis(), bijective=False, once=False) if quotient else Tok(value.dim, value.axis)
        if c.sizes.count(number) == 1 and target.post == 1:
            return Tok(value.dim, value.axis) if quotient else replace(value, target=Axis(), bijective=False, once=False)
    if any(c.sizes.depends(arg.meta["val"]) for arg in node.all_input_nodes if isinstance(c.of(arg), Size)):
        return c.mixed(node, "divides by the length of the sequence")
    return pointwise(c, node, args)


@rule("sort", "argsort", "msort")
def sort(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Sorting one number per row permutes rows; sorting a permutation inverts it."""
    x = args["self"]
    value = c.of(x)
    rank = val(x).dim()
    dim = args.get("dim", 0) % rank
    only_indices = op_key(node) == "aten::argsort"
    if not isinstance(value, Row) or dim != value.dim:
        return along(c, node, args)
    if any(not is_one(size) for place, size in enumerate(c.shape(x)) if place != dim) or op_key(node) == "aten::msort":
        return c.mixed(node, f"sorts each channel over tokens; {BY_ITSELF}")
    if isinstance(value, Index) and value.bijective and not args.get("descending", False):
        c.as_rows.add((node, x))
        inverse = Index(dim, value.target, value.axis, True)
        return inverse if only_indices else (c.mixed(node, "counts rows"), inverse)
    tok = c.payload(node, x)
    if isinstance(tok, Mixed):
        return tok
    axis = Axis(Space("sorted", tok.axis.count, node))
    order = Index(dim, axis, tok.axis, True)
    return order if only_indices else (Tok(dim, axis), order)


def sort_key(c: Context, node: fx.Node) -> fx.Node | None:
    """The expert ids by which a sort in rising order has put its rows."""
    args = bind(node)
    return None if args.get("descending", False) else ids_of(c, args["self"])


_SAME_ELEMENTS = frozenset(
    f"aten::{name}"
    for name in names(
        """view reshape _unsafe_view flatten unflatten squeeze unsqueeze transpose permute t contiguous clone alias detach"""
    )
)


def ids_of(c: Context, node: fx.Node) -> fx.Node:
    """The node that first held these integers, seen through what only reorders, reshapes or casts them."""
    while True:
        key = op_key(node)
        source = node.args[0] if node.args else None
        if key in _SAME_ELEMENTS or (key in ("aten::_to_copy", "aten::to") and val(node).dtype not in (torch.bool, torch.uint8)):
            node = source  # type: ignore[assignment]
        elif isinstance(source, fx.Node) and op_key(source) == "aten::sort" and node.args[1] == 0:
            node = source.args[0]  # type: ignore[assignment]
        elif (key == "aten::slice" and _is_whole(c, node)) or (key == "aten::index" and _is_permutation(c, node)):
            node = source  # type: ignore[assignment]
        else:
            return node


def _is_whole(c: Context, node: fx.Node) -> bool:
    """Whether a slice keeps everything."""
    pairs = zip(c.shape(node), c.shape(node.args[0]), strict=True)  # type: ignore[arg-type]
    return all(a == b if isinstance(a, int) and isinstance(b, int) else c.sizes.same(a, b) for a, b in pairs)


def _is_permutation(c: Context, node: fx.Node) -> bool:
    used = [each for each in node.args[1] if each is not None]  # type: ignore[union-attr]
    value = c.of(used[0]) if len(used) == 1 else None
    return isinstance(value, Index) and value.bijective and val(node).dim() == 1


def _counted(c: Context, node: fx.Node, what: str, ids: fx.Node, groups: int) -> Mixed:
    return replace(c.mixed(node, what), counts=(ids_of(c, ids), groups))


@rule("histc", "bincount")
def histogram(c: Context, node: fx.Node, args: Arguments) -> Value:
    what = f"counts over tokens; {BY_ITSELF}"
    bins: Any = args["bins"] if "bins" in args else args["minlength"]
    exact = args.get("weights") is None and isinstance(bins, int) and bins > 0
    if op_key(node) == "aten::histc":  # bins of width (bins - 1) / bins, or 1: each integer has its own
        exact = exact and args["min"] == 0 and args["max"] in (bins - 1, bins)
    return _counted(c, node, what, args["self"], bins) if exact else c.mixed(node, what)


@rule("sum")
def total(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Rows of one-hot vectors, summed, are counts."""
    value = reduction(c, node, args)
    source = _one_hot_source(c, args["self"])
    if isinstance(value, Mixed) and value.node is node and source is not None and val(node).dim() == 1:
        ids, groups, dim = source
        if dim % val(args["self"]).dim() not in {d % val(args["self"]).dim() for d in args.get("dim") or ()}:
            return replace(value, counts=(ids_of(c, ids), groups))
    return value


def _one_hot_source(c: Context, node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(ids, groups, dim of the groups) where a node holds one-hot vectors of ids."""
    while op_key(node) in ("aten::_to_copy", "aten::to", "aten::clone"):
        node = node.args[0]  # type: ignore[assignment]
    args, key, rank = bind(node), op_key(node), val(node).dim()
    if key == "aten::one_hot":
        return args["self"], args["num_classes"], rank - 1
    if key == "aten::eq" and is_tensor(args["other"]):
        literal = c.of(args["other"])
        groups = c.shape(node)[-1]
        ahead = op_key(args["self"]) == "aten::unsqueeze" and args["self"].args[1] in (-1, rank - 1)
        counting = op_key(args["other"]) == "aten::arange" and _counts_from_zero(args["other"])
        if isinstance(literal, Free) and counting and val(args["other"]).dim() == 1 and ahead and isinstance(groups, int):
            return args["self"], groups, rank - 1
    if key == "aten::scatter" and args["dim"] % rank == rank - 1 and args.get("value") == 1 and from_topk(args["index"]):
        base, groups = c.of(args["self"]), c.shape(node)[-1]
        if isinstance(base, Tok) and base.fill == 0 and isinstance(groups, int):
            return args["index"], groups, rank - 1
    return None


def _counts_from_zero(node: fx.Node) -> bool:
    args = bind(node)
    return (args.get("start", 0), args.get("step", 1)) == (0, 1)


@rule("cumsum", counts=True)
def running_sum(c: Context, node: fx.Node, args: Arguments) -> Value:
    value = c.of(args["self"])
    if isinstance(value, Mixed):
        return replace(value, cumulative=True) if value.counts and not value.cumulative else replace(value, counts=None)
    if isinstance(value, Tok) and value.fill == 1 and value.axis == Axis() and args["dim"] % val(node).dim() == value.dim:
        return Iota(value.dim, 1, 1, 1)  # of ones: 1, 2, 3, ...
    return along(c, node, args)


@rule("_grouped_mm", "transformers::grouped_mm_fallback", counts=True)
def grouped_mm(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Rows [offs[g-1], offs[g]) times matrix g: each row by itself when the offsets count the ids that sorted the rows."""
    ours = "self" in args
    x, weight, offs = args["self" if ours else "input"], args["mat2" if ours else "weight"], args["offs"]
    value, groups = c.of(x), c.of(offs)
    if isinstance(value, Mixed):
        return value
    sorted_by = value.axis.space.node if isinstance(value, Tok) and value.axis.plain and value.dim == 0 else None
    if sorted_by is None or not isinstance(c.of(weight), Free) or val(weight).dim() != 3:
        return c.mixed(node, f"multiplies groups of rows that are not sorted by group; {BY_ITSELF}")
    if not isinstance(groups, Mixed) or not groups.cumulative or groups.counts is None:
        return c.mixed(node, "has group offsets that are not a running count of the ids that sorted its rows")
    ids, number = groups.counts
    if sort_key(c, sorted_by) is not ids or number != c.shape(weight)[0]:
        return c.mixed(node, "has group offsets that count other ids than those that sorted its rows")
    return for_each_result(node, value)

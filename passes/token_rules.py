"""Which ops compute with values, and when do they keep tokens apart?

Pointwise ops, products, reductions, norms, convolutions, and the attention op, which alone may mix tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from compile_attn.passes.graph import val
from compile_attn.passes.token_context import BY_ITSELF, Context, bind, for_each_result, is_row, names, op_key, rule, tensors
from compile_attn.passes.token_values import Axis, Free, Index, Iota, Mixed, Size, Tok, Value

Arguments = dict[str, Any]

# Elementwise with broadcasting, but without torch.Tag.pointwise, which the context asks for first.
_POINTWISE = names(
    """where masked_fill type_as __and__ __or__ __xor__ bitwise_and floor_divide isin copy hardswish polar
    complex real imag log_sigmoid log_sigmoid_forward fill clamp clip maximum minimum add mul sub rsub pow
    nan_to_num float_power subtract multiply divide true_divide negative absolute square not_equal equal greater
    less greater_equal less_equal logaddexp logical_and logical_or bitwise_not relu6 hardtanh softsign
    tanhshrink isclose fix xlogy special_expit expit special_log1p special_exp2 special_erf
    mish silu gelu sgn"""
)


@rule(*_POINTWISE)
def pointwise(c: Context, node: fx.Node, args: Arguments) -> Value:
    closed = _closed_form(c, node)
    if closed is not None:
        return closed
    rank = val(node).dim() if isinstance(node.meta["val"], torch.Tensor) else -1
    operands = list(tensors(args.values()))
    if rank < 0:
        return c.mixed(node, f"has several results and no rule; {BY_ITSELF}")
    placed = [(arg, [rank - val(arg).dim() + dim for dim in range(val(arg).dim())]) for arg in operands]
    joined = c.aligned(node, placed)
    fill = _folded(c, node, operands)
    return replace(joined, fill=fill) if fill is not None and isinstance(joined, Tok) and joined.uniform else joined


def _closed_form(c: Context, node: fx.Node) -> Value | None:
    """start + step * row stays that under adding a number; other arithmetic makes it a value."""
    name = op_key(node).removeprefix("aten::")
    if name == "masked_fill" and _is_fill(c, node.args[1], 0):
        return c.of(node.args[0])
    rows = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and isinstance(c.of(arg), (Iota, Index))]
    if len(rows) != 1 or len(node.args) != 2 or node.kwargs:
        return None
    value, other = c.of(rows[0]), node.args[1] if rows[0] is node.args[0] else node.args[0]
    if name == "mul" and _is_fill(c, other, 1):
        return _moved(value, val(node).dim() - val(rows[0]).dim())
    if name not in ("add", "sub") or not isinstance(other, (int, float)) or isinstance(other, bool):
        return None
    if isinstance(value, Index) or rows[0] is not node.args[0]:
        return value if other == 0 and rows[0] is node.args[0] else None
    assert isinstance(value, Iota)
    return replace(value, start=value.start + other if name == "add" else value.start - other)


def _moved(value: Value, by: int) -> Value:
    return replace(value, dim=value.dim + by) if isinstance(value, (Tok, Iota, Index)) else value


def _is_fill(c: Context, arg: object, number: float) -> bool:
    if isinstance(arg, (int, float)):
        return arg == number
    value = c.of(arg)
    return isinstance(value, Tok) and value.fill == number


def _folded(c: Context, node: fx.Node, operands: Sequence[fx.Node]) -> float | None:
    """The number that fills the result where every operand is filled with one."""
    fills = {}
    for arg in operands:
        value = c.of(arg)
        if not isinstance(value, Tok) or value.fill is None:
            return None
        fills[arg] = torch.tensor(value.fill, dtype=val(arg).dtype)
    made = node.target(*fx.map_arg(node.args, fills.__getitem__), **node.kwargs)  # type: ignore[operator]
    return made.item() if isinstance(made, torch.Tensor) and made.dim() == 0 else None


@rule(
    "_to_copy",
    "to",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "lift_fresh_copy",
    "lift_fresh",
    "positive",
    "float",
    counts=True,
)
def cast(c: Context, node: fx.Node, args: Arguments) -> Value:
    """The same numbers in another dtype or layout. A cast to bool compares with zero."""
    value = c.of(node.args[0])
    if isinstance(value, (Iota, Index)) and not _keeps_integers(val(node).dtype):
        return c.payload(node, node.args[0])  # type: ignore[arg-type]
    return value


def _keeps_integers(dtype: torch.dtype) -> bool:
    return dtype in (torch.int64, torch.int32, torch.float32, torch.float64)


@rule("dropout", "feature_dropout", "alpha_dropout", "native_dropout", "_safe_dropout", "rrelu")
def dropout(c: Context, node: fx.Node, args: Arguments) -> Value:
    training = args.get("train", args.get("training"))
    probability = args.get("p", 1.0)
    if training is False or probability == 0:
        value = c.of(node.args[0])
        return (value, value) if isinstance(node.meta["val"], (tuple, list)) else value
    return c.mixed(node, "is on", "call model.eval()")


def _contract(c: Context, node: fx.Node, a: object, b: object, *, strict: bool) -> list[tuple[object, list[int | None]]]:
    """Places of the dims of a matrix product's operands: [..., n, k] x [..., k, m], vectors without n or m."""
    rank, ra, rb = val(node).dim(), val(a).dim(), val(b).dim()  # type: ignore[arg-type]
    m = 0 if rb == 1 else 1
    n = 0 if ra == 1 else 1
    left: list[int | None] = [rank - m - n - (ra - 2) + dim for dim in range(max(ra - 2, 0))]
    right: list[int | None] = [rank - m - n - (rb - 2) + dim for dim in range(max(rb - 2, 0))]
    left += [None] if ra == 1 else [rank - 1 - m, None]
    right += [None] if rb == 1 else [None, rank - 1]
    return [(a, left), (b, right)]


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", "addbmm", "addmv", "chain_matmul")
def matmul(c: Context, node: fx.Node, args: Arguments) -> Value:
    name = op_key(node).removeprefix("aten::")
    if name in ("addbmm", "chain_matmul"):
        return c.mixed(node, "has no rule; write it as matmul and add")
    a, b = (args.get(key) for key in _factors(args))
    places = _contract(c, node, a, b, strict=False)
    added = args.get("self") if name.startswith(("addm", "baddbmm")) else None
    if added is not None:
        rank = val(node).dim()
        places.append((added, [rank - val(added).dim() + dim for dim in range(val(added).dim())]))
    return c.aligned(node, places, strict=name in ("bmm", "baddbmm"))


def _factors(args: Arguments) -> tuple[str, str]:
    for pair in (
        ("mat1", "mat2"),
        ("batch1", "batch2"),
        ("mat", "vec"),
        ("self", "mat2"),
        ("self", "other"),
        ("self", "vec"),
    ):
        if all(name in args for name in pair):
            return pair
    return "self", "tensor"


@rule("linear")
def linear(c: Context, node: fx.Node, args: Arguments) -> Value:
    x, weight, bias = args["input"], args["weight"], args["bias"]
    rank = val(node).dim()
    out: list[int | None] = [rank - 1] if val(weight).dim() == 2 else []
    places = [(x, [*range(val(x).dim() - 1), None]), (weight, [*out, None])]
    return c.aligned(node, [*places, (bias, [rank - 1])])


@rule("outer", "ger")
def outer(c: Context, node: fx.Node, args: Arguments) -> Value:
    return c.aligned(node, [(args["self"], [0]), (args["vec2"], [1])])


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention")
def leftover_attention(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Attention among other things than tokens, where they are a batch dim; attention over tokens must have been rewritten."""
    rank = val(args["query"]).dim()
    places: list[int | None] = [*range(rank - 2), None, None]
    operands = [(args[name], places) for name in ("query", "key", "value")]
    mask = args.get("attn_mask", args.get("attn_bias"))
    if mask is not None:
        operands.append((mask, places[rank - val(mask).dim() :]))
    value = c.aligned(node, operands)
    if isinstance(value, Mixed):
        return c.mixed(node, "attends over tokens and was not rewritten")
    return for_each_result(node, value)


@rule("paged_attn::attention", counts=True)
def attention(c: Context, node: fx.Node, args: Arguments) -> Value:
    """What alone may mix tokens: q, k, v are [1, H, T, D], and what it captures is the same for every token."""
    for name in ("q", "k", "v"):
        value = c.payload(node, args[name]) if is_row(c.of(args[name])) else c.of(args[name])
        if isinstance(value, Mixed):
            return value
        if not isinstance(value, Tok) or value.dim != 2 or value.axis != Axis():
            return c.mixed(node, f"takes {name} that is not of one row per token")
    for captured in args["captured"]:
        if isinstance(value := c.of(captured), Mixed):
            return value
        if not isinstance(value, Free):
            return c.mixed(node, f"captures {captured}, which is given per token", "leave padding masks out of the call")
    return Tok(2)


@rule("embedding")
def embedding(c: Context, node: fx.Node, args: Arguments) -> Value:
    if not isinstance(c.of(args["weight"]), Free):
        return c.mixed(node, "looks tokens up in a table made of tokens")
    bound_positions(c, args["indices"], c.shape(args["weight"])[0])
    return c.aligned(node, [(args["indices"], list(range(val(args["indices"]).dim())))])


def bound_positions(c: Context, index: object, rows: object) -> None:
    """A table of so many rows that is indexed by position limits the position."""
    value = c.of(index)
    if isinstance(value, Iota) and value.step == 1 and isinstance(rows, int):
        c.bounds.append(int(rows - value.start))


@rule("one_hot")
def one_hot(c: Context, node: fx.Node, args: Arguments) -> Value:
    return c.aligned(node, [(args["self"], list(range(val(args["self"]).dim())))])


@rule("bucketize", "searchsorted")
def bucketize(c: Context, node: fx.Node, args: Arguments) -> Value:
    if op_key(node) == "aten::searchsorted":
        return c.mixed(node, f"has no rule; {BY_ITSELF}")
    if not isinstance(c.of(args["boundaries"]), Free):
        return c.mixed(node, "has boundaries that depend on tokens")
    return c.aligned(node, [(args["self"], list(range(val(args["self"]).dim())))])


@rule("item", "_local_scalar_dense", counts=True)
def item(c: Context, node: fx.Node, args: Arguments) -> Value:
    """A number read on the host: of a free tensor, or the number of rows of one expert."""
    source = node.args[0]
    value = c.of(source)
    if isinstance(value, Free):
        return Size(False)
    assert isinstance(source, fx.Node)
    counted = c.of(source.args[0]) if op_key(source) == "aten::select" else None
    group = bind(source).get("index")
    if isinstance(counted, Mixed) and counted.counts and not counted.cumulative and isinstance(group, int):
        ids, groups = counted.counts
        return Size(True, (ids, group % groups, groups))
    return value if isinstance(value, Mixed) else c.mixed(node, "reads a number out of the tokens' values")


@rule("_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_constrain_range", lengths=True, counts=True)
def assertion(c: Context, node: fx.Node, args: Arguments) -> Value:
    return Free()

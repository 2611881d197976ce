"""Which ops work along an axis, and is it the token axis?

Reductions, running sums, sorts, norms and convolutions keep tokens apart as long as they work along other axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from compile_attn.passes.graph import val
from compile_attn.passes.token_context import BY_ITSELF, Context, for_each_result, names, op_key, rule, tensors
from compile_attn.passes.token_rules import pointwise
from compile_attn.passes.token_values import Free, Mixed, Tok, Value

Arguments = dict[str, Any]

_REDUCTIONS = names(
    """sum mean amax amin max min logsumexp var std var_mean std_mean prod any all argmax argmin norm median
    nanmedian linalg_vector_norm nansum aminmax count_nonzero mode frobenius_norm special_logsumexp"""
)
_ALONG = names(
    """softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod logcumsumexp cummax cummin
    sort argsort topk kthvalue glu diff special_softmax renorm msort fft_fft fft_ifft fft_rfft fft_irfft
    fft_hfft fft_fft2 fft_ifft2 fft_fftn fft_rfft2 fft_rfftn fft_ifftn fft_irfftn flip roll"""
)


def _dims(args: Arguments, rank: int) -> list[int]:
    """The dims that an op works along; all of them where it names none."""
    given = next((args[name] for name in ("dim", "dims", "axis") if args.get(name) is not None), None)
    listed = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else list(given)
    return [dim % rank for dim in listed] if rank else []


@rule(*_REDUCTIONS)
def reduction(c: Context, node: fx.Node, args: Arguments) -> Value:
    if len(tensors(args.values())) > 1:  # max.other and its like
        return pointwise(c, node, args)
    dims = _dims(args, _rank(node))
    value = _beside(c, node, dims, "reduces over")
    if isinstance(value, Mixed):
        return value
    keep = bool(args.get("keepdim", False))
    moved = replace(value, dim=value.dim - (0 if keep else sum(dim < value.dim for dim in dims)), fill=None)
    return for_each_result(node, moved)


@rule(*_ALONG)
def along(c: Context, node: fx.Node, args: Arguments) -> Value:
    rank = _rank(node)
    name = op_key(node).removeprefix("aten::")
    if (
        (args.get("dim", 0) is None and not name.startswith("fft_"))
        or name in ("fft_fftn", "fft_rfftn", "fft_ifftn", "fft_irfftn", "renorm", "msort")
        or len(tensors(args.values())) > 1
    ):
        dims = list(range(rank))
    else:
        dims = _dims(args, rank)
    value = _beside(c, node, dims, "works along")
    return value if isinstance(value, Mixed) else for_each_result(node, replace(value, fill=None))


def _rank(node: fx.Node) -> int:
    return val(node.args[0]).dim()  # type: ignore[arg-type]


def _beside(c: Context, node: fx.Node, dims: Sequence[int], verb: str) -> Tok | Mixed:
    """The first argument's value, whose token axis is none of these; else Mixed."""
    value = c.payload(node, node.args[0])  # type: ignore[arg-type]
    if not isinstance(value, Mixed) and value.dim in dims:
        return c.mixed(node, f"{verb} the token axis; {BY_ITSELF}")
    return value


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def norm(c: Context, node: fx.Node, args: Arguments) -> Value:
    x = args["input"]
    rank = val(x).dim()
    count = len(args["normalized_shape"])
    places: list[int | None] = [dim if dim < rank - count else None for dim in range(rank)]
    others = [args[name] for name in ("weight", "bias") if args.get(name) is not None]
    if any(not isinstance(c.of(other), Free) for other in others):
        return c.mixed(node, "has a weight that depends on tokens")
    return for_each_result(node, c.aligned(node, [(x, places)]))


@rule("group_norm", "native_group_norm", "instance_norm")
def group_norm(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Statistics run over all but the batch dim and the groups: tokens may only be the batch."""
    x = args["input"]
    value = c.aligned(node, [(x, [0, *[None] * (val(x).dim() - 1)])])
    return for_each_result(node, value)


@rule(
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
)
def batch_norm(c: Context, node: fx.Node, args: Arguments) -> Value:
    if args.get("training", False):
        return c.mixed(node, f"takes its statistics over tokens; {BY_ITSELF}", "call model.eval()")
    x = args["input"]
    value = c.aligned(node, [(x, [0, None, *range(2, val(x).dim())])])
    return for_each_result(node, value)


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def convolution(c: Context, node: fx.Node, args: Arguments) -> Value:
    """Tokens may be the batch, or a spatial dim along which the kernel is one wide and leaves rows where they are."""
    x, weight = args["input"], args["weight"]
    value = c.payload(node, x)
    if isinstance(value, Mixed):
        return value
    spatial = val(weight).dim() - 2
    first = val(x).dim() - spatial
    if any(not isinstance(c.of(arg), Free) for arg in (weight, args["bias"]) if isinstance(arg, fx.Node)):
        return c.mixed(node, "has a kernel that depends on tokens")
    if value.dim == first - 1:
        return c.mixed(node, f"sums over the token axis; {BY_ITSELF}")
    if value.dim < first:
        return value
    place = value.dim - first
    width = c.shape(weight)[2 + place]
    still = width == 1 and _at(args["stride"], place) == 1 and _at(args["padding"], place) in (0, "valid", "same")
    if not still or args.get("transposed", False):
        return c.mixed(node, f"convolves over tokens with a kernel of {width}; {BY_ITSELF}")
    return value


def _at(given: object, place: int) -> object:
    if isinstance(given, (list, tuple)):
        return given[place] if len(given) > 1 else given[0]
    return given


@rule("tril", "triu")
def triangle(c: Context, node: fx.Node, args: Arguments) -> Value:
    rank = val(node).dim()
    return c.aligned(node, [(args["self"], [*range(rank - 2), None, None])])

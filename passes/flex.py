"""What does a flex_attention op compute, written with tensors in place of functions of one score?

Its `score_mod` and `mask_mod` are graphs over scalars: with tensors that broadcast in their place they give all scores at once, if
every op in them is elementwise. Beside `mask_mod` the op takes tables of blocks. That they say the same is proven: they are those
of no mask, or `create_block_mask` made them, from a function that is `mask_mod` op by op. Anything else is refused.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from compile_attn.passes.graph import same_size
from compile_attn.passes.pointwise import RULES
from compile_attn.passes.terms import unreadable

_OPERATORS = ("truediv", "floordiv", "mod", "invert", "and", "or", "xor", "not", "pos", "to", "float", "int", "long", "bool")
_ELEMENTWISE = {*RULES, *_OPERATORS, "less", "less_equal", "greater", "greater_equal", "not_equal"} - {"max", "min"}
_MAKERS = ("new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like")
_SYNONYMS = {  # operators on one side are methods on the other
    **{"floordiv": "floor_divide", "truediv": "div", "true_divide": "div", "mod": "remainder", "invert": "bitwise_not"},
    **{"bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor"},
}
_REVERSED = ("rsub", "radd", "rmul")  # 1 - x as a method of x
_EITHER_WAY = ("add", "mul", "and", "or", "xor", "eq", "ne")
_CONTROL = ("lazy_load_decompositions", "vmap_increment_nesting", "vmap_decrement_nesting")
_WHOLE = 1 << 30  # the block size of a flex_attention without a block mask: one block holds every token
_CURE = "make the mask by create_block_mask(mask_mod, ...) in the model, of elementwise ops; or write it with matmul and softmax"


def spell_out_flex(gm: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of Dynamo's graph with every flex_attention in plain ops, and how many there were; the graph itself if none."""
    if not any(_name(node) == "flex_attention" for node in gm.graph.nodes):
        return gm, 0
    gm = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    graph = gm.graph
    ops = [node for node in graph.nodes if _name(node) == "flex_attention"]
    tables: list[fx.Node] = []
    for node in ops:
        tables.extend(_replace(gm, node))
    _erase(graph, tables)
    graph.lint()
    gm.recompile()
    return gm, len(ops)


def _name(node: fx.Node) -> str:
    """`and` for operator.and_, Tensor.__and__ and torch's own; "" for what is no call."""
    if node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    dunder, own = name.startswith("__"), getattr(target, "__module__", "") == "_operator"
    return name.strip("_") if dunder or own else name.lstrip("_")  # the underscore of `add_` says that it writes in place


def _replace(gm: fx.GraphModule, node: Any) -> list[fx.Node]:
    """Put `_attend` in the place of one op; returns its tables of blocks, which are then dead."""
    query, key, value, score_mod, block_mask, scale, _, *buffers = node.args
    score_buffers, mask_buffers = (tuple(part) for part in (*buffers, (), ())[:2])
    used = [user for user in node.users if user.users]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in used):
        raise unreadable(node, "the logsumexp of flex_attention is used", "use its output alone")
    mask_mod = block_mask[-1]
    why = next(filter(None, (_not_elementwise(gm, score_mod, score_buffers), _not_elementwise(gm, mask_mod, mask_buffers))), None)
    why = why or _other_blocks(gm, node, block_mask, mask_buffers)
    if why is not None:
        raise unreadable(node, why, _CURE)
    with gm.graph.inserting_before(node):
        args = (query, key, value, score_mod, mask_mod, scale, score_buffers, mask_buffers)
        spelled = gm.graph.call_function(_attend, args)
        spelled.meta = dict(used[0].meta if used else node.meta)
    for user in list(node.users):
        user.replace_all_uses_with(spelled)
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return [part for part in block_mask if isinstance(part, fx.Node) and part.op != "get_attr"]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    mask_mod: Any,
    scale: float,
    score_buffers: Sequence[Tensor],
    mask_buffers: Sequence[Tensor],
) -> Tensor:
    """flex_attention by its definition."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    places = []
    for dim, size in enumerate((*query.shape[:3], key.shape[2])):
        place = torch.arange(size, device=query.device)
        places.append(place.view([-1 if n == dim else 1 for n in range(4)]))
    scores = score_mod((query @ key.transpose(-2, -1)).float() * scale, *places, *score_buffers)
    scores = torch.where(mask_mod(*places, *mask_buffers), scores, float("-inf"))
    return torch.softmax(scores, -1).to(query.dtype) @ value


def _not_elementwise(gm: fx.GraphModule, attribute: Any, buffers: Sequence[Any]) -> str | None:
    """Why a function of scalars may differ on tensors that broadcast: it must be elementwise, and index buffers fully."""
    function = getattr(gm, attribute.target)
    inputs = [node for node in function.graph.nodes if node.op == "placeholder"]
    ranks = dict(zip(inputs[len(inputs) - len(buffers) :], map(_rank, buffers), strict=True))
    node: Any
    for node in function.graph.nodes:
        name = _name(node)
        if name == "getitem":
            places = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if ranks.get(node.args[0], -1) != len(places) or not all(isinstance(place, (int, fx.Node)) for place in places):
                return f"{node.name} of {attribute.name} does not index every dim of a captured tensor"
        elif node.op not in ("placeholder", "output") and name not in _MAKERS and name not in _ELEMENTWISE:
            return f"{name or node.op} in {attribute.name} is not known for an elementwise op"
        elif node.op != "placeholder" and any(ranks.get(part, 0) > 0 for part in node.all_input_nodes):
            return f"{node.name} of {attribute.name} takes a whole captured tensor"
    return None


def _rank(node: Any) -> int:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _other_blocks(gm: fx.GraphModule, node: Any, block_mask: Sequence[Any], mask_buffers: Sequence[Any]) -> str | None:
    """Why the tables of blocks may say something else than `mask_mod`."""
    numbers, indices, full_numbers, full_indices = block_mask[2:6]
    rows, columns, mask_mod = block_mask[-3:]
    if (rows, columns) == (_WHOLE, _WHOLE) and full_numbers is None:
        plain = _name(numbers) == "ones" and _name(indices) == "zeros"
        return None if plain else "the tables of a flex_attention without a block mask are not its own"
    parts = [
        _back(numbers, "to", "sum", "to", "to", "and"),
        _back(indices, "to", "argsort", "to", "to", "and"),
        _back(full_numbers, "to", "sum", "to", "to", "eq"),
        _back(full_indices, "to", "argsort", "to", "to", "eq"),
    ]
    counts = {_count(part, rows * columns) for part in parts}
    dense = _dense(counts.pop(), rows, columns) if len(counts) == 1 else None
    made = None if dense is None else _function(dense)
    if made is None:
        return "the block mask was not made by create_block_mask in the model, so its blocks cannot be read"
    tree, sizes = made
    query, key = (x.meta["example_value"].shape for x in node.args[:2])
    for place, size, want in zip("bhij", sizes, (query[0], query[1], query[2], key[2]), strict=True):
        if not same_size(size, want) and (place in "ij" or _uses(tree, place)):
            return f"the block mask is made for {size} where the call has {want}"
    function = getattr(gm, mask_mod.target)
    inputs = [inner for inner in function.graph.nodes if inner.op == "placeholder"]
    leaves: dict[fx.Node, Any] = dict(zip(inputs, (*"bhij", *mask_buffers), strict=True))
    (result,) = next(inner for inner in function.graph.nodes if inner.op == "output").args
    same = _tree(result, leaves) == tree
    return None if same else "the mask_mod of a block mask is not the function that its blocks were made from"


def _back(node: Any, *names: str) -> Any:
    """The node reached through first arguments, where every node on the way has its name; its own name is the last."""
    for place, name in enumerate(names):
        if not isinstance(node, fx.Node) or _name(node) != name:
            return None
        if name in ("sum", "argsort") and (node.kwargs.get("dim") != -1 or len(node.args) > 1):
            return None
        if name == "argsort" and not node.kwargs.get("descending"):
            return None
        if place < len(names) - 1:
            node = node.args[0]
    return node


def _count(part: Any, size: int) -> Any:
    """How many elements of each block are set, of `0 < count < size` and of `count == size`."""
    if part is None or _name(part) == "eq":
        return part.args[0] if part is not None and part.args[1] == size else None
    more, less = part.args
    fits = (_name(more), more.args[1:], _name(less), less.args[1:]) == ("gt", (0,), "lt", (size,))
    return more.args[0] if fits and more.args[0] is less.args[0] else None


def _dense(count: Any, rows: int, columns: int) -> Any:
    """The mask [B, H, Tq, Tk] whose elements are counted by blocks of rows and columns."""
    if count is None or _name(count) != "sum" or list(count.kwargs.get("dim", ())) != [-2, -1]:
        return None
    turned = count.args[0]
    if _name(turned) != "permute" or turned.args[1:] != (0, 1, 2, 4, 3, 5):
        return None
    cut = turned.args[0]
    if _name(cut) != "view" or len(cut.args) != 7 or (cut.args[4], cut.args[6]) != (rows, columns):
        return None
    source = cut.args[0]
    if _name(source) == "pad":
        source, widths, mode, value = source.args
        if (widths[0], widths[2], mode) != (0, 0, "constant") or value not in (None, 0):
            return None
    return source


def _function(dense: Any) -> tuple[Any, list[Any]] | None:
    """The tree of the function of b, h, i and j that vmap made a mask of, and the sizes of the four."""
    node = dense
    for level in (1, 2, 3, 4):  # the outermost axis is taken off last
        if not isinstance(node, fx.Node) or _name(node) != "remove_batch_dim" or (node.args[1], node.args[3]) != (level, 0):
            return None
        node = node.args[0]
    leaves: dict[fx.Node, Any] = {}
    each: Any
    for each in _ancestors([node]):
        if _name(each) != "add_batch_dim":
            continue
        source, dim, level = each.args
        if _name(source) != "arange" or source.args[0] != 0 or len(source.args) != 2 or dim != 0 or level not in (1, 2, 3, 4):
            return None
        leaves[each] = "bhij"[level - 1]
    return _tree(node, leaves), list(dense.meta["example_value"].shape)


def _tree(value: Any, leaves: dict[fx.Node, Any]) -> Any:
    """An expression as nested tuples of names, so that two spellings of the same calls are equal."""
    if isinstance(value, fx.Node):
        if value in leaves:
            return leaves[value]
        if value.op not in ("call_function", "call_method") or _name(value) in ("add_batch_dim", "remove_batch_dim"):
            return value
        if _name(value) in ("getitem", "index"):
            source, places = value.args
            places = places if isinstance(places, (tuple, list)) else (places,)
            return ("getitem", _tree(source, leaves), *(_tree(place, leaves) for place in places))
        if _name(value) in _MAKERS:  # from the tensor itself they take its kind alone
            return (_name(value), *(_tree(part, leaves) for part in value.args[1:]), *sorted(value.kwargs.items(), key=str))
        options = tuple(sorted((name, _tree(part, leaves)) for name, part in value.kwargs.items()))
        parts = [_tree(part, leaves) for part in value.args]
        name = _SYNONYMS.get(_name(value), _name(value))
        if name in _REVERSED and len(parts) == 2 and not options:
            name, parts = name[1:], parts[::-1]
        return (name, *(sorted(parts, key=str) if name in _EITHER_WAY else parts), *options)
    if isinstance(value, (tuple, list)):
        return tuple(_tree(part, leaves) for part in value)
    return value


def _uses(tree: Any, place: str) -> bool:
    return tree == place if isinstance(tree, str) else isinstance(tree, tuple) and any(_uses(part, place) for part in tree)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found, todo = set(nodes), list(nodes)
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _erase(graph: fx.Graph, tables: Sequence[fx.Node]) -> None:
    """Remove what only made tables of blocks: their ancestors, writes into those, and then vmap's own bookkeeping."""
    zone = _ancestors(tables)
    while writes := [n for n in graph.nodes if _name(n) == "setitem" and n not in zone and n.args[0] in zone]:
        zone |= _ancestors(writes)
    for node in reversed(list(graph.nodes)):
        if (node in zone or _name(node) == "add_batch_dim") and not node.users and node.op != "placeholder":
            graph.erase_node(node)
    if not any(_name(node) == "add_batch_dim" for node in graph.nodes):
        for node in [n for n in graph.nodes if _name(n) in _CONTROL and not n.users]:
            graph.erase_node(node)

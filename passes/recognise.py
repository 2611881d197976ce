"""Which nodes of a graph are one attention, and what does it compute?

From every softmax, whatever its spelling (`anchors`), the score is read back to the product of queries and keys and the
result forward through the product with the values. Each site comes out with its spec, or rejected with the node that stopped it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from sympy.logic.boolalg import Boolean
from torch import fx

from compile_attn.kernels.expr import H, Load, S
from compile_attn.kernels.mask import Bidirectional, Mask
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.passes.anchors import Anchor, find_anchors
from compile_attn.passes.axes import Frame, Rows, frames
from compile_attn.passes.contractions import is_contraction, operands
from compile_attn.passes.graph import Location, downstream, is_tensor, location, placeholders
from compile_attn.passes.heads import Operand
from compile_attn.passes.indices import op_name, shape_of
from compile_attn.passes.masks import classify, sees_itself
from compile_attn.passes.normalize import Normalized
from compile_attn.passes.outputs import OutputReader
from compile_attn.passes.pointwise import RULES
from compile_attn.passes.products import read_product
from compile_attn.passes.proof import implies
from compile_attn.passes.report import Rejected
from compile_attn.passes.score import ScoreError, read_score
from compile_attn.passes.symbolic import Reader
from compile_attn.passes.terms import Dot, Opaque, Unreadable, unreadable
from compile_attn.passes.values import boolean, number

__all__ = ["AttentionSite", "Operand", "recognise"]


@dataclass(frozen=True)
class AttentionSite:
    """One attention: its meaning, its operands, the node whose value the fused op replaces, and the nodes that then die."""

    where: Location
    spec: AttentionSpec
    q: tuple[Operand, ...]  # parts that stand side by side in the channels; nearly always one
    k: tuple[Operand, ...]
    v: Operand
    captured: tuple[fx.Node, ...]
    output: Operand
    replaced: frozenset[fx.Node]
    asked: str = ""  # what of its meaning is not the model's own, and who asked for it


def recognise(normalized: Normalized, *, paged: bool, positions: frozenset[fx.Node]) -> tuple[list[AttentionSite], list[Rejected]]:
    """All attention of a graph, in order. `positions`: inputs whose element t is t by contract (paged)."""
    graph = normalized.module.graph
    before = set(graph.nodes)
    anchors = list(find_anchors(graph))  # it adds the spelled-out form of SDPA nodes
    inputs = [n for n in placeholders(graph) if n not in normalized.constants]
    data = downstream(inputs) | set(inputs)
    tokens = downstream(n for n in inputs if is_tensor(n) and n not in positions)
    site_reader = _SiteReader(Reader(normalized.constants, positions, data), paged, data, tokens)
    sites, rejected = [], []
    for anchor in anchors:
        try:
            site = site_reader.read(anchor)
        except Unreadable as stop:
            rejected.append(stop.rejected)
            continue
        if site is not None:
            sites.append(site)
    needed = {node for site in sites for node in site.captured}
    needed |= {operand.node for site in sites for operand in (*site.q, *site.k, site.v)}
    for node in reversed(list(graph.nodes)):
        if node not in before and node not in needed and not node.users:
            graph.erase_node(node)
    return sites, rejected


class _SiteReader:
    """Reads one anchor after another; masks shared between layers are read once, by the reader's memo."""

    def __init__(self, reader: Reader, paged: bool, data: set[fx.Node], tokens: set[fx.Node]) -> None:
        self.reader, self.paged, self.data, self.tokens = reader, paged, data, tokens
        self.outputs = OutputReader(reader)

    def read(self, anchor: Anchor) -> AttentionSite | None:
        """The site of an anchor; None where a softmax is no attention at all. Raises Unreadable."""
        if anchor.refused is not None and anchor.scores is anchor.softmax:
            raise unreadable(anchor.softmax, *anchor.refused)
        if anchor.refused is not None:
            self._refuse(anchor, anchor.refused)
            return None
        first: Unreadable | None = None
        for frame in frames(anchor, self.reader.bounds):
            # The second try: sequences and heads on one axis, as in view(B * H, T, D). Every row of it is then a head of its own.
            for batched in (False,) if self.paged else (True, False):
                try:
                    return self._read(anchor, frame, batched)
                except Unreadable as stop:
                    first = first or stop
        assert first is not None
        raise first

    def _read(self, anchor: Anchor, frame: Frame, batched: bool) -> AttentionSite | None:
        value = anchor.score_at(self.reader, frame.index)
        if not value.has(Dot):
            self._no_product(anchor, frame, value)
            return None
        product = read_product(anchor, frame, value, batched, self.reader)
        rows = product.rows
        self._check_pageable(anchor, rows)
        output = self.outputs.values(anchor, frame, rows, number(value).xreplace(rows.values))
        v, dim_v = output.values, output.size
        mask, parts, captured = self._meaning(anchor, frame, product.score, rows, output.sink)
        parts["scale"] = float(parts["scale"]) * product.factor if "score" not in parts else 1.0
        if "score" in parts:
            parts["score"] = parts["score"].xreplace({S: S * sympy.Float(product.factor)})
        heads_kv = max(product.heads, v.heads)
        if heads_kv % min(product.heads, v.heads):
            why = f"keys and values have different numbers of heads ({product.heads} and {v.heads})"
            raise unreadable(anchor.softmax, why, "let one of them divide the other, or repeat the heads in the model")
        dims = product.channels
        if not (dims.is_Integer and dim_v.is_Integer):
            raise unreadable(anchor.softmax, f"head sizes are not constants: {dims} and {dim_v}", "mark only lengths dynamic")
        spec = AttentionSpec(rows.heads, heads_kv, int(dims), int(dim_v), mask=mask, **parts)
        replaced = self._dead(anchor, output.operand.node, [int(dot.args[0]) for dot in value.atoms(Dot)])
        where, out = location(anchor.softmax), output.operand
        return AttentionSite(where, spec, product.queries, product.keys, v.operand, captured, out, replaced)

    def _refuse(self, anchor: Anchor, why: tuple[str, str]) -> None:
        """What resembles a softmax and is none: nothing to do with attention unless a product of queries and keys is in it."""
        index = tuple(self.reader.bounds.symbol(f"a{dim}", size) for dim, size in enumerate(anchor.shape))
        value = anchor.score_at(self.reader, index)
        if value.has(Dot) or (not self.paged and self._unread(anchor, value) is not None):
            raise unreadable(anchor.softmax, *why)

    def _no_product(self, anchor: Anchor, frame: Frame, value: sympy.Basic) -> None:
        """A softmax without q.k: a router, a gate, a vocabulary. Rejected if it runs over an axis as long as the sequence, and,
        where lengths are constants, if a product of queries and keys leads to it all the same."""
        stop = self._unread(anchor, value)
        if frame.keys.size.is_Integer and (stop is None or self.paged):
            return
        why = "a softmax over tokens whose score is not one product of queries and keys"
        if stop is not None:
            stop = stop if op_name(stop) else stop.all_input_nodes[0]  # of several outputs it is one
            why = f"{why}: between the two stands {stop.name} ({op_name(stop)}), an op that cannot be read"
        raise unreadable(anchor.softmax, why, "write the score as q @ k.transpose(-1, -2) with elementwise terms")

    def _unread(self, anchor: Anchor, value: sympy.Basic) -> fx.Node | None:
        """The op at which reading the score has ended, where a product of queries and keys stands before it."""
        leaves = [self.reader.captured[int(load.args[0])] for load in value.atoms(Load)]
        leaves += [self.reader.opaque[int(opaque.args[0])] for opaque in value.atoms(Opaque)]
        behind = (leaf for leaf in leaves if leaf in self.data and self._from_product(leaf, anchor.shape[anchor.dim]))
        return next(behind, None)

    def _from_product(self, node: fx.Node, keys: sympy.Expr) -> bool:
        """Whether a product of two tensors of the call leads to this node, and no layer of weights makes something new of it.

        So a router after an attention is none. Weights that mix heads leave pairs of tokens as they are: two axes of keys, or one
        of their square.
        """
        seen, todo = {node}, [node]
        while todo:
            node = todo.pop()
            data = [source for source in node.all_input_nodes if source in self.data and op_name(source) != "sym_size"]
            if is_contraction(node) and self.data.issuperset(operands(node)):
                return True
            weighted = any(is_tensor(source) and source not in self.data for source in node.all_input_nodes)
            if weighted and op_name(node) not in RULES:
                data = [source for source in data if _has_pairs(node, keys) and _has_pairs(source, keys)]
            todo.extend(source for source in data if source not in seen)
            seen.update(data)
        return False

    def _check_pageable(self, anchor: Anchor, rows: Rows) -> None:
        if self.paged and rows.keys != rows.queries:
            why = f"{rows.queries} queries attend to {rows.keys} keys; a paged model's keys are those of its own tokens"
            raise unreadable(anchor.softmax, why, "remove memory keys and caches from the model: the pages are the cache")
        if self.paged and rows.keys.is_Integer:
            why = f"the sequence length is a constant, {rows.keys}"
            raise unreadable(anchor.softmax, why, "mark it dynamic, with at least 2 tokens")

    def _meaning(
        self, anchor: Anchor, frame: Frame, score: sympy.Expr, rows: Rows, gate: sympy.Expr | None
    ) -> tuple[Mask, dict, tuple[fx.Node, ...]]:  # type: ignore[type-arg]
        """Mask, the other parts of the spec, and the captured tensors, renumbered from 0."""
        if score.has(Dot) or any(name.name.startswith("a") and "_" in name.name for name in score.free_symbols):
            raise unreadable(
                anchor.softmax, f"the score could not be read: {score}", "keep to elementwise terms of q @ k.transpose(-1, -2)"
            )
        sinks = anchor.sinks_at(self.reader, frame.index)
        if sinks is not None and gate is not None:
            raise unreadable(anchor.softmax, "the site has a column of sinks and a factor of sinks", "write them as one column")
        sinks = gate if sinks is None else sinks
        try:
            read = read_score(score, rows.keys if rows.keys.is_Symbol else None, shift=sinks is None)
        except ScoreError as error:
            raise unreadable(anchor.softmax, error.reason, error.cure) from None
        visible: Boolean = read.visible
        self._check_zeroed(anchor, frame, rows, visible)
        parts: dict[str, object] = {"scale": read.scale, "softcap": read.softcap, "bias": read.bias}
        if read.score is not None:
            parts = {"score": read.score}
        if sinks is not None:
            parts["sinks"] = sink = number(sinks).xreplace(rows.values)
            if not sink.free_symbols <= {H} and not sink.has(Dot, Opaque):
                why = f"the sink {sink} is not one number per head"
                raise unreadable(anchor.softmax, why, "let sinks depend on the head alone")
        tensors = [part for part in (*parts.values(), visible) if isinstance(part, sympy.Basic)]
        if any(part.has(Opaque) or part.has(Dot) for part in tensors):
            why = "the score depends on a reduction over tokens that is not a shift of the row"
            raise unreadable(anchor.softmax, why, "leave out the reduction, or subtract it from all scores of a row alike")
        loads = sorted({int(load.args[0]) for part in tensors for load in part.atoms(Load)})
        captured = tuple(self.reader.captured[number] for number in loads)
        self._check_captured(captured)
        rename = {load: Load(loads.index(int(load.args[0])), *load.args[1:]) for part in tensors for load in part.atoms(Load)}
        parts = {k: v.xreplace(rename) if isinstance(v, sympy.Basic) else v for k, v in parts.items()}
        visible = visible.xreplace(rename)
        mask = Bidirectional() if visible is sympy.true else classify(visible, rows.heads)
        if not isinstance(mask, Bidirectional) and not sees_itself(visible, rows.heads):
            why = f"a query may see no key at all ({mask.words()}), and then the model's fill value decides"
            raise unreadable(anchor.softmax, why, "let every query see at least itself")
        if self.paged and not mask.causal():
            why = f"a query sees keys after it ({mask.words()}); pages hold only what came before"
            raise unreadable(anchor.softmax, why, "only causal attention can be paged")
        return mask, parts, captured

    def _check_zeroed(self, anchor: Anchor, frame: Frame, rows: Rows, visible: Boolean) -> None:
        """What is hidden after the softmax must have been hidden before it: else the row no longer adds up to 1."""
        for mask in anchor.zeroed:
            after = boolean(self.reader.operand(mask, frame.index)).xreplace(rows.values)
            if not implies(after, sympy.Not(visible), rows.heads):
                why = f"probabilities are set to 0 where {mask.name}, and not all of them were masked before the softmax"
                raise unreadable(anchor.softmax, why, "mask the scores by the same mask, before the softmax")

    def _check_captured(self, captured: Iterable[fx.Node]) -> None:
        cure = "a paged score may read parameters, buffers and positions only"
        for node in captured:
            if not self.paged or node not in self.data:
                continue
            if node.op == "placeholder":
                raise unreadable(node, f"the score depends on the input {node.name}, which is data of the call", cure)
            what = "which is computed from the tokens" if node in self.tokens else "an op that cannot be read"
            why = f"the score depends on {node.name} ({op_name(node) or node.op}), {what}"
            raise unreadable(node, why, cure)

    def _dead(self, anchor: Anchor, output: fx.Node, products: list[int]) -> frozenset[fx.Node]:
        """The nodes that die with the site; Unreadable if something between q.k and the output is used elsewhere."""
        inside = self._between([self.reader.contractions[number] for number in products], output)
        for node in inside - {output}:
            for user in node.users:
                if user not in inside and op_name(user) != "sym_size":
                    what = "probabilities are" if node in downstream([anchor.softmax]) | {anchor.softmax} else "scores are"
                    why = f"the {what} also used by {user.name} ({op_name(user) or user.op})"
                    raise unreadable(node, why, "return no attention weights")
        return frozenset(inside)

    def _between(self, products: list[fx.Node], output: fx.Node) -> set[fx.Node]:
        after = downstream(products) | set(products)
        found, todo = {output}, [output]
        while todo:
            for node in todo.pop().all_input_nodes:
                if node in after and node not in found:
                    found.add(node)
                    todo.append(node)
        return found


def _has_pairs(node: fx.Node, keys: sympy.Expr) -> bool:
    """Of tokens: a symbol may be written in several ways, but what it stands for are tokens."""
    shape = shape_of(node) if is_tensor(node) else ()
    tokens = [size for size in shape if (size == keys if keys.is_Integer else not size.is_Integer)]
    return len(tokens) > 1 or keys**2 in shape

"""What is one element of a node, as a function of its index?

`Reader.at(node, index)` interprets an ATen graph as mathematics, on demand, down to leaves: `Load(k, ...)` of a captured
tensor, or `Dot(k, ...)`, an element of a contraction. No spelling is known here, only what each op computes.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from compile_attn.kernels.expr import Load
from compile_attn.passes import pointwise, symbolic_makers
from compile_attn.passes.constants import is_affine, read_constant
from compile_attn.passes.contractions import adds, is_contraction, operands
from compile_attn.passes.graph import is_tensor, val
from compile_attn.passes.indices import Bounds, Index, as_expr, broadcast, index_map, op_name
from compile_attn.passes.terms import Dot, Opaque
from compile_attn.passes.values import cast, constant, number

RULES = {**pointwise.RULES, **symbolic_makers.RULES}


class Reader:
    """Reads one graph. `positions` are inputs whose element at (.., t) is t by contract.

    `data`: the nodes that differ from call to call. A contraction of two of them is a term of its own; any other is a tensor.
    """

    def __init__(
        self,
        constants: Mapping[fx.Node, torch.Tensor],
        positions: frozenset[fx.Node] = frozenset(),
        data: Container[fx.Node] = frozenset(),
    ) -> None:
        self.constants, self.positions, self.data = constants, positions, data
        self.bounds = Bounds()
        self.captured: list[fx.Node] = []
        self.contractions: list[fx.Node] = []
        self.opaque: list[fx.Node] = []
        self.read_constants: set[fx.Node] = set()
        self._memo: dict[tuple[fx.Node, Index], sympy.Basic] = {}

    def at(self, node: Any, index: Index) -> sympy.Basic:
        """The element at `index`; numbers are themselves."""
        if not isinstance(node, fx.Node):
            return constant(node)
        if not is_tensor(node):
            return as_expr(node)
        key = (node, index)
        if key not in self._memo:
            self._memo[key] = self._read(node, index)
        return self._memo[key]

    def operand(self, node: Any, index: Index) -> sympy.Basic:
        """An operand that broadcasts to the output that `index` is of."""
        return self.at(node, broadcast(index, node) if is_tensor(node) else index)

    def load(self, node: fx.Node, index: Index) -> sympy.Basic:
        """An element of a tensor that stays a tensor."""
        if node not in self.captured:
            self.captured.append(node)
        value = Load(self.captured.index(node), *index)
        return sympy.Ne(value, 0) if val(node).dtype == torch.bool else value

    def _read(self, node: fx.Node, index: Index) -> sympy.Basic:
        if node in self.positions:
            return index[-1]
        if node in self.constants:
            value = read_constant(self.constants[node], index)
            if value is None and is_affine(self.constants[node]):
                first, second = (self.load(node, (*index[:-1], sympy.Integer(place))) for place in (0, 1))
                value = first + (second - first) * index[-1]
            if value is not None:
                self.read_constants.add(node)
                return value
            return self.load(node, index)
        mapped = index_map(node, index, self.bounds)
        if mapped is not None:
            source, place = mapped
            if _out_of(place, source):
                return self.load(node, index)
            return cast(self.at(source, place), val(source).dtype, val(node).dtype)
        if is_contraction(node) and all(part in self.data for part in operands(node)):
            return self._contraction(node, index)
        rule = RULES.get(op_name(node))
        if rule is not None:
            try:
                return rule(self, node, index)
            except NotImplementedError:
                pass
        return self.load(node, index)

    def _contraction(self, node: fx.Node, index: Index) -> sympy.Basic:
        if node not in self.contractions:
            self.contractions.append(node)
        product = Dot(self.contractions.index(node), *index)
        if adds(node):
            beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
            return constant(alpha) * product + constant(beta) * number(self.operand(node.args[0], index))
        return product

    def opaque_at(self, node: fx.Node, index: Index) -> sympy.Basic:
        """A value that is only known not to depend on what the index lacks."""
        if node not in self.opaque:
            self.opaque.append(node)
        return Opaque(self.opaque.index(node), *index)


def _out_of(index: Index, node: fx.Node) -> bool:
    """Whether a constant index is outside a dim that is known: such a read is never interpreted."""
    return any(bool(place.is_negative) for place in index)

"""Is a rewritten graph well formed, for every number of tokens, sequences and rows?

The graph is run on fake tensors of fresh symbolic sizes, so that nothing that Dynamo assumed about the first call is left.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode  # stable in practice: what torch.export's own users import
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from compile_attn.passes.bounds import NotABound, exception, upper_bound
from compile_attn.passes.graph import placeholders

# First-call sizes that the inner compiler sees as hints: primes, so that no two symbols are unified by having equal hints.
_HINTS = (67, 17, 19, 23, 29, 31, 37, 41)


class FreshInputs:
    """Fake inputs with fresh symbols: every symbol of the old graph becomes a new one of range [2, inf)."""

    def __init__(self, graph: fx.Graph) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), static_shapes=False)
        self._symbols: dict[object, torch.SymInt] = {}
        self.values = [self._fresh(node) for node in placeholders(graph)]

    def _fresh(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if not isinstance(value, torch.Tensor):
            return value
        shape = [self._size(n) for n in value.shape]
        stride = value.stride() if all(isinstance(n, int) for n in value.stride()) else _contiguous(shape)
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    def _size(self, length: int | torch.SymInt) -> int | torch.SymInt:
        if isinstance(length, int):
            return length
        key = length.node.expr  # the simplified sympy expression: equal for sizes that Dynamo has unified
        if key not in self._symbols:
            self._symbols[key] = self._new_symbol(len(self._symbols))
        return self._symbols[key]

    def _new_symbol(self, number: int) -> torch.SymInt:
        # create_symbol / create_symintnode are what FakeTensorMode itself calls for a dynamic dim; there is no public way to
        # make a fake tensor whose sizes are free of a real tensor's.
        from torch._dynamo.source import ConstantSource

        env = self.mode.shape_env
        assert env is not None
        source = ConstantSource(f"paged_attn_size_{number}")
        hint = _HINTS[number % len(_HINTS)] + 64 * (number // len(_HINTS))
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        return env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]


def _contiguous(shape: list[int | torch.SymInt]) -> list[int | torch.SymInt]:
    strides: list[int | torch.SymInt] = [1]
    for length in reversed(shape[1:]):
        strides.insert(0, strides[0] * length)
    return strides


def verify(module: fx.GraphModule, inputs: FreshInputs) -> None:
    """Lint the graph and run it on fake tensors; every node's `val` is made anew. Raises what the run raises.

    A compiler that traces the graph on these inputs, as Inductor does, makes this run itself.
    """
    module.graph.lint()
    with inputs.mode, enable_python_dispatcher():  # as AOTAutograd traces: C++ composite kernels want constant sizes
        _Propagate(module, inputs.mode).run(*inputs.values)


def assumed_bounds(inputs: FreshInputs) -> dict[sympy.Symbol, int]:
    """How large the sizes may be, by what the run or a compiler has assumed: an index of 32 bits, say.

    Raises NotABound where something else was assumed but for `excepted`, so that the program would be wrong for other sizes.
    """
    return _assumed(inputs)[0]


def excepted(inputs: FreshInputs) -> list[tuple[int, int, int]]:
    """Single sizes for which the compiled program may be wrong: (which input, which dimension, which size).

    Inductor asks whether two strides are the same, say, and goes on as for a length for which they are not.
    """
    found = _assumed(inputs)[1]
    shapes = [(place, x.shape) for place, x in enumerate(inputs.values) if isinstance(x, torch.Tensor)]
    sizes: list[tuple[int, int, Any]] = [(place, dim, size) for place, shape in shapes for dim, size in enumerate(shape)]
    symbols = [(place, dim, size.node.expr) for place, dim, size in sizes if isinstance(size, torch.SymInt)]
    where = [one for one in symbols if one[2] in found]
    if missing := found.keys() - {symbol for _, _, symbol in where}:
        raise NotABound(", ".join(f"{symbol} != {sorted(found[symbol])}" for symbol in missing))
    return [(place, dim, length) for place, dim, symbol in where for length in sorted(found[symbol])]


def _assumed(inputs: FreshInputs) -> tuple[dict[sympy.Symbol, int], dict[sympy.Symbol, set[int]]]:
    env = inputs.mode.shape_env
    assert env is not None
    fixed = [(symbol, value) for symbol, value in env.replacements.items() if not (_by_data(symbol) and _by_data(value))]
    if fixed:
        raise NotABound(", ".join(f"{symbol} = {value}" for symbol, value in fixed))
    bounds: dict[sympy.Symbol, int] = {}
    exceptions: dict[sympy.Symbol, set[int]] = {}
    for guard in env.guards:
        symbol = next(iter(guard.expr.free_symbols), sympy.Symbol("constant"))
        if isinstance(guard.expr, sympy.Ne):
            if (length := exception(guard.expr, symbol)) is not None:
                exceptions.setdefault(symbol, set()).add(length)
        elif (bound := upper_bound(guard.expr, symbol)) is not None:
            bounds[symbol] = min(bound, bounds.get(symbol, bound))
    return bounds, exceptions


def _by_data(size: sympy.Basic) -> bool:
    """Whether a size is one that data decides, as of torch.where. Tracing again names it again: the names are then equal."""
    return isinstance(size, sympy.Symbol) and size.name.startswith("u")


class _Propagate(fx.Interpreter):
    """Record each node's fake value, and name the node that fails."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module)
        self._mode = mode

    def run_node(self, n: fx.Node) -> Any:
        with torch.no_grad():
            value = super().run_node(n)
        n.meta["val"] = value
        return value

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, torch.Tensor) else value

"""How does a spec travel as text, through a graph, a file or a log?

Python-like text that a person can read, exact in every float, read back through `ast` with a whitelist: nothing is executed.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from compile_attn.kernels import expr as language

_SYMBOLS = {symbol.name: symbol for symbol in (language.S, language.B, language.H, language.I, language.J)}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name)
    for name in "floor ceiling Mod Min Max Abs tanh exp log sqrt sin cos sign erf Piecewise Eq Ne And Or Not Xor".split()
} | {"Load": language.Load, "Round": language.Round, "Trunc": language.Trunc}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
    ast.BitAnd: sympy.And,
    ast.BitOr: sympy.Or,
    ast.BitXor: sympy.Xor,
}
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: sympy.Lt,
    ast.LtE: sympy.Le,
    ast.Gt: sympy.Gt,
    ast.GtE: sympy.Ge,
    ast.Eq: sympy.Eq,
    ast.NotEq: sympy.Ne,
}


class _Exact(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, value: sympy.Float) -> str:
        return repr(float(value))

    def _print_Infinity(self, value: object) -> str:
        return "oo"


def print_expr(expr: sympy.Basic) -> str:
    """The expression as text that `parse` reads back to an equal one."""
    return str(_Exact({"full_prec": True}).doprint(expr))


def parse(text: str, constructors: dict[str, Callable[..., Any]] | None = None) -> Any:
    """Read an expression, or with `constructors` a value built by those names. ValueError for anything else."""
    names = {**_FUNCTIONS, **(constructors or {})}
    try:
        return _read(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f"not the text of a spec: {text[:200]!r} ({error})") from None


def _read(node: ast.AST, names: dict[str, Callable[..., Any]]) -> Any:
    match node:
        case ast.Constant(value=bool() | None):
            return {True: sympy.true, False: sympy.false, None: None}[node.value]
        case ast.Constant(value=int()):
            return sympy.Integer(node.value)
        case ast.Constant(value=float()):
            return sympy.Float(node.value)
        case ast.Name(id="oo"):
            return sympy.oo
        case ast.Name(id=name):
            return _SYMBOLS[name]
        case ast.BinOp(op=ast.Mult()):  # a chain at once: sympy distributes a number over a sum in a product of two
            return sympy.Mul(*(_read(factor, names) for factor in _factors(node)))
        case ast.BinOp(left=left, op=op, right=right):
            return _BINARY[type(op)](_read(left, names), _read(right, names))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand, names)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return sympy.Not(_read(operand, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARE[type(op)](_read(left, names), _read(right, names))
        case ast.Tuple(elts=parts):
            return tuple(_read(part, names) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return names[name](*(_read(a, names) for a in args), **{str(k.arg): _read(k.value, names) for k in keywords})
    raise KeyError(ast.dump(node)[:80])


def _factors(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left), *_factors(node.right)]
    return [node]

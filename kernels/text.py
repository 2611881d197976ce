"""How does a spec travel as text, through a graph, a file or a log?

Python-like text that a person can read, exact in every float, read back through `ast` with a whitelist; nothing runs.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy.logic.boolalg import ITE
from sympy.printing.str import StrPrinter

from compile_attn.kernels import expr as language

_SYMBOLS = {symbol.name: symbol for symbol in (language.S, language.B, language.H, language.I, language.J)}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name)
    for name in [
        "floor",
        "ceiling",
        "Mod",
        "Min",
        "Max",
        "Abs",
        "tanh",
        "exp",
        "log",
        "sqrt",
        "sin",
        "cos",
        "sign",
        "erf",
        "Piecewise",
        "Eq",
        "Ne",
        "Xor",
    ]
} | {"Load": language.Load, "Round": language.Round, "Trunc": language.Trunc, "ITE": ITE}
_NODES = {name: getattr(sympy, name) for name in ["Add", "Mul", "Pow", "And", "Or", "Not", "Lt", "Le", "Gt", "Ge", "Rational"]}
_CONSTANTS = {"oo": sympy.oo, "nan": sympy.nan, "pi": sympy.pi, "E": sympy.E}
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
_CLASSES: dict[str, type] = {
    **{name: each for name, each in _NODES.items() if isinstance(each, type)},
    **{"Lt": sympy.StrictLessThan, "Le": sympy.LessThan, "Gt": sympy.StrictGreaterThan, "Ge": sympy.GreaterThan},
    **{"Eq": sympy.Equality, "Ne": sympy.Unequality},
    **{name: each for name, each in _FUNCTIONS.items() if isinstance(each, type)},
}
_NAMES = {each: name for name, each in _CLASSES.items()}


class _Exact(StrPrinter):  # type: ignore[misc]
    def _print_Float(self, value: sympy.Float) -> str:
        return repr(float(value))


class _Literal(_Exact):
    """Every node by its name: no operator, so nothing that reading could rearrange."""

    def emptyPrinter(self, expr: Any) -> str:
        if isinstance(expr, sympy.Tuple) or not isinstance(expr, sympy.Basic) or not expr.args:
            return str(super().emptyPrinter(expr))
        if expr.func not in _NAMES:
            raise ValueError(f"no text for {expr.func.__name__}; a spec may hold {', '.join(sorted(_CLASSES))}")
        return f"{_NAMES[expr.func]}({', '.join(map(self._print, expr.args))})"

    _print_Add = _print_Mul = _print_Pow = _print_And = _print_Or = _print_Not = emptyPrinter
    _print_Relational = _print_Piecewise = _print_Xor = _print_ITE = emptyPrinter


@functools.lru_cache(maxsize=4096)
def print_expr(expr: sympy.Basic) -> str:
    """The expression as text that `parse` reads back to an equal one. ValueError for what no spec may hold.

    Numbers are doubles, as in torch: one of another precision, or smaller than a double can be, is rounded to a double.
    """
    doubles = {each: sympy.Float(float(each)) for each in expr.atoms(sympy.Float)}
    expr = expr.xreplace({each: double for each, double in doubles.items() if each._prec != 53 or each != double})
    strange = {str(each) for each in expr.free_symbols - set(_SYMBOLS.values())}
    if strange:
        raise ValueError(f"a spec is written in s, b, h, i, j, not in {', '.join(sorted(strange))}: {expr}")
    text = str(_Exact({"order": "none"}).doprint(expr))
    if _reads_back(text, expr):
        return text
    literal = f"_({_Literal({'order': 'none'}).doprint(expr)})"  # a form that sympy would simplify when reading
    if not _reads_back(literal, expr):
        raise ValueError(f"no text for {sympy.srepr(expr)}")
    return literal


def _reads_back(text: str, expr: sympy.Basic) -> bool:
    try:
        return bool(parse(text) == expr)
    except ValueError:
        return False


def parse(text: str, constructors: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """Read an expression, or with `constructors` a value built by those names. ValueError for anything else."""
    try:
        return _read(ast.parse(text, mode="eval").body, {**_FUNCTIONS, **(constructors or {})})
    except (SyntaxError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the text of a spec: {text[:200]!r} ({error})") from None


def _read(node: ast.AST, names: Mapping[str, Callable[..., Any]]) -> Any:
    match node:
        case ast.Constant(value=bool() | None):
            return None if node.value is None else sympy.sympify(bool(node.value))
        case ast.Constant(value=int()):
            return sympy.Integer(node.value)
        case ast.Constant(value=float()):
            return sympy.Float(node.value)
        case ast.Name(id=name):
            return _SYMBOLS[name] if name in _SYMBOLS else _CONSTANTS[name]
        case ast.BinOp(op=ast.Mult()):  # a chain at once: sympy distributes a number over a sum in a product of two
            return sympy.Mul(*(_read(factor, names) for factor in _factors(node)))
        case ast.BinOp(left=left, op=op, right=right):
            first, second = _read(left, names), _read(right, names)
            if isinstance(op, ast.Div) and first.is_Integer and second.is_Integer and second != 0:
                return sympy.Rational(first.p, second.p)  # also where sympy would leave a product of -1 and 1/4
            return _BINARY[type(op)](first, second)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_read(operand, names)
        case ast.UnaryOp(op=ast.Invert(), operand=operand):
            return sympy.Not(_read(operand, names))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _COMPARE[type(op)](_read(left, names), _read(right, names))
        case ast.Tuple(elts=parts):
            return tuple(_read(part, names) for part in parts)
        case ast.Call(func=ast.Name(id="_"), args=[part], keywords=[]):
            with sympy.evaluate(False):
                return _read(part, _CLASSES)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return names[name](*(_read(a, names) for a in args), **{str(k.arg): _read(k.value, names) for k in keywords})
    raise KeyError(ast.dump(node)[:80])


def _factors(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return [*_factors(node.left), *_factors(node.right)]
    return [node]

"""How is an attention written as mathematics that every browser sets by itself, in MathML Core?

The formula is printed from the expressions that kernels run, so that what is read on a page is what is computed. Numbers have six
digits.
"""

from __future__ import annotations

import html
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import ITE

from compile_attn.kernels.expr import B, H, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec

_OR, _AND, _RELATION, _SUM, _PRODUCT, _POWER, _ATOM = range(7)  # how tightly a piece of a formula holds together
_LONG = 6  # parts of a condition that stand below each other
_DIGITS = 6  # of a number
_TYPES = {7: "bf16", 10: "fp16", 23: "fp32", 52: "fp64"}  # by explicit mantissa bits
_RELATIONS = {"==": "=", "!=": "≠", "<": "&lt;", "<=": "≤", ">": "&gt;", ">=": "≥"}
_CALLED = {
    sympy.exp: "exp",
    sympy.tanh: "tanh",
    sympy.log: "log",
    sympy.sin: "sin",
    sympy.cos: "cos",
    sympy.erf: "erf",
    sympy.sign: "sign",
}
_CALLED |= {Trunc: "trunc", sympy.Min: "min", sympy.Max: "max"}
_FENCES = {sympy.floor: ("⌊", "⌋"), sympy.ceiling: ("⌈", "⌉"), sympy.Abs: ("|", "|")}
_BRACES = (("prefix", "{"), ("postfix", "}"))
_ONE = re.compile(r"<(m[ino])>[^<]*</\1>")  # an element that needs no row around it
_Piece = tuple[str, int]  # markup, and how tightly it holds together


@dataclass(frozen=True)
class Formula:
    """Lines of MathML, each a <math> element; and what their letters mean, as (MathML, words)."""

    lines: tuple[str, ...]
    letters: tuple[tuple[str, str], ...]


def formula(spec: AttentionSpec) -> Formula:
    """output = a sum over visible keys of weights and values; score = ...; visible = a set of keys."""
    score, visible, sinks = spec.expression(), spec.mask.predicate(), spec.sinks or sympy.S.Zero
    output, seen = _sub("o", _index(score, visible, sinks)), _sub("V", _index(visible))
    one, other = (_sub("z", _index(score) + key) for key in "jl")
    weights = _sum(_in("l", seen), _exp(other))
    if spec.sinks is not None:
        weights = _exp(_print(spec.sinks, spec)[0]) + _op("+") + weights
    total = _sum(_in("j", seen), f"<mfrac>{_row(_exp(one))}{_row(weights)}</mfrac>" + _sub("v", "j"))
    keys = _text("all keys") if visible == sympy.true else _set(_print(visible, spec)[0])
    lines = [(output, total), (one, _score(spec)), (seen, keys)]
    return Formula(tuple(_math(left + _op("=") + right) for left, right in lines), tuple(_letters([score, visible, sinks])))


def _score(spec: AttentionSpec) -> str:
    """In the order of its meaning, which sympy would rearrange: scale, softcap, bias."""
    if spec.score is not None or spec.softcap is None:
        return _print(spec.expression(), spec)[0]
    cap = _number(sympy.Float(spec.softcap))[0]
    scaled = _print(sympy.Float(spec.scale) * S, spec)[0]
    capped = cap + _op("·") + _applied("tanh", f"<mfrac>{_row(scaled)}{_row(cap)}</mfrac>")
    if spec.bias is None:
        return capped
    sign, bias = ("−", -spec.bias) if _negative(spec.bias) else ("+", spec.bias)
    return capped + _op(sign) + _held(bias, _PRODUCT, spec)


def _index(*parts: sympy.Basic) -> str:
    """b and h, where a part depends on them, and i."""
    symbols = set().union(*(part.free_symbols for part in parts))
    return "".join(symbol.name for symbol in (B, H) if symbol in symbols) + "i"


def _letters(parts: Sequence[sympy.Basic]) -> list[tuple[str, str]]:
    symbols = set().union(*(part.free_symbols for part in parts))
    letters = [("<mi>q</mi><mo>,</mo><mi>k</mi><mo>,</mo><mi>v</mi>", "the rows of a head's queries, keys and values")]
    letters += [("<mi>i</mi><mo>,</mo><mi>j</mi>", "positions of the query and of the key")]
    letters += [("<mi>h</mi>", "the query head, from 0")] if H in symbols else []
    letters += [("<mi>b</mi>", "the sequence")] if B in symbols else []
    numbers = sorted({int(load.args[0]) for part in parts for load in part.atoms(Load)})
    letters += [(f"<msub><mi>t</mi><mn>{number}</mn></msub>", f"captured tensor {number} of the site") for number in numbers]
    rounded = sorted({int(each.args[0]) for part in parts for each in part.atoms(Round)})
    return letters + [(f"<mi>{_type(bits)}</mi>", f"rounded to {bits} bits of mantissa") for bits in rounded]


def _print(expr: Any, spec: AttentionSpec) -> _Piece:
    """Any expression that a spec may hold. What is not known here is printed as its name and arguments: nothing is left out."""
    if expr == S:
        return _sub("q", "i") + _op("·") + _sub("k", "j"), _PRODUCT
    show = _PRINTERS.get(expr.func)
    if show is not None:
        piece: _Piece = show(expr, spec)
        return piece
    if isinstance(expr, Relational):
        left, right = (_held(part, _SUM, spec) for part in expr.args)
        return left + _op(_RELATIONS[expr.rel_op]) + right, _RELATION
    if expr.func in _FENCES:
        left, right = _FENCES[expr.func]
        return _fenced(left, _print(expr.args[0], spec)[0], right), _ATOM
    if expr.is_Symbol:
        return f"<mi>{html.escape(expr.name)}</mi>", _ATOM
    if expr.is_Number or expr.is_NumberSymbol:
        return _number(expr)
    if expr in (sympy.true, sympy.false):
        return f"<mtext>{'always' if expr else 'never'}</mtext>", _ATOM
    return _call(_CALLED.get(expr.func, expr.func.__name__), expr.args, spec)


def _held(expr: Any, least: int, spec: AttentionSpec) -> str:
    """In parentheses, unless it holds together at least so tightly."""
    markup, bound = _print(expr, spec)
    return _row(markup) if bound >= least else _fenced("(", markup, ")")


def _add(expr: Any, spec: AttentionSpec) -> _Piece:
    """The product of queries and keys first, then what is added, then what is subtracted."""
    terms = sorted(expr.args, key=lambda term: (_negative(term), not term.has(S), term.is_number, str(term)))
    markup = ""
    for at, term in enumerate(terms):
        sign = _op("−") if _negative(term) else _op("+") if at else ""
        markup += sign + _held(-term if _negative(term) else term, _PRODUCT, spec)
    return markup, _SUM


def _negative(term: Any) -> bool:
    return bool(term.as_coeff_Mul()[0].is_negative)


def _mul(expr: Any, spec: AttentionSpec) -> _Piece:
    if _negative(expr):
        return _op("−") + _held(-expr, _PRODUCT, spec), _SUM
    above: list[str] = []
    below: list[str] = []
    for factor in sorted(expr.args, key=lambda each: (not each.is_number, not each.has(S), each.is_Add, str(each))):
        if root := _root(factor, spec):
            below.append(root)
        elif factor.is_Pow and factor.exp.is_number and factor.exp.is_negative:
            below.append(_held(factor.base**-factor.exp, _PRODUCT, spec))
        elif factor.is_Rational and factor.q != 1:
            above += [] if factor.p == 1 else [f"<mn>{factor.p}</mn>"]
            below.append(f"<mn>{factor.q}</mn>")
        elif factor != sympy.Float(1):  # a scale of 1.0
            above.append(_held(factor, _PRODUCT, spec))
    product = _op("·").join(above) or "<mn>1</mn>"
    if not below:
        return product, _PRODUCT
    return f"<mfrac>{_row(product)}{_row(_op('·').join(below))}</mfrac>", _POWER


def _root(factor: Any, spec: AttentionSpec) -> str:
    """A number that is 1 / sqrt(head size), as a double or a float has it, is told as what it is."""
    root = math.sqrt(spec.head_dim)
    if root.is_integer() or not factor.is_Float:
        return ""
    known = {spec.head_dim**-0.5, 1 / root}
    known |= {struct.unpack("f", struct.pack("f", value))[0] for value in known}
    return f"<msqrt><mn>{spec.head_dim}</mn></msqrt>" if float(factor) in known else ""


def _pow(expr: Any, spec: AttentionSpec) -> _Piece:
    if expr.exp == sympy.Rational(1, 2):
        return f"<msqrt>{_print(expr.base, spec)[0]}</msqrt>", _ATOM
    if expr.exp.is_number and expr.exp.is_negative:
        return f"<mfrac><mn>1</mn>{_row(_print(expr.base**-expr.exp, spec)[0])}</mfrac>", _POWER
    return f"<msup>{_held(expr.base, _ATOM, spec)}{_row(_print(expr.exp, spec)[0])}</msup>", _POWER


def _joined(sign: str, bound: int, least: int) -> Any:
    def show(expr: Any, spec: AttentionSpec) -> _Piece:
        """Short conditions first; many of them below each other."""
        parts = sorted(expr.args, key=lambda part: (part.has(Load), sympy.count_ops(part), str(part)))
        shown = [_held(part, least, spec) for part in parts]
        if sympy.count_ops(expr) <= 2 * _LONG and len(parts) < _LONG:
            return _op(sign).join(shown), bound
        first, *others = shown
        rows = [first, *(_op(sign) + part for part in others)]
        return _table([[row] for row in rows]), bound

    return show


def _not(expr: Any, spec: AttentionSpec) -> _Piece:
    return _op("¬") + _held(expr.args[0], _ATOM, spec), _RELATION


def _mod(expr: Any, spec: AttentionSpec) -> _Piece:
    left, right = _held(expr.args[0], _PRODUCT, spec), _held(expr.args[1], _POWER, spec)
    return f"{left}<mspace width='.25em'></mspace><mo>mod</mo><mspace width='.25em'></mspace>{right}", _SUM


def _load(expr: Any, spec: AttentionSpec) -> _Piece:
    tensor = f"<msub><mi>t</mi><mn>{int(expr.args[0])}</mn></msub>"
    return tensor + _fenced("[", _op(",").join(_print(place, spec)[0] for place in expr.args[1:]), "]"), _ATOM


def _round(expr: Any, spec: AttentionSpec) -> _Piece:
    return _call(_type(int(expr.args[0])), expr.args[1:], spec)


def _type(bits: int) -> str:
    return _TYPES.get(bits, f"round{bits}")


def _piecewise(expr: Any, spec: AttentionSpec) -> _Piece:
    cases = [(expr.args[1], expr.args[0]), (expr.args[2], sympy.true)] if isinstance(expr, ITE) else list(expr.args)
    rows = [
        [_print(value, spec)[0], "<mtext>otherwise</mtext>" if met == sympy.true else _text("if ") + _print(met, spec)[0]]
        for value, met in cases
    ]
    return _row("<mo form='prefix' stretchy='true'>{</mo>" + _table(rows)), _ATOM


def _call(name: str, args: Sequence[Any], spec: AttentionSpec) -> _Piece:
    inside = _op(",").join(_print(arg, spec)[0] for arg in args)
    return _applied(html.escape(name), inside), _ATOM


def _number(number: Any) -> _Piece:
    if number.is_negative:
        return _op("−") + _number(-number)[0], _SUM
    if number.is_infinite:
        return "<mi>∞</mi>", _ATOM
    if number.is_Rational and number.q != 1:
        return f"<mfrac><mn>{number.p}</mn><mn>{number.q}</mn></mfrac>", _POWER
    if number.is_NumberSymbol:
        return f"<mi>{'π' if number == sympy.pi else 'e'}</mi>", _ATOM
    digits, _, exponent = (str(number) if number.is_Integer else f"{float(number):.{_DIGITS}g}").partition("e")
    if not exponent:
        return f"<mn>{digits}</mn>", _ATOM
    power = f"<msup><mn>10</mn>{_row(_number(sympy.Integer(exponent))[0])}</msup>"
    return (power if digits == "1" else f"<mn>{digits}</mn>{_op('·')}{power}"), _PRODUCT


def _math(inside: str) -> str:
    return f"<math display='block'>{inside}</math>"


def _row(markup: str) -> str:
    return markup if _ONE.fullmatch(markup) else f"<mrow>{markup}</mrow>"


def _op(sign: str) -> str:
    return f"<mo>{sign}</mo>"


def _text(words: str) -> str:
    return f"<mtext>{words.replace(' ', '&#xA0;')}</mtext>"


def _sub(name: str, index: str) -> str:
    return f"<msub><mi>{name}</mi><mrow>{''.join(f'<mi>{letter}</mi>' for letter in index)}</mrow></msub>"


def _exp(power: str) -> str:
    """Not a power of e: what stands small and high is hard to read."""
    return _applied("exp", power)


def _applied(name: str, inside: str) -> str:
    return f"<mi>{name}</mi><mo>&#x2061;</mo>" + _fenced("(", inside, ")")


def _in(letter: str, space: str) -> str:
    return f"<mi>{letter}</mi>{_op('∈')}{space}"


def _sum(over: str, inside: str) -> str:
    return f"<munder>{_op('∑')}{_row(over)}</munder>{_row(inside)}"


def _set(condition: str) -> str:
    left, right = (f"<mo form='{form}' stretchy='{str('mtable' in condition).lower()}'>{brace}</mo>" for form, brace in _BRACES)
    return _row(f"{left}<mi>j</mi>{_op(':')}{_row(condition)}{right}")


def _fenced(left: str, inside: str, right: str) -> str:
    return _row(f"<mo form='prefix'>{left}</mo>{inside}<mo form='postfix'>{right}</mo>")


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "<mtable>" + "".join("<mtr>" + "".join(f"<mtd>{cell}</mtd>" for cell in row) + "</mtr>" for row in rows) + "</mtable>"


_PRINTERS: dict[Any, Any] = {
    sympy.Add: _add,
    sympy.Mul: _mul,
    sympy.Pow: _pow,
    sympy.And: _joined("∧", _AND, _RELATION),
    sympy.Or: _joined("∨", _OR, _AND),
    sympy.Xor: _joined("⊕", _OR, _ATOM),
    sympy.Not: _not,
    sympy.Mod: _mod,
    Load: _load,
    Round: _round,
    sympy.Piecewise: _piecewise,
    ITE: _piecewise,
}

"""How does a score read as Triton source?

`print_score` writes a module of three functions, in the arithmetic of `evaluate`: whole numbers exact, everything else
float32. What does not depend on the key goes to `per_row`, outside the loop over keys; what occurs twice gets a name.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import sympy
from sympy.logic.boolalg import ITE, Boolean

from compile_attn.kernels.expr import B, H, I, J, Load, Round, S, Trunc
from compile_attn.kernels.spec import AttentionSpec

# How tightly a text binds: what it must exceed to stand without parentheses.
_OR, _COMPARE, _ADD, _MUL, _ATOM = range(5)
_INFIX = {
    sympy.And: (" & ", _COMPARE),  # Python's & binds more tightly than its comparisons: those are always parenthesised
    sympy.Or: (" | ", _COMPARE),
    sympy.Xor: (" ^ ", _COMPARE),
}
_COMPARISONS = {sympy.Eq: "==", sympy.Ne: "!=", sympy.Lt: "<", sympy.Le: "<=", sympy.Gt: ">", sympy.Ge: ">="}
_REAL = {sympy.exp: "tl.exp", sympy.log: "tl.log", sympy.sin: "tl.sin", sympy.cos: "tl.cos"}
_REAL |= {sympy.erf: "tl.erf", sympy.tanh: "tanh"}
_HELPERS = ("capped", "floor_divide", "modulo", "place", "power", "round_bfloat16", "sign", "tanh", "whole_power")
_FLOAT32_MAX, _FLOAT32_TINY = 3.4028235677973366e38, 2.0**-126
_SYMBOLS = (S, B, H, I, J)
_LOG2E = math.log2(math.e)


@functools.lru_cache(maxsize=1024)
def print_score(spec: AttentionSpec, whole: tuple[bool, ...]) -> str:
    """Source of `per_row`, `score` and, with sinks, `sink`. ValueError for what has no text.

    `score`, to be multiplied by `factor(spec)`, is -inf where the mask hides. `whole` says which captured tensors hold
    integers or bools. Captured tensors come as one flat tuple: for each of `loads(spec)` pointer, then size and stride of
    every axis.
    """
    coefficient, score = _apart(spec)
    mask = spec.mask.predicate()
    printer = _Printer(whole, [score, mask])
    printer.capped = _is_capped(spec)
    value = printer.real(score)
    body = [*printer.lines, f"value = {value}" if score.has(S) else f"value = tl.zeros_like(s) + {value}"]
    printer.lines = []
    visible = printer.at(mask, _OR)
    if mask is not sympy.true:
        hidden = [*printer.lines, f'value = tl.where({visible}, value, float("-inf"))']
        body += ["if MASKED:", *(f"    {line}" for line in hidden)]
    state = ", ".join(["b", "h", "i", *printer.rows])
    unpack = _unpack(spec)
    rows = [f"{name} = {text}" for name, text in printer.rows.items()]
    parts = [
        "import triton\nimport triton.language as tl",
        f"from compile_attn.kernels.triton_math import {', '.join(_HELPERS)}\n",
        _function("per_row(b, h, i, captured)", [*unpack, *rows, f"return {state}"]),
        _function("score(s, j, row, captured, MASKED: tl.constexpr)", [*unpack, f"{state} = row", *body, "return value"]),
    ]
    if spec.sinks is not None:
        scaled = spec.sinks if coefficient == 1 else spec.sinks / coefficient
        printer = _Printer(whole, [scaled], hoist=False)
        value = printer.real(scaled)
        parts.append(_function("sink(b, h, i, captured)", [*unpack, *printer.lines, f"return {value}"]))
    return "\n".join(parts)


@functools.lru_cache(maxsize=1024)
def factor(spec: AttentionSpec) -> float:
    """What a printed score is multiplied by to be the exponent of a weight: a product that the difference from the highest
    score takes along.
    """
    return float(_apart(spec)[0]) * (_LOG2E if binary(spec) else 1.0)


def _is_capped(spec: AttentionSpec) -> bool:
    """Is every tanh of the score that of a softcap no larger than scores are?"""
    return spec.softcap is not None and spec.softcap <= 100 and not (spec.bias is not None and spec.bias.has(sympy.tanh))


def _apart(spec: AttentionSpec) -> tuple[sympy.Number, sympy.Expr]:
    """A positive number that the score is a multiple of, and the rest."""
    number, rest = spec.expression().as_coeff_Mul()
    return (number, rest) if binary(spec) and 1e-30 < number < 1e30 else (sympy.S.One, spec.expression())


@functools.lru_cache(maxsize=1024)
def binary(spec: AttentionSpec) -> bool:
    """Are weights powers of 2, so that exp2 takes a score without a product of its own?

    Not where they may be as low as float32 goes, as a captured bias that hides keys is: the product would be -inf.
    """
    score = spec.expression()
    return not (score.has(Load) or any(abs(float(each)) > 1e30 for each in score.atoms(sympy.Number)))


@functools.lru_cache(maxsize=1024)
def loads(spec: AttentionSpec) -> tuple[tuple[int, int], ...]:
    """The captured tensors that the spec reads: number and how many axes, by number."""
    parts = (spec.expression(), spec.mask.predicate(), spec.sinks)
    found = {(int(each.args[0]), len(each.args) - 1) for part in parts if part is not None for each in part.atoms(Load)}
    if len(dict(found)) < len(found):
        raise ValueError(f"a captured tensor is read with different numbers of axes: {sorted(found)}")
    return tuple(sorted(found))


@functools.lru_cache(maxsize=1024)
def pairwise(spec: AttentionSpec) -> tuple[int, ...]:
    """The captured tensors of which a program reads a value for every query and key, one entry a read."""
    return tuple(sorted(int(each.args[0]) for each in _loads_by_key(spec) if each.has(H, I)))


def reads_by_key(spec: AttentionSpec) -> bool:
    """Does a program read captured tensors for every key?"""
    return bool(_loads_by_key(spec))


def _loads_by_key(spec: AttentionSpec) -> list[sympy.Basic]:
    found = spec.expression().atoms(Load) | spec.mask.predicate().atoms(Load)
    return [each for each in found if each.has(J)]


@functools.lru_cache(maxsize=1024)
def fits_int32(spec: AttentionSpec, whole: tuple[bool, ...], limit: int) -> bool:
    """Do all whole values stay below 2^31 for b, h, i, j < limit? Otherwise indices must be int64."""
    printer = _Printer(whole, [])
    parts = [part for part in (spec.expression(), spec.mask.predicate(), spec.sinks) if part is not None]
    nodes = {node for part in parts for node in sympy.preorder_traversal(part)}
    return all(_magnitude(node, limit) < 2**31 for node in nodes if isinstance(node, sympy.Expr) and printer.whole(node))


def _magnitude(expr: sympy.Basic, limit: int) -> float:
    """At least |expr| for whole numbers that are int32; what is cast to int64 counts as 1."""
    if isinstance(expr, sympy.Symbol):
        return limit
    if isinstance(expr, (Load, Trunc)):
        return 1.0
    if isinstance(expr, sympy.Integer):
        return float(abs(expr))
    inner = [_magnitude(part, limit) for part in expr.args if isinstance(part, sympy.Expr)]
    if isinstance(expr, sympy.Add):
        return math.fsum(inner)
    if isinstance(expr, sympy.Mul):
        return math.prod(max(1.0, each) for each in inner)
    if isinstance(expr, sympy.Pow):
        return inner[0] ** min(64.0, float(expr.exp)) if isinstance(expr.exp, sympy.Integer) else 1.0
    if isinstance(expr, sympy.Piecewise):
        return max(_magnitude(value, limit) for value, _ in expr.args)
    return max(inner, default=1.0)


def _unpack(spec: AttentionSpec) -> list[str]:
    names = []
    for number, axes in loads(spec):
        names += [f"t{number}", *(f"t{number}_{what}{axis}" for axis in range(axes) for what in ("size", "stride"))]
    return [f"{', '.join(names)}{',' if len(names) == 1 else ''} = captured"] if names else []


def _function(signature: str, lines: Sequence[str]) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"\n@triton.jit\ndef {signature}:\n{body}"


class _Printer:
    """One walk over expressions: `lines` name what occurs twice, `rows` what holds for every key of a row."""

    def __init__(self, whole: tuple[bool, ...], roots: Iterable[sympy.Basic], hoist: bool = True) -> None:
        self.captured_whole = whole
        self.hoist = hoist
        self.capped = False
        self.lines: list[str] = []
        self.rows: dict[str, str] = {}
        self.names: dict[sympy.Basic, str] = {}
        self.uses: Counter[sympy.Basic] = Counter()
        for root in roots:
            self._count(root)

    def _count(self, expr: sympy.Basic) -> None:
        self.uses[expr] += 1
        if self.uses[expr] == 1:
            for part in expr.args:
                self._count(part)

    def whole(self, expr: sympy.Basic) -> bool:
        """Is the value an integer, as `evaluate` has it?"""
        match expr:
            case sympy.Symbol():
                return bool(expr != S)
            case Load():
                return self.captured_whole[int(expr.args[0])]
            case sympy.floor() | sympy.ceiling() | Trunc():
                return True
            case sympy.Piecewise():
                return expr.args[-1][1] == sympy.true and all(self.whole(value) for value, _ in expr.args)
            case sympy.Pow():
                return isinstance(expr.exp, sympy.Integer) and expr.exp > 0 and self.whole(expr.base)
            case sympy.Add() | sympy.Mul() | sympy.Mod() | sympy.Max() | sympy.Min() | sympy.Abs() | sympy.sign():
                return all(self.whole(part) for part in expr.args)
        return isinstance(expr, sympy.Integer)

    def real(self, expr: sympy.Basic) -> str:
        """As float32."""
        if expr.is_number and not expr.has(Load, Round, Trunc):
            return _number(float(expr))
        return f"{self.at(expr, _ATOM)}.to(tl.float32)" if self.whole(expr) else self.at(expr, _OR)

    def at(self, expr: sympy.Basic, level: int) -> str:
        """As text that may stand where `level` binds."""
        text, binds = self._named(expr)
        return text if binds >= level else f"({text})"

    def _named(self, expr: sympy.Basic) -> tuple[str, int]:
        if expr in self.names:
            return self.names[expr], _ATOM
        if self.hoist and _of_row(expr):
            plain = _Printer(self.captured_whole, [], hoist=False)
            plain.names, plain.uses = self.names, Counter()
            self.names[expr] = f"r{len(self.rows)}"
            self.rows[self.names[expr]] = plain._print(expr)[0]
            return self.names[expr], _ATOM
        text, binds = self._print(expr)
        if self.uses[expr] > 1 and expr.args:
            self.names[expr] = f"x{sum(name.startswith('x') for name in self.names.values())}"
            self.lines.append(f"{self.names[expr]} = {text}")
            return self.names[expr], _ATOM
        return text, binds

    def _print(self, expr: sympy.Basic) -> tuple[str, int]:
        if expr in (sympy.true, sympy.false) or isinstance(expr, sympy.Integer):
            return str(expr), _ATOM
        if isinstance(expr, sympy.Symbol):
            if expr not in _SYMBOLS:
                raise ValueError(f"no Triton text for the symbol {expr}; a spec is written in {', '.join(map(str, _SYMBOLS))}")
            return expr.name, _ATOM
        if expr.is_number and not expr.has(Load, Round, Trunc):
            return _number(float(expr)), _ATOM
        if isinstance(expr, sympy.Add):
            return self._sum(expr), _ADD
        if isinstance(expr, sympy.Mul):
            return " * ".join(self.at(part, _ATOM) for part in self._grouped(expr)), _MUL
        if expr.func in _INFIX:
            sign, level = _INFIX[expr.func]
            return sign.join(self.at(part, level + 1) for part in expr.args), _OR
        if expr.func in _COMPARISONS:
            left, right = (self.at(part, _ADD) for part in expr.args)
            return f"{left} {_COMPARISONS[expr.func]} {right}", _COMPARE
        quotient = _quotient(expr)
        if quotient is not None and all(self.whole(part) and part.is_nonnegative for part in quotient[1:]):
            sign, left, right = quotient  # where nothing is negative, Triton's division is Python's
            return f"{self.at(left, _MUL)} {sign} {self.at(right, _ATOM)}", _MUL
        return self._call(expr), _ATOM

    def _grouped(self, expr: sympy.Expr) -> list[sympy.Expr]:
        """The operands, those that do not depend on the key joined to one."""
        rows = [part for part in expr.args if not part.has(S, J)]
        if not self.hoist or len(rows) == len(expr.args) or all(part.is_number and not part.has(Load) for part in rows):
            return list(expr.args)
        return [expr.func(*rows), *(part for part in expr.args if part.has(S, J))]

    def _sum(self, expr: sympy.Add) -> str:
        terms = self._grouped(expr)
        terms = sorted(terms, key=lambda term: term.could_extract_minus_sign())  # stable; so that a - b is no -b + a
        text = self.at(terms[0], _ADD)
        for term in terms[1:]:
            minus = term.could_extract_minus_sign()
            text += f" - {self.at(-term, _MUL)}" if minus else f" + {self.at(term, _MUL)}"
        return text

    def _call(self, expr: sympy.Basic) -> str:
        if expr.func in _REAL:
            name = "capped" if self.capped and expr.func == sympy.tanh else _REAL[expr.func]
            return f"{name}({self.real(expr.args[0])})"
        match expr:
            case Load():
                return self._load(expr)
            case Round():
                return self._round(int(expr.args[0]), self.real(expr.args[1]))
            case Trunc():
                (inner,) = expr.args
                return self.at(inner, _OR) if self.whole(inner) else f"{self.at(inner, _ATOM)}.to(tl.int64)"
            case sympy.floor():
                return self._floor(expr.args[0])
            case sympy.ceiling():
                return f"(-{self._floor(-expr.args[0])})"
            case sympy.Piecewise() | ITE():
                return self._choice(expr)
            case sympy.Pow():
                return self._power(expr)
            case sympy.Mod():
                return f"modulo({self._alike(expr)})"
            case sympy.Max() | sympy.Min():
                name = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
                texts = [self.at(part, _OR) for part in expr.args]
                return functools.reduce(lambda a, b: f"{name}({a}, {b})", texts)
            case sympy.Abs():
                return f"tl.abs({self.at(expr.args[0], _OR)})"
            case sympy.sign():
                return f"sign({self.at(expr.args[0], _OR)})"
            case sympy.Not():
                return f"({self.at(expr.args[0], _ATOM)} == 0)"
        raise ValueError(f"no Triton text for {expr.func.__name__} in {expr}")

    def _alike(self, expr: sympy.Basic) -> str:
        plain = all(map(self.whole, expr.args))
        return ", ".join(self.at(part, _OR) if plain else self.real(part) for part in expr.args)

    def _load(self, expr: Load) -> str:
        number, *index = expr.args
        text = f"t{number}"
        for axis, each in enumerate(index):
            at = self.at(each, _OR) if self.whole(each) else f"{self.at(each, _ATOM)}.to(tl.int64)"
            text += f" + place({at}, t{number}_size{axis}, t{number}_stride{axis})"
        return f"tl.load({text}).to({'tl.int64' if self.whole(expr) else 'tl.float32'})"

    def _round(self, bits: int, value: str) -> str:
        if bits == 7:
            return f"round_bfloat16({value})"
        if bits == 10:
            return f"({value}).to(tl.float16).to(tl.float32)"
        if bits >= 23:  # values are float32
            return f"({value})"
        raise ValueError(f"no Triton text for rounding to {bits} bits of mantissa; there are 7, 10, 23 and 52")

    def _floor(self, inner: sympy.Expr) -> str:
        """As `evaluate`: floor(p / q) with a constant q divides whole numbers wherever p is whole."""
        top, bottom = _fraction(inner)
        if not self.whole(top):
            value = self.real(top) if bottom == 1 else f"tl.div_rn({self.real(top)}, {_number(float(bottom))})"
            return f"tl.floor({value}).to(tl.int64)"
        if bottom == 1:
            return f"({self.at(top, _OR)})"
        return f"floor_divide({self.at(top, _OR)}, {bottom})"

    def _choice(self, expr: sympy.Basic) -> str:
        if isinstance(expr, ITE):
            cases, text = [(expr.args[1], expr.args[0])], self.at(expr.args[2], _OR)
        else:
            pairs = [(value, condition) for value, condition in expr.args]
            closed = pairs[-1][1] == sympy.true
            cases = pairs[:-1] if closed else pairs
            text = self.at(pairs[-1][0], _OR) if closed else 'float("nan")'
        for value, condition in reversed(cases):
            text = f"tl.where({self.at(condition, _OR)}, {self.at(value, _OR)}, {text})"
        return text

    def _power(self, expr: sympy.Pow) -> str:
        base, exponent = expr.base, expr.exp
        if exponent == -1:
            return f"(1.0 / {self._real_atom(base)})"
        if exponent == sympy.Rational(1, 2):
            return f"tl.sqrt_rn({self.real(base)})"
        if exponent == sympy.Rational(-1, 2):
            return f"tl.rsqrt({self.real(base)})"
        if isinstance(exponent, sympy.Integer):
            positive = f"whole_power({self.at(base, _OR) if exponent > 0 else self.real(base)}, {abs(int(exponent))})"
            return positive if exponent > 0 else f"(1.0 / {positive})"
        if base.is_number and base.is_positive and not base.has(Load):
            return f"tl.exp2({self.real(exponent * sympy.Float(math.log2(float(base))))})"
        return f"power({self.real(base)}, {self.real(exponent)})"

    def _real_atom(self, expr: sympy.Basic) -> str:
        text = self.real(expr)
        return text if text.endswith(".to(tl.float32)") else f"({text})"


def _fraction(inner: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    top, bottom = sympy.fraction(sympy.together(inner))
    return (top, bottom) if isinstance(bottom, sympy.Integer) else (inner, sympy.S.One)


def _quotient(expr: sympy.Basic) -> tuple[str, sympy.Expr, sympy.Expr] | None:
    if isinstance(expr, sympy.floor):
        top, bottom = _fraction(expr.args[0])
        return ("//", top, bottom) if bottom != 1 else None
    return ("%", *expr.args) if isinstance(expr, sympy.Mod) else None


def _of_row(expr: sympy.Basic) -> bool:
    """Worth computing once a row: no key in it, and neither a symbol nor a number."""
    if not isinstance(expr, (sympy.Expr, Boolean)) or not expr.args or expr.has(S, J):
        return False
    return bool(expr.has(B, H, I, Load))


def _number(value: float) -> str:
    if not abs(value) < _FLOAT32_MAX:
        return 'float("nan")' if math.isnan(value) else f'float("{"inf" if value > 0 else "-inf"}")'
    if 0 < abs(value) < _FLOAT32_TINY:  # as a literal it would be a float64
        return f"tl.full((), {value!r}, tl.float32)"
    return repr(value)

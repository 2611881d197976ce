"""Which block of keys does a tile of queries visit as its k-th? As a module of three Triton functions.

`count(first, last, head, length)` counts the blocks in which every row sees every key, and the others; `clear(k, state)` and
`edge(k, state)` give the k-th of either. Every visited block is named once. The spans of `visible` become pieces that share
no block; inside a piece blocks are numbered, so that any share of them starts anywhere, without a list in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from compile_attn.kernels.mask import Mask
from compile_attn.kernels.visible import Cells, Span, spans

_HEAD = "import triton\nimport triton.language as tl\n"


@dataclass(frozen=True)
class _Runs:
    """`width` blocks at `offset` + each of `deltas`, in every `period` of blocks. Offset and width are texts."""

    period: int
    offset: str
    width: str
    deltas: tuple[int, ...]


@dataclass(frozen=True)
class _Piece:
    """Blocks low <= n < end, of them those in `runs`; clear where clear <= n < clear_end. All are texts."""

    low: str
    end: str
    clear: str | None
    clear_end: str
    runs: _Runs | None


@functools.lru_cache(maxsize=1024)
def print_sight(mask: Mask, heads: int, block_n: int) -> str:
    """Source of `count`, `clear` and `edge` for tiles of that many query heads and blocks of `block_n` keys."""
    writer = _Writer(block_n)
    pieces = writer.pieces(spans(mask, heads))
    state = [name for number in range(len(pieces)) for name in (f"a{number}", f"c{number}", f"m{number}", f"e{number}")]
    state += [name for number, piece in enumerate(pieces) if piece.runs for name in (f"o{number}", f"w{number}")]
    totals = [f"clears = {_plus('m', len(pieces))}", f"edges = {_plus('e', len(pieces))}"]
    given = f"{', '.join(state)} = state"
    return "\n".join(
        [
            _HEAD,
            _function("count(first, last, head, length)", [*writer.lines, *totals, f"return clears, edges, ({', '.join(state)})"]),
            _function("clear(k, state)", [given, *_numbered(pieces, "m", lambda at: f"c{at} + k"), "return n"]),
            _function("edge(k, state)", [given, *_numbered(pieces, "e", _edge), "return n"]),
        ]
    )


def _edge(at: int) -> str:
    return f"a{at} + k + tl.where(a{at} + k >= c{at}, m{at}, 0)"


def _numbered(pieces: Sequence[_Piece], count: str, place: object) -> list[str]:
    """Lines that give n, the k-th block over all pieces."""
    lines = []
    for at, piece in enumerate(pieces):
        if at:
            lines += [f"k = k - {count}{at - 1}"]
        number = place(at)  # type: ignore[operator]
        text = number if piece.runs is None else _nth(piece.runs, number, at)
        lines += [f"n = {text}" if at == 0 else f"n = tl.where(k >= 0, {text}, n)"]
    return lines


def _nth(runs: _Runs, number: str, at: int) -> str:
    """The block of that number: the inverse of `_Writer.below`."""
    if runs.width == "1" and len(runs.deltas) == 1:
        return f"({number}) * {runs.period} + o{at} - {runs.period}"
    each = f"{len(runs.deltas)} * w{at}"
    inner = f"({number}) % ({each})"
    shift = "0"
    for place, delta in enumerate(runs.deltas[1:], 1):
        shift = f"tl.where({inner} >= {place} * w{at}, {delta}, {shift})"
    return f"({number}) // ({each}) * {runs.period} + ({inner}) % w{at} + {shift} + o{at} - {runs.period}"


def _plus(name: str, count: int) -> str:
    return " + ".join(f"{name}{number}" for number in range(count))


def _function(signature: str, lines: Sequence[str]) -> str:
    body = "".join(f"    {line}\n" for line in lines)
    return f"\n@triton.jit\ndef {signature}:\n{body}"


class _Writer:
    """Collects the lines of `count`."""

    def __init__(self, block_n: int) -> None:
        self.block_n = block_n
        self.lines: list[str] = []

    def pieces(self, found: Sequence[Span]) -> list[_Piece]:
        """Spans in blocks, each without what the plain ones before it hold; counted."""
        whole = [self._piece(number, span) for number, span in enumerate(found)]
        pieces: list[_Piece] = []
        for number, piece in enumerate(whole):
            rest = [(piece, found[number])]
            for before in range(number):
                if whole[before].runs is None:
                    rest = [cut for each in rest for cut in self._without(each, whole[before], found[before])]
            pieces += [each for each, _ in rest]
        for at, piece in enumerate(pieces):
            self._count(at, piece)
        return pieces

    def _piece(self, number: int, span: Span) -> _Piece:
        size = self.block_n
        runs = None if span.cells is None else self._runs(number, span.cells)
        provable = span.clear_stop is not None and (span.cells is None or (runs is not None and span.cells.unit % size == 0))
        texts = {"low": f"{_text(span.low)} // {size}", "end": f"({_text(span.stop)} + {size - 1}) // {size}"}
        if provable:
            texts["clear"] = f"({_text(span.clear)} + {size - 1}) // {size}"
            texts["clear_end"] = f"{_text(span.clear_stop)} // {size}"
        self.lines += [f"{name}{number} = {text}" for name, text in texts.items()]
        # An empty range ends where it begins, so that what is cut at both is whole.
        self.lines.append(f"end{number} = tl.maximum(end{number}, low{number})")
        clear = f"clear{number}" if provable else None
        return _Piece(f"low{number}", f"end{number}", clear, f"clear_end{number}", runs)

    def _runs(self, number: int, cells: Cells) -> _Runs | None:
        """Cells as runs of blocks; None: every block may hold a key of a visible cell, or none can tell."""
        size, unit, period = self.block_n, cells.unit, cells.period
        residue = _text(cells.residue)
        self.lines.append(f"cell{number} = ({residue} % {period} + {period}) % {period}")
        if unit % size == 0:
            each = unit // size
            most = period * each
            width = str(each) if cells.lag == 0 else f"tl.minimum({_text(cells.lag)} * {each} + {each}, {most})"
            return _Runs(most, f"cell{number} * {each}", width, tuple(delta * each for delta in cells.deltas))
        in_block = size // unit
        if size % unit == 0 and period > in_block and period % in_block == 0 and cells.lag == 0 and cells.deltas == (0,):
            return _Runs(period // in_block, f"cell{number} // {in_block}", "1", (0,))
        return None

    def _without(self, piece: tuple[_Piece, Span], cut: _Piece, span: Span) -> list[tuple[_Piece, Span]]:
        """What lies below and above the other, unless nothing can."""
        it, own = piece
        name = f"{len(self.lines)}"
        out = []
        if not _among(sympy.Max, span.low, own.low):
            self.lines.append(f"below{name} = tl.minimum({it.end}, {cut.low})")
            out.append((_Piece(it.low, f"below{name}", it.clear, it.clear_end, it.runs), own))
        if not _among(sympy.Min, span.stop, own.stop):
            self.lines.append(f"above{name} = tl.maximum({it.low}, {cut.end})")
            out.append((_Piece(f"above{name}", it.end, it.clear, it.clear_end, it.runs), own))
        return out

    def _count(self, at: int, piece: _Piece) -> None:
        """Numbers of the first block `a`, the first clear one `c`, how many are clear `m`, how many are not `e`."""
        if piece.runs is not None:
            self.lines += [f"o{at} = {piece.runs.offset}", f"w{at} = {piece.runs.width}"]
        first, end = (self._below(at, piece.runs, each) for each in (piece.low, piece.end))
        self.lines += [f"a{at} = {first}", f"z{at} = tl.maximum({end}, a{at})"]
        if piece.clear is None:
            self.lines += [f"c{at} = z{at}", f"m{at} = 0", f"e{at} = z{at} - a{at}"]
            return
        clear, clear_end = (self._below(at, piece.runs, each) for each in (piece.clear, piece.clear_end))
        self.lines += [
            f"c{at} = tl.minimum(tl.maximum({clear}, a{at}), z{at})",
            f"m{at} = tl.minimum(tl.maximum({clear_end}, c{at}), z{at}) - c{at}",
            f"e{at} = z{at} - a{at} - m{at}",
        ]

    def _below(self, at: int, runs: _Runs | None, block: str) -> str:
        """How many blocks of a piece come before that one, counted from a period before 0, where no number is negative."""
        if runs is None:
            return block
        from_offset = f"({block} + {runs.period} - o{at})"
        rest = f"{from_offset} % {runs.period}"
        inside = [f"tl.minimum(tl.maximum({rest} - {delta}, 0), w{at})" for delta in runs.deltas]
        return f"{from_offset} // {runs.period} * {len(runs.deltas)} * w{at} + {' + '.join(inside)}"


def _among(kind: type, small: sympy.Expr, large: sympy.Expr) -> bool:
    """For Min: is `large` at most `small`, because it is the least of the same and more? For Max: at least."""
    return set(kind.make_args(small)) <= set(kind.make_args(large)) or bool(small == 0 and kind is sympy.Max)  # type: ignore[attr-defined]


def _text(expr: sympy.Expr) -> str:
    """Whole numbers, in words that mean the same in Python and in Triton, whose division truncates."""
    if isinstance(expr, (sympy.Symbol, sympy.Integer)):
        return str(expr) if expr.is_Symbol or expr >= 0 else f"({expr})"
    if isinstance(expr, (sympy.Add, sympy.Mul)):
        sign = " + " if isinstance(expr, sympy.Add) else " * "
        return f"({sign.join(map(_text, expr.args))})"
    if isinstance(expr, (sympy.Max, sympy.Min)):
        name = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        return functools.reduce(lambda left, right: f"{name}({left}, {right})", map(_text, expr.args))
    if not isinstance(expr, sympy.floor):
        raise ValueError(f"no text for {expr}")
    top, bottom = sympy.fraction(sympy.together(expr.args[0]))
    whole = _text(top)
    return f"({whole} // {bottom})" if top.is_nonnegative else f"({whole} // {bottom} - tl.where({whole} % {bottom} < 0, 1, 0))"

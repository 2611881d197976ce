"""What of a graph's text stays the same from one run to the next, and from one torch to the next?

torch numbers all nodes of a graph in one row, so that one op more renames those behind it. Here a value is named by the module that
computes it, the op, and its turn among the values of that op and module: `transpose_1`, or `blocks.0.qkv/linear` where
another module reads it, `/add` where it belongs to none. A part of a tuple is `split[0]`, a size is its symbol. Lines of source
are left out, and so is the text of a spec, which the sites of a report tell in words. A type follows from the op: it alone is no
change.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from compile_attn.passes.places import NUMBER, ranges

_HEADER = re.compile(r"# (?P<module>[\w.]+)(?:  |$)")
_NODE = re.compile(r"(?P<name>\w+)(?:: (?P<type>.+?))? = (?P<target>[\w.]+)(?:\((?P<arguments>.*)\))?$")
_INPUT = re.compile(r"input (?P<name>[^:]+)(?:: |$)")
_PART = re.compile(r"(?P<whole>\w+), (?P<index>\d+)$")
_SPEC = re.compile(r"'AttentionSpec\(.*?\)'")
_WORD = re.compile(r"(?<![\w.'])[A-Za-z_]\w*(?![\w.=('])")  # no part of a dotted name, no keyword, no function
_PATH = re.compile(r"(?<=@@ )[\w.]+|(?<![\w.])(?:[A-Za-z_][\w.]*|\d+\.[A-Za-z_][\w.]*|\d[\w.]*(?=/))")  # no 0.5
_ENDING = re.compile(r"(?<=_)\d+$")
_GAP = 2  # equal lines between two changes of one hunk


@dataclass(frozen=True)
class Line:
    """A node; or an input of the graph, whose module is ""."""

    module: str
    text: str
    type: str = field(default="", compare=False)  # follows from the op, unless it is an input's
    is_input: bool = False
    source: str = field(default="", compare=False)  # the user's line, as a Location has it
    spec: str = field(default="", compare=False)  # the text of an AttentionSpec among the arguments

    def __str__(self) -> str:
        return self.text.replace(" = ", f": {self.type} = ", 1) if self.type else self.text


def stable_diff(before: str, after: str) -> list[str]:
    """What changes between two texts of `Report.before` and `Report.after`; of equal hunks the first, and which are like it."""
    lines: list[str] = []
    groups: dict[str, tuple[list[str], list[tuple[int, ...]]]] = {}
    for was, now in named_graphs(before, after or before):
        added = {_input_name(line) for line in set(now) - set(was) if line.is_input}
        for hunk in _hunks(was, now):
            shown = list(_shown(hunk))
            key, first = _offsets("\n".join(shown), added)
            groups.setdefault(key, (shown, []))[1].append(first)
    for shown, firsts in groups.values():
        lines += [*shown, *_more(firsts)]
    return lines


def named_graphs(before: str, after: str) -> Iterator[tuple[list[Line], list[Line]]]:
    """The lines of each graph before and after, under names that both share."""
    for old, new in zip(_graphs(before), _graphs(after), strict=True):
        names = _Names()
        yield _written(old, names), _written(new, names)


def stable_graph(text: str) -> list[str]:
    """A whole graph, its lines under the modules that they belong to."""
    lines: list[str] = []
    for graph in _graphs(text):
        module = None
        for line in _written(graph, _Names()):
            lines += [f"# {line.module}"] if line.module != module else []
            lines.append(str(line))
            module = line.module
    return lines


def without_numbers(sentence: str, text: str) -> str:
    """A sentence about nodes of this graph (`softmax_3`), with their ops in place of their names."""
    ops = {found["name"]: _op(found["target"]) for found in map(_NODE.match, text.splitlines()) if found}
    return re.sub(r"\w+", lambda word: ops.get(word[0], word[0]) if re.search(r"_\d+$", word[0]) else word[0], sentence)


@dataclass
class _Names:
    """The name of each value, as the module it belongs to and a name in it. Graphs before and after share them."""

    known: dict[str, tuple[str | None, str]] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, module: str, found: re.Match[str]) -> bool:
        """Name the value of a node; whether the node is worth a line, as parts of tuples and sizes are not."""
        part = _PART.match(found["arguments"] or "") if found["target"] == "getitem" else None
        is_size = found["type"] is not None and "[" not in found["type"]
        if is_size:
            self.known[found["name"]] = (None, found["type"])
        elif part and part["whole"] in self.known:
            home, whole = self.known[part["whole"]]
            self.known[found["name"]] = (home, f"{whole}[{part['index']}]")
        elif found["name"] not in self.known:
            op = _op(found["target"])
            turn = self.counts[module, op]
            self.counts[module, op] += 1
            self.known[found["name"]] = (module, f"{op}_{turn}" if turn else op)
        return not (is_size or part)

    def rewritten(self, module: str, arguments: str) -> str:
        """Arguments as seen from a module."""

        def name(word: re.Match[str]) -> str:
            home, local = self.known.get(word[0], (None, word[0]))
            return local if home in (None, module) else f"{home}/{local}"

        return _WORD.sub(name, _SPEC.sub("spec", arguments))


def _op(target: str) -> str:
    """`aten.transpose.int` is transpose, `getitem` itself."""
    parts = target.split(".")
    return parts[-2] if len(parts) > 2 else parts[-1]


def _graphs(text: str) -> list[list[str]]:
    """A model with graph breaks has several graphs, each of which ends with what it returns."""
    graphs: list[list[str]] = [[]]
    for line in filter(None, text.splitlines()):
        graphs[-1].append(line)
        if line.startswith("return "):
            graphs.append([])
    return [graph for graph in graphs if graph]


def _written(graph: Sequence[str], names: _Names) -> list[Line]:
    lines: list[Line] = []
    module = source = ""
    for line in graph:
        found = _NODE.match(line)
        if line.startswith("# "):
            header = _HEADER.match(line)
            module, source = (header["module"], line[header.end() :]) if header else ("", line[2:])
        elif line.startswith("input "):
            lines.append(Line("", line, is_input=True))
        elif not found:
            lines.append(Line(module, names.rewritten(module, line), source=source))
        elif names.add(module, found):
            call = "" if found["arguments"] is None else f"({names.rewritten(module, found['arguments'])})"
            text, spec = f"{names.known[found['name']][1]} = {found['target']}{call}", _SPEC.search(line)
            lines.append(Line(module, text, found["type"] or "", source=source, spec=spec[0][1:-1] if spec else ""))
    return lines


def _hunks(was: list[Line], now: list[Line]) -> Iterator[list[tuple[str, Line]]]:
    """Each input alone; nodes of a layer with at most _GAP equal ones between them together, and nothing equal around them."""
    old, new = ([line for line in lines if line.is_input] for lines in (was, now))
    yield from ([("-", line)] for line in old if line not in new)
    yield from ([("+", line)] for line in new if line not in old)
    old, new = ([line for line in lines if not line.is_input] for lines in (was, now))
    for group in difflib.SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(_GAP // 2):
        hunk: list[tuple[str, Line]] = []
        for kind, start, end, first, last in group:
            if kind == "equal":
                hunk += [(" ", line) for line in old[start:end]]
            else:
                hunk += [*(("-", line) for line in old[start:end]), *(("+", line) for line in new[first:last])]
        for part in _by_layer(hunk):
            if changed := [at for at, (sign, _) in enumerate(part) if sign != " "]:
                yield part[changed[0] : changed[-1] + 1]


def _by_layer(hunk: Sequence[tuple[str, Line]]) -> Iterator[list[tuple[str, Line]]]:
    """Cut where the numbers of the module path change: neighbouring layers may be alike."""
    part: list[tuple[str, Line]] = []
    layer: list[str] = []
    for sign, line in hunk:
        numbers = NUMBER.findall(line.module)
        if numbers and numbers != layer:
            yield part
            part, layer = [], numbers
        part.append((sign, line))
    yield part


def _shown(hunk: Sequence[tuple[str, Line]]) -> Iterator[str]:
    module = None
    for sign, line in hunk:
        if line.module != module and not line.is_input:
            yield f"@@ {line.module}".rstrip()
        module = line.module
        yield f"{sign}{line}"


def _input_name(line: Line) -> str:
    found = _INPUT.match(line.text)
    return found["name"] if found else ""


def _offsets(text: str, added: set[str]) -> tuple[str, tuple[int, ...]]:
    """The text with the numbers of module paths and added inputs as distances to the first of their depth; and those first ones.

    So texts are equal only where the first ones say what all of them are.
    """
    first: list[int] = []

    def word(found: re.Match[str]) -> str:
        depths = itertools.count()

        def distance(number: re.Match[str]) -> str:
            depth = next(depths)
            first.extend([int(number[0])] if depth == len(first) else [])
            return f"{int(number[0]) - first[depth]:+}"

        return (_ENDING if found[0] in added else NUMBER).sub(distance, found[0])

    return _PATH.sub(word, text), tuple(first)


def _more(first: Sequence[tuple[int, ...]]) -> list[str]:
    """How many hunks are like the one shown, and what numbers they have in place of its first ones."""
    if len(first) == 1:
        return []
    one, *others = (".".join(map(str, numbers)) for numbers in first)
    shown = ranges([numbers[0] for numbers in first[1:]]) if len(first[0]) == 1 else ", ".join(others)
    return [f"... and {len(others)} more like it" + (f", with {shown} for {one}" if one else "")]

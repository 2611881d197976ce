"""Which named mask is a predicate? Decided by proof.

Parameters are guessed from the predicate itself (the first key 0 that a query loses, the first key that query 0 loses, the
moduli), then the candidate must equal the predicate for all i, j >= 0 and all heads: `proof` says why finitely many points decide
that. What equals no family stays General, beside Causal() where causality at least is proven.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Boolean, Or

from compile_attn.kernels.expr import H, I, J, Load
from compile_attn.kernels.mask import (
    All,
    Any,
    Bidirectional,
    BlockSparse,
    Causal,
    Chunked,
    General,
    Mask,
    Prefix,
    SameDocument,
    Window,
)
from compile_attn.passes.formula import Formula, nested
from compile_attn.passes.proof import first_false, implies, same, truth, valid

_FREE = 4  # atoms over tensors that are told apart; a mask with more stays General
_LOCAL = 4096  # most local blocks looked for: 16 is what models use
_CAUSAL = Causal().predicate()


@functools.lru_cache(maxsize=512)
def classify(visible: Boolean, num_heads: int | None = None) -> Mask:
    """The named mask that equals the predicate for all i, j >= 0, or General. Never a wrong one."""
    visible = sympy.to_nnf(visible, simplify=False)
    named = _family(visible, num_heads) or _with_tensors(visible, num_heads) or _alternatives(visible, num_heads)
    if named is not None:
        return named
    if not implies(visible, _CAUSAL, num_heads):
        return General(visible)
    return All(Causal(), General(And(*(part for part in And.make_args(visible) if not implies(_CAUSAL, part, num_heads)))))


@functools.lru_cache(maxsize=512)
def sees_itself(visible: Boolean, num_heads: int | None = None) -> bool:
    """Proven: every query sees a key, itself or the first one. A large finite fill is a mask in such rows only."""
    return valid(Or(visible.subs(J, I), visible.subs(J, 0)), num_heads)


def _family(visible: Boolean, num_heads: int | None) -> Mask | None:
    """A mask of positions alone."""
    if visible is sympy.true:
        return Bidirectional()
    if _tensor_atoms(visible):
        return None
    for candidate in _candidates(visible, num_heads):
        if same(visible, candidate.predicate(), num_heads):
            return candidate
    parts = [part for part in And.make_args(visible) if not implies(_CAUSAL, part, num_heads)]
    if len(parts) > 1 and implies(visible, _CAUSAL, num_heads):
        members = [_family(And(_CAUSAL, part), num_heads) for part in parts]
        if None not in members and same(visible, All(*members).predicate(), num_heads):  # type: ignore[arg-type]
            return All(*members)  # type: ignore[arg-type]
    return None


def _candidates(visible: Boolean, num_heads: int | None) -> Iterator[Mask]:
    """What the mask must be, if it is one of the families."""
    if not implies(visible, _CAUSAL, num_heads):
        seen = first_false(visible.subs({I: 0, H: 0}), J)
        yield Bidirectional() if seen is None else Prefix(seen)
        return
    lost = first_false(visible.subs({J: 0, H: 0}), I)
    moduli = _moduli(visible)
    if lost is None:
        yield Causal()
    elif lost > 0:
        yield Window(lost - 1)
        yield Chunked(lost)
        yield from (All(Window(lost - 1), Chunked(size)) for size in moduli if size > lost)
    for block, stride in itertools.product(moduli, sorted({*moduli, *(a // b for a in moduli for b in moduli if a % b == 0)})):
        if stride > 1 and (candidate := _block_sparse(visible, block, stride, num_heads)) is not None:
            yield candidate


def _moduli(visible: Boolean) -> list[int]:
    """The numbers by which positions are divided, 1 included."""
    formula = Formula()
    formula.read(visible)
    floors = {inner for atom in formula.atoms for inner in nested(atom.term)}
    return sorted({1, *(slope.denominator for inner in floors for slope in inner.linear)})


def _block_sparse(visible: Boolean, block: int, stride: int, num_heads: int | None) -> BlockSparse | None:
    """Local blocks and slides as far rows show them: in `stride` rows running, one has no vertical block beside the local ones."""
    constants = {abs(int(number)) for number in visible.atoms(sympy.Integer)}
    reach = min(_LOCAL, max(constants, default=0) + 2)
    rows = np.repeat(np.arange(reach + stride, reach + 2 * stride), reach)
    back = np.tile(np.arange(reach), stride)
    near = truth(visible, rows * block, (rows - back) * block)
    if near is None:
        return None
    runs = np.where(near.reshape(stride, reach).all(1), reach, np.argmin(near.reshape(stride, reach), axis=1))
    local = int(runs.min())
    if local >= reach:
        return None
    last = np.full(stride, (reach + 2 * stride) * block)
    far = truth(visible, last, np.arange(stride) * block, num_heads or 2)
    if far is None or not (far.sum(axis=1) == 1).all():
        return None
    sliding = _sliding(((-1 - np.argmax(far, axis=1)) % stride).tolist(), stride)
    return None if sliding is None else BlockSparse(block, local, stride, *sliding)


def _sliding(slides: list[int], stride: int) -> tuple[int, int, int] | None:
    """The step, offset and group of heads by which (offset + h) // group * step, modulo stride, is the slide of each head h."""
    heads = len(slides)
    turns = [head for head in range(1, heads) if slides[head] != slides[head - 1]]
    if not turns:
        return (0, 0, 1) if slides[0] == 0 else (slides[0], heads, heads)
    first, step = turns[0], (slides[turns[0]] - slides[turns[0] - 1]) % stride
    group = turns[1] - first if len(turns) > 1 else max(first, heads - first)
    before = next((number for number in range(stride) if number * step % stride == slides[0]), None)
    return None if before is None else (step, before * group + -first % group, group)


def _tensor_atoms(visible: Boolean) -> list[Boolean]:
    """The comparisons that are free booleans of the proof."""
    found = []
    for atom in sorted(visible.atoms(Relational), key=str):
        formula = Formula()
        formula.read(atom)
        if formula.free:
            found.append(atom)
    return found


def _with_tensors(visible: Boolean, num_heads: int | None) -> Mask | None:
    """Positions and tensors apart: a family, and a conjunction of what tensors say."""
    atoms = _tensor_atoms(visible)
    if not atoms or len(atoms) > _FREE:
        return None
    values = itertools.product((sympy.true, sympy.false), repeat=len(atoms))
    reachable = Or(*(visible.xreplace(dict(zip(atoms, value, strict=True))) for value in values))
    family = classify(reachable, num_heads)
    literals = [literal for atom in atoms for literal in (atom, sympy.Not(atom)) if implies(visible, literal, num_heads)]
    if not literals or not same(visible, And(family.predicate(), *literals), num_heads):
        return All(*_members(family), General(visible)) if family.causal() else None
    documents = {literal: mask for literal in literals if (mask := _document(literal)) is not None}
    others = And(*(literal for literal in literals if literal not in documents))
    masks = [*_members(family), *dict.fromkeys(documents.values()), *([] if others is sympy.true else [General(others)])]
    return masks[0] if len(masks) == 1 else All(*masks)


def _members(mask: Mask) -> tuple[Mask, ...]:
    if isinstance(mask, All):
        return mask.masks
    return () if isinstance(mask, Bidirectional) else (mask,)


def _document(literal: Boolean) -> SameDocument | None:
    candidates = (SameDocument(int(load.args[0])) for load in literal.atoms(Load) if load.args[0].is_Integer)
    return next((mask for mask in candidates if same(literal, mask.predicate())), None)


def _alternatives(visible: Boolean, num_heads: int | None) -> Mask | None:
    """A disjunction of named masks."""
    if not isinstance(visible, Or):
        return None
    masks = [classify(part, num_heads) for part in visible.args]
    return None if any(_has_general(mask) for mask in masks) else Any(*masks)


def _has_general(mask: Mask) -> bool:
    return isinstance(mask, General) or any(map(_has_general, getattr(mask, "masks", ())))

"""Is a batch run by the model that has made the keys with which its sequences begin?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from compile_attn.origin import Origin
from compile_attn.sequences import CachedSequence, Sequences, stale
from compile_attn.step import NOT_PAGED


class Proof:
    """Of one batch after another: a sequence that begins with found keys is run first by what has made these, or not at all.

    taken_back   called when the batch that was made last must not be run
    """

    def __init__(self, seqs: Sequences, taken_back: Callable[[], None]) -> None:
        self._seqs, self._taken_back = seqs, taken_back
        self._begun: tuple[tuple[CachedSequence, int], ...] = ()
        self._only_asking = False

    @property
    def origin(self) -> Origin | None:
        """By what the last step was run that asked; the same object until that is another, but for changes in place."""
        return self._seqs.origin

    def begin(self, begun: Iterable[tuple[CachedSequence, int]] = ()) -> None:
        """The sequences of the next batch, and how long they were before it."""
        self._begun = tuple(begun)

    def check(self, code: object, tensors: Sequence[torch.Tensor]) -> None:
        """By what the batch is about to be run. StalePrefix: it must not be, and every sequence is as it was before the batch.

        code: the compiled graph and the numbers it is called with; tensors: all else it is called with, in order, without tokens.
        """
        found = self._seqs.check_origin(code, tensors, self._begun)
        if found is not None:
            for seq, length in self._begun:
                if not seq.freed:
                    self._seqs.truncate(seq, length)
                    seq.unrun = False
            self._begun = ()
            self._taken_back()
            raise stale(found)
        if self._only_asking:
            raise _Asked

    def ask(self, run: Callable[[], object]) -> None:
        """The same for a batch that a CUDA graph will run, which asks nobody.

        `run` calls the model, which says by what it would run. That costs Dynamo's guards; without found keys it is not done.
        """
        if not any(seq._found for seq, _ in self._begun):
            return
        self._only_asking = True
        try:
            run()
        except _Asked:
            return
        finally:
            self._only_asking = False
        raise RuntimeError(NOT_PAGED)

    def ran(self) -> None:
        """The batch was run, so the keys that its sequences have found are theirs."""
        for seq, _ in self._begun:
            seq._found = False
        self._begun = ()


class _Asked(Exception):
    """The model was called, and has only said by what it would run."""

"""What has computed the keys in a cache, and does it still stand as it stood then?

Two requests may share keys only if the second one would compute the same: by the same compiled graph, called with the same
numbers and the same tensors, none of which was changed in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import is_, is_not

import torch

_address = torch.Tensor.data_ptr


class StalePrefix(RuntimeError):
    """A sequence begins with keys that the model, as it is now, would compute otherwise. Nothing was written."""


class Origin:
    """A compiled graph and what it is called with, apart from tokens. Tensors are held weakly: a weight that is replaced can go.

    A tensor has not changed if it is the same object, over the same storage, at the same address, and torch has counted no change
    in place. What torch does not count is not seen: writing through `.data`, through NumPy, from a CUDA graph. A tensor whose
    changes it does not count at all (made in inference mode, or of a class of its own) is never known to stand.

    code     the graph, and the numbers that it is called with
    tensors  everything else, in order
    """

    def __init__(self, code: object, tensors: Sequence[torch.Tensor]) -> None:
        self._code = code
        self._counted = all(map(_is_counted, tensors))
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self._stamp(tensors)

    def same(self, code: object, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a call is of this graph, with these very tensors, where they were. Asked at every step, so of changes in place
        nothing is said: their count only grows, and `stands` compares it before anything is shared."""
        same = code == self._code and all(map(is_, [tensor() for tensor in self._tensors], tensors))
        return same and (not self._counted or [*map(_address, tensors)] == self._addresses)

    def stands(self) -> bool:
        """Whether all tensors are there, unchanged."""
        tensors = [there for tensor in self._tensors if (there := tensor()) is not None]
        if not self._counted or len(tensors) < len(self._tensors):
            return False
        storages = [tensor.untyped_storage() for tensor in tensors]
        return (
            [*map(_address, tensors)] == self._addresses
            and [tensor._version for tensor in tensors] == self._versions
            and not any(map(is_not, [storage() for storage in self._storages], storages))
        )

    def renew(self) -> None:
        """Take the tensors as they are now for unchanged."""
        tensors = [tensor() for tensor in self._tensors]
        self._stamp([tensor for tensor in tensors if tensor is not None])

    def _stamp(self, tensors: Sequence[torch.Tensor]) -> None:
        counted = tensors if self._counted else []
        self._addresses = [*map(_address, counted)]
        self._versions = [tensor._version for tensor in counted]
        self._storages = [weakref.ref(tensor.untyped_storage()) for tensor in counted]


def _is_counted(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.layout is torch.strided and not tensor.is_inference()

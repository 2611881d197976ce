"""Where do the weights of merged linears lie, and whose memory may be moved?

Parameters become the rows of one tensor: each keeps its identity, its shape and its values, and so does the state_dict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def one_block(weights: Sequence[torch.Tensor]) -> list[int] | None:
    """The order in which these tensors lie one behind the other in one storage, as after `join`; None where they do not."""
    if not all(_plain(weight) and weight.is_contiguous() for weight in weights):
        return None
    order = sorted(range(len(weights)), key=lambda place: weights[place].data_ptr())
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    ends = [weights[place].data_ptr() + weights[place].nbytes for place in order]
    starts = [weights[place].data_ptr() for place in order]
    return order if len(storages) == 1 and ends[:-1] == starts[1:] else None


def unmovable(weight: torch.Tensor) -> str | None:
    """Why the memory of this weight must stay where it is; None where moving it can surprise nobody.

    A parameter that takes gradients may move, as it does in `model.to(device)`.
    """
    if not _plain(weight):
        return f"is a {type(weight).__name__}, not a plain parameter"
    if not weight.is_contiguous():
        return f"has strides {tuple(weight.stride())}, so its rows are not contiguous"
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "has hooks, which may count on where it lies"
    if weight.is_inference():
        return "was made in inference mode"
    storage = weight.untyped_storage()
    if storage.device.type == "cpu" and storage.is_shared():
        return "is shared with other processes"
    if storage.nbytes() != weight.nbytes:
        return "is a part of a larger tensor"
    if _holders(weight) > _holders(nn.Parameter(torch.empty(1))):
        return "shares its memory with another tensor, such as a state_dict that is still held"
    return None


def join(weights: Sequence[torch.Tensor], joined: torch.Tensor | None = None) -> torch.Tensor:
    """The weights as one tensor, in this order along dim 0; from now on each of them is a part of it.

    `joined`: such a tensor, of which some of them are parts already. Where they lie so already nothing is moved; else there is
    one copy too many until the last of them has moved. ValueError where one must not be moved.
    """
    first, rows = weights[0], [weight.shape[0] for weight in weights]
    with torch.inference_mode(False), torch.no_grad():
        if one_block(weights) == list(range(len(weights))):
            whole, strides = torch.Size((sum(rows), *first.shape[1:])), (math.prod(first.shape[1:]), *first.stride()[1:])
            return first.detach().as_strided(whole, strides, first.storage_offset())  # a single row may have any stride
        replaced = joined is not None
        if joined is None:
            joined = torch.empty((sum(rows), *first.shape[1:]), dtype=first.dtype, device=first.device)
        pairs = zip(weights, torch.split(joined, rows), strict=True)
        moving = [(weight, part) for weight, part in pairs if weight.data_ptr() != part.data_ptr()]
        stuck = next(filter(None, (unmovable(weight) for weight, _ in moving)), None)
        if stuck is not None:
            why = f"a weight that is merged with others was replaced, and the new one {stuck}"
            raise ValueError(f"{why}; copy into the weight instead, or compile with merge_linears=False")
        for weight, part in moving:
            part.copy_(weight)
        for weight, part in moving:
            weight.data = part
            if replaced:  # what a user has put there is now where the old values were: whoever compares addresses must see a change
                torch.autograd.graph.increment_version(weight)
    if first.is_cuda:
        torch.cuda.empty_cache()  # else the allocator keeps what became free, which no larger tensor fits into
    return joined


class JoinedWeights:
    """The joined tensors that a call needs, made from the parameters it is called with.

    What lies elsewhere than at the call before is joined again: its data was replaced, or it is another model's.
    """

    def __init__(self, groups: Sequence[Sequence[int]] = ()) -> None:
        """`groups`: for each tensor, the places of its parameters among the inputs of the model."""
        self._groups = tuple(map(tuple, groups))
        self._places = tuple(place for group in self._groups for place in group)
        self._addresses: list[int] = []
        self._tensors: list[torch.Tensor | None] = [None] * len(self._groups)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        if [inputs[place].data_ptr() for place in self._places] != self._addresses:
            known = set(self._addresses)
            for at, group in enumerate(self._groups):
                weights = [inputs[place] for place in group]
                same_model = any(weight.data_ptr() in known for weight in weights)
                self._tensors[at] = join(weights, self._tensors[at] if same_model else None)
            self._addresses = [inputs[place].data_ptr() for place in self._places]
        return self._tensors


def _plain(weight: torch.Tensor) -> bool:
    """No tensor subclass, sharded or quantised say, which would mean something else by its rows."""
    return type(weight) is nn.Parameter and type(weight.data) is torch.Tensor and weight.layout is torch.strided


def _holders(weight: torch.Tensor) -> int:
    """Tensors that use this memory. Private, fenced here: what Inductor's CUDA graphs count them with."""
    count: int = torch._C._storage_Use_Count(weight.untyped_storage()._cdata)
    return count

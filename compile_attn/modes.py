"""In which of torch's modes does a server run, whatever mode its caller is in?"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Placed(Protocol):
    """What works on one device."""

    @property
    def device(self) -> torch.device: ...


Owner = TypeVar("Owner", bound=Placed)


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Without gradients, outside of inference mode, and on a GPU with this one as the current device.

    What is made in inference mode cannot be written outside of it, and what is compiled in one mode is compiled again in another.
    """
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with current, torch.inference_mode(False), torch.no_grad():
        yield


def in_own_modes(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """A method that runs in such modes of its object's device; what needs no gradients says so itself, so most callers' will do."""

    @functools.wraps(method)
    def inside(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled() and _is_current(self.device):
            return method(self, *args, **kwargs)
        with own_modes(self.device):
            return method(self, *args, **kwargs)

    return inside


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.current_device() == device.index

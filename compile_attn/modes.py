"""In which of torch's modes does a server run, whatever mode its caller is in?"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Placed(Protocol):
    """What works on one device."""

    @property
    def device(self) -> torch.device: ...


Owner = TypeVar("Owner", bound=Placed)


def in_own_modes(method: Callable[Concatenate[Owner, P], T]) -> Callable[Concatenate[Owner, P], T]:
    """A method that runs outside of inference mode, and with its object's GPU as the current device.

    What is made in inference mode cannot be written outside of it, and what is compiled in one mode is compiled again in another.
    Gradients are the business of whoever calls the model; but to leave inference mode turns them on.
    """

    @functools.wraps(method)
    def inside(self: Owner, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled() and _is_current(self.device):
            return method(self, *args, **kwargs)
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with current, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return inside


def _is_current(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.current_device() == device.index

"""How is a stranger's model compiled as one graph, and what is said where it cannot be?"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from compile_attn.apart import compiled_apart
from compile_attn.calling import Call, call_of
from compile_attn.options import Options
from compile_attn.passes.graph import Location, source_line
from compile_attn.passes.pipeline import refusal
from compile_attn.passes.report import RefusedError, Rejected, Report


class OneGraph:
    """The model against its cache, called with packed token ids and positions, [1, T] both.

    A call of the user's own is compiled with the model, so that it sees packed tokens as the model does.
    """

    def __init__(
        self, model: nn.Module, options: Options, call: Call | None, backend: Callable[..., Callable[..., Any]] | None = None
    ) -> None:
        from compile_attn.backend import paged_attn

        self._call = call_of(model) if call is None else _directly
        whole = model if call is None else _Through(model, call)
        given = {field.name: getattr(options, field.name) for field in fields(options)}
        # fullgraph: code outside the graph would see packed tokens and answer wrongly
        self._compiled = compiled_apart(whole, fullgraph=True, backend=backend or paged_attn, options=given)

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """What the model returns. RefusedError where it is not one graph; what the backend says, unwrapped."""
        from torch._dynamo.exc import BackendCompilerFailed, Unsupported, UserError

        try:
            with torch.no_grad(), _as_plain_ops():
                return self._call(self._compiled, input_ids, position_ids)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, ValueError):
                raise error.inner_exception from None
            raise
        except (Unsupported, UserError) as error:
            raise _not_one_graph(error) from error


class _Through(nn.Module):
    """A model behind the user's own call."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self._through = model, call

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        return self._through(self.model, input_ids, position_ids)


def _directly(compiled: Callable[..., Any], input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
    return compiled(input_ids, position_ids)


@contextmanager
def _as_plain_ops() -> Iterator[None]:
    """Two switches of torch: what they turn on does not become a graph of any length.

    nn.TransformerEncoder's fast path is one op, which torch 2.11 cannot capture. opt_einsum, where it is installed, orders
    the products of an einsum by their sizes, and makes a constant of the number of tokens.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.backends.opt_einsum.flags(enabled=False):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _not_one_graph(error: Exception) -> RefusedError:
    """Dynamo's own refusal, in the words of ours; its hints stay in the chained error."""
    what = str(error).strip().splitlines()[0]
    stack = getattr(error, "real_stack", None)
    where = source_line("".join(traceback.format_list(stack))) if stack else ""
    cure = "rewrite the code that is named there, or move it out of forward"
    rejected = Rejected(f"the model does not compile as one graph: {what}", Location(source=where), cure)
    return refusal(Report("paged"), [rejected])

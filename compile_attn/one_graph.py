"""How is a stranger's model compiled as one graph, and what is said where it cannot be?"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compile_attn.calling import Call, call_of
from compile_attn.options import Options
from compile_attn.passes.graph import Location, source_line
from compile_attn.passes.pipeline import refusal
from compile_attn.passes.report import RefusedError, Rejected, Report


class OneGraph:
    """The model against its cache, called with packed token ids and positions, [1, T] both.

    A call of the user's own is compiled with the model, so that it sees packed tokens as the model does.
    """

    def __init__(self, model: nn.Module, options: Options, call: Call | None) -> None:
        from compile_attn.backend import paged_attn

        self._call = call_of(model) if call is None else _directly
        whole = model if call is None else _Through(model, call)
        given: dict[str, Any] = {"kernel": options.kernel, "cache": options.cache, "inner": options.inner}
        keywords: dict[str, Any] = {"isolate_recompiles": True} if _CAN_ISOLATE else {}
        # fullgraph: code outside the graph would see packed tokens and answer wrongly
        compiled: Callable[..., Any] = torch.compile(whole, fullgraph=True, backend=paged_attn, options=given, **keywords)
        self._compiled = compiled

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """What the model returns. RefusedError where it is not one graph; what the backend says, unwrapped."""
        from torch._dynamo.exc import BackendCompilerFailed, Unsupported, UserError

        try:
            with torch.no_grad(), _without_opaque_encoders(), _without_shared_limit():
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
def _without_opaque_encoders() -> Iterator[None]:
    """nn.TransformerEncoder as the ops that it is made of: its fast path is one op, which torch 2.11 cannot capture."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Other PagedLMs of the same class share the code of `forward`, and must not use up its limit of recompilations. After
# torch 2.11 torch.compile counts them apart; before, the limit itself is lifted while our model runs.
_CAN_ISOLATE = "isolate_recompiles" in inspect.signature(torch.compile).parameters


@contextmanager
def _without_shared_limit() -> Iterator[None]:
    if _CAN_ISOLATE:
        yield
        return
    import torch._dynamo.config as dynamo  # documented, for all its underscore

    with dynamo.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


def _not_one_graph(error: Exception) -> RefusedError:
    """Dynamo's own refusal, in the words of ours; its hints stay in the chained error."""
    what = str(error).strip().splitlines()[0]
    stack = getattr(error, "real_stack", None)
    where = source_line("".join(traceback.format_list(stack))) if stack else ""
    cure = "rewrite the code that is named there, or move it out of forward"
    rejected = Rejected(f"the model does not compile as one graph: {what}", Location(source=where), cure)
    return refusal(Report("paged"), [rejected])

"""Was the same graph traced to ATen before, by this process or by another?

Tracing takes longer than all other passes together, and what comes of it follows from Dynamo's graph, its fake inputs, and how
torch is set. So it is kept in a file beside Inductor's, named by all of that, unless tracing has assumed anything of a size: then
it has said so to Dynamo, and would have to say it again. Reading and proof are never kept.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch._guards import detect_fake_mode  # what every backend uses to find the mode of its inputs
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from compile_attn.passes import written
from compile_attn.passes.graph import placeholders
from compile_attn.passes.written import Json, Unwritten, Writer


class Traced:
    """The place of one graph's trace; without a name where it cannot be kept."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._mode: FakeTensorMode | None = None
        self._file: Path | None = None
        inputs = [node.meta.get("example_value") for node in placeholders(gm.graph)]
        mode = detect_fake_mode(inputs)  # the one that a trace is made in
        known = {id(one.fake_mode.shape_env) for one in inputs if isinstance(one, FakeTensor)}
        if mode is None or known != {id(mode.shape_env)} or not wanted():
            return
        try:
            told = [_graph(gm), _aliases(inputs), _assumed(mode), _settings(), _source()]
        except (Unwritten, AttributeError):  # of a torch that keeps it elsewhere: nothing is kept there
            return
        name = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self._mode, self._file = mode, _folder() / name[:2] / f"{name}.json"
        self._before = _assumed(mode)

    def find(self) -> fx.GraphModule | None:
        """The trace, under Dynamo's own symbols."""
        if self._file is None or self._mode is None:
            return None
        try:
            digest, _, text = self._file.read_text(encoding="utf-8").partition("\n")
        except (OSError, UnicodeDecodeError):
            return None
        if digest != _digest(text):  # cut, or changed: traced again, and written anew
            return None
        found = written.read(json.loads(text), self._mode, _symbols(self._mode))
        return found if _assumed(self._mode) == self._before else None

    def keep(self, module: fx.GraphModule) -> None:
        if self._file is None or self._mode is None or _assumed(self._mode) != self._before:
            return
        try:
            text = json.dumps(Writer().graph(module))
        except Unwritten:
            return
        _write(self._file, f"{_digest(text)}\n{text}")


def wanted() -> bool:
    """As Inductor's cache of graphs is; and not where whoever is above may change what an op does."""
    from torch._inductor import config

    ours_alone = not (torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack())
    return bool(config.fx_graph_cache and not config.force_disable_caches and ours_alone)


def _graph(gm: fx.GraphModule) -> Json:
    """Dynamo's graph, with lines of source: what is traced from it tells them."""
    writer = Writer()
    nodes = [writer.node(node, node.meta.get("example_value") if node.op == "placeholder" else None, gm) for node in gm.graph.nodes]
    return [nodes, list(writer.texts)]


def _aliases(inputs: Sequence[Any]) -> Json:
    """Which inputs share memory, which are parameters, and which were made in inference mode."""
    first: dict[int, int] = {}
    told = []
    for place, one in enumerate(inputs):
        if isinstance(one, FakeTensor):
            storage = first.setdefault(one.untyped_storage()._cdata, place)
            told.append([storage, isinstance(one, torch.nn.Parameter), one.is_leaf, one.is_inference()])
    return told


def _assumed(mode: FakeTensorMode) -> Json:
    """What is known of sizes, and was assumed of them. Private, fenced here: torch keeps it in its ShapeEnv."""
    env: Any = mode.shape_env
    if env is None:
        raise Unwritten("sizes that are no symbols")
    values = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    known = [{str(symbol): str(one) for symbol, one in each.items()} for each in (values, env.var_to_range, env.replacements)]
    guards = [str(guard.expr) for guard in env.guards]
    later = [str(one.expr) for asserts in env.deferred_runtime_asserts.values() for one in asserts]
    return [*known, guards, later, sorted(map(str, env.divisible)), repr(env.settings)]


def _symbols(mode: FakeTensorMode) -> dict[str, sympy.Symbol]:
    env: Any = mode.shape_env
    return {str(symbol): symbol for symbol in env.var_to_range}


def _settings() -> Json:
    """How torch is set, as far as tracing depends on it."""
    kinds = ("cpu", "cuda")
    autocast = [[torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))] for kind in kinds]
    switches = [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        bool(torch.backends.opt_einsum.enabled),
        torch.cuda.is_available(),
        *(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math", "cudnn")),
    ]
    functorch: Any = torch._functorch.config
    inductor: Any = torch.compiler.config
    named = [torch.__version__, str(torch.get_default_dtype()), str(torch.get_default_device()), inductor.cache_key_tag]
    return [autocast, switches, named, functorch.get_hash().hex()]


@functools.cache
def _source() -> str:
    """The text of what traces, writes and reads."""
    from compile_attn.passes import decompositions, normalize

    modules = (normalize, decompositions, written, sys.modules[__name__])
    return hashlib.sha256("".join(map(inspect.getsource, modules)).encode()).hexdigest()


def _folder() -> Path:
    # Private, fenced here: where Inductor keeps what it has compiled, so that who moves or empties that does so with this.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "paged_attn"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    """All of it or nothing; a folder that cannot be written is no error, as it is none to Inductor."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=file.parent, delete=False) as part:
            part.write(text)
        os.replace(part.name, file)
    except OSError:
        return

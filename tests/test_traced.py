"""Is a graph that was traced before the very graph that tracing makes, and is nothing found that would be another one?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import compile_attn as ca
from compile_attn.passes import normalize, traced, written
from compile_attn.passes.report import Report
from tests.models import handwritten
from tests.models.families import FAMILIES, build
from tests.tiny import alone, prompts_of, tiny

WRITTEN = ("Einsum", "NanoGPT", "HeadList", "TorchMha", "ExpSum", "Alibi", "RopeTable", "BmmParallel")
SERVED = ("gemma2", "bloom")
IDS = torch.arange(9)[None]


class Count:
    """How many graphs were traced."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.graphs = folder, 0

    @property
    def files(self) -> list[Path]:
        return list(self.folder.rglob("*.json"))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Count:
    """Traces are kept, in a folder of the test's own."""
    found, trace = Count(tmp_path), normalize._trace

    def counted(gm: fx.GraphModule) -> fx.GraphModule:
        found.graphs += 1
        return trace(gm)

    monkeypatch.setattr(traced, "_folder", lambda: tmp_path)
    monkeypatch.setattr(normalize, "_trace", counted)
    return found


def same(one: Report, other: Report) -> None:
    assert one.before == other.before and one.after == other.after
    assert (one.sites, one.rejected, one.tokens, one.linears) == (other.sites, other.rejected, other.tokens, other.linears)
    assert one.max_positions == other.max_positions


def twice(count: Count, make: Callable[[], nn.Module], **how: Any) -> None:
    """Traced once, found once, and everything that is said of it is the same."""
    first = ca.explain(make(), kernel="reference", **how)
    assert (count.graphs, len(count.files)) == (1, 1)
    same(first, ca.explain(make(), kernel="reference", **how))
    assert (count.graphs, len(count.files)) == (1, 1)
    assert first.sites


@pytest.mark.parametrize("name", WRITTEN)
def test_forms(name: str, count: Count) -> None:
    twice(count, lambda: getattr(handwritten, name)().eval(), paged=True)


@pytest.mark.parametrize("name", SERVED)
def test_families(name: str, count: Count) -> None:
    twice(count, lambda: build(next(family for family in FAMILIES if family.name == name)), paged=True)


@pytest.mark.every_form
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_other_families(family: Any, count: Count) -> None:
    """What can be written down is found, what cannot is traced; either way the same comes of it."""
    try:
        first = ca.explain(build(family), paged=True, kernel="reference")
    except ValueError:
        pytest.skip("it has no paged form")
    same(first, ca.explain(build(family), paged=True, kernel="reference"))
    assert count.graphs == 2 - len(count.files)


def test_a_served_model(count: Count) -> None:
    """Through the inner compiler's own symbols; both are right."""
    prompts = prompts_of([5, 9, 2])
    expected = [alone(tiny(), prompt, ca.Sampling(max_new_tokens=6)) for prompt in prompts]
    for traces in (1, 1):
        with ca.PagedLM(tiny(), 64, page_size=4, max_seqs=2, inner="eager") as lm:
            assert lm.generate(prompts, max_new_tokens=6) == expected
        assert count.graphs == traces


def test_reading_is_not_kept(count: Count) -> None:
    """Another kernel, page size or mask that is asked for: of the same trace."""
    reports = [ca.explain(tiny(), paged=True, kernel=kernel) for kernel in ("reference", "general")]
    assert count.graphs == 1 and [report.sites[0].kernel for report in reports] == ["reference", "general"]


def _in_half(model: nn.Module) -> Report:
    return ca.explain(model.to(torch.bfloat16), IDS)


def _under_autocast(model: nn.Module) -> Report:
    with torch.autocast("cpu", torch.bfloat16):
        return ca.explain(model, IDS)


def _by_another_torch(model: nn.Module) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "2.99")
        return ca.explain(model, IDS)


def _tagged(model: nn.Module) -> Report:
    with torch.compiler.config.patch(cache_key_tag="mine"):  # type: ignore[attr-defined]
        return ca.explain(model, IDS)


def _from_another_line(model: nn.Module) -> Report:
    model.head.register_forward_hook(lambda module, args, out: out * 1)  # type: ignore[union-attr]
    return ca.explain(model, IDS)


def _by_other_code(model: nn.Module) -> Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traced, "_source", lambda: "another")
        return ca.explain(model, IDS)


def _tied(model: nn.Module) -> Report:
    model.attention[1].out.weight = model.attention[0].out.weight  # type: ignore[index,union-attr]
    return ca.explain(model, IDS)


OTHERS = (_in_half, _under_autocast, _by_another_torch, _tagged, _from_another_line, _by_other_code, _tied)


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.__name__)
def test_what_is_another_graph(other: Callable[[nn.Module], Report], count: Count) -> None:
    ca.explain(tiny(), IDS)
    assert count.graphs == 1
    other(tiny())
    assert (count.graphs, len(count.files)) == (2, 2)
    torch._dynamo.reset()
    other(tiny())
    assert count.graphs == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: data.replace(b"softmax", b"sigmoid"), lambda data: b"\xff", lambda data: b""]
)
def test_damaged_files(damage: Callable[[bytes], bytes], count: Count) -> None:
    """Not found, and written anew."""
    first = ca.explain(tiny(), IDS)
    [file] = count.files
    whole = file.read_bytes()
    assert damage(whole) != whole
    file.write_bytes(damage(whole))
    same(first, ca.explain(tiny(), IDS))
    assert count.graphs == 2 and file.read_bytes() == whole


def test_what_tracing_has_assumed_is_not_kept(count: Count, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo would not hear of it in a process that finds the graph."""
    trace = normalize._trace

    def assuming(gm: fx.GraphModule) -> fx.GraphModule:
        tokens = next(node.meta["example_value"] for node in gm.graph.nodes if node.name.endswith("input_ids_"))
        assert bool(tokens.shape[1] < 60)
        return trace(gm)

    monkeypatch.setattr(normalize, "_trace", assuming)
    for graphs in (1, 2):
        assert ca.explain(tiny(), paged=True).sites
        assert count.graphs == graphs and not count.files


@torch.library.custom_op("paged_attn_tests::kept", mutates_args=())
def kept(x: Tensor) -> Tensor:
    return x.clone()


@kept.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_ops_of_others_are_not_kept(count: Count) -> None:
    """What they are may change without their name."""
    model = tiny()
    model.head.register_forward_hook(lambda module, args, out: kept(out))
    for graphs in (1, 2):
        assert ca.explain(model, IDS).sites
        assert count.graphs == graphs and not count.files


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("how", [{"force_disable_caches": True}, {"fx_graph_cache": False}])
def test_switched_off_as_inductors_is(how: dict[str, bool], count: Count) -> None:
    for graphs in (1, 2):
        with torch._inductor.config.patch(how):
            ca.explain(tiny(), IDS)
        assert count.graphs == graphs and not count.files


def test_a_folder_that_cannot_be_written(count: Count, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(traced, "_folder", lambda: tmp_path / "file" / "below")
    assert ca.explain(tiny(), IDS).sites and not count.files


# The language


@pytest.fixture
def sizes() -> Iterator[tuple[Any, Any]]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    yield mode, mode.from_tensor(torch.ones(7, 5)).shape[0]


def round_trip(module: fx.GraphModule, mode: Any) -> fx.GraphModule:
    return written.read(json.loads(json.dumps(written.Writer().graph(module))), mode, traced._symbols(mode))


def test_arguments_and_values(sizes: tuple[Any, Any]) -> None:
    mode, size = sizes
    graph = fx.Graph()
    x = graph.placeholder("x")
    with mode:
        x.meta["val"] = torch.empty_strided((size, 3 * size + 1), (size // 2 + 9, 1), dtype=torch.bfloat16)[:, 2:]
    args = (slice(None, None, 2), ..., None), [1, 2.5, float("inf"), True, "text"], torch.float16, torch.device("cpu")
    node = graph.call_function(torch.ops.aten.add.Tensor, (x, args), {"like": torch.contiguous_format})
    node.meta.update(
        val=[x.meta["val"], size * size], stack_trace="line", nn_module_stack={"1": ("a", nn.Linear), "2": ("a.b", nn.Linear)}
    )
    graph.output((node,))
    found = round_trip(fx.GraphModule(nn.Module(), graph), mode)
    old, new = list(graph.nodes), list(found.graph.nodes)
    assert [(one.op, one.name, one.target) for one in new] == [(one.op, one.name, one.target) for one in old]
    assert str(new[1].args) == str(old[1].args) and new[1].kwargs == old[1].kwargs
    value, like = new[0].meta["val"], x.meta["val"]
    assert value.shape == like.shape and value.stride() == like.stride() and value.storage_offset() == 2
    assert (value.dtype, value.device, value.requires_grad, value.fake_mode) == (like.dtype, like.device, False, mode)
    assert new[1].meta["val"][1] == size * size and new[1].meta["val"][1].node.expr == (size * size).node.expr
    assert new[1].meta["stack_trace"] == "line" and [path for path, _ in new[1].meta["nn_module_stack"].values()] == ["a", "a.b"]


def test_literals(sizes: tuple[Any, Any]) -> None:
    mode, _ = sizes
    for value in (
        torch.tensor(0.1),
        torch.tensor([[1, -2], [3, 4]]),
        torch.tensor([True, False]),
        torch.tensor([float("nan"), -0.0]).half(),
    ):
        holder = nn.Module()
        holder.register_buffer("held", value)
        graph = fx.Graph()
        node = graph.get_attr("held")
        node.meta["val"] = mode.from_tensor(value)
        graph.output(node)
        found = round_trip(fx.GraphModule(holder, graph), mode).get_buffer("held")
        assert found.dtype == value.dtype and found.shape == value.shape
        assert torch.equal(found.view(torch.uint8) if found.dim() else found, value.view(torch.uint8) if value.dim() else value)


@pytest.mark.parametrize("target", [test_literals, print, torch.ops.paged_attn.once.default, lambda x: x])
def test_functions_of_others(target: Any) -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(target, ()))
    with pytest.raises(written.Unwritten):
        written.Writer().graph(fx.GraphModule(nn.Module(), graph))


@pytest.mark.parametrize("name", ["os.system", "torch.ops.paged_attn.once.default", "builtins.eval", "torch", "torch.nn", "eval"])
def test_names_that_are_no_function_of_torch(name: str) -> None:
    assert written._found(name) is None

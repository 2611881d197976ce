"""Do PyTorch's own tools see our compilations, and leave them alone, as they do torch's?

What torch reads while it is imported, and what a second process finds of a first one, takes processes; tests share them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from compile_attn import PagedLM, RefusedError, Sampling
from compile_attn.cache import Chunk, PagedKVCache
from tests.tiny import alone, prompts_of, tiny

ROOT = Path(__file__).parent.parent
IDS = torch.arange(9)[None]
PROMPTS = prompts_of([5, 9, 2])
EAGERLY = {"inner": "eager"}
ARTEFACTS = ["graph_after", "graph_before", "graph_diff", "report"]
SUMMARY = "1 attention site rewritten"
STATELESS = """
import torch
from tests.tiny import tiny
with torch.no_grad():
    torch.compile(tiny(1), backend="paged_attn", options={"inner": "eager"})(torch.arange(9)[None])
"""
TRACED = f"""
import json, sys
import compile_attn as ca
{STATELESS}
report = ca.PagedLM(tiny(1), 64, max_seqs=2, inner="eager").report
said = dict(report=str(report), graph_before=report.before, graph_after=report.after, graph_diff=report.diff())
json.dump(said, open(sys.argv[1], "w"))
"""
# Two compilations in a process whose Inductor finds what an earlier one has left: in its folder, or in a file of artefacts.
CACHED = """
import json, sys, time
import torch
from torch._dynamo.utils import counters
import torch._inductor.config
import compile_attn as ca
import compile_attn.inductor
from compile_attn.passes import normalize
from tests.tiny import prompts_of, tiny

torch._inductor.config.cpp.simdlen = 1  # else the compiler is tried on each kind of vectors, which takes longer than all kernels

traced = []
trace = normalize._trace
normalize._trace = lambda gm: traced.append(gm) or trace(gm)

def compiled(what, run):
    begin = time.perf_counter()
    counters.clear()
    traced.clear()
    result = run()
    counts = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    found[what] = {**counts, "traced": len(traced), "result": result, "seconds": time.perf_counter() - begin}

@torch.no_grad()
def stateless():
    return torch.compile(tiny(1), backend="paged_attn")(torch.arange(9)[None]).tolist()

def paged():
    lm = ca.PagedLM(tiny(1), 64, page_size=4, max_seqs=2)
    return lm.generate(prompts_of([5, 9]), max_new_tokens=6), lm.cache.max_tokens

out, artefacts, way = sys.argv[1:]
found = {}
if way == "load":
    assert torch.compiler.load_cache_artifacts(open(artefacts, "rb").read()) is not None
compiled("stateless", stateless)
compiled("paged", paged)
if way == "save":
    open(artefacts, "wb").write(torch.compiler.save_cache_artifacts()[0])
if way == "find":
    torch._dynamo.reset()
    compile_attn.inductor._what_ops_are = lambda: "other ops"
    compiled("other ops", stateless)
json.dump(found, open(out, "w"))
"""


def _python(program: str, *arguments: str | Path, **variables: str) -> str:
    """What the program prints on standard error, in a process with these variables of torch's and no others."""
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, env=quiet | variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


# TORCH_LOGS and TORCH_TRACE


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, str]]:
    """A stateless and a paged compilation: what TORCH_LOGS showed, the file of TORCH_TRACE, and what the paged report says."""
    place = tmp_path_factory.mktemp("trace")
    shown = _python(TRACED, place / "said.json", TORCH_LOGS="+paged_attn", TORCH_TRACE=str(place / "raw"))
    [file] = (place / "raw").glob("*.log")
    return shown, file, json.loads((place / "said.json").read_text())


def test_torch_logs_with_graphs(traced: tuple[str, Path, dict[str, str]]) -> None:
    for mode in ("stateless", "paged"):
        for text in (f"{SUMMARY} ({mode})", f"{mode} graph before:", f"{mode} graph after:"):
            assert traced[0].count(text) == 1, text


@pytest.mark.parametrize(("names", "times"), [("paged_attn, compile_attn", 1), ("-paged_attn", 0)])
def test_torch_logs_by_level(names: str, times: int) -> None:
    shown = _python(STATELESS, TORCH_LOGS=names)
    assert shown.count(SUMMARY) == times and "graph before" not in shown


def test_set_logs() -> None:
    """The same names, from a program; `import paged_attn` is `import compile_attn`."""
    program = f"""
import logging, torch
torch._logging.set_logs(modules={{"paged_attn": logging.INFO}})
{STATELESS}
import paged_attn, compile_attn
assert paged_attn.PagedLM is compile_attn.PagedLM and paged_attn.__all__ == compile_attn.__all__
"""
    assert _python(program).count(SUMMARY) == 1


def _artefacts(trace: str) -> dict[tuple[int, int], dict[str, str]]:
    """By compilation, what tlparse reads: a JSON line for each artefact, and its payload in the tab-indented lines after it."""
    found: dict[tuple[int, int], dict[str, list[str]]] = {}
    lines: list[str] = []
    for line in trace.splitlines():
        if line.startswith("\t"):
            lines.append(line[1:])
            continue
        record, lines = json.loads(line[line.index("{") :]), []
        name = record.get("artifact", {}).get("name", "")
        if name.startswith("paged_attn_"):
            assert record["artifact"]["encoding"] == "string" and record["attempt"] == 0
            compilation = found.setdefault((record["frame_id"], record["frame_compile_id"]), {})
            assert compilation.setdefault(name.removeprefix("paged_attn_"), lines) is lines, "said once"
    return {place: {name: "\n".join(lines) for name, lines in texts.items()} for place, texts in found.items()}


def test_torch_trace(traced: tuple[str, Path, dict[str, str]]) -> None:
    stateless, paged = _artefacts(traced[1].read_text()).values()
    assert sorted(stateless) == sorted(paged) == ARTEFACTS
    assert paged == traced[2]
    assert stateless["report"].startswith(f"{SUMMARY} (stateless)") and paged["report"].startswith(f"{SUMMARY} (paged)")
    for texts, op in ((stateless, "aten.scaled_dot_product_attention"), (paged, "paged_attn.attend")):
        assert "aten.softmax.int" in texts["graph_before"] and op not in texts["graph_before"]
        assert "aten.softmax.int" not in texts["graph_after"] and op in texts["graph_after"]
        assert texts["graph_diff"].startswith("--- before\n+++ after\n")


def test_tlparse_lists_the_artefacts(traced: tuple[str, Path, dict[str, str]], tmp_path: Path) -> None:
    tlparse = Path(sysconfig.get_path("scripts")) / "tlparse"
    assert tlparse.exists(), "pip install tlparse: it is among the extra `test`"
    pages = tmp_path / "pages"
    subprocess.run([tlparse, traced[1], "-o", pages, "--no-browser"], check=True, capture_output=True)
    index = (pages / "index.html").read_text()
    compilations = _artefacts(traced[1].read_text())
    assert len(compilations) == 2
    for (frame, compilation), texts in compilations.items():
        for name, text in texts.items():
            [link] = re.findall(rf'href="(-_{frame}_{compilation}_0/paged_attn_{name}_\d+\.txt)"', index)
            assert (pages / link).read_text().rstrip("\n") == text.rstrip("\n")


# Stances, whole graphs, Dynamo's own explanation and reset


def _paged(model: torch.nn.Module) -> tuple[PagedKVCache, Callable[..., Any]]:
    cache = PagedKVCache(64, page_size=4, max_seqs=2)
    return cache, torch.compile(model, backend="paged_attn", options={"cache": cache, "inner": "eager"})


@torch.no_grad()
def _logits(cache: PagedKVCache, step: Callable[..., Any], chunk: Chunk) -> torch.Tensor:
    batch = cache.batch([chunk])
    return batch.rows(step(batch.input_ids))


def _served(**options: Any) -> PagedLM:
    return PagedLM(tiny(), 64, page_size=4, max_seqs=2, inner="eager", **options)


def _expected() -> list[list[int]]:
    return [alone(tiny(), prompt, Sampling(max_new_tokens=6)) for prompt in PROMPTS]


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("stance", ["default", "force_eager", "eager_on_recompile", "fail_on_recompile"])
def test_stances_without_a_cache(stance: str) -> None:
    model = tiny()
    fast = torch.compile(model, backend="paged_attn", options={"inner": "eager"}, dynamic=False)
    assert torch.allclose(fast(IDS), model(IDS), atol=1e-5)
    compiled = _graphs()
    longer = torch.arange(11)[None]
    with torch.compiler.set_stance(stance):
        assert torch.allclose(fast(IDS), model(IDS), atol=1e-5) and _graphs() == compiled
        if stance == "fail_on_recompile":
            with pytest.raises(RuntimeError, match=r"Detected recompile when torch\.compile stance is 'fail_on_recompile'"):
                fast(longer)
        else:
            assert torch.allclose(fast(longer), model(longer), atol=1e-5)
    assert _graphs() == compiled + (stance == "default")
    assert torch.allclose(fast(longer), model(longer), atol=1e-5) and _graphs() == compiled + 1


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


EAGER: dict[str, Callable[[], Any]] = {  # what has torch run a model as it is written, though it was compiled with a cache
    "force_eager": lambda: torch.compiler.set_stance("force_eager"),
    "eager_on_recompile": lambda: torch.compiler.set_stance("eager_on_recompile"),
    "another backend": lambda: torch.compiler.set_stance(force_backend="eager"),
    "recompile limit": lambda: torch._dynamo.config.patch(recompile_limit=0),
}


@pytest.mark.parametrize("how", EAGER)
def test_a_cache_is_never_served_eagerly(how: str) -> None:
    """Packed tokens are one sequence to the model as it is written: whatever made torch run that, nothing of it is taken."""
    model = tiny()
    cache, step = _paged(model)
    lost = cache.add()
    with EAGER[how](), pytest.raises(RuntimeError, match=r"not as its paged graph.*look for torch\.compiler\.set_stance"):
        _logits(cache, step, Chunk(lost, [1, 2, 3]))
    with pytest.raises(ValueError, match="was in a batch that was never run"):
        cache.batch([Chunk(lost, [4])])
    cache.free(lost)
    torch._dynamo.reset()
    seq = cache.add()
    rows = torch.cat([_logits(cache, step, Chunk(seq, part, "all")) for part in ([1, 2, 3], [4], [5, 6])])
    assert torch.allclose(rows, model(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0], atol=1e-5)


@pytest.mark.parametrize("how", [*EAGER][:3])
def test_a_model_is_never_served_eagerly(how: str) -> None:
    with EAGER[how](), pytest.raises(RuntimeError, match="not as its paged graph"):
        _served()


def test_a_server_in_other_stances() -> None:
    """What is compiled serves every batch without another compilation; where torch must not use it, an error loses nothing."""
    expected = _expected()
    with _served() as lm:
        for stance in ("fail_on_recompile", "eager_on_recompile"):
            with torch.compiler.set_stance(stance):
                assert lm.generate(PROMPTS, max_new_tokens=6) == expected
        requests = [lm.submit(prompt, Sampling(max_new_tokens=6)) for prompt in PROMPTS]
        lm.step()
        with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="not as its paged graph"):
            lm.step()
        while lm.has_work:
            lm.step()
        assert [request.new_tokens for request in requests] == expected
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="Detected recompile"):
        _served()


class Broken(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(input_ids)
        torch._dynamo.graph_break()
        return 2 * out


@pytest.mark.usefixtures("no_grad")
def test_fullgraph() -> None:
    model, broken = tiny(), Broken()
    assert torch.allclose(torch.compile(model, backend="paged_attn", options=EAGERLY, fullgraph=True)(IDS), model(IDS), atol=1e-5)
    assert torch.allclose(torch.compile(broken, backend="paged_attn", options=EAGERLY)(IDS), broken(IDS), atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        torch.compile(broken, backend="paged_attn", options=EAGERLY, fullgraph=True)(IDS)
    for whole, error in ((False, RefusedError), (True, torch._dynamo.exc.Unsupported)):
        torch._dynamo.reset()
        cache = PagedKVCache(64, page_size=4, max_seqs=2)
        step = torch.compile(broken, backend="paged_attn", options={**EAGERLY, "cache": cache}, fullgraph=whole)
        with pytest.raises(error, match=r"graph[_ ]break"):
            step(cache.batch([Chunk(cache.add(), [1, 2, 3])]).input_ids)


@pytest.mark.usefixtures("no_grad")
def test_dynamos_explain_is_unharmed() -> None:
    """It says the same before and after ours, and ours serves on, though it resets Dynamo."""
    model = tiny()
    before = torch._dynamo.explain(model)(IDS)
    with _served() as lm:
        expected = lm.generate(PROMPTS, max_new_tokens=6)
        torch.compile(model, backend="paged_attn", options=EAGERLY)(IDS)
        after = torch._dynamo.explain(model)(IDS)
        assert (after.graph_count, after.graph_break_count, after.op_count) == (1, 0, before.op_count)
        assert str(after.graphs[0].graph) == str(before.graphs[0].graph)
        assert lm.generate(PROMPTS, max_new_tokens=6) == expected == _expected()


@pytest.mark.parametrize("reset", [torch._dynamo.reset, torch.compiler.reset])
def test_reset_in_the_middle(reset: Callable[[], None]) -> None:
    """What is compiled is gone, pages and requests are not."""
    model = tiny()
    cache, step = _paged(model)
    seq = cache.add()
    rows = [_logits(cache, step, Chunk(seq, [1, 2, 3, 4, 5], "all"))]
    with _served() as lm:
        requests = [lm.submit(prompt, Sampling(max_new_tokens=6)) for prompt in PROMPTS]
        lm.step()
        lm.step()
        compiled = cache.compilations, lm.cache.compilations
        reset()
        rows += [_logits(cache, step, Chunk(seq, [token], "all")) for token in (6, 7)]
        while lm.has_work:
            lm.step()
        assert (cache.compilations, lm.cache.compilations) == (compiled[0] + 1, compiled[1] + 1)
        assert [request.new_tokens for request in requests] == _expected()
    assert torch.allclose(torch.cat(rows), model(torch.arange(1, 8)[None])[0], atol=1e-5)


# Inductor's cache of compiled graphs


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What three processes found: the first one nothing, the second the folder of the first, the third its artefacts alone."""
    place = tmp_path_factory.mktemp("cached")
    found = {}
    for way, folder in (("save", "warm"), ("find", "warm"), ("load", "empty")):
        before = _kernels(place / folder)
        _python(CACHED, place / f"{way}.json", place / "artefacts", way, TORCHINDUCTOR_CACHE_DIR=str(place / folder))
        made = _kernels(place / folder) - before
        found[way] = {**json.loads((place / f"{way}.json").read_text()), "kernels": len(made)}
    return found


def _kernels(folder: Path) -> set[tuple[Path, int]]:
    """The libraries that Inductor has compiled there, and when."""
    return {(path, path.stat().st_mtime_ns) for path in folder.rglob("*.so")}


@pytest.mark.parametrize("what", ["stateless", "paged"])
def test_a_second_process_finds_the_graph(processes: dict[str, dict[str, Any]], what: str) -> None:
    counts = {way: tuple(found[what][name] for name in ("hit", "miss", "bypass")) for way, found in processes.items()}
    assert counts == {"save": (0, 1, 0), "find": (1, 0, 0), "load": (1, 0, 0)}
    assert processes["find"][what]["result"] == processes["load"][what]["result"] == processes["save"][what]["result"]


@pytest.mark.parametrize("what", ["stateless", "paged"])
def test_a_second_process_traces_no_graph(processes: dict[str, dict[str, Any]], what: str) -> None:
    """Ours: where the folder has it. Torch's artefacts hold what torch has made."""
    assert {way: found[what]["traced"] for way, found in processes.items()} == {"save": 1, "find": 0, "load": 1}


def test_a_second_process_compiles_no_kernel(processes: dict[str, dict[str, Any]]) -> None:
    """Torch's artefacts hold C++ as text: there kernels of a CPU are compiled again, where the folder has them they are not."""
    assert processes["save"]["kernels"] == processes["load"]["kernels"] > 0 == processes["find"]["kernels"]


def test_results_through_the_cache_are_right(processes: dict[str, dict[str, Any]]) -> None:
    found = processes["find"]
    assert torch.allclose(torch.tensor(found["stateless"]["result"]), tiny(1)(IDS), atol=1e-5)
    tokens, most = found["paged"]["result"]
    assert tokens == [alone(tiny(1), prompt, Sampling(max_new_tokens=6)) for prompt in prompts_of([5, 9])]
    assert most == 63, "what Inductor has assumed of sizes, the position table has 64 rows, is known of a graph that was found, too"


def test_a_graph_is_not_found_for_other_ops(processes: dict[str, dict[str, Any]]) -> None:
    """An op is a name to Inductor; what it has compiled in of ours is told apart by the text that says so."""
    found = processes["find"]["other ops"]
    assert (found["hit"], found["miss"], found["bypass"]) == (0, 1, 0)
    assert found["result"] == processes["find"]["stateless"]["result"]

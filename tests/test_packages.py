"""Does a package of native code do what its program does, without compiling, and is every file refused that cannot be run here?"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import compile_attn as ca
from compile_attn.cli import main
from compile_attn.exporting import inputs_of
from compile_attn.inductor import ahead_of_time, cannot_run, native_code, needs_of_native_code
from compile_attn.kernels import ops
from compile_attn.kernels.backend import DeviceStep, Paged, plan_size
from compile_attn.kernels.mask import Causal
from compile_attn.kernels.reference import ReferenceBackend
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.manifest import FORMAT
from tests.models.families import FAMILIES, build
from tests.test_exporting import NEW, PROMPTS, answers, cache, handwritten, rewritten, with_fields

COMPILER = shutil.which("g++") or os.environ.get("CXX", "c++")  # not $CXX first, which may put its runtime into the code
MOST = 999  # tokens, of which the compiler is made to assume that there are no more
OTHERS = ("gpt2", "gemma2", "qwen3")
# Serves the package that it is told of; it knows nothing of the model, and may compile nothing.
SERVER = """
import json, sys
import torch
import compile_attn as ca
from torch._dynamo.utils import counters
path, prompts, new = json.loads(sys.stdin.read())
with ca.PagedLM(ca.load_package(path), 512, max_seqs=4) as lm:
    print("TOKENS", json.dumps(lm.generate(prompts, max_new_tokens=new)), flush=True)
assert not any(name.startswith(("tests", "transformers")) for name in sys.modules)
assert not counters["inductor"] and not counters["stats"], counters
"""


def llama() -> nn.Module:
    return build(next(family for family in FAMILIES if family.name == "llama"))


def packed(program: torch.export.ExportedProgram, path: Path) -> Path:
    """Not optimised: half of the time would be the C++ compiler's."""
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.simdlen": 1, "cpp.cxx": (COMPILER,)}
    with torch._inductor.config.patch(quick):
        ca.package(program, path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> torch.export.ExportedProgram:
    """Saved and loaded, as whoever packages a model need not have its code."""
    file = tmp_path_factory.mktemp("programs") / "llama.pt2"
    ca.save(ca.export(llama(), cache=cache(), merge_linears=True), file)
    return ca.load(file)


@pytest.fixture(scope="module")
def path(program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled by an Inductor that assumes of the tokens what it may assume of an index: that they are not too many."""
    from torch._inductor.graph import GraphLowering

    run = GraphLowering.run

    def assuming(self: Any, *inputs: Any) -> Any:
        tokens = next(node.meta["val"] for node in self.module.graph.nodes if node.name.startswith("sym_size_int"))
        assert tokens.node.shape_env.evaluate_expr(tokens.node.expr <= MOST)
        return run(self, *inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphLowering, "run", assuming)
        return packed(program, tmp_path_factory.mktemp("packages") / "llama.pt2")


@pytest.fixture
def package(path: Path) -> Iterator[ca.Package]:
    yield ca.load_package(path)


def test_a_fresh_process_serves_the_same_tokens(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps([str(path), PROMPTS, NEW]),
        capture_output=True,
        text=True,
        cwd=path.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = [json.loads(line.removeprefix("TOKENS ")) for line in done.stdout.splitlines() if line.startswith("TOKENS ")]
    expected = answers(llama())
    assert found == expected and len({token for answer in expected for token in answer}) > 2


def test_what_it_knows_of_itself(package: ca.Package, program: torch.export.ExportedProgram) -> None:
    told = ca.Manifest.attached(program)
    assert package.manifest.assumed == {"tokens": MOST} and told.assumed == {} and told.native is None
    assert package.manifest.layers == told.layers and package.manifest.sites == told.sites
    assert package.manifest.native is not None and package.manifest.native["torch"] in torch.__version__
    with ca.PagedLM(package, 2048, max_seqs=2) as lm:
        assert lm.cache.max_tokens == MOST
        assert lm.report is not None and [site.where.module for site in lm.report.sites] == [one["module"] for one in told.sites]
    names = dict(package.named_parameters())
    assert [name for name in names if name.startswith("merged_")] == [f"merged_{n}" for n in range(4)], "q, k, v; gate, up"


def test_its_tensors_are_the_server_s_own(path: Path) -> None:
    """One copy, which may be changed in place, as a model's."""
    package = ca.load_package(path)
    before = answers(package, "inductor")
    with torch.no_grad():
        dict(package.named_parameters())["model__norm__weight"].mul_(-1)
    after = answers(package, "inductor")
    assert before == answers(llama()) != after
    for moved in (package.half, package.double, lambda: package.to("meta")):
        with pytest.raises(ValueError, match="a program's tensors keep their dtype and device; export the model again"):
            moved()


def by_hand(package: ca.Package) -> dict[str, Any]:
    """Two prompts, and pages of no cache's."""
    ours = cache()
    batch = ours.batch([ca.Chunk(ours.add(), PROMPTS[0]), ca.Chunk(ours.add(), PROMPTS[1])])
    step: dict[str, Any] = dict(inputs_of(ours, batch.input_ids, batch.position_ids))
    for name, wanted in package.manifest.inputs().items():
        if name not in step:
            step[name] = [torch.zeros([ours.num_pages + 1 if n == "pages" else n for n in shape], dtype=d) for d, shape in wanted]
    return step


def test_steps_by_hand(package: ca.Package) -> None:
    step = by_hand(package)
    logits = package(**step)
    assert logits.shape[:2] == (1, 2) and not logits.requires_grad
    assert all(pool[1:].abs().sum() > 0 for pool in (*step["k_pages"], *step["v_pages"]))
    for row, prompt in enumerate(PROMPTS[:2]):
        whole = llama()(torch.tensor([prompt])).logits[0, -1]
        torch.testing.assert_close(logits[0, row], whole, atol=1e-4, rtol=1e-4)


def test_a_step_of_one(package: ca.Package) -> None:
    """One token of one sequence in one page, after the others of it; the code is for two of each."""
    step, prompt = by_hand(package), PROMPTS[0]
    for tokens, length in ((prompt[:-1], len(prompt) - 1), (prompt[-1:], len(prompt))):
        ids = torch.tensor([tokens])
        step |= {"input_ids": ids, "position_ids": torch.arange(length - len(tokens), length)[None]}
        step |= {"block_table": torch.tensor([[3]], dtype=torch.int32), "logits_rows": torch.tensor([len(tokens) - 1])}
        step |= {name: torch.tensor([n], dtype=torch.int32) for name, n in (("seq_lens", length), ("query_lens", len(tokens)))}
        logits = package(**step)
    assert logits.shape[:2] == (1, 1)
    torch.testing.assert_close(logits[0, 0], llama()(torch.tensor([prompt])).logits[0, -1], atol=1e-4, rtol=1e-4)
    assert all(pool[4:].abs().sum() == 0 and pool[1:3].abs().sum() == 0 for pool in (*step["k_pages"], *step["v_pages"]))


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("block_table", lambda x: x.long(), r"block_table: int64 \[.*\] on cpu; this package takes int32 \[sequences, max_pages\]"),
        ("input_ids", lambda x: x[0], r"input_ids: int64 \[8\] on cpu; this package takes int64 \[1, tokens\]"),
        ("position_ids", lambda x: x[:, 1:], r"position_ids: int64 \[1, 7\] .* tokens is 8"),
        ("seq_lens", lambda x: x[:1], r"seq_lens: int32 \[1\] .* takes int32 \[sequences\], .* sequences is 2"),
        ("block_table", lambda x: x.T.contiguous().T, r"block_table: .* contiguous, on cpu"),
        ("k_pages", lambda x: x[:1], r"k_pages: 1 tensors; this package takes 2"),
        ("v_pages", lambda x: [x[0], x[1][:-1]], r"v_pages: float32 \[32, 16, 2, 8\] .* pages is 33"),
        ("k_pages", lambda x: [one.double() for one in x], r"k_pages: float64 .* takes float32 \[pages, 16, 2, 8\]"),
        ("k_scales", lambda _: [torch.ones([])], r"k_scales: 1 tensors; this package takes 0"),
    ],
)
def test_a_step_of_other_tensors(name: str, change: Callable[[Any], Any], why: str, package: ca.Package) -> None:
    step = by_hand(package)
    step[name] = change(step.get(name))
    with pytest.raises(ValueError, match=why):
        package(**step)


def test_a_step_of_too_many_tokens(package: ca.Package) -> None:
    step = by_hand(package)
    ids = torch.zeros(1, MOST + 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"tokens is {MOST + 1}; this package takes at most {MOST}"):
        package(**{**step, "input_ids": ids, "position_ids": ids})


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"inner": "eager"}, "inner: it was chosen when the program was exported"),
        ({"kernel": "reference"}, "kernel: it was chosen when the program was exported"),
        ({"page_size": 32}, "page_size=32; the program was exported for pages of 16"),
    ],
)
def test_a_server_asks_for_what_the_package_has(how: dict[str, Any], why: str, package: ca.Package) -> None:
    with pytest.raises(ValueError, match=why):
        ca.PagedLM(package, 512, **how)


@pytest.mark.every_form
@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name: str, tmp_path: Path) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    file = packed(ca.export(model, cache=cache(), merge_linears=True), tmp_path / "other.pt2")
    assert answers(ca.load_package(file), "inductor") == answers(model)


@pytest.mark.every_form
def test_fp8_pages(tmp_path: Path) -> None:
    how: dict[str, Any] = {"kv_dtype": "fp8_e4m3", "kv_scales": [(0.05, 0.07), (0.11, 0.13)]}
    file = packed(ca.export(handwritten(), cache=cache(**how)), tmp_path / "fp8.pt2")
    assert answers(ca.load_package(file), "inductor", **how) == answers(handwritten(), **how)


# Files


def needing(**needs: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        told = json.loads(text)
        return json.dumps({**told, "native": {**told["native"], **needs}})

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_fields(format=FORMAT + 1), r"has format 2, by paged_attn .*; this one reads format 1"),
        (with_fields(device="cuda"), r"made for a CUDA device, and there is none"),
        (with_fields(sites=[{"kernel": "magic"}]), r"uses magic, which this paged_attn does not have; it has "),
        (with_fields(native=None), r"written by compile_attn\.save; read it with compile_attn\.load"),
        (needing(torch="2.99"), r"its code is for torch 2\.99, and this is 2\..*; package the model's program again, here"),
        (needing(machine="z80"), r"its code is for processor z80, and this is "),
        (needing(system="plan9"), r"its code is for system plan9, and this is "),
        (needing(ops="others"), r"its code calls ops of another version of paged_attn"),
        (needing(vectors="avx512 avx9000"), r"its code uses avx9000.*, which this processor does not have"),
        (lambda text: text[:40], r"paged_attn\.json cannot be read"),
    ],
    ids=["version", "device", "kernel", "program", "torch", "processor", "system", "ops", "vectors", "cut"],
)
def test_files_that_cannot_be_run_here(change: Callable[[str], str], why: str, path: Path, tmp_path: Path) -> None:
    """One clear error each, before torch is given the file."""
    if "CUDA" in why and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    file = rewritten(path, tmp_path / "other.pt2", change)
    with pytest.MonkeyPatch.context() as patch:
        for reader in ("torch.load", "torch._inductor.aoti_load_package"):
            patch.setattr(reader, lambda *_, **__: pytest.fail("the file was given to torch"))
        with pytest.raises(ValueError, match=rf"other\.pt2: .*{why}"):
            ca.load_package(file)


def test_what_native_code_needs() -> None:
    """Of a GPU, too: that of its own compute capability."""
    needs = needs_of_native_code(torch.device("cpu"))
    assert cannot_run(needs) is None
    with pytest.MonkeyPatch.context() as patch:  # a processor that is no x86
        patch.setattr("torch._inductor.cpu_vec_isa.x86_isa_checker", lambda: [])
        patch.setattr("torch._inductor.cpu_vec_isa.pick_vec_isa", lambda: "asimd")
        assert cannot_run(needs | {"vectors": "asimd"}) is None
        assert cannot_run(needs | {"vectors": "sve"}) == "its code uses sve, which this processor does not have"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        assert cannot_run(needs | {"gpu": "9.0"}) is None
        assert cannot_run(needs | {"gpu": "8.0"}) == "its code is for GPUs of compute capability 8.0, and this one has 9.0"


@pytest.mark.parametrize("kept", [0, 0.4, 0.999])
def test_cut_files(kept: float, path: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "cut.pt2", path.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"cut\.pt2: damaged, or no saved program .*; save it again"):
        ca.load_package(file)


@pytest.mark.parametrize("entry", ["code.pt2", "data/0"])
def test_changed_bytes(entry: str, path: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "changed.pt2", bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        [found] = [one for one in archive.infolist() if one.filename.endswith(entry)]
    data[found.header_offset + 200 + found.file_size // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"changed\.pt2: damaged: .* does not have the checksum"):
        ca.load_package(file)


def test_files_of_others(path: Path, program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    ca.save(program, tmp_path / "program.pt2")
    with pytest.raises(ValueError, match=r"program\.pt2: written by compile_attn\.save; read it with compile_attn\.load"):
        ca.load_package(tmp_path / "program.pt2")
    with pytest.raises(ValueError, match=r"llama\.pt2: written by compile_attn\.package; read it with compile_attn\.load_package"):
        ca.load(path)
    torch.save({}, tmp_path / "tensors.pt2")
    with pytest.raises(ValueError, match=r"tensors\.pt2: not written by compile_attn\.package, .* see torch\._inductor\.aoti_load"):
        ca.load_package(tmp_path / "tensors.pt2")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ca.load_package(tmp_path / "none.pt2")
    with pytest.raises(ValueError, match="device='cuda', and its code is for cpu"):
        ca.load_package(path, "cuda")


def test_it_is_compared_with_its_program(
    path: Path, program: torch.export.ExportedProgram, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ca.save(program, tmp_path / "program.pt2")
    assert main(["diff", str(path), str(tmp_path / "program.pt2")]) == 0
    assert main(["diff", "--graphs", str(path), str(path)]) == 2
    assert "a package holds native code, and no graph; leave --graphs out" in capsys.readouterr().err


def test_what_torch_cannot_read(path: Path, tmp_path: Path) -> None:
    """A manifest as it should be, and no code that could be run."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "hollow.pt2", "w") as new:
        for entry in old.infolist():
            new.writestr(entry, b"no code" if entry.filename.endswith("code.pt2") else old.read(entry))
    with pytest.raises(ValueError, match=r"hollow\.pt2: torch cannot read it"):
        ca.load_package(tmp_path / "hollow.pt2")


def test_a_package_that_is_not_made_leaves_the_old_one(program: torch.export.ExportedProgram, tmp_path: Path) -> None:
    file = tmp_path / "old.pt2"
    file.write_text("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compile_attn.inductor.ahead_of_time", lambda *_: None)  # writes no code
        with pytest.raises(FileNotFoundError):
            ca.package(program, file)
        # As for DeepSeek-V2, whose strides are compared with a number while its code is made.
        patch.setattr("compile_attn.inductor.ahead_of_time", lambda _, inputs, path: bool(4 * inputs[-4].shape[0] == 12))
        with pytest.raises(ValueError, match=r"cannot be packaged: .* may be wrong for steps of which a size is 3; save it"):
            ca.package(program, file)
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["old.pt2"]
    with pytest.raises(ValueError, match=r"not a program of compile_attn\.export"):
        ca.package(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)


@pytest.mark.parametrize("how", ["static", "shared"])
def test_a_compiler_whose_code_would_crash(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, library, file = tmp_path / "name.cpp", tmp_path / "name.so", tmp_path / "name.pt2"
    source.write_text("#include <string>\nstd::string name(int n) { return std::to_string(n); }\n")
    flags = ["-static-libstdc++"] if how == "static" else []
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library), *flags], check=True, timeout=60)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx_aot", lambda *_, **__: [str(library)])
    if how == "static":
        with pytest.raises(ValueError, match=r"the C\+\+ compiler \(.+\) has put libstdc\+\+ into the code, .* set CXX"):
            ahead_of_time(nn.Identity(), (), str(file))
    else:
        ahead_of_time(nn.Identity(), (), str(file))
    assert file.exists() == (how == "shared")


class Planner(ReferenceBackend):
    """Plans one number a sequence; keeps what it is given, and fails when told to."""

    plan_numbers = 1

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.fails = False

    def plan(self, step: DeviceStep, spec: AttentionSpec) -> torch.Tensor:
        self.seen.append((step.page_size, step.dtype))
        return torch.zeros(plan_size(len(step.seq_lens), 1), dtype=torch.int32)

    def attend(self, q: torch.Tensor, kv: Paged, captured: Sequence[torch.Tensor], spec: AttentionSpec) -> torch.Tensor:
        assert kv.plan is not None and kv.plan.shape == (9,)
        self.seen.append((captured, kv.k_scale))
        if self.fails:
            raise ValueError("not today")
        return super().attend(q, kv, captured, spec)


def test_what_native_code_hands_to_an_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph does; and nothing more is called after an op that has failed."""
    spec, kernel = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, head_dim_v=4, mask=Causal(), scale=0.5), Planner()
    monkeypatch.setattr(ops, "backend", lambda _: kernel)

    def twice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *where: torch.Tensor) -> tuple[torch.Tensor]:
        plan = torch.ops.paged_attn.plan(*where, 2, "float32", spec.encode(), "planner", 1)
        for _ in range(2):
            q = torch.ops.paged_attn.attend(q, k, v, *where, [], spec.encode(), "planner", plan=plan)
        return (q,)

    table, lengths, starts = (torch.tensor(each, dtype=torch.int32) for each in ([[1, 0]], [3], [0, 3]))
    where = table, lengths, starts, torch.arange(3), torch.zeros(3, dtype=torch.int32)
    inputs = torch.randn(3, 2, 4), torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4), *where
    ahead_of_time(make_fx(twice, tracing_mode="fake")(*inputs), inputs, str(tmp_path / "twice.pt2"))
    run = native_code(str(tmp_path / "twice.pt2"), torch.device("cpu"))
    kernel.seen.clear()
    assert_close(run(*inputs), twice(*inputs)[0])
    assert kernel.seen == 2 * [(2, torch.float32), ([], None), ([], None)]
    kernel.seen.clear()
    kernel.fails = True
    with pytest.raises(RuntimeError, match=r"not today|API call failed"):
        run(*inputs)
    assert kernel.seen == [(2, torch.float32), ([], None)]


def test_an_op_that_native_code_would_call_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compile_attn.inductor._MISREAD", True)
    with torch.library._scoped_library("test_packages", "FRAGMENT") as library:
        library.define("cast(Tensor x, ScalarType dtype) -> Tensor")
        library.impl("cast", lambda x, dtype: x.to(dtype, copy=True), "CompositeExplicitAutograd")
        torch.library.register_fake("test_packages::cast", lambda x, dtype: x.new_empty(x.shape, dtype=dtype), lib=library)
        graph = make_fx(lambda x: (torch.ops.test_packages.cast(x, torch.float64),), tracing_mode="fake")(torch.ones(3))
        with pytest.raises(ValueError, match=r"test_packages\.cast\.default takes a dtype, for which native code of torch \d"):
            ahead_of_time(graph, (torch.ones(3),), str(tmp_path / "cast.pt2"))
    assert not os.listdir(tmp_path)


# On a GPU


@pytest.mark.gpu
def test_cuda_graphs_of_a_package(tmp_path: Path) -> None:
    """A program and its package on a GPU: tokens of the compiled model, steps replayed from graphs."""
    model = llama().to("cuda")
    program = ca.export(model, cache=ca.PagedKVCache(512, max_seqs=4, device="cuda"), merge_linears=True)
    expected = answers(model, "inductor")
    ca.save(program, tmp_path / "saved.pt2")
    assert answers(ca.load(tmp_path / "saved.pt2"), "inductor", cuda_graphs=True) == expected
    package = ca.load_package(packed(program, tmp_path / "packed.pt2"))
    with ca.PagedLM(package, 512, max_seqs=4, cuda_graphs=True) as lm:
        assert lm.generate(PROMPTS, max_new_tokens=NEW) == expected
        assert lm.cache.steps_run > 0 and lm._runner.recorded

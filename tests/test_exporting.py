"""Does a program that was exported, saved and loaded do what the model does, and is every other file refused?"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compile_attn as ca
from compile_attn import Manifest
from compile_attn.exporting import inputs_of
from compile_attn.manifest import FILE, FORMAT
from tests.models import handwritten as written
from tests.models.families import FAMILIES, build
from tests.models.handwritten import VOCAB
from tests.models.handwritten_more import decoder

PROMPTS = [[3, 14, 15, 9, 2, 6], [5, 3], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7]]
NEW = 9
OTHERS = (
    "gemma2",
    "llama",
    "bloom",
    "gpt2",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "gpt_neox",
    "opt",
    "phi",
    "falcon-alibi",
    "cohere",
)
# Loads every file that it is told of, and knows nothing of the models: this file and tests/ are not on its path.
SERVER = """
import json, sys
import compile_attn as ca
for line in sys.stdin:
    path, prompts, new = json.loads(line)
    with ca.PagedLM(ca.load(path), 512, max_seqs=4, inner="eager") as lm:
        print("TOKENS", json.dumps(lm.generate(prompts, max_new_tokens=new)), flush=True)
assert not any(name.startswith(("tests", "transformers")) for name in sys.modules)
"""


def cache(**how: Any) -> ca.PagedKVCache:
    return ca.PagedKVCache(512, max_seqs=4, **how)


def handwritten(name: str = "RopeTable") -> nn.Module:
    torch.manual_seed(1)
    model = getattr(written, name)().eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(3)
    return model


def answers(model: Any, inner: str = "eager", **how: Any) -> list[list[int]]:
    with ca.PagedLM(model, 512, max_seqs=4, inner=inner, **how) as lm:
        return lm.generate(PROMPTS, max_new_tokens=NEW)


def served_elsewhere(files: list[Path]) -> list[list[list[int]]]:
    """By a process that has no access to the models' code."""
    lines = "".join(json.dumps([str(file), PROMPTS, NEW]) + "\n" for file in files)
    done = subprocess.run(
        [sys.executable, "-c", SERVER], input=lines, capture_output=True, text=True, cwd=files[0].parent, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("TOKENS ")) for line in done.stdout.splitlines() if line.startswith("TOKENS ")]


def round_trips(models: dict[str, nn.Module], folder: Path) -> None:
    files = []
    for name, model in models.items():
        files.append(folder / f"{name}.pt2")
        ca.save(ca.export(model, cache=cache()), files[-1])
    expected = [answers(model) for model in models.values()]
    for name, each in zip(models, expected, strict=True):
        assert len({token for answer in each for token in answer}) > 2, f"{name}: one token again and again"
    assert served_elsewhere(files) == expected


def test_a_fresh_process_serves_the_same_tokens(tmp_path: Path) -> None:
    round_trips({"Alibi": handwritten("Alibi")}, tmp_path)


@pytest.mark.every_form
def test_other_families(tmp_path: Path) -> None:
    families = {family.name: build(family) for family in FAMILIES if family.name in OTHERS}
    assert len(families) == len(OTHERS)
    round_trips(families, tmp_path)


@pytest.mark.every_form
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiled_but_for_a_single_length() -> None:
    """Inductor compares strides of a complex rotation with a number; a step of that many tokens is run by the graph."""
    model = build(next(family for family in FAMILIES if family.name == "deepseek_v2"))
    expected = answers(model)
    assert answers(model, "inductor") == expected == answers(ca.export(model, cache=cache()), "inductor")


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return ca.export(handwritten(), cache=cache())


@pytest.mark.parametrize("merge", [False, True])
def test_the_graph_is_that_of_a_compilation(merge: bool) -> None:
    model, ours = build(next(family for family in FAMILIES if family.name == "llama")) if merge else handwritten(), cache()
    ca.export(model, cache=ours, merge_linears=merge)

    def call(model: Callable[..., Any], ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A part of the model, as the logits of an exported one are."""
        return model(ids, use_cache=False, return_dict=True).logits if merge else model(ids)

    how: dict[str, Any] = {"merge_linears": merge, "call": call}
    with ca.PagedLM(model, 512, max_seqs=4, inner="eager", **how) as lm:
        assert ours.report is not None and lm.report is not None
        assert ours.report.after == lm.report.after and ours.report.sites == lm.report.sites


def test_inputs_and_what_is_written(program: torch.export.ExportedProgram) -> None:
    """By name; all sizes of a step are dynamic, and any step runs, from one token of one sequence up."""
    assert sorted(program.graph_signature.user_inputs_to_mutate.values()) == ["k_pages_0", "k_pages_1", "v_pages_0", "v_pages_1"]
    named = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    assert [named[name].shape[0] for name in ("input_ids", "position_ids")] == [1, 1]
    sizes = [named["input_ids"].shape[1], *named["block_table"].shape, named["logits_rows"].shape[0], named["k_pages_0"].shape[0]]
    assert len({str(size) for size in sizes}) == 5 and not any(isinstance(size, int) for size in sizes)
    module, pages = program.module(), [torch.zeros(5, 16, 2, 8) for _ in range(4)]
    for new, table in (([1], [[3, 1]]), ([7], [[2, 4]]), ([3, 2], [[1, 2], [3, 4]])):
        ids, rows = torch.ones(1, sum(new), dtype=torch.int64), torch.arange(len(new))
        lengths = torch.tensor(new, dtype=torch.int32)
        where = torch.tensor(table, dtype=torch.int32), lengths, lengths
        with torch.no_grad():
            step = dict(zip(("block_table", "seq_lens", "query_lens", "logits_rows"), (*where, rows), strict=True))
            pools = {"k_pages": pages[:2], "v_pages": pages[2:], "k_scales": [], "v_scales": []}
            out = module(input_ids=ids, position_ids=ids * 0, **step, **pools)
        assert out.shape == (1, len(new), VOCAB) and out.isfinite().all()
    assert all(each[1:].abs().sum() > 0 and each[0].abs().sum() == 0 for each in pages)


def test_steps_by_hand_are_the_model(program: torch.export.ExportedProgram) -> None:
    """The example of the README: a cache, a batch, a call; against recomputation."""
    model, ours = handwritten(), cache()
    program = ca.export(model, cache=ours)
    module = program.module()
    seq, other = ours.add(), ours.add()
    pools = {"k_pages": ours.k_pages, "v_pages": ours.v_pages, "k_scales": [], "v_scales": []}
    for chunks in ([ca.Chunk(seq, PROMPTS[2]), ca.Chunk(other, PROMPTS[1])], [ca.Chunk(seq, [4])], [ca.Chunk(seq, [9, 8, 7])]):
        batch = ours.batch(chunks)
        with torch.no_grad():
            logits = module(**dict(inputs_of(ours, batch.input_ids, batch.position_ids)), **pools)
    text = torch.tensor([[*PROMPTS[2], 4, 9, 8, 7]])
    torch.testing.assert_close(logits[0, 0], model(text)[0, -1], atol=1e-4, rtol=1e-4)


def test_the_example_serves_it(saved: Path) -> None:
    """docs/serve_program.py, at most 40 lines of code."""
    example = Path(__file__).parent.parent / "docs" / "serve_program.py"
    code = [line for line in example.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 40
    prompts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    command = [sys.executable, str(example), str(saved), str(NEW), *prompts]
    done = subprocess.run(command, capture_output=True, text=True, cwd=saved.parent, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [[int(token) for token in line.split()] for line in done.stdout.splitlines()]
    assert [list(answer) for answer in zip(*lines, strict=True)] == answers(handwritten())


def test_what_compiling_has_assumed_bounds_a_step(program: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of 32 bits, say: as of a model that is compiled."""
    from compile_attn.passes import pipeline

    def bounds(inputs: Any) -> dict[Any, int]:
        own = next(value for value in inputs.values if isinstance(value, torch.Tensor) and value.dtype == torch.int64)
        return {own.shape[1].node.expr: 7}

    monkeypatch.setattr(pipeline, "assumed_bounds", bounds)
    with ca.PagedLM(program, 512, max_seqs=4, inner="eager") as lm:
        assert lm.cache.max_tokens == 7


def test_an_inner_compiler_serves_it(program: torch.export.ExportedProgram) -> None:
    assert answers(program, "inductor") == answers(handwritten())


def test_fp8_pages(tmp_path: Path, kv_dtype: str = "fp8_e4m3") -> None:
    model, scales = handwritten(), [(0.05, 0.07), (0.11, 0.13)]
    ca.save(ca.export(model, cache=cache(kv_dtype=kv_dtype, kv_scales=scales)), tmp_path / "p.pt2")
    found = answers(ca.load(tmp_path / "p.pt2"), kv_dtype=kv_dtype, kv_scales=scales)
    assert found == answers(model, kv_dtype=kv_dtype, kv_scales=scales)


def test_prefixes_samples_and_drafts(program: torch.export.ExportedProgram) -> None:
    """What a server does with a model it does with a program, too."""
    how: dict[str, Any] = {"page_size": 16, "drafter": ca.PromptLookup()}
    sampling = ca.Sampling(temperature=0.7, n=2, seed=3, max_new_tokens=7)
    with ca.PagedLM(program, 512, inner="eager", **how) as one, ca.PagedLM(handwritten(), 512, inner="eager", **how) as other:
        for lm in (one, other):
            lm.generate([PROMPTS[2] * 2], max_new_tokens=2)
        assert one.generate([PROMPTS[2] * 3], sampling) == other.generate([PROMPTS[2] * 3], sampling)


def test_dims_can_be_bounded() -> None:
    made = ca.export(handwritten(), cache=cache(), dynamic_shapes={"tokens": torch.export.Dim.DYNAMIC(min=1, max=64)})
    assert any(bound.upper == 64 for bound in made.range_constraints.values())
    with pytest.raises(ValueError, match=r"dynamic_shapes: unknown 'batch'; sizes of a program are tokens, sequences, rows"):
        ca.export(handwritten(), cache=cache(), dynamic_shapes={"batch": 3})


IDS = torch.zeros(1, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "kwargs", "why"),
    [
        ((IDS, IDS, IDS), {}, r"3 arguments; a paged model takes token ids and positions"),
        ((IDS,), {"attention_mask": IDS}, r"a tensor 'attention_mask'; a paged model takes"),
        ((IDS[0],), {}, r"input_ids is a tensor \[5\]; give a tensor \[1, T\]"),
        ((), {"position_ids": IDS}, r"no token ids are given"),
        (([1, 2],), {}, r"input_ids is a list; give a tensor"),
    ],
)
def test_inputs_that_are_none(args: tuple[Any, ...], kwargs: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ca.export(handwritten(), args, kwargs, cache=cache())


def test_positions_are_given_where_they_are_asked_for() -> None:
    model = build(next(family for family in FAMILIES if family.name == "gpt2"))
    made = ca.export(model, (IDS,), {"position_ids": IDS, "use_cache": False}, cache=cache())
    assert answers(made) == answers(model)


def test_a_tensor_literal_of_the_mask_alone() -> None:
    """`torch.where(b, w, torch.tensor(-1e4))`: the rewritten graph has no use for it."""
    torch.manual_seed(1)
    model = decoder("conv1d_qkv").eval()
    made = ca.export(model, cache=cache())
    assert not made.constants
    assert answers(made) == answers(model)


def test_a_model_that_cannot_be_paged() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(VOCAB, VOCAB)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.table(input_ids)
            return x + x.cumsum(1)

    ours = cache()
    with pytest.raises(ca.RefusedError, match="cumsum"):
        ca.export(Mean(), cache=ours)
    assert ours.report is not None and ours.report.rejected and ours.pages_in_use == 0
    with pytest.raises(ValueError, match="model is a str"):
        ca.export("model", cache=ours)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dropout 0\.5; generation needs dropout off"):
        ca.export(nn.Sequential(nn.Embedding(9, 9), nn.Dropout(0.5)).train(), cache=ours)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"kernel": "reference"}, "kernel: it was chosen when the program was exported"),
        ({"call": lambda model, ids, positions: model(ids)}, "call: it was chosen when"),
        ({"page_size": 32}, "page_size=32; the program was exported for pages of 16"),
        ({"kv_dtype": "fp8_e4m3"}, "kv_dtype: pages would be float8_e4m3fn; the program was exported for auto"),
    ],
)
def test_a_server_asks_for_what_the_program_has(how: dict[str, Any], why: str, program: torch.export.ExportedProgram) -> None:
    with pytest.raises(ValueError, match=why):
        ca.PagedLM(program, 512, inner="eager", **how)


# Files


@pytest.fixture(scope="module")
def saved(program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "program.pt2"
    ca.save(program, path)
    return path


def test_the_manifest(saved: Path, program: torch.export.ExportedProgram) -> None:
    found = Manifest.attached(ca.load(saved))
    assert found == Manifest.attached(program) == Manifest.read(saved)
    assert found.format == FORMAT and found.page_size == 16 and found.vocabulary == VOCAB and found.device == "cpu"
    assert [layer["num_kv_heads"] for layer in found.layers] == [2, 2] and torch.__version__.startswith(found.versions["torch"])
    assert [site["kernel"] for site in found.sites] == ["general"] * 2 or {site["kernel"] for site in found.sites} <= {"reference"}


def rewritten(saved: Path, to: Path, change: Callable[[str], str]) -> Path:
    """The same file with another manifest."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(to, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, change(data.decode()).encode() if entry.filename.endswith(FILE) else data)
    return to


def with_fields(**fields: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **fields})


def with_kernel(name: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        told = json.loads(text)
        return json.dumps({**told, "sites": [{**site, "kernel": name} for site in told["sites"]]})

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_fields(format=FORMAT + 1), r"has format 2, by paged_attn .*; this one reads format 1: export the model again"),
        (with_fields(device="cuda"), r"made for a CUDA device, and there is none; export the model on the CPU"),
        (
            with_fields(versions={"torch": "99.1.0"}),
            r"saved by torch 99\.1\.0, and this is 2\..*; install that torch or",
        ),
        (with_fields(sites=[{"kernel": "magic"}]), r"uses magic, which this paged_attn does not have; it has "),
        (
            with_kernel("flash_attn"),
            r"kernel 'flash_attn' was asked for, but it runs on cuda, not on cpu; .*; export the model again, here",
        ),
        (with_fields(sites=[{"kernel": "reference"}] * 2), r"what its paged_attn\.json says of its sites cannot be read"),
        (with_fields(pages=3), r"paged_attn\.json cannot be read"),
        (lambda text: text[:40], r"paged_attn\.json cannot be read"),
        (lambda text: "[]", r"paged_attn\.json cannot be read"),
    ],
    ids=["version", "device", "torch", "kernel", "library", "sites", "field", "cut", "list"],
)
def test_files_that_cannot_be_run_here(change: Callable[[str], str], why: str, saved: Path, tmp_path: Path) -> None:
    """One clear error each, before torch is given the file."""
    if "CUDA" in why and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    file = rewritten(saved, tmp_path / "other.pt2", change)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.export, "load", lambda *_: pytest.fail("the file was given to torch"))
        with pytest.raises(ValueError, match=rf"other\.pt2: .*{why}"):
            ca.load(file)


@pytest.mark.parametrize("kept", [0, 0.3, 0.9, 0.999])
def test_cut_files(kept: float, saved: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "cut.pt2", saved.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=r"cut\.pt2: damaged, or no saved program .*; save it again"):
        ca.load(file)


def test_changed_bytes(saved: Path, tmp_path: Path) -> None:
    file, data = tmp_path / "changed.pt2", bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    data[largest.header_offset + 200 + largest.file_size // 2] ^= 0xFF
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"changed\.pt2: damaged: .* does not have the checksum"):
        ca.load(file)


def test_files_of_others(tmp_path: Path, program: torch.export.ExportedProgram) -> None:
    plain = torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(plain, tmp_path / "plain.pt2")
    with pytest.raises(ValueError, match=r"plain\.pt2: not written by compile_attn\.save"):
        ca.load(tmp_path / "plain.pt2")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        ca.load(tmp_path / "none.pt2")
    for other in (plain, "a path"):
        with pytest.raises(ValueError, match=r"not a program of compile_attn\.export"):
            ca.save(other, tmp_path / "x.pt2")  # type: ignore[arg-type]
    assert not (tmp_path / "x.pt2").exists()
    with pytest.raises(ValueError, match=r"not a program of compile_attn\.export"):
        ca.PagedLM(plain, 512)


def test_what_torch_cannot_read(saved: Path, tmp_path: Path) -> None:
    """A manifest as it should be, and nothing behind it."""
    file = tmp_path / "hollow.pt2"
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(file, "w") as new:
        for entry in old.infolist():
            if "models/" not in entry.filename:
                new.writestr(entry, old.read(entry))
    with pytest.raises(ValueError, match=r"hollow\.pt2: torch\.export\.load cannot read it"):
        ca.load(file)


def test_manifests_differ_where_programs_do(program: torch.export.ExportedProgram) -> None:
    told = Manifest.attached(program)
    assert replace(told, page_size=32) != told and json.loads(told.text())["page_size"] == 16

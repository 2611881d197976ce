"""Do the walls stand: which way imports go, how long files and functions are, what is imported lazily?"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("kernels", "passes", "compile_attn")
FILES = sorted(p for folder in FOLDERS for p in (ROOT / folder).glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
HEAVY = {"triton", "flash_attn", "flashinfer", "transformers", "matplotlib", "vllm"}
BACKENDS = {"reference", "sdpa", "general", "flash_attn", "flashinfer", "block_sparse"}
FORBIDDEN = {  # file or folder -> modules it must not import
    "kernels": ("torch.fx", "compile_attn.passes", "compile_attn.backend", "compile_attn.cache", "compile_attn.lm"),
    "passes": ("compile_attn.backend", "compile_attn.cache", "compile_attn.lm", "compile_attn.options"),
    "passes/recognise.py": ("compile_attn.passes.lower", "compile_attn.kernels.select", "compile_attn.kernels.ops"),
    "passes/lower.py": tuple(f"compile_attn.kernels.{name}" for name in BACKENDS),
}
PASSES_OPEN = {"pipeline", "report", "graph", "render", "stable", "places"}  # what compile_attn/ may see of passes/


def imports(path: Path, top_level: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_arrows(path: Path) -> None:
    seen = set(imports(path))
    for place, modules in FORBIDDEN.items():
        if name(path) == place or path.parent.name == place:
            bad = {m for m in seen for banned in modules if m == banned or m.startswith(banned + ".")}
            assert not bad, f"{name(path)} imports {bad}"
    if path.parent.name == "kernels" and path.stem in BACKENDS:
        others = {m for m in seen if m.removeprefix("compile_attn.kernels.") in BACKENDS - {path.stem}}
        assert not others, f"a backend imports another: {others}"
    if path.parent.name == "compile_attn":
        inner = {m.split(".")[2] for m in seen if m.startswith("compile_attn.passes.")}
        assert inner <= PASSES_OPEN, f"{name(path)} sees {inner - PASSES_OPEN}"


@pytest.mark.parametrize("path", FILES + TESTS, ids=name)
def test_budgets(path: Path) -> None:
    text = path.read_text()
    most = 400 if path in FILES else 600  # a catalogue of models in tests/ reads like a table
    assert text.count("\n") <= most, f"split the file: {most} lines are the most"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines; 60 are the most"


@pytest.mark.parametrize("path", [p for p in FILES if "triton" not in p.stem], ids=name)
def test_heavy_libraries_are_lazy(path: Path) -> None:
    assert not {m.split(".")[0] for m in imports(path, top_level=True)} & HEAVY


def test_bare_names_are_never_imported() -> None:
    for path in FILES + TESTS:
        assert not {m.split(".")[0] for m in imports(path)} & {"passes", "kernels"}, name(path)


def test_links_stand() -> None:
    for folder in ("passes", "kernels"):
        link = ROOT / "compile_attn" / folder
        assert link.is_symlink() and link.resolve() == ROOT / folder


def test_importing_the_package_is_light() -> None:
    heavy = "[m for m in ('triton', 'transformers', 'matplotlib', 'flashinfer') if m in sys.modules]"
    code = f"import sys, compile_attn; found = {heavy}; sys.exit(str(found) if found else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_no_model_family_is_named_in_passes() -> None:
    families = ("llama", "mistral", "gemma", "gpt", "qwen", "bloom", "falcon", "mpt", "deepseek", "phi", "mixtral")
    for path in (ROOT / "passes").glob("*.py"):
        words = set(re.findall(r"[a-z]+", path.read_text().lower()))
        assert not words & set(families), path.name

"""Does what is released work where the checkout is not?"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Neither the checkout on the path, nor its editable installation: what a stranger has.
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was made from it; the checkout itself is not written to."""
    place = tmp_path_factory.mktemp("built")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place, ROOT, cwd=place)
    return place


@pytest.fixture(scope="module")
def venv(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A new environment with the wheel. torch and its like are borrowed from this one, by path: no download."""
    place = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    [wheel] = built.glob("*.whl")
    _run(sys.executable, "-m", "pip", "--python", place, "install", "--no-deps", "--no-index", wheel, cwd=place)
    [packages] = place.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not read: an editable checkout stays out.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield place
    shutil.rmtree(place)


def test_the_sdist_holds_the_sources(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "paged_attn.py", "tests/test_package.py"} <= names
    assert {"compile_attn/passes/pipeline.py", "compile_attn/kernels/spec.py"} <= names, "the links of the checkout are files here"
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", "dist/"))]


def test_the_package_is_imported_from_the_wheel(venv: Path) -> None:
    code = "import compile_attn.passes.pipeline as p, compile_attn.kernels.ops as o; print(p.__file__); print(o.__file__)"
    found = _run(venv / "bin" / "python", "-c", code, cwd=venv).split()
    assert len(found) == 2 and all(Path(file).is_relative_to(venv) for file in found)
    [metadata] = venv.glob("lib/python*/site-packages/paged_attn-*.dist-info")
    assert (metadata.parent / "compile_attn" / "py.typed").exists()
    entries = importlib.metadata.Distribution.at(metadata).entry_points
    values = {"compile_attn.backend:paged_attn", "compile_attn.cli:main", "compile_attn.pytest_plugin"}
    assert {entry.value for entry in entries} == values


def test_pytest_finds_the_fixture(venv: Path) -> None:
    """By its entry point, with no word of it on the command line; who does not use it does not import torch for it."""
    (venv / "test_unused.py").write_text("import sys\n\ndef test_light():\n    assert 'torch' not in sys.modules\n")
    (venv / "test_used.py").write_text("def test_known(graph_diff):\n    assert callable(graph_diff)\n")
    assert "2 passed" in _run(venv / "bin" / "python", "-m", "pytest", "-W", "error", "test_unused.py", "test_used.py", cwd=venv)


def test_the_backend_is_found(venv: Path) -> None:
    code = "import torch, torch._dynamo as d; print(*d.list_backends()); torch.compile(abs, backend='paged_attn')"
    assert "paged_attn" in _run(venv / "bin" / "python", "-c", code, cwd=venv).split()


def test_torch_knows_the_name_of_its_logs(venv: Path) -> None:
    """torch refuses to be imported where TORCH_LOGS has a name that is no module's, and imports no module to find out."""
    code = "import sys, torch, logging; print(logging.getLogger('paged_attn').level, 'compile_attn' in sys.modules)"
    command = ("env", "TORCH_LOGS=+paged_attn", venv / "bin" / "python", "-c", code)
    assert _run(*command, cwd=venv).split() == ["10", "False"]


def test_the_demo_runs(venv: Path) -> None:
    shown = _run(venv / "bin" / "compile-attn", "demo", "--seconds", "1", "--inner", "eager", "--tokens", "8", cwd=venv)
    assert "equal, token for token" in " ".join(shown.split())
    assert (venv / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")

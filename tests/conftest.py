"""What holds for every test?"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.interpreter import quicken

# The same examples at every run, so that a failure is one of the change; --hypothesis-profile=search draws others.
hypothesis.settings.register_profile("steady", derandomize=True)
hypothesis.settings.register_profile("search", derandomize=False)
hypothesis.settings.load_profile("steady")

# Tracing makes garbage by the million. What tests import is looked through once, and what they make now and then, not after each
# compilation: that took every seventh second.
gc.set_threshold(100_000, 50, 100)
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

# Workers share the cores: where each takes all of them, products of float64 wait for each other.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: it decides when a kernel is defined
    quicken()

# Small models fill the cache of fake tensors and hardly ask it: it took a quarter of each compilation. Processes that tests start
# have it.
torch._dynamo.config.fake_tensor_cache_enabled = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu need a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Nothing that was imported is garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Or libraries complain of what they think was left behind."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this run traces to ATen, for all its workers: many tests compile the same small models."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, traces: Path) -> None:
    """No test sees the compilations, the recompile limit or the random numbers of another: the same weights each time.

    Nor the traces that an earlier run has left.
    """
    from compile_attn.passes import traced

    monkeypatch.setattr(traced, "_folder", lambda: traces)
    torch._dynamo.reset()
    torch.manual_seed(0)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For a whole file: pytest.mark.usefixtures("no_grad")."""
    with torch.no_grad():
        yield

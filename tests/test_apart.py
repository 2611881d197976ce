"""Do our compilations and the user's leave each other alone, on every torch?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import compile_attn as ca
from compile_attn import apart
from compile_attn.apart import compiled_apart
from tests.tiny import tiny

IDS = torch.arange(9)[None]
LIMIT = 2  # of recompilations; torch's 8 take four times as long
# Whether torch does it by itself: what it offers here, and what is done for an older one.
WAYS = sorted({apart.CAN_ISOLATE, False})


def _explain(model: Any) -> None:
    assert len(ca.explain(model, IDS).sites) == 2


def _page(model: Any) -> None:
    assert len(ca.explain(model, paged=True).sites) == 2


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("isolates", WAYS)
@pytest.mark.parametrize("ours", [_explain, _page])
@torch._dynamo.config.patch(recompile_limit=LIMIT)
def test_the_users_compilation_is_left_alone(ours: Callable[[Any], None], isolates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not made anew, and more of ours than the recompile limit take nothing from it."""
    monkeypatch.setattr(apart, "CAN_ISOLATE", isolates)
    model = tiny()
    fast = torch.compile(model, backend="eager")
    fast(IDS)
    before = _graphs()
    for _ in range(LIMIT + 2):
        ours(model)
    after = _graphs()
    assert after > before
    fast(IDS)
    assert _graphs() == after, "compiled anew"
    fast(torch.arange(11)[None])
    assert _graphs() > after, "the limit was used up"


@pytest.mark.parametrize("isolates", WAYS)
@torch._dynamo.config.patch(recompile_limit=LIMIT)
def test_ours_are_not_limited_by_the_users(isolates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "CAN_ISOLATE", isolates)
    model = tiny()
    fast = torch.compile(model, backend="eager", dynamic=False)
    for length in range(2, LIMIT + 4):
        fast(torch.arange(length)[None])
    _explain(model)
    _page(model)


@pytest.mark.parametrize("isolates", WAYS)
def test_a_compilation_is_used_again(isolates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "CAN_ISOLATE", isolates)
    model = tiny()
    ours = compiled_apart(model, backend="eager", fullgraph=True)
    before = _graphs()
    assert torch.equal(ours(IDS), model(IDS)) and torch.equal(ours(input_ids=IDS), model(IDS))
    made = _graphs() - before
    ours(IDS)
    assert _graphs() == before + made and made >= 1


@pytest.mark.parametrize("isolates", WAYS)
def test_inputs_keep_their_names(isolates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are given by position, where a function of ours stands between Dynamo and the model."""
    monkeypatch.setattr(apart, "CAN_ISOLATE", isolates)
    assert "\ninput input_ids: int64[1, 9]\n" in ca.explain(tiny(), IDS).before

    def mixed(x: torch.Tensor, y: torch.Tensor, *others: torch.Tensor, kwargs: float = 1.0) -> torch.Tensor:
        return torch.stack([x, y, *others]).sum(0) * kwargs

    one = torch.ones(3)
    assert torch.equal(compiled_apart(mixed, backend="eager")(one, one, kwargs=2.0), 4 * one)
    assert torch.equal(compiled_apart(mixed, backend="eager")(one, one, one), 3 * one)
    assert {"input x: float32[3]", "input y: float32[3]"} <= set(ca.explain(mixed, one, 2 * one).before.splitlines())

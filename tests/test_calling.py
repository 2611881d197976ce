"""Are models of any shape called rightly, and their facts read rightly?"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from compile_attn.calling import call_of, check_no_dropout, device_of, dtype_of, logits_of, position_cure, vocabulary_of

IDS, POSITIONS, LOGITS = torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), torch.zeros(1, 2, 9)


def called(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the model is called with."""
    return call_of(model)(lambda *args, **kwargs: (args, kwargs), IDS, POSITIONS)  # type: ignore[no-any-return]


class Plain(nn.Module):
    def forward(self, tokens: Any) -> None: ...


class Named(nn.Module):
    def forward(self, input_ids: Any, *, position_ids: Any = None, use_cache: bool = True, return_dict: bool = False) -> None: ...


class Demanding(nn.Module):
    def forward(self, input_ids: Any, position_ids: Any, use_cache: bool = True) -> None: ...


class Wrapping(nn.Module):
    """Hands its keywords on to the model that it wraps, as heads of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Named()

    def forward(self, input_ids: Any, **kwargs: Any) -> None: ...


class Swallowing(nn.Module):
    def forward(self, input_ids: Any, **kwargs: Any) -> None: ...


def test_only_what_the_signature_takes_is_passed() -> None:
    everything = {"use_cache": False, "return_dict": True}
    assert called(Plain()) == called(Swallowing()) == ((IDS,), {})
    assert called(Named()) == called(Wrapping()) == ((IDS,), everything)
    assert called(Demanding()) == ((IDS,), {"position_ids": POSITIONS, "use_cache": False})


def test_the_cure_names_positions_that_are_not_passed() -> None:
    assert "call=lambda" in (position_cure(Named()) or "")
    assert "call=lambda" in (position_cure(Wrapping()) or "")
    assert position_cure(Demanding()) is None and position_cure(Plain()) is None


@pytest.mark.parametrize(
    "output", [LOGITS, (LOGITS, None), [LOGITS], SimpleNamespace(logits=LOGITS), {"logits": LOGITS, "loss": None}]
)
def test_logits_are_found(output: Any) -> None:
    assert logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (None, "NoneType"),
        ((), "tuple"),
        ({"last_hidden_state": LOGITS}, "dict with last_hidden_state"),
        (SimpleNamespace(last_hidden_state=LOGITS), "SimpleNamespace"),
        (IDS, "a tensor of torch.int64"),
    ],
)
def test_no_logits_is_an_error(output: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"the model returned {what}, in which there are no logits"):
        logits_of(output)


def test_the_vocabulary() -> None:
    token, place = nn.Embedding(50, 4), nn.Embedding(80, 4)
    assert vocabulary_of(nn.ModuleList([place, token]), 50) == 50
    assert vocabulary_of(nn.ModuleList([token]), 64) == 50  # logits padded to a round number
    assert vocabulary_of(nn.ModuleList([place, token]), 64) == 64
    assert vocabulary_of(nn.Linear(2, 2), 7) == 7
    named = nn.ModuleList([place])
    named.get_input_embeddings = lambda: token  # type: ignore[assignment]
    assert vocabulary_of(named, 80) == 50
    configured = nn.ModuleList([place, token])
    configured.config = SimpleNamespace(vocab_size=48)  # type: ignore[assignment]
    assert vocabulary_of(configured, 80) == 48


def test_device_and_dtype() -> None:
    assert device_of(nn.Linear(2, 2)) == device_of(nn.Identity()) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"tensors are on cpu, meta; one device is supported"):
        device_of(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")]))
    assert dtype_of(nn.Linear(2, 2).half()) == torch.float16
    assert dtype_of(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).half()])) is dtype_of(nn.Identity()) is None


class Rate(nn.Module):
    def __init__(self, attention_dropout: float) -> None:
        super().__init__()
        self.attention_dropout = attention_dropout


@pytest.mark.parametrize("part", [nn.Dropout(0.1), Rate(0.2), nn.MultiheadAttention(4, 2, dropout=0.3)])
def test_dropout_is_refused_in_training_mode_only(part: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(2, 2), part)
    with pytest.raises(ValueError, match=r"training mode and 1 \(\w+\) has dropout 0\.\d; .* call model\.eval\(\) first"):
        check_no_dropout(model)
    check_no_dropout(model.eval())


def test_training_mode_without_dropout_is_allowed() -> None:
    check_no_dropout(nn.Sequential(nn.Dropout(0.0), Rate(0.0)))

"""Do decoders that people write by hand page, whatever their style?"""

from __future__ import annotations

import pytest
import torch

from tests.models.families import enliven
from tests.models.handwritten_more import NAMES, STYLE_NAMES, VOCAB, decoder
from tests.models.harness import assert_context_matters, assert_same_logits, assert_same_tokens, paged


def _model(name: str) -> torch.nn.Module:
    model = decoder(name)
    enliven(model)
    return model.eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", [*NAMES, *STYLE_NAMES])
def test_handwritten(name: str) -> None:
    model = _model(name)
    assert_context_matters(model, VOCAB, sees_all=name not in ("window_softcap_qknorm", "flex"))
    case = paged(model, VOCAB)
    assert case.lm.report is not None and case.lm.report.sites and not case.lm.report.rejected
    answers = assert_same_tokens(case)
    assert_same_logits(case, answers)


def test_there_are_enough_styles() -> None:
    assert len(NAMES) >= 10


def test_one_site_per_head_of_a_list() -> None:
    case = paged(_model("head_list"), VOCAB)
    assert case.lm.report is not None
    assert len(case.lm.report.sites) == 8  # two blocks of four heads
    assert {site.spec.num_q_heads for site in case.lm.report.sites} == {1}

"""Does every family of causal language models page, with no code of its own anywhere?

Each family once by default, eager and SDPA in turn; `-m every_form` runs the other form of each.
"""

from __future__ import annotations

from typing import Any

import pytest

from compile_attn.passes.report import RefusedError
from tests.models.families import FAMILIES, POSITIONS, VOCAB, Family, build
from tests.models.harness import assert_context_matters, assert_same_logits, assert_same_tokens, paged, sees_the_future

pytestmark = pytest.mark.filterwarnings("ignore")  # what stock models, and Dynamo of them, warn of is not ours
PAGED = [family for family in FAMILIES if family.refused is None]
REFUSED = [family for family in FAMILIES if family.refused is not None]
DEFAULT = [(family, family.forms[place % len(family.forms)]) for place, family in enumerate(PAGED)]
OTHERS = [(family, form) for family in PAGED for form in family.forms if (family, form) not in DEFAULT]


def _name(case: tuple[Family, str]) -> str:
    return f"{case[0].name}-{case[1]}"


def _check(family: Family, form: str) -> None:
    model = build(family, form)
    if sees_the_future(model, VOCAB):  # RoFormer up to transformers 5.17, whatever its is_decoder says
        assert family.name == "roformer"
        with pytest.raises(RefusedError, match="bidirectional"):
            paged(model, VOCAB)
        return
    assert_context_matters(model, VOCAB, family.sees_all)
    case = paged(model, VOCAB)
    assert case.lm.report is not None and case.lm.report.sites and not case.lm.report.rejected
    answers = assert_same_tokens(case)
    assert_same_logits(case, answers)


@pytest.mark.parametrize("case", DEFAULT, ids=_name)
def test_family(case: tuple[Family, str]) -> None:
    _check(*case)


@pytest.mark.every_form
@pytest.mark.parametrize("case", OTHERS, ids=_name)
def test_other_form(case: tuple[Family, str]) -> None:
    _check(*case)


@pytest.mark.parametrize("family", REFUSED, ids=lambda family: family.name)
def test_what_is_not_read_yet_is_refused_with_its_reason(family: Family) -> None:
    with pytest.raises(RefusedError, match=family.refused):
        paged(build(family, family.forms[0]), VOCAB)


@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_positions_that_count_other_ids_than_padding(form: str) -> None:
    """RoBERTa's own positions depend on which ids are padding. Without any they start at the padding id + 1: a call says so."""
    model: Any = build(next(one for one in FAMILIES if one.name == "roberta"), form)
    first = model.config.pad_token_id + 1
    with pytest.raises(RefusedError) as refused:
        paged(model, VOCAB)
    assert any("call=lambda" in note for note in refused.value.__notes__)

    case = paged(model, VOCAB, call=lambda model, ids, positions: model(ids, position_ids=positions + first, use_cache=False))
    assert_same_logits(case, assert_same_tokens(case))
    assert case.lm.cache.max_positions == POSITIONS - first


def test_there_are_enough_families() -> None:
    assert len({family.model_type for family in PAGED}) >= 34


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "falcon-alibi"])
def test_more_sequences_at_once(name: str) -> None:
    """Eight places and a large budget: all prompts in one batch, whole."""
    family = next(one for one in FAMILIES if one.name == name)
    assert_same_tokens(paged(build(family, "eager"), VOCAB, max_seqs=8, budget=128))

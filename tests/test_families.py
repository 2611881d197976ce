"""Does every family of causal language models page, with no code of its own anywhere?

Each family once by default, eager and SDPA in turn, but for those that compute what another one does; `-m every_form` runs
these, and the other form of each.
"""

from __future__ import annotations

from typing import Any

import pytest

from compile_attn.passes.report import RefusedError
from tests.models.families import FAMILIES, POSITIONS, VOCAB, Family, build
from tests.models.harness import (
    assert_context_matters,
    assert_same_logits,
    assert_same_tokens,
    assert_short_prompts_and_neighbours,
    paged,
    sees_the_future,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")  # what stock models, and Dynamo of them, warn of is not ours
PAGED = [family for family in FAMILIES if family.refused is None]
REFUSED = [family for family in FAMILIES if family.refused is not None]
ALIKE = ("qwen2", "granite", "nemotron", "arcee", "seed_oss", "ernie4_5", "hunyuan_v1_dense", "jais2")  # llama
ALIKE += ("ministral3", "cwm", "exaone4", "qwen3_moe", "dots1", "glm4_moe", "granitemoeshared", "flex_olmo", "mixtral-top1")
ALIKE += ("solar_open", "exaone_moe", "hyperclovax", "gpt_neox_japanese")  # qwen2_moe, olmo3, granitemoe, gpt_neox
ALIKE += ("mbart", "trocr", "electra", "youtu")  # bart, bert, deepseek_v3
DEFAULT = [(one, one.forms[place % len(one.forms)]) for place, one in enumerate(PAGED) if one.name not in ALIKE]
TOGETHER = ("gemma3_text", "gpt_oss", "falcon-alibi")  # also with eight places and a large budget: all prompts in one batch, whole
NEIGHBOURS = ("llama", "llama-bias", "bloom", "gpt_oss", "gemma3_text", "olmo3")  # llama-bias and olmo3 by SDPA, the others eagerly
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
    together = family.name in TOGETHER
    case = paged(model, VOCAB, max_seqs=8 if together else 2)
    assert case.lm.report is not None and case.lm.report.sites and not case.lm.report.rejected
    answers = assert_same_tokens(case)
    assert_same_logits(case, answers)
    if family.name in NEIGHBOURS:
        assert_short_prompts_and_neighbours(case)
    if together:
        case.lm._scheduler._max_batch_tokens = 128  # no graph knows it
        assert assert_same_tokens(case) == answers


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

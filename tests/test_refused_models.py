"""Are models that cannot be paged refused, each with its reason, and is nothing done to them?"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import compile_attn as ca
from tests.models.families import FAMILIES, VOCAB, build, enliven
from tests.models.refused import REFUSED
from tests.models.refused_subtle import subtle

# transformers' models with state, convolution over tokens, or no order: model type -> small configuration
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "expand": 2},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8},
    "falcon_mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 32},
    "lfm2": {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_ff_dim": 48},
    "bamba": {
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 4,
    },
    "jamba": {
        "num_key_value_heads": 2,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "num_experts": 2,
        "use_mamba_kernels": False,
    },
}

SUBTLE = subtle()


def _refusal(model: torch.nn.Module) -> ca.RefusedError:
    """The error, after a check that nothing was touched: the model computes what it did, the report has no site."""
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        before = model(ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ca.RefusedError) as caught:
        ca.PagedLM(model, kv_tokens=64, page_size=4, max_seqs=2, inner="eager")
    with torch.no_grad():
        after = model(ids)
    for one, other in zip(_tensors(before), _tensors(after), strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert caught.value.report.sites == () and caught.value.report.rejected
    return caught.value


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [output["logits"]]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """With the reason, the node or the line of the model, and a cure."""
    make, reason = REFUSED[name]
    model = make()
    enliven(model)
    refused = _refusal(model.eval().requires_grad_(False))
    rejected = refused.report.rejected
    assert any(re.search(reason, one.reason, re.IGNORECASE) for one in rejected), rejected
    assert any(one.reason in str(refused) for one in rejected)
    assert all(one.where.node or one.where.source for one in rejected), rejected  # a source alone where Dynamo refused
    assert any("tests/models/" in one.where.source for one in rejected), rejected
    assert any(one.cure for one in rejected), rejected


@pytest.mark.parametrize("name", SUBTLE)
def test_subtle_trespasses_are_refused(name: str) -> None:
    """One small trespass each in a plain decoder: anything but a refusal would be a wrong answer to somebody."""
    model = SUBTLE[name]().eval().requires_grad_(False)
    with pytest.raises(ca.RefusedError) as caught:
        ca.PagedLM(model, kv_tokens=64, page_size=4, max_seqs=2, inner="eager")
    assert caught.value.report.sites == () and all(one.reason for one in caught.value.report.rejected)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # transformers' own
@pytest.mark.parametrize("kind", STATEFUL)
def test_stateful_families_are_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **STATEFUL[kind])
    _refusal(AutoModelForCausalLM.from_config(config).eval().requires_grad_(False))


@pytest.mark.parametrize("kind", ["bert", "electra", "roberta"])
def test_bidirectional_encoders_are_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, max_position_embeddings=128, type_vocab_size=1, pad_token_id=0)
    refused = _refusal(AutoModelForMaskedLM.from_config(config).eval().requires_grad_(False))
    assert re.search("bidirectional|future|causal|left", str(refused))


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.refused], ids=lambda family: family.name)
def test_families_that_cannot_be_paged(family: Any) -> None:
    refused = _refusal(build(family))
    assert re.search(family.refused, str(refused), re.IGNORECASE)

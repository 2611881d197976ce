"""Which causal-LM families of transformers are tried, and how is a tiny random model of each made?

A family is data: a model type and the numbers that make it small. Windows, chunks, caps and floor scales are small enough
that prompts of 41 tokens exceed them, and weights are large enough that every visible token moves the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCAB = 97
POSITIONS = 128  # longest position table; prompts and answers of the tests stay under it
FORMS = ("eager", "sdpa")


@dataclass(frozen=True)
class Family:
    """A name for the test, transformers' model type, the configuration, and the attention forms that it has."""

    name: str
    model_type: str
    config: Mapping[str, Any]
    forms: tuple[str, ...] = FORMS
    sees_all: bool = True  # token 0 reaches the last logits of a prompt of 41 tokens
    refused: str | None = None  # why it cannot be paged, as a regular expression; None: it can


def build(family: Family, form: str = "eager", seed: int = 0) -> nn.Module:
    """A model in eval mode, float32, on the CPU, with weights that make attention matter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family.model_type, **family.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=form)
    enliven(model, seed)
    return model.eval().requires_grad_(False)


def enliven(model: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
    """Random weights of gain about 1 per matrix and 0.3 for vectors: attention is then far from uniform, logits from flat."""
    generator = torch.Generator().manual_seed(seed)
    convolved = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            if weight.dim() < 2:
                weight.add_(noise, alpha=0.2)
            elif "embed" in name or "wte" in name or "wpe" in name:
                weight.copy_(noise * 0.5)
            else:
                fan_in = weight[0].numel() if id(weight) in convolved else weight.shape[-1]
                weight.copy_(noise * (gain * 1.5 / fan_in**0.5))


def _sizes(hidden: str, inner: str, layers: str, heads: str, count: int = 2) -> dict[str, Any]:
    """32 channels, 4 heads of 8, under the names that a configuration has for them."""
    named = {hidden: 32, inner: 48, layers: count, heads: 4}
    return {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **named}


def _llama(count: int = 2, **more: Any) -> dict[str, Any]:
    """The names that most configurations share; two query heads to a key head."""
    sizes = _sizes("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", count)
    return {**sizes, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, **more}


def _plain(count: int = 2, **more: Any) -> dict[str, Any]:
    """The same for configurations without key-value heads."""
    sizes = _sizes("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", count)
    return {**sizes, "max_position_embeddings": POSITIONS, **more}


def _gpt2(**more: Any) -> dict[str, Any]:
    sizes = _sizes("n_embd", "n_inner", "n_layer", "n_head")
    return {**sizes, "n_positions": POSITIONS, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, **more}


def _bart(**more: Any) -> dict[str, Any]:
    sizes = _sizes("d_model", "decoder_ffn_dim", "decoder_layers", "decoder_attention_heads")
    return {**sizes, "max_position_embeddings": POSITIONS, "dropout": 0.0, **more}


_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 8}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_DEEPSEEK_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MLA = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
_FOUR = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_EAGER = ("eager",)


def _all() -> tuple[Family, ...]:
    return (*_dense(), *_windows(), *_moe(), *_older(), *_encoders_as_decoders(), *_recent())


def _dense() -> list[Family]:
    return [
        Family("llama", "llama", _llama()),
        Family("llama-bias", "llama", _llama(attention_bias=True, tie_word_embeddings=True)),
        Family("qwen2", "qwen2", _llama()),
        Family("qwen3", "qwen3", _llama(**_HEAD)),
        Family("gemma", "gemma", _llama(**_HEAD)),
        Family("olmo", "olmo", _llama(clip_qkv=2.0)),
        Family("olmo2", "olmo2", _llama()),
        Family("cohere", "cohere", _llama(use_qk_norm=True, logit_scale=1.0)),
        Family("stablelm", "stablelm", _llama(use_qkv_bias=True, qk_layernorm=True)),
        Family("granite", "granite", _llama(attention_multiplier=0.4, residual_multiplier=0.7)),
        Family("glm", "glm", _llama(**_HEAD)),
        Family("glm4", "glm4", _llama(**_HEAD)),
        Family("nemotron", "nemotron", _llama()),
        Family("helium", "helium", _llama(**_HEAD)),
        Family("arcee", "arcee", _llama(**_HEAD)),
        Family("apertus", "apertus", _llama()),
        Family("seed_oss", "seed_oss", _llama(**_HEAD)),
        Family("ernie4_5", "ernie4_5", _llama(**_HEAD)),
        Family("smollm3", "smollm3", _llama(no_rope_layer_interval=2)),
        Family("hunyuan_v1_dense", "hunyuan_v1_dense", _llama(**_HEAD)),
        Family("phi", "phi", _llama()),
        Family("phi3", "phi3", _llama()),
        Family("persimmon", "persimmon", _plain()),
        Family("bitnet", "bitnet", _llama()),
        Family("diffllama", "diffllama", _llama()),
        Family("nanochat", "nanochat", _llama()),
        Family("jais2", "jais2", _llama()),
    ]


def _windows() -> list[Family]:
    return [
        Family("mistral", "mistral", _llama(**_WINDOW), sees_all=False),
        Family("ministral", "ministral", _llama(**_WINDOW, **_HEAD, **_ALTERNATING)),
        Family("ministral3", "ministral3", _llama(**_HEAD, sliding_window=None)),
        Family("starcoder2", "starcoder2", _llama(**_WINDOW), sees_all=False),
        Family("phi3-window", "phi3", _llama(**_WINDOW), sees_all=False),
        Family("qwen2-window", "qwen2", _llama(**_WINDOW, use_sliding_window=True, max_window_layers=1)),
        Family("gemma2", "gemma2", _llama(**_HEAD, **_WINDOW, attn_logit_softcapping=1.5), forms=_EAGER),
        Family("gemma3_text", "gemma3_text", _llama(**_HEAD, **_WINDOW, **_FOUR, count=4)),
        Family("cohere2", "cohere2", _llama(**_WINDOW, **_ALTERNATING, logit_scale=1.0)),
        Family("exaone4", "exaone4", _llama(**_WINDOW, **_ALTERNATING)),
        Family("olmo3", "olmo3", _llama(**_WINDOW, **_ALTERNATING)),
        Family("vaultgemma", "vaultgemma", _llama(**_HEAD, **_WINDOW, attn_logit_softcapping=1.5), forms=_EAGER),
        Family("cwm", "cwm", _llama(**_HEAD, **_WINDOW, **_ALTERNATING)),
        Family("gpt_neo", "gpt_neo", _gpt_neo(), forms=_EAGER),
        Family(
            "modernbert-decoder",
            "modernbert-decoder",
            _plain(local_attention=8, layer_types=_ALTERNATING["layer_types"]),
        ),
        Family("llama4_text", "llama4_text", _llama4()),
    ]


def _gpt_neo() -> dict[str, Any]:
    sizes = _sizes("hidden_size", "intermediate_size", "num_layers", "num_heads")
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 8}
    return {**sizes, **kinds, "max_position_embeddings": POSITIONS}


def _llama4() -> dict[str, Any]:
    """Two chunked layers with rope and two full ones without, whose queries grow with the position."""
    chunks = {"attention_chunk_size": 8, "floor_scale": 4, "attn_scale": 0.5, "attn_temperature_tuning": True}
    kinds = {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0, 1, 0]}
    sizes = {
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
    }
    return _llama(count=4, **_HEAD, **chunks, **kinds, **sizes)


def _moe() -> list[Family]:
    dbrx = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS, "vocab_size": VOCAB}
    dbrx_parts = {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 4.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    }
    return [
        Family("mixtral", "mixtral", _llama(**_MOE)),
        Family("mixtral-top1", "mixtral", _llama(num_local_experts=4, num_experts_per_tok=1)),
        Family("qwen2_moe", "qwen2_moe", _llama(**_QWEN_MOE)),
        Family("qwen3_moe", "qwen3_moe", _llama(**_QWEN_MOE, **_HEAD)),
        Family("olmoe", "olmoe", _llama(num_experts=4, num_experts_per_tok=2)),
        Family("granitemoe", "granitemoe", _llama(**_MOE)),
        Family("phimoe", "phimoe", _llama(**_MOE)),
        Family("gpt_oss", "gpt_oss", _llama(**_MOE, **_HEAD, **_WINDOW, **_ALTERNATING), forms=_EAGER),
        Family("jetmoe", "jetmoe", _jetmoe()),
        Family("dbrx", "dbrx", {**dbrx, **dbrx_parts}, refused="one graph"),
        Family("deepseek_v2", "deepseek_v2", _llama(**{**_DEEPSEEK_MOE, **_MLA})),
        Family("deepseek_v3", "deepseek_v3", _llama(**{**_DEEPSEEK_MOE, **_MLA})),
        Family("dots1", "dots1", _llama(**_DEEPSEEK_MOE, **_HEAD)),
        Family("glm4_moe", "glm4_moe", _llama(**_DEEPSEEK_MOE, **_HEAD)),
        Family("ernie4_5_moe", "ernie4_5_moe", _ernie_moe()),
        Family("minimax_m2", "minimax_m2", _llama(**_MOE, **_HEAD)),
        Family("hunyuan_v1_moe", "hunyuan_v1_moe", _llama(**_HEAD, num_experts=4, moe_topk=2)),
        Family("granitemoeshared", "granitemoeshared", _llama(**_MOE, shared_intermediate_size=16)),
        Family("flex_olmo", "flex_olmo", _llama(num_experts=4, num_experts_per_tok=2)),
    ]


def _jetmoe() -> dict[str, Any]:
    more = {"kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return {**_plain(), **more}


def _ernie_moe() -> dict[str, Any]:
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
    return _llama(**experts, moe_layer_start_index=1, moe_layer_interval=1)


def _older() -> list[Family]:
    falcon = _sizes("hidden_size", "ffn_hidden_size", "num_hidden_layers", "num_attention_heads")
    mpt = {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "expansion_ratio": 2,
        "max_seq_len": POSITIONS,
        "vocab_size": VOCAB,
    }
    rotary = {"rotary_dim": 4}
    opt = _sizes("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads")
    xglm = _sizes("d_model", "ffn_dim", "num_layers", "attention_heads")
    ctrl = _sizes("n_embd", "dff", "n_layer", "n_head")
    return [
        Family("gpt2", "gpt2", _gpt2()),
        Family(
            "gpt2-upcast",
            "gpt2",
            _gpt2(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
            forms=_EAGER,
        ),
        Family("gpt_bigcode", "gpt_bigcode", _gpt2(multi_query=True)),
        Family("gpt_neox", "gpt_neox", _plain()),
        Family("gpt_neox_japanese", "gpt_neox_japanese", _plain(intermediate_multiple_size=2), forms=_EAGER),
        Family("gptj", "gptj", _gpt2(**rotary), forms=_EAGER),
        Family("codegen", "codegen", _gpt2(**rotary), forms=_EAGER),
        Family("opt", "opt", {**opt, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32}),
        Family("bloom", "bloom", _sizes("hidden_size", "unused", "n_layer", "n_head"), forms=_EAGER),
        Family("mpt", "mpt", mpt, forms=_EAGER),
        Family("falcon", "falcon", {**falcon, "alibi": False}),
        Family("falcon-alibi", "falcon", {**falcon, "alibi": True}),
        Family("falcon-new", "falcon", {**falcon, "new_decoder_architecture": True, "num_kv_heads": 2}),
        Family("biogpt", "biogpt", _plain()),
        Family("xglm", "xglm", {**xglm, "max_position_embeddings": POSITIONS}, forms=_EAGER),
        Family("ctrl", "ctrl", {**ctrl, "n_positions": POSITIONS}, forms=_EAGER, refused="one graph"),
        Family("openai-gpt", "openai-gpt", _gpt2(), forms=_EAGER),
        Family("stablelm-parallel", "stablelm", _llama(use_parallel_residual=True, partial_rotary_factor=0.5)),
    ]


def _encoders_as_decoders() -> list[Family]:
    """Decoder halves and encoders turned causal: learned positions with offsets, scaled embeddings, cross-attention left out."""
    decoder = {"is_decoder": True, "type_vocab_size": 1}
    return [
        Family("bart", "bart", _bart()),
        Family("mbart", "mbart", _bart()),
        Family("marian", "marian", _bart(decoder_start_token_id=0)),
        Family("trocr", "trocr", _bart(), forms=_EAGER),
        Family("bert", "bert", _plain(**decoder)),
        Family("roberta", "roberta", _plain(**decoder), refused="cumsum"),  # positions by counting ids that are no padding
        Family("electra", "electra", _plain(**decoder, embedding_size=16)),
        Family("roformer", "roformer", _plain(**decoder, embedding_size=32), forms=_EAGER),
    ]


def _recent() -> list[Family]:
    return [
        Family("solar_open", "solar_open", _llama(**_DEEPSEEK_MOE, **_HEAD)),
        Family("minicpm3", "minicpm3", _llama(**_MLA, scale_emb=1.0, dim_model_base=32)),
        Family("youtu", "youtu", _llama(**_MLA)),
        Family("granite_swa", "granite_swa", _llama(**_WINDOW, **_ALTERNATING), forms=_EAGER),
        Family("afmoe", "afmoe", _llama(**_WINDOW, **_ALTERNATING, num_dense_layers=1, **_QWEN_MOE), forms=_EAGER),
        Family("exaone_moe", "exaone_moe", _llama(**_WINDOW, **_ALTERNATING, **_QWEN_MOE)),
        Family("mimo_v2_flash", "mimo_v2_flash", _llama(**_WINDOW), forms=_EAGER),
        Family("doge", "doge", _llama(), refused="computed from the tokens"),
        Family("hyperclovax", "hyperclovax", _llama()),
    ]


FAMILIES = _all()

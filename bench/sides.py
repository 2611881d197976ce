"""How does each engine run a Llama of random weights: ours over the naive model and over its package, vLLM, and transformers?

Each function builds its engine and gives a `Generate` with the seconds that its start took, by phase. Libraries are imported there.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.naive_llama import Shape, random_llama
from bench.workload import Generate

Made = tuple[Generate, dict[str, Any]]
MOST_SEQUENCES = 256
LONGEST = 8192  # tokens of a sequence
KV_TOKENS = 196_608  # 256 sequences of 768 tokens; 32 of 4129 are 132,128


def ours(shape: Shape, device: torch.device, **options: Any) -> Made:
    """PagedLM over the naive model, without its prefix cache: its prompts must not help each other. `options` are PagedLM's."""
    begin = time.perf_counter()
    model = _naive(shape, device)
    return _served(model, {"weights": time.perf_counter() - begin}, **options)


def packaged(shape: Shape, device: torch.device, **options: Any) -> Made:
    """The same over what AOTInductor has made of the model: exported, packaged, and loaded again."""
    import compile_attn as ca

    begin = time.perf_counter()
    model, seconds = _naive(shape, device), {}
    seconds["weights"] = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        program = ca.export(model, cache=ca.PagedKVCache(512, device=device), merge_linears=True)
        seconds["export"] = time.perf_counter() - begin
        begin = time.perf_counter()
        ca.package(program, Path(folder) / "model.pt2")
        seconds["package"] = time.perf_counter() - begin
        begin = time.perf_counter()
        loaded = ca.load_package(Path(folder) / "model.pt2")
        seconds["load_package"] = time.perf_counter() - begin
    return _served(loaded, seconds, **options)


def _naive(shape: Shape, device: torch.device) -> nn.Module:
    model = random_llama(shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return model


def _served(model: nn.Module, seconds: dict[str, Any], **options: Any) -> Made:
    from compile_attn import PagedLM, Sampling

    begin = time.perf_counter()
    sizes = {"kv_tokens": KV_TOKENS, "page_size": 16, "max_seqs": MOST_SEQUENCES, "max_batch_tokens": 8192}
    given = {**sizes, "prefix_cache": False, **options}
    lm = PagedLM(model, **given)
    seconds["PagedLM"] = time.perf_counter() - begin
    if lm.report is not None:
        seconds |= {f"of it {phase}": spent for phase, spent in lm.report.seconds.items()}
        print("kernels:", sorted({site.kernel for site in lm.report.sites}), flush=True)

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
        how = [Sampling(max_new_tokens=length) for length in lengths]
        return [len(new) for new in lm.generate(prompts, how, progress=False)]

    begin = time.perf_counter()
    lm.warm_up(tokens=min(LONGEST, lm.cache.length_limit))
    seconds["warm-up"] = time.perf_counter() - begin
    seconds["of it recording CUDA graphs"] = sum(graph.seconds for graph in lm.cuda_graphs)
    print(f"{len(lm.cuda_graphs)} CUDA graphs, {sum(graph.bytes for graph in lm.cuda_graphs) >> 20} MiB", flush=True)
    return generate, seconds


def llama_config(shape: Shape) -> dict[str, Any]:
    """As Llama's config.json has it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": shape.theta,
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def vllm(shape: Shape, device: torch.device) -> Made:
    """vLLM's engine as it comes, without its prefix cache: its prompts must not help each other."""
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # compiles at the first run; greedy sampling needs it not
    from vllm import LLM, SamplingParams

    begin = time.perf_counter()
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(llama_config(shape)))
    engine = LLM(
        model=folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=10240,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        max_num_seqs=MOST_SEQUENCES,
        seed=0,
    )
    seconds = {"engine": time.perf_counter() - begin}

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
        how = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths]
        made = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False)
        return [len(one.outputs[0].token_ids) for one in made]

    return generate, seconds


def transformers(shape: Shape, device: torch.device) -> Made:
    """LlamaForCausalLM.generate with its static cache, which it compiles by itself. Prompts of one length only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    begin = time.perf_counter()
    named = {
        name: value for name, value in llama_config(shape).items() if name not in ("architectures", "model_type", "torch_dtype")
    }
    config = LlamaConfig(**{**named, "eos_token_id": None})
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(before)
    seconds = {"weights": time.perf_counter() - begin}

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
        ids, count = torch.tensor(prompts, device=device), max(lengths)
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **how)
        made: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return [len(one) for one in made]

    return generate, seconds


SIDES: dict[str, Callable[..., Made]] = {"ours": ours, "packaged": packaged, "vllm": vllm, "transformers": transformers}
OURS = "ours", "packaged"

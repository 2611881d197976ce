"""What is the smallest decoder whose every token matters, and what does it say without paging?

`TinyDecoder` is written as a person would write it. `alone` generates by full recomputation, one request at a time: the
definition of right for the runtime's tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.cache import PagedKVCache
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.lm import PagedLM
from compile_attn.passes.lower import LayerKV
from compile_attn.running import Runner
from compile_attn.sampling import Sampling, SamplingRows, sample

VOCAB, WIDTH, HEADS, POSITIONS = 31, 16, 2, 64
GAIN = 1.5


class TinyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("seen", torch.tril(torch.ones(POSITIONS, POSITIONS, dtype=torch.bool)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, HEADS, c // HEADS).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(c // HEADS)
        scores = scores.masked_fill(~self.seen[:t, :t], float("-inf"))
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, c))


class TinyDecoder(nn.Module):
    """Learned positions, two blocks, [B, T] -> [B, T, VOCAB]."""

    def __init__(self, layers: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)
        self.pos = nn.Embedding(POSITIONS, WIDTH)
        self.attention = nn.ModuleList(TinyAttention() for _ in range(layers))
        self.mlp = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():  # gains above 1, sines: a small change moves the next token
                noise = torch.randn(weight.shape, generator=generator)
                if weight.dim() == 2:
                    weight.copy_(noise if name in ("tok.weight", "pos.weight") else noise * (GAIN / WIDTH**0.5))
                else:
                    weight.copy_(noise * 0.2 if name.endswith("bias") else 1 + noise * 0.2)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1], device=input_ids.device))
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(torch.nn.functional.layer_norm(x, (WIDTH,)))
            x = x + torch.sin(3 * mlp(x))
        return self.head(self.norm(x))


def tiny(layers: int = 2, seed: int = 0) -> TinyDecoder:
    return TinyDecoder(layers, seed).eval().requires_grad_(False)


def alone(model: nn.Module, prompt: Sequence[int], sampling: Sampling, limit: int = POSITIONS) -> list[int]:
    """The new tokens of one request, by recomputing everything for each of them."""
    tokens = list(prompt)
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0, -1:]
        count = len(tokens) - len(prompt)
        tokens.append(int(sample(logits, SamplingRows.of([sampling], [(sampling.seed or 0, count)]))))
        if tokens[-1] in sampling.stop_ids or count + 1 >= sampling.max_new_tokens or len(tokens) > limit:
            return tokens[len(prompt) :]


def as_on_a_gpu(lm: PagedLM) -> PagedLM:
    """With steps sent ahead of their tokens, and decodes that advance by themselves: a CPU runs anew what a GPU replays."""
    drafts = lm._scheduler.drafting is not None
    lm._ahead = 0 if drafts else 1
    lm._runner = Runner(lm._runner._run, lm.cache, lm._model, True, lm._scheduler._max_batch_tokens, drafts)
    return lm


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


def layer_kv(device: torch.device | None = None) -> LayerKV:
    size = WIDTH // HEADS
    return LayerKV(HEADS, size, size, torch.float32, device or torch.device("cpu"))


def by_hand(model: TinyDecoder, cache: PagedKVCache) -> Callable[[Tensor], Tensor]:
    """What a paged compilation of this model should do, written out on the low-level ops."""
    ops = torch.ops.paged_attn
    spec = AttentionSpec(HEADS, HEADS, WIDTH // HEADS, WIDTH // HEADS, scale=(WIDTH // HEADS) ** -0.5).encode()
    cache.bind([layer_kv(cache.device)] * len(model.attention), owner=model, max_positions=POSITIONS)

    def step(input_ids: Tensor) -> Tensor:
        cache.check_inputs(input_ids, None)
        block_table, seq_lens, query_lens, rows = cache.step_inputs()
        tokens = input_ids.shape[1]
        cu, positions, slots, which = ops.build_metadata(block_table, seq_lens, query_lens, tokens, cache.page_size)
        x = (model.tok(input_ids) + model.pos(positions))[0]
        for at, (attention, mlp) in enumerate(zip(model.attention, model.mlp, strict=True)):
            normed = torch.nn.functional.layer_norm(x, (WIDTH,))
            q, k, v = (y.view(tokens, HEADS, -1) for y in attention.qkv(normed).split(WIDTH, dim=1))
            pages = (cache.k_pages[at], cache.v_pages[at])
            ops.write_kv(k, v, *pages, slots)
            mixed = ops.attend(q, *pages, block_table, seq_lens, cu, positions, which, [], spec, "reference")
            x = x + attention.out(mixed.reshape(tokens, WIDTH))
            x = x + torch.sin(3 * mlp(x))
        return model.head(model.norm(x[rows])).unsqueeze(0)

    return step

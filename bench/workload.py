"""What is every engine asked to do, how is it timed, and what is the least it could take?

The same prompts in the same order for all, greedy, with a fixed number of new tokens.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.naive_llama import Shape

ROWS = ((1, 128), (8, 128), (32, 128), (128, 128), (256, 128), (1, 8000), (32, 4000))  # sequences, tokens of each prompt
NEW = 128  # new tokens over which a step is averaged
REQUESTS = 512
Generate = Callable[[list[list[int]], list[int]], list[int]]  # prompts, new tokens of each -> tokens made of each
Found = dict[str, Any]


def row_name(batch: int, context: int) -> str:
    return f"b{batch}_ctx{context}"


class Prompts:
    """Random token ids, the same ones in every process."""

    def __init__(self, vocabulary: int) -> None:
        self._random = random.Random(0)
        self._most = min(120_000, vocabulary)

    def of(self, batch: int, length: int) -> list[list[int]]:
        return [[self._random.randrange(10, self._most) for _ in range(length)] for _ in range(batch)]

    def mixed(self, requests: int) -> tuple[list[list[int]], list[int]]:
        """Prompts of 50 to 600 tokens, answers of 50 to 400."""
        lengths = [self._random.randrange(50, 400) for _ in range(requests)]
        return [self.of(1, self._random.randrange(50, 600))[0] for _ in range(requests)], lengths


def measure(
    generate: Generate,
    vocabulary: int,
    save: Callable[[str, Found], None],
    rows: Sequence[tuple[int, int]] = ROWS,
    requests: int = REQUESTS,
    new: int = NEW,
    tries: int = 2,
    warm: bool = True,
) -> None:
    """Seconds of a prefill; milliseconds of a decode step: (time for new + 1 tokens - time for 1) / new, the least of the tries.

    Then the ragged requests, all given at once, in the least time of the tries. `save` is told each result as it comes.
    """
    prompts = Prompts(vocabulary)

    def run(batch: int, context: int, count: int) -> float:
        return _seconds(generate, prompts.of(batch, context), [count] * batch)

    if warm:
        save("first_run", {"seconds": round(run(4, 64, 8), 3)})
    for batch, context in rows:
        prefill = min(run(batch, context, 1) for _ in range(tries))
        whole = min(run(batch, context, 1 + new) for _ in range(tries))
        step = (whole - prefill) / new
        figures = {"prefill_s": prefill, "decode_ms_per_step": step * 1e3, "tok_s": batch / step}
        save(row_name(batch, context), {name: round(value, 4) for name, value in figures.items()})
    if requests:
        given, lengths = prompts.mixed(requests)
        seconds = min(_seconds(generate, given, lengths) for _ in range(tries))
        save("mixed", {"requests": requests, "seconds": round(seconds, 3), "out_tok_s": round(sum(lengths) / seconds, 1)})


def _seconds(generate: Generate, prompts: list[list[int]], lengths: list[int]) -> float:
    begin = time.perf_counter()
    made = generate(prompts, lengths)
    seconds = time.perf_counter() - begin
    if made != lengths:
        raise RuntimeError(f"asked for {sum(lengths)} new tokens in {len(lengths)} answers, got {sum(made)} in {len(made)}")
    return seconds


def decode_work(shape: Shape, batch: int, context: int, itemsize: int = 2) -> tuple[int, int]:
    """Bytes and operations of one step: every weight and every cached key and value read once."""
    weights = shape.layers * shape.layer_weights + shape.vocabulary * shape.width
    cached = 2 * batch * context * shape.layers * shape.kv_heads * shape.head_dim
    return (weights + cached) * itemsize, 2 * batch * weights + 4 * batch * context * shape.layers * shape.heads * shape.head_dim


def prefill_work(shape: Shape, batch: int, length: int, itemsize: int = 2) -> tuple[int, int]:
    """Bytes and operations of prompts: logits of the last token only, attention over visible keys only."""
    head = shape.vocabulary * shape.width
    pairs = batch * length * (length + 1) // 2
    operations = 2 * batch * (length * shape.layers * shape.layer_weights + head)
    return (
        shape.layers * shape.layer_weights + head
    ) * itemsize, operations + 4 * pairs * shape.layers * shape.heads * shape.head_dim

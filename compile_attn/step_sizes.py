"""Of which sizes are steps recorded, and up to how many new tokens?

A graph is of one size, which a smaller step is padded to. Pad rows cost next to nothing, since attention skips them; pad tokens are
multiplied with all weights. So there are many sizes by tokens and few by rows.
"""

from __future__ import annotations

from torch import nn

from compile_attn.step import Sizes

# New tokens of a step with prompts, and its sequences. Up to so many tokens reading the weights takes longer than multiplying with
# them, so that pad tokens cost little.
_TOKENS = (16, 32, 64, 128, 256)
_ROWS = (2, 16, 128, 512)
_APART = 128  # beyond these, sizes are so many tokens apart, and have as many rows as there can be
MOST_DRAFTED, MOST_DRAFTED_ROWS = _TOKENS[-1], 128  # of a step with drafts, which keeps a row of logits a token
_MOST = 1024  # tokens, whatever the model
# An H200 and its host, with Inductor: launching a layer takes 0.3 ms, and a product in bfloat16 runs at 6e14 operations a second.
_LAUNCHING, _RATE = 0.3e-3, 6e14


def worth_recording(model: nn.Module, layers: int) -> int:
    """Most new tokens of a step with prompts for which launching its kernels takes longer than running them.

    A token takes two operations a parameter: 256 tokens for 32 layers with 8 billion parameters, 1024 for 16 with 1.2 billion.
    """
    parameters = sum(each.numel() for each in model.parameters())
    tokens = int(_LAUNCHING * layers * _RATE / (2 * max(1, parameters)))
    return max(_TOKENS[-1], min(tokens // _APART * _APART, _MOST))


def token_steps(most: int) -> list[int]:
    """New tokens of the graphs for steps with prompts, up to so many; ascending."""
    steps = [*_TOKENS, *range(_TOKENS[-1] + _APART, most, _APART)]
    return [*(step for step in steps if step < most), most]


def decode_size(rows: int, most_rows: int) -> int:
    """Rows of the graph that serves so many decodes: 2, 4, 8, 16, 32, 48, ..., 128, 160, ..."""
    size = next((step for step in (2, 4, 8, 16) if rows <= step), -(-rows // 16) * 16 if rows <= 128 else -(-rows // 32) * 32)
    return min(size, most_rows)


def mixed_size(rows: int, tokens: int, most_rows: int, most_tokens: int) -> tuple[int, int] | None:
    """Rows and new tokens of the graph that serves a step with prompts; None where it is too large for any."""
    if tokens > most_tokens or rows > min(_ROWS[-1], most_rows):
        return None
    few = next(step for step in _ROWS if (rows if tokens <= _TOKENS[-1] else _ROWS[-1]) <= step)
    size = min(few, most_rows)
    found = next((step for step in token_steps(most_tokens) if max(tokens, size + 1) <= step), None)
    if found is not None and found > _TOKENS[-1]:
        size = min(_ROWS[-1], most_rows)
    return None if found is None or size >= found else (size, found)


def mixed_sizes(rows: int, tokens: int, most_rows: int, most_tokens: int) -> set[tuple[int, int]]:
    """All that steps of up to so many rows, of up to so many tokens each, ask for."""
    least = [1, *(step + 1 for step in token_steps(most_tokens))]  # tokens that ask for the next size
    counts = [(count, max(count, new)) for count in range(1, rows + 1) for new in least if new <= count * tokens]
    return {size for count in counts if (size := mixed_size(*count, most_rows, most_tokens)) is not None}


def with_logits(size: tuple[int, int], each_token: bool) -> Sizes | None:
    """With the rows of logits: one a sequence, or one a token where several of a sequence are wanted."""
    if not each_token:
        return (*size, size[0])
    return (*size, size[1]) if size[1] <= MOST_DRAFTED else None

"""Do the kernels that draw tokens compile for an H200 without spilling registers? See hopper.py."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.hopper import H200, Compiled
from tests.hopper_step import resources

CASES = {  # vocabulary, dtype, whether numbers are given
    "common": (128256, torch.bfloat16, False),
    "odd": (50257, torch.float16, True),
    "large": (262144, torch.float32, False),
    "larger": (2_000_003, torch.bfloat16, False),
    "tiny": (31, torch.float32, True),
}


def main() -> None:
    from triton.runtime import driver

    from compile_attn.kernels import draw_triton
    from compile_attn.sampling import NOT_FINITE, Sampling, SamplingRows

    driver.set_active(H200())
    found: list[Any] = []
    draw_triton.blocks = Compiled(draw_triton.blocks, found)
    draw_triton.rows = Compiled(draw_triton.rows, found)
    how = SamplingRows.of([Sampling(temperature=1.0)] * 2, [(0, 0)] * 2).tensors()
    for name in sys.argv[1:] or CASES:
        vocabulary, dtype, given = CASES[name]
        draws = torch.zeros(2, dtype=torch.float64) if given else None
        draw_triton.draw(torch.empty(2, vocabulary, dtype=dtype), how, draws, NOT_FINITE)
        for kernel in found:
            print(f"{name}, {kernel.metadata.name}: {resources(kernel)}, {kernel.metadata.shared} bytes of shared memory")
        found.clear()


if __name__ == "__main__":
    main()

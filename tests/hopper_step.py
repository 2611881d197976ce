"""Do the kernels of a step (metadata, writing, advancing) compile for an H200 without spilling registers? See hopper.py."""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.hopper import H200, Compiled, assembled

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
WRITES = {  # tokens, KV heads, D, Dv, dtype, dtype of pages, shapes of the scales
    "decode": (8, 8, 128, 128, BF16, BF16, (None, None)),
    "fp8": (8, 8, 128, 128, BF16, FP8, ((), (8,))),
    "latent": (512, 1, 576, 512, torch.float16, torch.float8_e5m2, ((1,), (1,))),
    "odd sizes": (100, 3, 80, 40, torch.float32, BF16, (None, None)),
}
STEPS = {"small": (8, 8), "many rows": (512, 512), "many tokens": (16384, 512)}  # tokens, rows


def resources(kernel: Any) -> str:
    """Registers, spills and widest accesses."""
    said = assembled(kernel)
    assert "0 bytes spill stores, 0 bytes spill loads" in said, said
    return next(line.split("info    : ")[1] for line in said.splitlines() if "registers" in line)


def main() -> None:
    from triton.runtime import driver

    from compile_attn.kernels import batch_triton, blocks_triton, write_kv_triton

    driver.set_active(H200())
    found: list[Any] = []
    for module, name in (
        (write_kv_triton, "write"),
        (batch_triton, "metadata"),
        (batch_triton, "advance"),
        (blocks_triton, "copy"),
    ):
        setattr(module, name, Compiled(getattr(module, name), found))
    for name, (tokens, heads, dim, dim_v, dtype, stored, scales) in WRITES.items():
        joined = torch.empty(tokens, 4 * heads, dim + dim_v, dtype=dtype)
        k, v = joined[:, heads : 2 * heads, :dim], joined[:, 2 * heads : 3 * heads, dim:]
        pages = (torch.empty(9, 16, heads, size, dtype=stored) for size in (dim, dim_v))
        by = (None if shape is None else torch.ones(shape) for shape in scales)
        write_kv_triton.write_pages(k, v, *pages, torch.zeros(tokens, dtype=torch.int64), *by)
        ptx = found[-1].asm["ptx"]
        wide = sum(ptx.count(f"{op}.global.{each}") for op in ("ld", "st") for each in ("v4.b32", "v2.b32", "v2.b64"))
        print(f"write, {name}: {resources(found[-1])}; {wide} vector accesses")
    for name, (tokens, rows) in STEPS.items():
        lengths = torch.zeros(rows, dtype=torch.int32)
        for held in (None, lengths):
            batch_triton.build_metadata(torch.zeros(rows, 64, dtype=torch.int32), lengths, lengths, tokens, 16, held)
            print(f"metadata, {name}{'' if held is None else ', and lengths'}: {resources(found[-1])}")
    ids = torch.zeros(64, dtype=torch.int64)
    batch_triton.advance_step(ids, ids, torch.zeros(64, dtype=torch.int32), ids)
    print(f"advance: {resources(found[-1])}")
    for name, dtype, dim in (("pages", BF16, 128), ("pages of odd sizes", FP8, 5)):
        pools = [torch.empty(9, 16, 1, dim, dtype=dtype) for _ in range(2)]
        blocks_triton.copy_pages(pools, torch.tensor([[1, 2]]))
        print(f"copy, {name}: {resources(found[-1])}")


if __name__ == "__main__":
    sys.exit(main())

"""How are pages copied inside their pools on a GPU? All pairs in all pools by one launch; nothing is read on the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_BLOCK = 1024  # elements of a program: with those of 8 bytes, 8 KiB
_UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


# Not specialised: what changes from step to step would only compile the kernel again.
@triton.jit(do_not_specialize=["num_pools"])  # type: ignore[untyped-decorator]
def copy(given, num_pools, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """given: by pool its address and the elements of its pages; by pair the two pages."""
    pool, pair = tl.program_id(1), num_pools + tl.program_id(0)
    address, size = tl.load(given + 2 * pool), tl.load(given + 2 * pool + 1)
    source, target = tl.load(given + 2 * pair), tl.load(given + 2 * pair + 1)
    bytes_: tl.constexpr = UNIT.primitive_bitwidth // 8
    here = (address + source * size * bytes_).to(tl.pointer_type(UNIT))
    there = (address + target * size * bytes_).to(tl.pointer_type(UNIT))
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    tl.store(there + at, tl.load(here + at, mask=at < size), mask=at < size)


def copy_pages(pools: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """Page pairs[n, 0] to page pairs[n, 1] in contiguous pools [P, ...] on one device; pairs [N, 2] int64 on the CPU.

    The pairs are checked, and no page is both read and written: they are copied in any order.
    """
    sizes = [pool.stride(0) * pool.itemsize for pool in pools]
    addresses = [pool.data_ptr() for pool in pools]
    unit = math.gcd(8, *addresses, *sizes)
    device = pools[0].device
    rows = [[address, size // unit] for address, size in zip(addresses, sizes, strict=True)]
    given = torch.cat([torch.tensor(rows, dtype=torch.int64, device="cpu"), pairs])
    if device.type == "cuda":
        given = given.pin_memory().to(device, non_blocking=True)
    parts = triton.cdiv(max(sizes) // unit, _BLOCK)
    with torch.cuda.device_of(pools[0]):  # type: ignore[no-untyped-call]
        copy[(len(pairs), len(pools), parts)](given, len(pools), _UNITS[unit], _BLOCK)

"""How fast can this device copy memory and multiply bf16 matrices?

No kernel that must do the same work is faster.

    python -m bench.floor [--device cuda] [--out DIR]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.measuring import RESULTS, Table, compare, number, publish, stamp

COPIED = 4 << 30  # bytes of each side: far beyond any cache
SIDE = 8192  # of the matrices


@dataclass(frozen=True)
class Floor:
    """What the device reaches: bytes a second, read and written together; bf16 operations a second."""

    bytes: float
    operations: float

    def seconds(self, bytes: float, operations: float) -> float:
        """The least that this work can take."""
        return max(bytes / self.bytes, operations / self.operations)


def measure(device: torch.device, copied: int = COPIED, side: int = SIDE, seconds: float = 0.5) -> Floor:
    """On random values: zeros multiply faster than any real data."""
    source = torch.randint(0, 256, (copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = compare({"copy": lambda: target.copy_(source)}, device, seconds)["copy"]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = compare({"product": lambda: torch.mm(a, b, out=out)}, device, seconds)["product"]
    return Floor(2 * copied / copy * 1e6, 2 * side**3 / product * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for floor.md and floor.json")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    floor = measure(device)
    rows = [
        ["copying 4 GiB, bytes read and written", f"{number(floor.bytes / 1e12)} TB/s"],
        ["bf16 matrix product, 8192 x 8192 x 8192", f"{number(floor.operations / 1e12)} TFLOP/s"],
    ]
    table = Table("What the device reaches", ["work", "rate"], rows)
    publish("floor", "Floor: what any kernel is measured against", [table], asdict(floor), stamp(device), chosen.out)


if __name__ == "__main__":
    main()

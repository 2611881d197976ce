"""Does a Triton kernel compile for an H200, on a machine without one, does it fit, and are its products asynchronous?

The interpreter runs Python, so it accepts what the compiler refuses. Triton's wheel holds all that compiling takes but a
device; the driver here only says which one is meant. Run as a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compile_attn.kernels import block_sparse, general, hopper
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import CAPTURED, SLOPE, SPECS

SHARED = 227 << 10  # bytes that a block may ask for on compute capability 9.0
SPILLED = 4 << 10  # bytes of a thread that no kernel may reach: the assembler then gives up, and keeps next to nothing in registers
EVERYTHING = AttentionSpec(
    8, 2, 192, 128, m.All(m.Window(99), m.SameDocument(0)), 0.07, 30.0, SLOPE * (J - I) + Load(1, H, J % 9), sinks=Load(2, H % 4)
)
PADDED = m.General(SPECS["padding"].mask.predicate() | (Load(3, B, I) < 1))
CASES = {  # spec, dtype, tokens, sequences, dtype of pages
    "decode": (AttentionSpec(32, 8, 64, 64), torch.bfloat16, 8, 8, None),
    "prefill": (AttentionSpec(32, 8, 128, 128), torch.bfloat16, 4096, 2, None),
    "block sparse": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 2, 8, 1)), torch.bfloat16, 4096, 2, None),
    "sparse, heads alike": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 1, 16), softcap=9.0), torch.bfloat16, 4096, 1, None),
    "sparse, many blocks": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 1, 2)), torch.bfloat16, 4096, 1, None),
    "sparse, small heads": (AttentionSpec(32, 8, 64, 64, m.BlockSparse(64, 1, 16, 1)), torch.bfloat16, 4096, 1, None),
    "sparse, large heads": (AttentionSpec(32, 8, 256, 256, m.BlockSparse(64, 1, 16)), torch.bfloat16, 4096, 1, None),
    "sparse, two head sizes": (AttentionSpec(16, 16, 192, 128, m.BlockSparse(64, 1, 16, 1)), torch.bfloat16, 4096, 1, None),
    "sparse, fp8 pages": (AttentionSpec(8, 8, 80, 80, m.BlockSparse(64, 1, 16)), torch.float16, 4096, 1, torch.float8_e4m3fn),
    "sparse with a bias": (
        AttentionSpec(32, 8, 128, 128, m.Window(300), bias=Load(1, H % 4, (I + J) % 9)),
        torch.bfloat16,
        4096,
        1,
        None,
    ),
    "sparse, float32": (AttentionSpec(32, 8, 256, 256, m.BlockSparse(64, 1, 16)), torch.float32, 4096, 1, None),
    "long window": (AttentionSpec(32, 8, 128, 128, m.Window(1000)), torch.bfloat16, 4096, 1, None),
    "sparse decode": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 2, 8, 1)), torch.bfloat16, 8, 8, None),
    "sparse, KV heads slide": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 2, 8, 1, 8, 4)), torch.bfloat16, 4096, 2, None),
    "sparse decode, KV heads slide": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 2, 8, 1, 8, 4)), torch.bfloat16, 8, 8, None),
    "fp8 pages": (AttentionSpec(8, 8, 80, 80), torch.float16, 512, 4, torch.float8_e4m3fn),
    "float32": (AttentionSpec(4, 4, 64, 64, m.Chunked(70), softcap=3.0), torch.float32, 512, 4, None),
    "everything": (EVERYTHING, torch.bfloat16, 512, 4, None),
    "large heads": (AttentionSpec(16, 1, 576, 512, PADDED), torch.bfloat16, 8, 4, None),
}
# For the kernel that is for Hopper alone (kernels/hopper_triton.py).
SPECIAL = {
    "special, dense": (AttentionSpec(32, 8, 128, 128), torch.bfloat16, 4096, 1, None),
    "special, chunks and decodes": (AttentionSpec(32, 8, 64, 64), torch.float16, 4096, 9, None),
    "special, heads alike": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 1, 16), softcap=9.0), torch.bfloat16, 4096, 2, None),
    "special, by head": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 2, 8, 1)), torch.float16, 4096, 2, None),
    "special, sinks and a bias": (
        AttentionSpec(32, 8, 128, 128, m.Window(500), bias=SLOPE * (J - I), sinks=Load(2, H % 4)),
        torch.bfloat16,
        4096,
        2,
        None,
    ),
    "special, small cells": (AttentionSpec(32, 8, 128, 128, m.BlockSparse(16, 1, 16, 1)), torch.bfloat16, 4096, 2, None),
    "special, everything": (replace(EVERYTHING, head_dim=128), torch.bfloat16, 4096, 4, None),
}
SERIALISED = {"sparse, many blocks"}  # measured, the fastest for all that: see FOR_MANY of kernels/block_sparse.py


class H200:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiled:
    """In place of a kernel: a launch compiles it, and runs nothing."""

    def __init__(self, kernel: Any, found: list[Any]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: Sequence[int]) -> Any:
        return lambda *args, **options: self.found.append(self.kernel.warmup(*args, grid=grid, **options))


def compile_call(spec: AttentionSpec, dtype: torch.dtype, tokens: int, rows: int, stored: torch.dtype | None) -> None:
    def whole(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    q = torch.empty(tokens, spec.num_q_heads, spec.head_dim, dtype=dtype)
    k, v = (torch.empty(9, 16, spec.num_kv_heads, dim, dtype=stored or dtype) for dim in (spec.head_dim, spec.head_dim_v))
    scales = (None, None) if stored is None else (torch.ones(()), torch.ones(spec.num_kv_heads))
    kv = Paged(k, v, whole(rows, 256), whole(rows), whole(rows + 1), torch.zeros(tokens, dtype=torch.int64), whole(tokens), *scales)
    sparse = isinstance(spec.mask, (m.BlockSparse, m.Window))
    backend = block_sparse.BlocksparseFlashAttentionBackend() if sparse else general.GeneralBackend()
    backend.attend(q, kv, CAPTURED, spec)
    if stored is None and not hopper.ON:
        row = torch.empty(2, spec.num_q_heads, tokens, spec.head_dim, dtype=dtype)
        keys, values = (torch.empty(2, tokens, each.shape[2], each.shape[3], dtype=dtype).transpose(1, 2) for each in (k, v))
        backend.attention(row, keys, values, CAPTURED, spec)


@functools.cache
def assembled(kernel: Any) -> str:
    """What NVIDIA's assembler, as it comes with Triton, says of a kernel."""
    from triton.backends.nvidia.compiler import get_ptxas  # the one that this Triton takes for the device

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(kernel.asm["ptx"])
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


def serialised(kernel: Any) -> bool:
    """Does each product of matrices wait for the one before it? Registers that are short make it so; the assembler alone tells."""
    return "are serialized" in assembled(kernel)


def spilled(kernel: Any) -> int:
    """Bytes that a thread puts aside for want of registers."""
    return max(map(int, re.findall(r"(\d+) bytes spill stores", assembled(kernel))))


def together(kernel: Any) -> bool:
    """Are all warps of a group done with shared memory, and at a barrier of the group, when one thread says for all that they are?

    In Gluon nothing says so: Triton puts those barriers.
    """
    met, found = False, 0
    for line in kernel.asm["ptx"].splitlines():
        if re.search(r"\b(wgmma|ld\.shared|st\.shared|ldmatrix|stmatrix)\b", line):
            met = False
        if "bar.sync" in line:
            met = True
        if "mbarrier.arrive.shared" in line:
            found += 1
            if not met:
                return False
    return found > 0


def stuck(kernel: Any) -> list[str]:
    """What a loop carries from turn to turn without a change, which nobody writes so. Triton 3.6 takes a value for dead that a loop
    carries if only bounds of a loop inside it use it, and so keeps its first one.
    """
    found: list[str] = []
    loops: list[tuple[int, list[str]]] = []  # how far a loop is indented, and what it carries
    for line in kernel.asm["ttgir"].splitlines():
        indent = len(line) - len(line.lstrip())
        if re.search(r"scf\.(for|while|if)\b", line):
            carried = re.search(r"iter_args\((.*?)\) ->", line)
            loops.append((indent, [each.split(" = ")[0].strip() for each in carried[1].split(",")] if carried else []))
        given = re.match(r"\s*scf\.yield (.*?) :", line)
        while given and loops and loops[-1][0] > indent - 2:
            loops.pop()
        if given and loops and loops[-1][0] == indent - 2:
            pairs = zip(loops[-1][1], given[1].split(","), strict=False)
            found += [name for name, value in pairs if name == value.strip()]
    return found


def check_special(name: str, kernel: Any) -> None:
    if serialised(kernel) or spilled(kernel):
        sys.exit(f"{name}: products serialised: {serialised(kernel)}; {spilled(kernel)} bytes of a thread are spilled")
    if "setmaxnreg.dec" not in kernel.asm["ptx"] or "cp.async.bulk.tensor" not in kernel.asm["ptx"]:
        sys.exit(f"{name}: registers are not moved from the fetching warp to those that compute, or TMA does not fetch")
    if stuck(kernel):
        sys.exit(f"{name}: loops carry {', '.join(stuck(kernel))} without a change: is it compiled wrongly?")
    if not together(kernel):
        sys.exit(f"{name}: an arrival at a barrier does not wait for the warps of its group")


def main() -> None:
    from triton.runtime import driver

    from compile_attn.kernels import combine_triton, grid_triton, hopper_triton, triton_launch

    driver.set_active(H200())
    found: list[Any] = []
    special: list[Any] = []
    grid_triton.attend = Compiled(grid_triton.attend, found)
    grid_triton.attend_evenly = Compiled(grid_triton.attend_evenly, found)
    combine_triton.combine = Compiled(combine_triton.combine, found)
    hopper_triton.attend = Compiled(hopper_triton.attend, special)
    hopper.available = lambda device: True
    for name in sys.argv[1:] or [*CASES, *SPECIAL]:
        hopper.ON = name in SPECIAL
        triton_launch.forget()
        compile_call(*(SPECIAL if hopper.ON else CASES)[name])
        if hopper.ON:
            (kernel,) = special
            check_special(name, kernel)
        shared = max(each.metadata.shared for each in found + special)
        if shared > SHARED:
            sys.exit(f"{name}: {shared} bytes of shared memory; a block has {SHARED}")
        if any(map(serialised, found)) and name not in SERIALISED:
            sys.exit(f"{name}: products of matrices are serialised")
        if any(spilled(each) >= SPILLED for each in found):
            sys.exit(f"{name}: {max(map(spilled, found))} bytes of a thread are spilled")
        print(f"{name}: {len(found + special)} kernels, {shared} bytes of shared memory")
        found.clear()
        special.clear()


if __name__ == "__main__":
    main()

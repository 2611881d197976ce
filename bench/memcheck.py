"""Does a Triton kernel read or write memory that is not its own?

compute-sanitizer watches every access while the tests of the Triton kernels run on the device, after it has shown that it sees a
planted one. Every tensor has an allocation of its own then, of the driver's pool, so that what lies behind it belongs to nobody.

    python -m bench.memcheck [--jobs 8] [--limit 500] [--tool memcheck] [--out DIR] [tests, default: Triton's kernels']

Under the tool what a process has allocated on the device and freed is not there again: with 8 processes that is 11 GiB at most.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measuring import RESULTS, Table, publish, stamp
from bench.processes import Clock, run_apart

TESTS = ("general", "block_sparse", "grid", "write_kv", "batch", "sampling", "draw", "flash_rows")
# The kernel for Hopper takes long to compile: pages and groups of all sizes, and every kind of tensor, make all its accesses.
FEW = tuple(f"tests/test_hopper_gpu.py::test_{name}" for name in ("pages", "groups", "captured_tensors_and_sinks"))
# Recording a graph, as a model that generates does, forbids allocations of its own; what reads 4 GiB of pages takes minutes.
LEFT_OUT = "not graph and not generates and not beyond_int32 and not long_context"
PLUGINS = ("-p", "no:cacheprovider", "-p", "no:benchmark")  # if the second is there, it warns of -n, and a warning is an error
PLACES = (
    shutil.which("compute-sanitizer"),
    *(f"/usr/local/cuda/{folder}/compute-sanitizer" for folder in ("bin", "compute-sanitizer")),
)
WHAT = (
    *("--target-processes", "all", "--require-cuda-init", "no"),
    *("--force-synchronization-limit", "16"),  # the tool holds device memory for every launch that was not waited for
    *("--kernel-name-exclude", "kernel_substring=at::"),  # PyTorch's own
)
MOST_OF_A_LOG = 4 << 20  # characters that are kept
PLANTED = """
import torch, triton, triton.language as tl
@triton.jit
def write(at):
    tl.store(at + 4, 1.0)
if __name__ == "__main__":
    write[(1,)](torch.zeros(4, device="cuda"))
    torch.cuda.synchronize()
"""


def sanitizer() -> str:
    """Where it is; FileNotFoundError otherwise."""
    found = next((place for place in PLACES if place and Path(place).exists()), None)
    if found is None:
        raise FileNotFoundError("compute-sanitizer is not here; it comes with the CUDA toolkit")
    return found


def watched(tool: str, command: Sequence[str], limit: float) -> tuple[int | None, list[str]]:
    """Run under the tool: the exit code (None: cut off), and the log of every process that used the device."""
    env = {**os.environ, "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
    with tempfile.TemporaryDirectory() as logs:
        how = ["--tool", tool, *WHAT, "--log-file", f"{logs}/%p.log"]
        code = run_apart([sanitizer(), *how, *command], limit, env)
        texts = [file.read_text(errors="replace") for file in sorted(Path(logs).iterdir())]
    return code, [text for text in texts if "ERROR SUMMARY" in text]


def errors(logs: Sequence[str]) -> int:
    """Of all processes together."""
    return sum(int(count) for text in logs for count in re.findall(r"ERROR SUMMARY: (\d+) error", text))


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=[*(f"tests/test_{name}.py" for name in TESTS), *FEW])
    parser.add_argument("--jobs", type=int, default=8, help="processes at once")
    parser.add_argument("--limit", type=float, default=500.0, help="seconds for the tests")
    parser.add_argument("--tool", default="memcheck", help="or racecheck, initcheck, synccheck")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(args)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows = []
    if chosen.tool == "memcheck":
        with tempfile.TemporaryDirectory() as folder:  # a file: Triton reads a kernel's source
            planted = Path(folder) / "planted.py"
            planted.write_text(PLANTED)
            _, seen = watched(chosen.tool, [sys.executable, str(planted)], 120)
        rows.append(["a planted write behind a tensor", str(len(seen)), str(errors(seen)), "yes" if errors(seen) else "NO"])
    if all(row[-1] == "yes" for row in rows):  # a tool that does not see the planted one shows nothing
        rows.append(tests_under(chosen.tool, chosen))
    table = Table(f"compute-sanitizer --tool {chosen.tool}", ["what ran", "processes", "errors", "as it should be"], rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    publish(chosen.tool, "Memory that kernels touch", [table], {"rows": rows, "left out": LEFT_OUT}, stamp(device), chosen.out)
    return 0 if all(row[-1] == "yes" for row in rows) else 1


def headlines(text: str) -> Counter[str]:
    """What the tool complains of, and how often: the first line of each complaint, without addresses."""
    lines = re.findall(r"^========= (?=\S)(?!COMPUTE-SANITIZER|ERROR SUMMARY)(.*)$", text, re.M)
    return Counter(re.sub(r"0x[0-9a-f]+|\d{4,}", "_", line) for line in lines)


def collected(files: Sequence[str]) -> list[str]:
    """Their gpu tests, each by its name for pytest; subprocess.CalledProcessError where pytest refuses them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", LEFT_OUT, *PLUGINS, *files]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line for line in said.splitlines() if "::" in line]


def tests_under(tool: str, chosen: argparse.Namespace) -> list[str]:
    """A row of the table: the gpu tests of these files. What was complained of is printed, and kept."""
    clock, tests = Clock(chosen.limit), collected(chosen.tests)
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(chosen.jobs), *PLUGINS, *tests]
    code, seen = watched(tool, command, chosen.limit)
    faulty, log = "\n".join(text for text in seen if errors([text])), chosen.out / f"{tool}.log"
    log.unlink(missing_ok=True)
    if faulty:
        log.write_text(faulty[:MOST_OF_A_LOG])
        print(*(f"{count} x {what}" for what, count in headlines(faulty).most_common(20)), sep="\n")
    well = len(tests) > 0 and code == 0
    ended = "all passed" if well else f"pytest ended with {'a cut' if code is None else code}"
    files = ", ".join(dict.fromkeys(Path(file).stem for file in chosen.tests))
    what = f"{len(tests)} gpu tests of {files}: {ended}, {clock.spent:.0f} s"
    return [what, str(len(seen)), str(errors(seen)), "yes" if well and seen and not errors(seen) else "NO"]


if __name__ == "__main__":
    raise SystemExit(main())

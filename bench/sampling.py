"""How long does choosing the next tokens take on a GPU, beside what others do?

`python -m bench.sampling`. Times are of one call among several in a replayed CUDA graph over bfloat16 logits; a call that cannot
be recorded is timed by itself. Sharp logits are normal numbers times five, of which few matter; flat ones are not multiplied, as
those of random weights are. torch draws as engines in plain PyTorch do: the largest of probabilities over exponential numbers, or
argmax; it has nothing for top_k and top_p without a sort. The floor reads the logits once, as fast as a large copy does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.measuring import MISSING, RESULTS, Table, compare, number, publish, stamp
from compile_attn.sampling import Sampling, SamplingRows, sample

VOCAB, ROWS, CALLS = 128256, (1, 32, 256), 8
KINDS = {
    "greedy": None,
    "random": Sampling(temperature=1.0),
    "top_k 50, top_p 0.9": Sampling(temperature=1.0, top_k=50, top_p=0.9),
    "top_p 0.9": Sampling(temperature=1.0, top_p=0.9),
}
SIDES = ("ours", "torch", "flashinfer")
Call = Callable[[], Any]


def by_torch(logits: torch.Tensor) -> torch.Tensor:
    probs = logits.float().softmax(dim=-1)
    return probs.div_(torch.empty_like(probs).exponential_()).argmax(dim=-1)


def by_flashinfer(logits: torch.Tensor, how: Sampling) -> Call | None:
    try:
        from flashinfer import sampling as library
    except ImportError:
        return None

    def call() -> Any:
        probs = logits.float().softmax(dim=-1)
        if how.top_k is not None:
            return library.top_k_top_p_sampling_from_probs(probs, how.top_k, how.top_p, filter_apply_order="top_k_first")
        return library.sampling_from_probs(probs) if how.top_p == 1 else library.top_p_sampling_from_probs(probs, how.top_p)

    return call


def calls(logits: torch.Tensor, how: Sampling | None) -> dict[str, Call | None]:
    if how is None:
        return {"ours": lambda: sample(logits), "torch": lambda: logits.argmax(dim=-1)}
    rows = SamplingRows.of([how] * len(logits), [(seed, 0) for seed in range(len(logits))]).to(logits.device)
    plain = how.top_k is None and how.top_p == 1
    return {
        "ours": lambda: sample(logits, rows),
        "torch": (lambda: by_torch(logits)) if plain else None,
        "flashinfer": by_flashinfer(logits, how),
    }


def time_of(call: Call, device: torch.device) -> float | None:
    """Microseconds; None of what fails, as a library may lack a kernel for the device."""
    if device.type == "cuda":
        from bench.write_kv import microseconds

        try:
            return microseconds([call] * CALLS)
        except RuntimeError as error:
            print(f"not in a CUDA graph: {str(error).strip().splitlines()[:1]}")
    try:
        return compare({"": call}, device)[""]
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        print(f"not timed: {str(error).strip().splitlines()[:1]}")
        return None


def measure(device: torch.device, rows: Sequence[int] = ROWS, vocab: int = VOCAB) -> list[dict[str, Any]]:
    found = []
    for count in rows:
        for spread in (5.0, 1.0):
            made = torch.randn(count, vocab, generator=torch.Generator().manual_seed(count)) * spread
            logits = made.to(torch.bfloat16).to(device)
            for kind, how in KINDS.items():
                times = {name: None if call is None else time_of(call, device) for name, call in calls(logits, how).items()}
                found.append(
                    {
                        "rows": count,
                        "logits": "flat" if spread == 1 else "sharp",
                        "tokens": kind,
                        "us": times,
                        "bytes": logits.nbytes,
                    }
                )
    return found


def table(found: Sequence[dict[str, Any]], rate: float) -> Table:
    """`rate`: bytes a microsecond."""
    rows = [
        [
            str(one["rows"]),
            one["tokens"],
            one["logits"],
            *(number(one["us"].get(side)) for side in SIDES),
            number(one["bytes"] / rate),
        ]
        for one in found
    ]
    note = f"{MISSING}: it has none, or is not installed."
    return Table("Microseconds a call", ["rows", "tokens", "logits", *SIDES, "floor"], rows, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    from bench.write_kv import bandwidth

    device, rate = torch.device("cuda"), bandwidth()
    found = measure(device)
    publish("sampling", "Choosing the next tokens", [table(found, rate)], {"bandwidth": rate, "found": found}, stamp(device), out)


if __name__ == "__main__":
    main()

"""With which tiles is block-sparse attention fastest, and how far from what its density allows?

    python -m bench.tune_block_sparse [--only prefill | decode]

Prints a line a case, the fastest tiles first. What is chosen stands in `kernels/block_sparse.py` and `kernels/tiles.py`.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from bench.block_sparse import MOST, Case, batch_of, call, kernel_of, masks, microseconds, prepare
from compile_attn.kernels import hopper
from compile_attn.kernels import tiles as tile_rules
from compile_attn.kernels.block_sparse import BlocksparseFlashAttentionBackend
from compile_attn.kernels.mask import BlockSparse, Causal, Window
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.tiles import Tiles

CLOSE = 2**-6  # of outputs by different tiles: they are rounded to bfloat16
DENSITIES = 3  # the lowest
ALONE = tile_rules._KEYS_ALONE
hopper.ON = False  # its tiles are not what is chosen here


@dataclass(frozen=True)
class Variant:
    """Sizes of a tile; rows 0: as chosen."""

    rows: int = 0
    keys: int = 0
    warps: int = 0
    stages: int = 0
    registers: int = 0
    together: bool = True  # one loop over blocks with and without a mask
    alone: int = 0  # keys of a program a tile; 0: as chosen

    def __str__(self) -> str:
        sizes = "as chosen" if not self.rows else f"{self.rows}x{self.keys} w{self.warps} s{self.stages} r{self.registers}"
        return sizes + ("" if self.together else " apart") + (f" alone {self.alone}" if self.alone else "")


class Tuned(BlocksparseFlashAttentionBackend):
    """Cuts every call into tiles of one size."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def tiles(self, spec: AttentionSpec, dot: torch.dtype, tokens: int, shared: int, read: int) -> Tiles:
        found, it = super().tiles(spec, dot, tokens, shared, read), self.variant
        tile_rules._KEYS_ALONE = it.alone or ALONE  # read after this, when programs are counted
        if not it.rows:
            return replace(found, together=found.together and it.together)
        sizes = {"block_m": it.rows, "block_q": max(1, it.rows // found.group) if tokens > 1 else 1, "block_n": it.keys}
        works = {"warps": it.warps, "stages": it.stages, "registers": it.registers}
        return replace(found, **sizes, **works, together=it.together)  # type: ignore[arg-type]


PREFILL = [
    Variant(),
    Variant(together=False),
    Variant(128, 64, 8, 2, 128, together=False),  # before: products wait for each other, and nothing is fetched ahead
    Variant(128, 32, 8, 3, 128),
    Variant(128, 32, 4, 4),
    Variant(128, 64, 8, 3),
    Variant(64, 64, 4, 3),
    Variant(64, 32, 4, 3, 168),
    Variant(64, 32, 4, 2, 128),
]
ALIKE = [Variant(256, 32, 16, 4, 128), Variant(256, 32, 8, 3)]
DECODE = [
    Variant(),
    Variant(together=False),
    Variant(alone=2560),
    Variant(16, 64, 4, 2, 168),
    Variant(16, 32, 4, 4, 168),
    Variant(16, 32, 4, 6, 168, alone=2560),
]
# The first is `general` as it is: would it gain by one loop, or by smaller tiles?
DENSE = [Variant(128, 128, 8, 3, 0, False), Variant(128, 128, 8, 3), Variant(128, 32, 8, 4, 128), Variant(128, 32, 4, 4)]
DENSE_DECODE = [Variant(together=False), Variant(), Variant(16, 32, 4, 4, 168)]


def cases() -> Iterator[tuple[Case, list[Variant]]]:
    for batch, context, prefill in ((1, 8192, True), (1, 32768, True), (32, 8192, False), (32, 32768, False)):
        for step in (0, 1):
            variants = DECODE if not prefill else PREFILL + (ALIKE if step == 0 else [])
            for mask in list(masks(context, prefill, step))[: DENSITIES if context < 32768 else 2]:
                yield Case(batch, context, prefill, mask), variants
    yield Case(1, 8192, True, BlockSparse(64, 1, 2)), PREFILL + ALIKE
    yield Case(1, 8192, True, Window(1023)), PREFILL
    for batch, context in ((1, 2048), (1, 8192), (4, 4096)):
        yield Case(batch, context, True, Causal()), DENSE
    for batch, context in ((8, 8192), (32, 1024), (32, 8192)):
        yield Case(batch, context, False, Causal()), DENSE_DECODE


def main() -> None:
    import compile_attn.kernels.ops  # noqa: F401

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("prefill", "decode"))
    only = parser.parse_args().only
    work = [(case, variants) for case, variants in cases() if only in (None, "prefill" if case.prefill else "decode")]
    dense = {(case.batch, case.context, case.prefill): replace(case, mask=Causal()) for case, _ in work}
    tuned = {variant: Tuned(variant) for _, variants in work for variant in variants}
    usual = [(case, kernel_of(case)) for case in dense.values()]
    with contextlib.suppress(Exception):  # those that do not compile are told below
        prepare(usual + [(case, tuned[variant]) for case, variants in work for variant in variants])
    took = {case: microseconds(call(case, by)) for case, by in usual}
    for case, variants in work:
        found, expected = [], None
        for variant in variants:
            run = call(case, tuned[variant])
            try:
                out = run()
                expected = out if expected is None else expected
                torch.testing.assert_close(out, expected, atol=CLOSE, rtol=CLOSE)
                found.append((microseconds(run, rep=15), str(variant)))
            except Exception as error:  # one that does not fit is no candidate, and is told
                found.append((float("inf"), f"{variant}: {type(error).__name__} {str(error)[:60]!r}"))
        whole = took[dense[case.batch, case.context, case.prefill]]
        goal = MOST * case.density() * whole if isinstance(case.mask, BlockSparse) else whole
        print(f"{case.name()} {case.mask} dense {whole:.1f}, at most {goal:.1f}: ", end="")
        print(*(f"{us:.1f} ({name})" for us, name in sorted(found)), sep="  ", flush=True)
    batch_of.cache_clear()


if __name__ == "__main__":
    main()

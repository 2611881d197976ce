"""Does the bench of the general kernel change what it says it changes, and write down what it measured?"""

from __future__ import annotations

import torch

from bench import general as bench
from compile_attn.kernels import tiles, triton_launch
from compile_attn.kernels.spec import AttentionSpec


def test_a_variant_lasts_as_long_as_its_block() -> None:
    def chosen() -> tuple[int, int, int]:
        found = triton_launch.tiles_of(AttentionSpec(32, 8, 128, 128), torch.bfloat16, 2048, 227 << 10)
        return found.block_m, found.block_q, tiles._KEYS_A_PROGRAM

    before = chosen()
    with bench.tuned({"block_m": 64, "_KEYS_A_PROGRAM": 17}):
        assert chosen() == (64, 16, 17)
    assert chosen() == before


def test_every_knob_exists() -> None:
    fields = set(tiles.Tiles.__dataclass_fields__)
    for _, variants in bench.SWEEPS.values():
        assert {name for knobs in variants for name in knobs} <= fields | vars(tiles).keys()


def test_tables() -> None:
    line = {"case": "decode", "graph": 1e-5, "eager": 2e-5, "of floor": 0.5, "FlashInfer": 9e-6}
    table = bench.tables({"bytes a second": 4e12, "operations a second": 8e14, "table": [line]})[0]
    assert table.rows == [["decode", "10.0", "20.0", "–", "9.0", "50 %", "–"]]
    swept = {
        "decode": {"cases": ["a", "b"], "variants": [{"knobs": {}, "us": [1.0, None]}, {"knobs": {"stages": 2}, "us": [2.0, 3.0]}]}
    }
    assert bench.sweep_tables(swept)[0].rows == [["1.0", "–", "as chosen then"], ["2.0", "3.0", "stages=2"]]


def test_the_work_of_a_case() -> None:
    assert bench.decode(2, 100).bytes() == 2 * 100 * 8 * 128 * 2 * 2
    assert bench.prefill(1, 1000).operations() == 4 * 32 * 128 * 1000 * 500
    assert [bench.decode(1, keys).bound() for keys in (10, 257, 1024, 1025, 32_768)] == [256, 1024, 1024, 4096, 65_536]

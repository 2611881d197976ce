"""Does every tile of queries, and every block of its keys, find a program, whatever the batch holds? In Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from compile_attn.kernels import mask as m
from compile_attn.kernels import tiles, triton_launch
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import CAPTURED, SPECS
from tests.paged import paged_batch
from tests.test_general import FLOAT32, check_on_gpu, interpreted, on_gpu

MANY = [(3, 1), (0, 1), (0, 0), (40, 1), (2, 1), (0, 0), (0, 25), (7, 4), (1, 1), (30, 5), (0, 0)]


@pytest.fixture(params=[(0, 0), (1000, 0), (0, 10_000)], ids=["equal shares", "parts of tiles", "a program a tile"])
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each way of spreading tiles of few tokens over programs, with few keys a program."""
    parts, alone = request.param
    monkeypatch.setattr(tiles, "_PARTS_EACH", parts)
    monkeypatch.setattr(tiles, "_KEYS_ALONE", alone)
    monkeypatch.setattr(tiles, "_KEYS_A_PROGRAM", 8)
    triton_launch.forget()
    yield
    triton_launch.forget()


@interpreted
@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("name", sorted(SPECS.keys() - {"documents", "padding", "buckets"}))  # whose tensors are too short
def test_long_and_short_sequences(name: str) -> None:
    for sequences in ([(40, 1), (3, 1), (0, 1), (0, 0), (70, 1)], [(0, 9), (37, 1), (2, 1), (0, 0)]):
        batch = paged_batch(SPECS[name], sequences, page_size=8, pad_tokens=2)
        torch.testing.assert_close(batch.attend(CAPTURED, "general").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("name", ["gqa", "everything"])
def test_more_sequences_than_are_looked_through_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.language as tl

    from compile_attn.kernels import grid_triton

    monkeypatch.setattr(grid_triton, "SEQUENCES", tl.constexpr(4))
    for sequences in (MANY, [(keys, min(new, 1)) for keys, new in MANY]):
        batch = paged_batch(SPECS[name], sequences, page_size=8, pad_tokens=3)
        torch.testing.assert_close(batch.attend(CAPTURED, "general").double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("sequences", [[(5, 2), (0, 0)], [(0, 0), (0, 9), (0, 0)] + [(0, 0)] * 6, [(0, 0), (3, 1)]], ids=str)
def test_as_many_tokens_as_rows_need_not_be_one_each(sequences: list[tuple[int, int]]) -> None:
    batch = paged_batch(SPECS["gqa"], sequences)
    torch.testing.assert_close(batch.attend([], "general").double(), batch.expected([]), atol=FLOAT32, rtol=0)


@interpreted
@pytest.mark.parametrize("mask", [m.Causal(), m.Window(20), m.Window(150)], ids=str)
@pytest.mark.parametrize("programs", [1, 3, 7])
def test_equal_shares_of_very_different_sequences(mask: m.Mask, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share may begin and end inside a tile, hold several, or none."""
    monkeypatch.setattr(triton_launch, "_device", lambda device: (227 << 10, programs))
    monkeypatch.setattr(tiles, "_at_once", lambda *_: 1)
    monkeypatch.setattr(tiles, "_PARTS_EACH", 0)
    monkeypatch.setattr(tiles, "_KEYS_ALONE", 0)
    monkeypatch.setattr(tiles, "_KEYS_A_PROGRAM", 1)
    triton_launch.forget()
    batch = paged_batch(AttentionSpec(4, 2, 8, 8, mask, scale=0.9), [(170, 1), (0, 1), (0, 0), (65, 1), (31, 1)], page_size=16)
    found = batch.attend([], "general")
    triton_launch.forget()
    torch.testing.assert_close(found.double(), batch.expected([]), atol=FLOAT32, rtol=0)


def test_who_serves_which_sequences() -> None:
    spec = AttentionSpec(32, 8, 128, 128)

    def found(tokens: int, sequences: int, page_size: int = 16, keys: int = 4096) -> list[tuple[int, int, bool]]:
        size = tiles.Size(sequences, tokens, keys, page_size)
        spread = tiles.launches(tiles.tiles_of, spec, torch.bfloat16, size, 227 << 10, 0, 132)
        return [(each.tiles.block_m, each.few, each.programs > 0) for each in spread]

    assert found(32, 32) == [(16, 0, True)]
    assert found(32, 32, keys=1024) == found(16, 16, keys=128) == [(16, 0, False)]  # a program a tile: short, or too few to share
    assert found(1, 1) == [(16, 0, False)]  # so few parts of tiles that each has a program
    assert found(600, 32) == [(16, 4, True), (128, -4, False)]  # tokens alone, or up to four in a tile; and chunks
    assert found(600, 1) == [(128, 0, False)]
    assert found(2, 1) == [(16, 0, False)]
    assert found(1, 8, page_size=0) == [(16, 0, False)]


@interpreted
@pytest.mark.parametrize("name", ["gqa", "sinks"])
@pytest.mark.parametrize("sequence", [(0, 40), (9, 31), (0, 0)], ids=str)
def test_one_sequence_and_pad_tokens(name: str, sequence: tuple[int, int]) -> None:
    batch = paged_batch(SPECS[name], [sequence], pad_tokens=17)
    found = batch.attend(CAPTURED, "general")
    torch.testing.assert_close(found.double(), batch.expected(CAPTURED), atol=FLOAT32, rtol=0)
    assert not found[sequence[1] :].any()


@pytest.mark.gpu
@pytest.mark.usefixtures("spread")
@pytest.mark.parametrize("dim", [64, 128])
def test_calls_of_one_shape_on_a_gpu(dim: int) -> None:
    """From the second on they look for nothing, unless a tensor lies otherwise."""
    spec = AttentionSpec(8, 2, dim, dim, m.Window(1500), scale=dim**-0.5)
    for before, after in (([1, 2000, 63, 0], [700, 1, 5, 900]), ([4000, 3, 3, 3], [2, 2, 4000, 640])):
        for lengths, pads in itertools.product((before, after), (0, 3)):  # pads: single tokens are then a launch of their own
            batch = on_gpu(spec, [(length, 1) for length in lengths], torch.bfloat16, pad_tokens=pads)
            check_on_gpu(batch)
            shifted = torch.empty(*batch.q.shape[:2], dim + 3, dtype=torch.bfloat16, device="cuda")[..., 3:]
            batch.q = shifted.copy_(batch.q)
            check_on_gpu(batch)
        check_on_gpu(on_gpu(spec, [(before[1], 1), (after[3], 90), (0, 3), (17, 1)], torch.bfloat16))

"""Does every way of drawing tokens (torch, Triton in its interpreter, Triton on a GPU) draw the right one?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compile_attn.sampling import NOT_FINITE, Sampling, SamplingRows, mixed, sample, uniform
from tests.test_general import NO_TRITON, interpreted

WAYS = (
    pytest.param("torch", id="torch"),
    pytest.param("interpreter", marks=interpreted),
    pytest.param("cuda", marks=pytest.mark.gpu),
)
every_way = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of a logit far below the largest
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAST = 1 - 2**-53  # the largest number that is drawn
INF, NAN = torch.inf, torch.nan
SLACK = 4e-6  # of a probability: what sums of float32 weights may err


def drawn(way: str, logits: torch.Tensor, rows: SamplingRows, draws: Sequence[float] | None = None) -> list[int]:
    numbers = None if draws is None else torch.tensor(draws, dtype=torch.float64)
    if way == "torch":
        return sample(logits, rows, numbers).tolist()
    if way == "cuda":
        return sample(logits.cuda(), rows.to(torch.device("cuda")), None if numbers is None else numbers.cuda()).tolist()
    from compile_attn.kernels.draw_triton import draw

    return draw(logits, rows.tensors(), numbers, NOT_FINITE).tolist()


def one_way(way: str, logits: torch.Tensor, how: Sampling, draws: Sequence[float]) -> list[int]:
    """One row of logits, drawn from with each of the numbers."""
    rows = SamplingRows.of([how] * len(draws), [(0, 0)] * len(draws))
    return drawn(way, logits.expand(len(draws), -1), rows, draws)


def spread(count: int) -> list[float]:
    """Numbers at equal distances: what they draw is the distribution, to 1 / count."""
    return [(i + 0.5) / count for i in range(count)]


def probabilities(logits: torch.Tensor, how: Sampling, top_p: float) -> torch.Tensor:
    """By the definition: of the likeliest k, as few as reach the share, the lower id before the higher among equals."""
    weights = ((logits.double() - logits.double().max()) / how.temperature).exp()
    order = sorted(range(len(weights)), key=logits.double().neg().tolist().__getitem__)[: how.top_k]  # stable
    reached = weights[order].cumsum(0)
    count = len(order) if top_p >= 1 else int((reached - weights[order] < top_p * reached[-1]).sum())
    found = torch.zeros_like(weights)
    found[order[:count]] = weights[order[:count]]
    return found / found.sum()


def justified(logits: torch.Tensor, how: Sampling, number: float, token: int) -> bool:
    """Whether a number and a share no further off than rounding could be give the token."""
    for top_p in (how.top_p, how.top_p - SLACK, how.top_p + SLACK) if how.top_p < 1 else (1.0,):
        probs = probabilities(logits, how, top_p)
        after = float(probs[: token + 1].sum())
        if probs[token] > 0 and after - probs[token] - SLACK <= number <= after + SLACK:
            return True
    return False


def compare(way: str, logits: torch.Tensor, how: Sequence[Sampling], seed: int = 0) -> int:
    """How many tokens are not the reference's; each of them must be one of rounding."""
    draws = [(seed + row, row % 5) for row in range(len(how))]
    rows = SamplingRows.of(how, draws)
    numbers, expected = uniform(rows.seeds, rows.counts), sample(logits, rows).tolist()
    others = [
        (row, token) for row, (token, wanted) in enumerate(zip(drawn(way, logits, rows), expected, strict=True)) if token != wanted
    ]
    for row, token in others:
        assert how[row].temperature > 0 and justified(logits[row], how[row], float(numbers[row]), token), (
            how[row],
            token,
            expected[row],
        )
    return len(others)


def of_any_kind(count: int, vocab: int, generator: torch.Generator) -> list[Sampling]:
    def any_of(values: Sequence[float | int | None]) -> float | int | None:
        return values[int(torch.randint(len(values), (), generator=generator))]

    return [
        Sampling(
            temperature=any_of((0.0, 0.3, 1.0, 1.0, 2.5)) or 0.0,
            top_k=any_of((None, None, 1, 3, 20, vocab, 2 * vocab)),  # type: ignore[arg-type]
            top_p=any_of((1.0, 1.0, 0.9, 0.5, 0.05, 0.999999)) or 1.0,
        )
        for _ in range(count)
    ]


@interpreted
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 200), st.sampled_from(DTYPES), st.sampled_from((0.01, 1.0, 6.0)), st.integers(0, 2**31))
def test_any_row_in_the_interpreter(vocab: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(6, vocab, generator=generator) * scale).to(dtype)
    logits[torch.rand(6, vocab, generator=generator) < 0.1] = -INF
    compare("interpreter", logits, of_any_kind(6, vocab, generator), seed)


def small_tiles(patch: pytest.MonkeyPatch, room: int) -> None:
    """Rows of few logits fill several tiles, and may be too many to gather."""
    from compile_attn.kernels import draw_triton

    for name, value in (("_CHUNK", 32), ("_TILE", 32), ("_BLOCK", 4), ("_MOST_BLOCKS", 64), ("_ROOM", room)):
        patch.setattr(draw_triton, name, value)


@interpreted
@settings(max_examples=12, deadline=None)
@given(st.integers(30, 100), st.sampled_from(DTYPES), st.integers(0, 2**31), st.sampled_from((8, 30, 100)))
def test_many_tiles_in_the_interpreter(vocab: int, dtype: torch.dtype, seed: int, room: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, vocab, generator=generator) * 2).to(dtype)
    logits[::2] = (logits[::2] * 2).round() / 2  # many equals
    with pytest.MonkeyPatch.context() as patch:
        small_tiles(patch, room)
        compare("interpreter", logits, of_any_kind(4, vocab, generator), seed)


@interpreted
@pytest.mark.parametrize("room", [8, 100])
def test_equals_in_many_tiles(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, room)
    logits = torch.zeros(90, dtype=torch.bfloat16)
    logits[80], logits[85] = 0.125, -INF
    for how in (Sampling(temperature=1e9, top_k=51), Sampling(temperature=1e9, top_k=85, top_p=0.6)):
        assert one_way("interpreter", logits, how, [0.0, 0.5, LAST]) == [0, 25, 80]


@interpreted
def test_hundreds_of_draws_in_the_interpreter() -> None:
    logits = torch.randn(1, 120, generator=torch.Generator().manual_seed(1)) * 3
    assert compare("interpreter", logits.expand(200, -1), [Sampling(temperature=1.0)] * 200) == 0
    assert compare("interpreter", logits.expand(20, -1), [Sampling(temperature=0.7, top_k=30, top_p=0.95)] * 20) == 0


@every_way
@pytest.mark.parametrize(
    "how",
    [
        Sampling(temperature=0.8),
        Sampling(temperature=1.3, top_k=5),
        Sampling(temperature=1.0, top_p=0.83),
        Sampling(temperature=2.0, top_k=7, top_p=0.71),
    ],
    ids=str,
)
def test_the_distribution(way: str, how: Sampling) -> None:
    """By evenly spread numbers, to their distance; by those of seeds, to a chi-square of one in a million."""
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.0, -3.0, 1.4, 0.9, 1.8])
    expected = probabilities(logits, how, how.top_p)
    count = 25 if way == "interpreter" else 4000
    found = torch.bincount(torch.tensor(one_way(way, logits, how, spread(count))), minlength=9) / count
    assert (found - expected).abs().max() <= 1 / count
    if way == "interpreter":
        return  # too slow for so many; that its numbers are those of the seeds is tested below
    rows = SamplingRows.of([how] * count, [(seed // 4, seed % 4) for seed in range(count)])
    found = torch.bincount(torch.tensor(drawn(way, logits.expand(count, -1), rows)), minlength=9)
    there = expected > 0
    assert found[~there].sum() == 0
    chi = ((found - count * expected)[there] ** 2 / (count * expected[there])).sum()
    degrees = int(there.sum()) - 1
    assert torch.special.gammainc(torch.tensor(degrees / 2), chi / 2) < 1 - 1e-6


@every_way
def test_numbers_come_from_seed_and_count_alone(way: str) -> None:
    logits = torch.zeros(6, 1000)
    rows = SamplingRows.of([Sampling(temperature=1.0)] * 6, [(0, 0), (0, 1), (2**70 + 3, 5), (7, 10**6), (8, 0), (0, 0)])
    expected = [int(number * 1000) for number in uniform(rows.seeds, rows.counts).tolist()]
    assert drawn(way, logits, rows) == expected and mixed(0) != mixed(8)
    assert drawn(way, logits[:1], rows.first(1)) == expected[:1]


@every_way
def test_of_equals_the_lower_ids_are_kept(way: str) -> None:
    for vocab in (10, 300):
        assert set(one_way(way, torch.zeros(vocab), Sampling(temperature=1.0, top_k=7), spread(7))) == set(range(7))
        assert one_way(way, torch.zeros(vocab), Sampling(temperature=1.0, top_p=0.5), [0.0, LAST]) == [0, vocab // 2 - 1]
    logits = torch.tensor([1.0, 0.0, -0.0, 2.0, 0.0, 1.0, -0.0, 0.0])
    assert set(one_way(way, logits, Sampling(temperature=9.0, top_k=5), spread(5))) == {0, 1, 2, 3, 5}
    assert set(one_way(way, -logits, Sampling(temperature=9.0, top_k=4), spread(5))) == {1, 2, 4, 6}
    assert set(one_way(way, logits, Sampling(temperature=9.0, top_k=5, top_p=0.7), spread(5))) == {0, 1, 3, 5}
    for number in (0.0, 0.5, LAST):
        assert one_way(way, logits.roll(2).repeat(9), Sampling(temperature=5.0, top_k=1), [number]) == [5]


@every_way
def test_masked_tokens_are_never_drawn(way: str) -> None:
    logits = torch.full((300,), -INF)
    kinds = [(None, 1.0), (50, 1.0), (2, 1.0), (None, 0.4), (None, 0.99999999)]
    for alive in ([0], [77], [299], [1, 64, 298], [63, 64, 128]):
        logits[:] = -INF
        logits[alive] = torch.tensor([-5.0, 0.5, 0.25])[: len(alive)]
        for top_k, top_p in kinds:
            how = Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
            assert set(one_way(way, logits, how, [0.0, 0.3, LAST])) <= set(alive)
        assert one_way(way, logits, Sampling(temperature=3.0), [0.0, LAST]) == [alive[0], alive[-1]]


@every_way
def test_temperatures_from_tiny_to_huge(way: str) -> None:
    logits = torch.linspace(-4, 4, 200).roll(50)
    for how in (Sampling(temperature=1e-30, top_p=0.9), Sampling(temperature=1e-300), Sampling(temperature=1e-6, top_k=9)):
        assert one_way(way, logits, how, [0.0, 0.5, LAST]) == [49] * 3
    for temperature in (1e6, 1e30, 1e300):  # all are equally likely, and top_k takes the likeliest all the same
        assert one_way(way, logits, Sampling(temperature=temperature), [0.0, 0.5025, LAST]) == [0, 100, 199]
        assert set(one_way(way, logits, Sampling(temperature=temperature, top_k=3), spread(9))) == {47, 48, 49}


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusable_rows_are_marked_and_alone(way: str, dtype: torch.dtype) -> None:
    logits = torch.randn(8, 130, generator=torch.Generator().manual_seed(2)).to(dtype)
    for how in (of_any_kind(8, 130, torch.Generator().manual_seed(7)), [Sampling(temperature=1.0)] * 8, [Sampling()] * 8):
        rows, usable = SamplingRows.of(how, [(3, 1)] * 8), logits.clone()
        expected = drawn(way, usable, rows)
        usable[1, 5], usable[3], usable[5, 129], usable[6, 0], usable[6, 1] = NAN, -INF, INF, INF, -INF
        for row in (1, 3, 5, 6):
            expected[row] = NOT_FINITE
        assert drawn(way, usable, rows) == expected


@every_way
def test_any_strides_and_padding_rows(way: str) -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5, 333, generator=generator)
    how = of_any_kind(3, 333, generator) + [Sampling()] * 2  # the last stand for nobody
    rows = SamplingRows.of(how, [(9, n) for n in range(5)])
    expected = drawn(way, logits, rows)
    assert expected[3:] == logits[3:].argmax(1).tolist()
    wide, tall, sparse = torch.full((5, 340), NAN), torch.empty(333, 5), torch.full((5, 666), NAN)
    wide[:, 7:], tall[:], sparse[:, ::2] = logits, logits.T, logits
    for other in (wide[:, 7:], tall.T, sparse[:, ::2]):
        assert drawn(way, other, rows) == expected
    for row in range(5):
        alone = SamplingRows(*(each[row : row + 1] for each in rows.tensors()))
        assert drawn(way, logits[row : row + 1], alone) == expected[row : row + 1]
    assert drawn(way, logits[:0], rows.first(0)) == []


@pytest.mark.skipif(NO_TRITON, reason="no Triton for this platform")
def test_the_kernels_compile_for_an_h200() -> None:
    """The interpreter accepts what the compiler refuses; see tests/hopper_draw.py."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "tests.hopper_draw"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("registers") == 10


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 8192, 50257, 128256, 262_145])
def test_any_row_on_a_gpu(dtype: torch.dtype, vocab: int) -> None:
    """Sharp and flat rows: candidates that fill one tile, that are gathered, and that are too many for it."""
    generator = torch.Generator().manual_seed(vocab)
    for scale in (0.01, 1.0, 3.0, 10.0):
        logits = (torch.randn(48, vocab, generator=generator) * scale).to(dtype)
        logits[:, vocab // 2 : vocab // 2 + vocab // 9] = -INF
        others = compare("cuda", logits, of_any_kind(48, vocab, generator))
        assert others <= 2 or scale < 10  # of many tokens that are all unlikely, rounding takes the neighbour


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """One recording; other logits, parameters and seeds at every replay."""
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    logits, rows = torch.zeros(32, 5000, device=device, dtype=torch.bfloat16), SamplingRows.idle(32).to(device)
    sample(logits, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sample(logits, rows)
        rows.counts.add_(1)
    for seed in range(4):
        logits.copy_(torch.randn(32, 5000, generator=generator) * 4)
        how = SamplingRows.of(of_any_kind(32, 5000, generator), [(seed, row) for row in range(32)])
        for old, new in zip(rows.tensors(), how.tensors(), strict=True):
            old.copy_(new)
        for step in range(2):
            graph.replay()
            again = SamplingRows(how.temperature, how.top_k, how.top_p, how.seeds, how.counts + step)
            expected = sample(logits.cpu(), again)
            assert (found.cpu() != expected).sum() <= 1

"""Are tokens drawn from the right distribution, and the same ones every time?"""

from __future__ import annotations

import pytest
import torch

from compile_attn.sampling import NOT_FINITE, Sampling, SamplingRows, draw_seed, mixed, uniform
from compile_attn.sampling import sample as sample_rows

MASK = 2**64 - 1


def sample(logits: torch.Tensor, how: list[Sampling], draws: list[float]) -> torch.Tensor:
    rows = SamplingRows.of(how, [(0, 0)] * len(how))
    return sample_rows(logits, rows, torch.tensor(draws, dtype=torch.float64))


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def by_hand(seed: int, count: int) -> float:
    """SplitMix64 in whole numbers of any size."""
    return (mix((mix(seed & MASK) + (count + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2.0**53


def counts(logits: torch.Tensor, how: Sampling, draws: int = 4000) -> torch.Tensor:
    """How often each token is drawn at evenly spread numbers: the distribution, to 1/draws."""
    rows = logits.expand(draws, -1)
    tokens = sample(rows, [how] * draws, [(i + 0.5) / draws for i in range(draws)])
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def test_greedy_is_the_first_maximum() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 4.0, 5.0, 1.0]])
    assert sample(logits, [Sampling()] * 2, [0.0, 0.0]).tolist() == sample_rows(logits).tolist() == [1, 0]


def test_temperature_scales_the_distribution() -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for temperature in (0.3, 1.0, 2.5):
        want = (logits / temperature).softmax(0)
        assert (counts(logits, Sampling(temperature=temperature)) - want).abs().max() < 2 / 4000


def test_tiny_temperature_is_greedy() -> None:
    logits = torch.tensor([[1.0, 1.5, 1.4]])
    assert sample(logits, [Sampling(temperature=1e-30)], [0.999]).tolist() == [1]


def test_top_k_keeps_k_and_renormalises() -> None:
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0])
    want = torch.tensor([0.0, 2.0, 1.0, 0.0]).exp() * torch.tensor([0.0, 1.0, 1.0, 0.0])
    got = counts(logits, Sampling(temperature=1.0, top_k=2))
    assert (got - want / want.sum()).abs().max() < 2 / 4000
    for all_of_them in (99, 2**63):
        assert counts(logits, Sampling(temperature=1.0, top_k=all_of_them)).count_nonzero() == 4


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.3, 0.1]).log()
    assert counts(logits, Sampling(temperature=1.0, top_p=0.5)).tolist() == [0, 1, 0, 0]
    assert counts(logits, Sampling(temperature=1.0, top_p=0.51)).nonzero().flatten().tolist() == [1, 2]
    assert counts(logits, Sampling(temperature=1.0, top_p=1e-9)).tolist() == [0, 1, 0, 0]
    # top_p counts what top_k left: 0.5 / 0.8 is more than 0.6
    assert counts(logits, Sampling(temperature=1.0, top_k=2, top_p=0.6)).tolist() == [0, 1, 0, 0]


def test_rows_do_not_touch_each_other() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 50, generator=generator)
    how = [
        Sampling(temperature=t, top_k=k, top_p=p)
        for t, k, p in (
            (0.0, None, 1.0),
            (1.0, None, 1.0),
            (0.7, 5, 1.0),
            (1.3, None, 0.6),
            (0.0, 3, 0.5),
            (2.0, 9, 0.9),
        )
    ]
    draws = torch.rand(6, generator=generator).tolist()
    together = sample(logits, how, draws).tolist()
    assert together == [int(sample(logits[i : i + 1], [how[i]], [draws[i]])) for i in range(6)]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for draw in (0.0, 0.5, 1 - 2**-53):
        assert int(sample(logits, [Sampling(temperature=1.0)], [draw])) in (0, 2)


def test_unusable_logits_are_marked() -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[0.0, nan], [-inf, -inf], [inf, 0.0], [1.0, 2.0]])
    for how in (Sampling(), Sampling(temperature=1.0)):
        assert sample(logits, [how] * 4, [0.3] * 4).tolist()[:3] == [NOT_FINITE] * 3


def test_uniform_is_uniform_and_fixed() -> None:
    seeds = torch.tensor([mixed(seed) for seed in range(50)]).repeat_interleave(100)
    numbers = uniform(seeds, torch.arange(100).repeat(50))
    assert numbers.min() >= 0 and numbers.max() < 1
    assert (torch.histc(numbers, 10, 0, 1) / 5000 - 0.1).abs().max() < 0.015  # 3.5 standard deviations of 1/10 in 5000
    pairs = torch.corrcoef(numbers.view(50, 100))
    assert (pairs - torch.eye(50)).abs().max() < 0.45  # 4.5 standard deviations of a correlation over 100 numbers
    assert numbers[0] == by_hand(0, 0) and numbers[107] == by_hand(1, 7) and numbers[0] != numbers[1] != numbers[100]
    assert uniform(torch.tensor([mixed(2**70 + 3)]), torch.tensor([5])).item() == by_hand(2**70 + 3, 5)


def test_seed_follows_torch() -> None:
    torch.manual_seed(3)
    first = draw_seed()
    torch.manual_seed(3)
    assert draw_seed() == first != draw_seed()


def test_stop_ids_become_a_tuple() -> None:
    assert Sampling(stop_ids=[3, 4]).stop_ids == (3, 4)  # type: ignore[arg-type]
    assert Sampling(stop_ids=3).stop_ids == (3,)  # type: ignore[arg-type]
    assert hash(Sampling()) == hash(Sampling())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 8192, 50257, 128256, 2_000_003])
def test_greedy_on_a_gpu_is_greedy_on_a_cpu(dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab)).to(dtype)
    logits[1, vocab // 2] = logits[1, -1] = 99.0  # the first of equals
    logits[2, vocab // 3] = torch.nan
    logits[3], logits[4, -1] = -torch.inf, torch.inf
    logits[5, : vocab // 2] = -torch.inf
    padded = torch.zeros(9, vocab + 3, dtype=dtype)
    padded[:, :vocab] = logits
    for given in (logits.cuda(), padded.cuda()[:, :vocab], logits.cuda()[:0]):
        assert sample_rows(given).tolist() == sample_rows(given.cpu()).tolist()
    assert sample_rows(logits.cuda()).tolist()[2:5] == [NOT_FINITE] * 3

"""Does FlashAttention get the right arguments, whichever provider is installed, and is what it gives right?

On the CPU a provider that does what FlashAttention's documentation says, in plain torch, stands for the installed ones.
tests/test_flash_attn_gpu.py asks the libraries themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import sympy
import torch

from compile_attn.kernels import flash_attn
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Request
from compile_attn.kernels.expr import H, Load
from compile_attn.kernels.flash_providers import Call, Provider
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import CAPTURED, SPECS, attend_row
from tests.paged import paged_batch
from tests.test_general import paged, stateless
from tests.test_reference import FLOAT32, MIXED

CUDA = torch.device("cuda")
DECODE = [(9, 1), (0, 1), (0, 0), (30, 1)]
SPECULATIVE = [(9, 3), (4, 0), (0, 1), (17, 0)]  # as many tokens as sequences, and no decode


class Emulated(Provider):
    """What the documentation says, row by row."""

    name, install = "emulated", "nothing"
    features = flash_attn.FlashAttnBackend.features

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def found(self) -> bool:
        return True

    def run(self, call: Call) -> torch.Tensor:
        self.calls.append(call)
        out = torch.full((*call.q.shape[:2], call.v.shape[-1]), torch.nan)
        starts = call.starts.tolist()
        assert starts == sorted(starts)
        for row, (begin, end) in enumerate(itertools.pairwise(starts)):
            assert end - begin <= call.most_queries
            if end > begin:
                k, v = self.keys(call, row)
                assert k.shape[0] <= call.most_keys
                out[begin:end] = self.row(call, call.q[begin:end], k, v)
        return out

    @staticmethod
    def keys(call: Call, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        if call.table is None:
            assert call.k_starts is not None
            span = slice(*call.k_starts[row : row + 2].tolist())
            return call.k[span], call.v[span]
        assert call.lengths is not None and call.rows is not None
        length, pages = call.lengths[row].item(), call.table[call.rows[row]]
        place = torch.arange(length)
        at = pages[place // call.k.shape[1]].long(), place % call.k.shape[1]
        return call.k[at], call.v[at]

    @staticmethod
    def row(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        score = torch.einsum("ihd,jhd->hij", q, k) * call.scale
        score = call.softcap * torch.tanh(score / call.softcap) if call.softcap else score
        distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0] - torch.arange(k.shape[0])
        if call.slopes is not None:
            score = score - call.slopes[:, None, None] * distance.abs()
        hidden = (distance > call.left) if call.left >= 0 else torch.zeros_like(distance, dtype=torch.bool)
        hidden = hidden | (distance < -call.right) if call.right >= 0 else hidden
        score = score.masked_fill(hidden, -torch.inf)
        if call.sinks is not None:
            score = torch.cat([score, call.sinks[:, None, None].expand(*score.shape[:2], 1)], -1)
        weights = torch.softmax(score, -1)[..., : k.shape[0]]
        return torch.einsum("hij,jhd->ihd", weights.nan_to_num(), v)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulated]:
    provider = Emulated()
    monkeypatch.setattr(flash_attn, "PROVIDERS", (provider,))
    flash_attn._first.cache_clear()
    monkeypatch.setattr(Emulated, "reasons", lambda self, request: ())
    yield provider
    flash_attn._first.cache_clear()


def asked(spec: AttentionSpec, page_size: int | None = 16, dtype: torch.dtype = torch.bfloat16) -> Request:
    return Request(spec, CUDA, dtype, page_size)


SERVED = [
    "causal",
    "gqa",
    "mqa, D != Dv",
    "window",
    "bidirectional",
    "softcap",
    "softcap, window, bias",
    "alibi of distance",
    "sinks",
]


def test_which_specs_are_served(emulated: Emulated) -> None:
    assert [name for name, spec in SPECS.items() if not backend("flash_attn").reasons(asked(spec))] == SERVED


@pytest.mark.parametrize(
    "sequences", [MIXED, DECODE, SPECULATIVE, [(3, 0), (0, 0)]], ids=["mixed", "decode", "speculative", "none"]
)
@pytest.mark.parametrize("name", SERVED)
def test_paged_equals_oracle(name: str, sequences: list[tuple[int, int]], emulated: Emulated) -> None:
    """Pads, whose queries are NaN, give 0."""
    for pad_tokens in (0, 1, 3):  # with one, DECODE has as many tokens as sequences
        batch = paged_batch(SPECS[name], sequences, pad_tokens=pad_tokens)
        if batch.q.numel():
            found = batch.attend(CAPTURED, "flash_attn").double()
            torch.testing.assert_close(found, batch.expected(CAPTURED), atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("lengths", [(12, 12), (5, 12), (12, 9)], ids=str)
@pytest.mark.parametrize("name", [name for name in SERVED if SPECS[name].bias is None])
def test_stateless_equals_oracle(name: str, lengths: tuple[int, int], emulated: Emulated) -> None:
    """Positions count from 0, also where there are fewer queries than keys, or more."""
    spec = SPECS[name]
    q, k, v = stateless(spec, *lengths)
    out = torch.ops.paged_attn.attention(q, k, v, list(CAPTURED), spec.encode(), "flash_attn")
    for b, i in ((0, 0), (0, 3), (1, 4), (1, lengths[0] - 1)):
        wanted = attend_row(spec, q[b, :, i], k[b].transpose(0, 1), v[b].transpose(0, 1), b, i, CAPTURED)
        torch.testing.assert_close(out[b, :, i].double(), wanted, atol=FLOAT32, rtol=0)


def test_nothing_to_do(emulated: Emulated) -> None:
    spec = SPECS["gqa"]
    batch = paged_batch(spec, [(3, 0), (0, 0)])
    assert backend("flash_attn").attend(batch.q, paged(batch), [], spec).shape == (0, 4, 8)
    q, k, v = stateless(spec, 3, 0)
    assert not backend("flash_attn").attention(q, k, v, [], spec).any()
    assert not emulated.calls


def test_queries_that_see_no_key_are_an_error(emulated: Emulated) -> None:
    q, k, v = stateless(SPECS["window"], 12, 7)
    with pytest.raises(ValueError, match="with 5 fewer keys than queries and causal, window of 5 keys, queries see no key"):
        backend("flash_attn").attention(q, k, v, [], SPECS["window"])


def test_pages_of_another_dtype_are_an_error(emulated: Emulated) -> None:
    batch = paged_batch(SPECS["gqa"], DECODE)
    batch.k_pages = batch.k_pages.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"reads pages of torch.float32, the dtype of the queries, not torch.float8_e4m3fn"):
        batch.attend([], "flash_attn")


def test_numbers_follow_from_shapes(emulated: Emulated) -> None:
    """What the host tells the provider: never a length."""
    spec = AttentionSpec(32, 8, 16, 16, scale=0.25)
    for sequences, pad_tokens, most_queries in ((DECODE, 1, 1), (SPECULATIVE, 0, 1), ([(9, 1), (0, 5)], 0, 6)):
        batch = paged_batch(spec, sequences, pad_tokens=pad_tokens)
        batch.attend([], "flash_attn")
        call = emulated.calls[-1]
        assert call.most_queries == most_queries
        assert call.most_keys == batch.metadata.block_table.shape[1] * 4
        assert (call.left, call.right, call.softcap, call.sinks, call.slopes, call.splits) == (-1, 0, 0.0, None, None, 1)


@pytest.mark.parametrize(
    ("tokens", "sequences", "keys", "spec", "splits"),
    [
        (8, 8, 131_072, AttentionSpec(32, 8, 128, 128), 17),  # a KV head has a share of the device
        (8, 8, 131_072, AttentionSpec(16, 1, 128, 128), 128),
        (8, 8, 131_072, AttentionSpec(32, 8, 128, 128, m.Window(1023)), 2),
        (8, 8, 4_096, AttentionSpec(32, 8, 128, 128), 8),
        (8, 8, 1_000, AttentionSpec(32, 8, 128, 128), 1),
        (512, 512, 131_072, AttentionSpec(32, 8, 128, 128), 16),  # by the memory that parts take
        (8192, 4, 131_072, AttentionSpec(32, 8, 128, 128), 1),
        (1000, 1000, 131_072, AttentionSpec(32, 8, 128, 128), 1),
    ],
)
def test_splits(tokens: int, sequences: int, keys: int, spec: AttentionSpec, splits: int) -> None:
    q = torch.empty((tokens, spec.num_q_heads, spec.head_dim), device="meta")
    assert flash_attn._splits(spec, q, sequences, keys) == splits


@pytest.mark.parametrize(
    ("sinks", "wanted"),
    [(Load(2, H), [0.5, -1.0, 2.0, 0.0]), (Load(4, 0, H, 0), [1.0, 2.0, 3.0, 4.0]), (0.25 * H + 1, [1.0, 1.25, 1.5, 1.75])],
    ids=str,
)
def test_sinks_become_a_vector(sinks: sympy.Expr, wanted: list[float], emulated: Emulated) -> None:
    spec = AttentionSpec(4, 2, 8, 8, sinks=sinks)
    batch = paged_batch(spec, DECODE)
    batch.attend([*CAPTURED, torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)], "flash_attn")
    found = emulated.calls[-1].sinks
    assert found is not None
    assert found.tolist() == wanted


def test_queries_are_aligned(emulated: Emulated) -> None:
    """Kernels read 16 bytes at a time: views of other strides are copied, others not."""
    batch = paged_batch(SPECS["gqa"], DECODE)
    wanted = batch.attend([], "flash_attn")
    wide, odd, across = torch.zeros(3, 8, 20), torch.zeros(3, 4, 9), torch.zeros(3, 8, 4).mT
    for view, copied in ((wide[:, 2:6, 4:12], False), (wide[:, 2:6, 1:9], True), (odd[..., :8], True), (across, True)):
        view.copy_(batch.q)
        batch.q = view
        assert torch.equal(batch.attend([], "flash_attn"), wanted)
        assert (emulated.calls[-1].q.data_ptr() != view.data_ptr()) == copied

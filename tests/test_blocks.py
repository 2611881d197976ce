"""Are whole pages moved, and only those, in as few copies as there can be?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compile_attn.kernels.ops  # noqa: F401
from compile_attn.kernels import blocks
from tests.test_general import interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
ALL = [*DTYPES, torch.float16, torch.float8_e5m2]
Move = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
# As on a CPU, and the two ways between a GPU and the host.
MOVES: list[tuple[Move, Move]] = [
    (torch.ops.paged_attn.swap_blocks, torch.ops.paged_attn.swap_blocks),
    (blocks.swap_out, blocks.swap_in),
]


def pool(dtype: torch.dtype, pages: int = 5) -> torch.Tensor:
    return torch.arange(pages * 2 * 3 * 4).view(pages, 2, 3, 4).remainder(97).to(dtype)


def raw(pages: torch.Tensor) -> torch.Tensor:
    return pages.contiguous().view(torch.uint8)


def filled(dtype: torch.dtype, *shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Any bytes, NaN among them."""
    make = torch.Generator().manual_seed(seed)
    last = shape[-1] * dtype.itemsize
    return torch.randint(256, (*shape[:-1], last), generator=make).to(torch.uint8).to(device).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swap_out_and_in_restores_the_pages(dtype: torch.dtype) -> None:
    device, host = pool(dtype), torch.zeros(3, 2, 3, 4).to(dtype)
    before = device.clone()
    torch.ops.paged_attn.swap_blocks(device, host, torch.tensor([[3, 0], [1, 2]]))
    assert torch.equal(host.float()[[0, 2]], before.float()[[3, 1]])
    assert not host[1].float().any()
    device.view(torch.uint8).fill_(0)
    torch.ops.paged_attn.swap_blocks(host, device, torch.tensor([[0, 3], [2, 1]]))
    assert torch.equal(device.float()[[1, 3]], before.float()[[1, 3]])
    assert not device.float()[[0, 2, 4]].any()


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(ALL), st.sampled_from(MOVES), st.integers(1, 9), st.integers(1, 9))
def test_any_pages_swapped_out_and_in_are_as_they_were(
    data: st.DataObject, dtype: torch.dtype, moves: tuple[Move, Move], ours: int, theirs: int
) -> None:
    """Byte for byte, into pages of others' choice both ways, and no other page is touched on either side."""
    there_and_back(data, dtype, moves, ours, theirs, "cpu")


def there_and_back(data: st.DataObject, dtype: torch.dtype, moves: tuple[Move, Move], ours: int, theirs: int, device: str) -> None:
    out, back = moves
    a, b = filled(dtype, ours, 2, 3, 5, device=device), filled(dtype, theirs, 2, 3, 5, seed=1)
    b = b if device == "cpu" else b.pin_memory()
    a_before, b_before = raw(a).clone(), raw(b).clone()
    count = data.draw(st.integers(0, min(ours, theirs)))
    sources, middles, targets = (
        torch.tensor(data.draw(st.permutations(range(size)))[:count], dtype=torch.int64) for size in (ours, theirs, ours)
    )
    as_bytes = [pages.view(torch.uint8) if dtype.itemsize == 1 else pages for pages in (a, b)]
    if count or out is not blocks.swap_out:
        out(*as_bytes, torch.stack([sources, middles], 1))
    if device == "cuda":
        torch.cuda.synchronize()
    expected = b_before.clone()
    expected[middles] = a_before[sources].cpu()
    assert torch.equal(raw(b), expected) and torch.equal(raw(a), a_before)
    if count or out is not blocks.swap_out:
        back(*as_bytes[::-1], torch.stack([middles, targets], 1))
    wanted = a_before.clone()
    wanted[targets] = a_before[sources]
    assert torch.equal(raw(a), wanted) and torch.equal(raw(b), expected)


@pytest.mark.parametrize("way", [blocks.swap_out, blocks.swap_in])
def test_pages_side_by_side_are_one_copy(way: Move, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their order in the pool on the device: 100 pages of 64 pools one by one would be 6400 copies."""
    copies: list[int] = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, *given, **how: copies.append(len(to)) or copy(to, *given, **how))
    device, host = torch.tensor([7, 2, 9, 4, 1]), torch.tensor([3, 4, 5, 0, 1])
    pairs = torch.stack([device, host] if way is blocks.swap_out else [host, device], 1)
    way(pool(torch.float32, 10), torch.zeros(10, 2, 3, 4), pairs)
    assert copies == [3, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12))
def test_runs_are_whole_and_in_order(pages: list[int]) -> None:
    runs = list(blocks._runs(torch.tensor(pages, dtype=torch.int64)))
    assert [page + i for _, page, count in runs for i in range(count)] == pages
    assert [begin for begin, _, _ in runs] == [sum(count for *_, count in runs[:at]) for at in range(len(runs))]
    assert all(page + count != after for (_, page, count), (_, after, _) in pairwise(runs)), "none could be joined"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_read_before_they_write(dtype: torch.dtype) -> None:
    k_pages, v_pages = [pool(dtype), pool(dtype)], [pool(dtype)]
    before = pool(dtype).float()
    torch.ops.paged_attn.copy_blocks(k_pages, v_pages, torch.tensor([[0, 1], [1, 4]]))
    for pages in (*k_pages, *v_pages):
        assert torch.equal(pages.float(), before[[0, 0, 2, 3, 1]])


def test_nothing_to_do() -> None:
    none = torch.empty(0, 2, dtype=torch.int64)
    torch.ops.paged_attn.copy_blocks([], [], none)
    torch.ops.paged_attn.copy_blocks([], [], torch.tensor([[0, 1]]))
    pages = pool(torch.float32)
    torch.ops.paged_attn.swap_blocks(pages, pages.clone(), none)
    torch.ops.paged_attn.copy_blocks([pages], [], none)
    assert torch.equal(pages, pool(torch.float32))


def test_bad_pairs_are_named() -> None:
    pages = pool(torch.float32)
    with pytest.raises(ValueError, match=r"pairs must be \[N, 2\] int64, not \[2\] torch.int64"):
        torch.ops.paged_attn.swap_blocks(pages, pages, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"no pages \[0, 5\] in pools of 5 and 5"):
        torch.ops.paged_attn.copy_blocks([pages], [], torch.tensor([[0, 5]]))
    with pytest.raises(ValueError, match=r"no pages \[0, 4\] in pools of 4 and 4"):
        torch.ops.paged_attn.copy_blocks([pages], [pool(torch.float32, 4)], torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match=r"no pages \[-1, 0\]"):
        torch.ops.paged_attn.swap_blocks(pages, pages, torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.paged_attn.swap_blocks(pages, pages.half(), torch.tensor([[0, 0]]))
    with pytest.raises(ValueError, match=r"a page is written twice by \[\[0, 2\], \[1, 2\]\]"):
        torch.ops.paged_attn.swap_blocks(pages, pages.clone(), torch.tensor([[0, 2], [1, 2]]))
    with pytest.raises(ValueError, match="swap_blocks: pairs on meta; the host reads them"):
        blocks.swap_blocks(pages, pages.clone(), torch.tensor([[0, 2]], device="meta"))
    assert torch.equal(pages, pool(torch.float32))


def one_launch(device: str) -> None:
    """Pools of other dtypes, heads and sizes, some of which nothing but bytes divides; several programs a page."""
    from compile_attn.kernels.blocks_triton import copy_pages

    for shapes in (
        [(torch.bfloat16, 4, 2, 8), (torch.bfloat16, 4, 2, 16)],
        [(torch.float32, 16, 8, 33), (torch.float8_e5m2, 1, 1, 5), (torch.float16, 3, 1, 7)],
        [(torch.float8_e4m3fn, 16, 4, 128)] * 5,
        [(torch.float32, 16, 8, 128), (torch.bfloat16, 16, 8, 64)],
    ):
        pools = [filled(dtype, 9, *sizes, seed=at, device=device) for at, (dtype, *sizes) in enumerate(shapes)]
        before = [raw(each).clone() for each in pools]
        copy_pages(pools, torch.tensor([[3, 8], [3, 1], [0, 2], [7, 6]]))
        for found, old in zip(pools, before, strict=True):
            assert torch.equal(raw(found), old[[0, 3, 0, 3, 4, 5, 7, 7, 3]])


@interpreted
def test_one_launch_copies_in_all_pools() -> None:
    one_launch("cpu")


@interpreted
@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(ALL), st.integers(1, 3))
def test_one_launch_equals_one_by_one(data: st.DataObject, dtype: torch.dtype, pools: int) -> None:
    from compile_attn.kernels.blocks_triton import copy_pages

    order = data.draw(st.permutations(range(8)))
    cut = data.draw(st.integers(1, 7))
    targets = order[cut:]
    pairs = torch.tensor([[data.draw(st.sampled_from(order[:cut])), target] for target in targets])
    ours, theirs = ([filled(dtype, 8, 2, at + 1, 3, seed=at) for at in range(pools)] for _ in range(2))
    copy_pages(ours, pairs)
    torch.ops.paged_attn.copy_blocks(theirs, [], pairs)
    assert all(torch.equal(raw(a), raw(b)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.gpu
def test_copies_on_a_gpu() -> None:
    one_launch("cuda")
    for pairs in (torch.tensor([[0, 1], [1, 4]]), torch.tensor([[0, 1], [1, 4]], device="cuda")):  # these need an order
        pages = pool(torch.bfloat16).cuda()
        torch.ops.paged_attn.copy_blocks([pages], [], pairs)
        assert torch.equal(pages.cpu(), pool(torch.bfloat16)[[0, 0, 2, 3, 1]])


@pytest.mark.gpu
def test_one_launch_on_a_gpu_does_not_wait() -> None:
    pools = [pool(torch.bfloat16).cuda() for _ in range(64)]
    pairs = torch.tensor([[0, 1], [2, 4]])
    torch.ops.paged_attn.copy_blocks(pools[:32], pools[32:], pairs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as seen:
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.ops.paged_attn.copy_blocks(pools[:32], pools[32:], pairs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    kernels = [event.name for event in seen.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in kernels if "Memcpy" not in name]) == 1, kernels
    assert all(torch.equal(pages.cpu(), pool(torch.bfloat16)[[0, 0, 2, 3, 2]]) for pages in pools)


@pytest.mark.gpu
@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(ALL), st.integers(1, 9), st.integers(1, 9))
def test_swapping_with_a_gpu(data: st.DataObject, dtype: torch.dtype, ours: int, theirs: int) -> None:
    there_and_back(data, dtype, MOVES[0], ours, theirs, "cuda")

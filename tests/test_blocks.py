"""Are whole pages moved, and only those?"""

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


def pool(dtype: torch.dtype, pages: int = 5) -> torch.Tensor:
    return torch.arange(pages * 2 * 3 * 4).view(pages, 2, 3, 4).remainder(97).to(dtype)


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
    with pytest.raises(ValueError, match=r"no pages \[-1, 0\]"):
        torch.ops.paged_attn.swap_blocks(pages, pages, torch.tensor([[-1, 0]]))
    with pytest.raises(ValueError, match="do not fit"):
        torch.ops.paged_attn.swap_blocks(pages, pages.half(), torch.tensor([[0, 0]]))

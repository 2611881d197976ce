"""Do keys and values reach their slots and nothing else, in torch and through Triton's interpreter?"""

import os
import subprocess
import sys

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401
from compile_attn.kernels.write_kv import write_kv
from tests.test_general import NO_TRITON, interpreted

SLOTS = torch.tensor([-1, 3, 15, 7, -1, 0, 2, 9])
SCALES = (None, torch.tensor(0.01), torch.tensor([0.01, 0.02, 0.5]))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def example(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """k and v with strides of a transpose, and pages of NaN; D != Dv."""
    make = torch.Generator().manual_seed(0)
    new = (torch.randn(3, 8, dim, generator=make).to(device).transpose(0, 1) * 3 for dim in (5, 6))
    k, v = (each.to(dtype) if dtype.itemsize > 1 else each for each in new)
    k_pages, v_pages = (torch.full((4, 4, 3, dim), torch.nan, device=device).to(dtype) for dim in (5, 6))
    return k, v, k_pages, v_pages


@pytest.mark.parametrize("scale", SCALES, ids=["none", "one", "per head"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_token_reaches_its_slot(dtype: torch.dtype, scale: torch.Tensor | None) -> None:
    k, v, k_pages, v_pages = example(dtype)
    torch.ops.paged_attn.write_kv(k, v, k_pages, v_pages, SLOTS, scale, scale)
    for new, pages in ((k, k_pages), (v, v_pages)):
        flat = pages.float().flatten(0, 1)
        for token, slot in enumerate(SLOTS.tolist()):
            if slot >= 0:
                expected = new[token].float() if scale is None else new[token].float() / scale.reshape(-1, 1)
                if dtype.itemsize == 1:
                    expected = expected.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
                assert torch.equal(flat[slot], expected.to(dtype).float())
        untouched = sorted(set(range(16)) - set(SLOTS.tolist()))
        assert flat[untouched].isnan().all()


def test_only_padding_writes_nothing() -> None:
    k, v, k_pages, v_pages = example(torch.float32)
    write_kv(k, v, k_pages, v_pages, torch.full((8,), -1))
    assert k_pages.isnan().all()
    assert v_pages.isnan().all()


def test_a_slot_beyond_the_pages_is_an_error() -> None:
    k, v, k_pages, v_pages = example(torch.float32)
    with pytest.raises(IndexError):
        write_kv(k, v, k_pages, v_pages, SLOTS + 1)


def test_shapes_that_do_not_fit() -> None:
    k, v, k_pages, v_pages = example(torch.float32)
    with pytest.raises(ValueError, match=r"k \[8, 3, 5\] does not fit \[4, 4, 3, 6\] and 8 slots"):
        write_kv(k, v, v_pages, v_pages, SLOTS)
    with pytest.raises(ValueError, match="and 3 slots"):
        write_kv(k, v, k_pages, v_pages, SLOTS[:3])
    with pytest.raises(ValueError, match="k_pages have strides"):
        write_kv(k, v, k_pages.transpose(0, 1), v_pages, SLOTS)


def numbers(exact: bool, *shape: int) -> torch.Tensor:
    """Random numbers, some beyond fp8; where asked, such as every dtype holds, as the interpreter rounds wrongly."""
    make = torch.Generator().manual_seed(len(shape) + shape[0])
    small = torch.randint(-7, 8, shape, generator=make).float() if exact else torch.randn(shape, generator=make)
    found = small * 2.0 ** torch.randint(-3, 4, shape, generator=make) * torch.where(small.round() == 1, 2.0**14, 1.0)
    return found if exact else found.index_fill(0, torch.tensor([0]), torch.nan)


def joined(tokens: int, heads: int, dim: int, dim_v: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v as slices of one projection of queries, keys and values: [T, (q | k | v)]."""
    whole = numbers(device == "cpu", tokens, 2 * heads * dim + heads * dim_v).to(dtype).to(device)
    k = whole[:, heads * dim : 2 * heads * dim].view(tokens, heads, dim)
    return k, whole[:, 2 * heads * dim :].view(tokens, heads, dim_v)


def compare(
    k: torch.Tensor,
    v: torch.Tensor,
    stored: torch.dtype,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    page_size: int = 4,
) -> None:
    """Triton's pages are torch's, bit for bit, where some slots are -1 and one is beyond the pages."""
    from compile_attn.kernels.write_kv_triton import write_pages

    tokens, heads, device = k.shape[0], k.shape[1], k.device
    count = -(-2 * tokens // page_size)
    slots = torch.randperm(count * page_size, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[1::5] = -1
    kept = slots.clone()
    slots[3:4], kept[3:4] = count * page_size, -1  # skipped: nothing can be raised from there
    ours, theirs = (
        [torch.full((count, page_size, heads, each.shape[2]), torch.nan).to(stored).to(at) for each in (k, v)]
        for at in (device, "cpu")
    )
    write_pages(k, v, ours[0], ours[1], slots.to(device), *(None if by is None else by.to(device) for by in scales))
    write_kv(k.cpu(), v.cpu(), theirs[0], theirs[1], kept, *scales)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=0, atol=0, equal_nan=True)


def any_dtype_and_scale(device: str) -> None:
    one, each = torch.tensor(0.25), torch.tensor([0.5, 2.0, 0.125])
    if device == "cuda":
        one, each = one * 0.3, each * 0.7
    for stored in DTYPES:
        for scales in ((None, None), (one, one), (each, one.view(1)), (None, each)):
            for dtype in (torch.float32, torch.bfloat16 if stored.itemsize == 1 else stored):
                k, v = joined(9, 3, 16, 24, dtype, device)
                compare(k, v, stored, scales)


def any_size(device: str) -> None:
    """Heads and channels that fill no tile, that need several; keys of a joined projection, values with the heads outside."""
    for heads, dim, dim_v in ((1, 8, 8), (1, 72, 40), (3, 80, 80), (8, 192, 128), (32, 64, 64), (1, 576, 512)):
        for tokens, page_size in ((1, 16), (7, 1), (33, 64)):
            k, v = joined(tokens, heads, dim, dim_v, torch.bfloat16, device)
            v = v.transpose(0, 1).contiguous().transpose(0, 1)
            compare(k, v, torch.bfloat16, (None, None), page_size)
            compare(k, v, torch.float8_e4m3fn, (2.0 ** -torch.arange(heads), torch.tensor([0.5])), page_size)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # numpy's, of what becomes infinite in float16
def test_triton_in_its_interpreter() -> None:
    any_dtype_and_scale("cpu")


@interpreted
def test_triton_in_its_interpreter_on_any_size() -> None:
    any_size("cpu")


@pytest.mark.gpu
def test_triton_on_a_gpu() -> None:
    any_dtype_and_scale("cuda")
    any_size("cuda")


@pytest.mark.skipif(NO_TRITON, reason="no Triton for this platform")
def test_the_kernels_of_a_step_compile_for_an_h200() -> None:
    """The interpreter accepts what the compiler refuses; see tests/hopper_step.py."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.hopper_step"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # 16 bytes an access: two reads and two writes of K and V, in the decode of a common model.
    assert "write, decode" in done.stdout and "; 4 vector accesses" in done.stdout.splitlines()[0], done.stdout
    assert "copy, pages of odd sizes:" in done.stdout


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    """One capture; other keys and other slots, pads among them, at every replay."""
    k, v = joined(8, 8, 128, 128, torch.bfloat16, "cuda")
    pages = [torch.zeros(4, 16, 8, 128, dtype=torch.float8_e4m3fn, device="cuda") for _ in range(2)]
    scales = [torch.tensor(0.05, device="cuda"), torch.tensor(0.1, device="cuda")]
    slots = torch.full((8,), -1, device="cuda")
    torch.ops.paged_attn.write_kv(k, v, *pages, slots, *scales)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.paged_attn.write_kv(k, v, *pages, slots, *scales)
    expected = [each.cpu() for each in pages]
    for seed in range(3):
        torch.manual_seed(seed)
        k.normal_()
        v.normal_()
        scales[0].mul_(1.5)  # a scale is read at the replay
        slots.copy_(torch.randperm(64)[:8] - 6 * seed)
        graph.replay()
        write_kv(k.cpu(), v.cpu(), *expected, slots.cpu(), *(scale.cpu() for scale in scales))
        for found, wanted in zip(pages, expected, strict=True):
            assert torch.equal(found.cpu().view(torch.uint8), wanted.view(torch.uint8))

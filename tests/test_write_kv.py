"""Do keys and values reach their slots and nothing else, in torch and through Triton's interpreter?"""

import os
import subprocess
import sys

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401
from compile_attn.kernels.write_kv import write_kv

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


def compare_with_triton(device: str) -> None:
    """Triton's pages against torch's, for every dtype and scale."""
    from compile_attn.kernels.write_kv_triton import write_pages

    for dtype in DTYPES:
        for scale in SCALES:
            k, v, k_pages, v_pages = example(dtype)
            beyond = SLOTS.clone()
            beyond[7] = 16  # not in these pages: skipped, as nothing can be raised from there
            there = [each.to(device) for each in (k, v, k_pages, v_pages)]
            by = None if scale is None else scale.to(device)
            write_pages(there[0], there[2], beyond.to(device), by)
            write_pages(there[1], there[3], beyond.to(device), by)
            kept = SLOTS.clone()
            kept[7] = -1
            write_kv(k, v, k_pages, v_pages, kept, scale, scale)
            for found, expected in ((there[2].cpu(), k_pages), (there[3].cpu(), v_pages)):
                # The interpreter rounds bf16 and fp8 towards zero: one unit in the last place, at most 2^-mantissa.
                unit = {2: 2**-7, 1: 2**-2}.get(dtype.itemsize, 0.0) if device == "cpu" else 0.0
                torch.testing.assert_close(found.float(), expected.float(), rtol=unit, atol=0.0, equal_nan=True)


def test_triton_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    command = "from tests.test_write_kv import compare_with_triton; compare_with_triton('cpu')"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_triton_on_a_gpu() -> None:
    compare_with_triton("cuda")

"""Do kernels answer to the names that serving frameworks have for them?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.kernels.backend import FP8, Backend, Request
from compile_attn.kernels.block_sparse import BlocksparseFlashAttentionBackend
from compile_attn.kernels.flash_attn import FlashAttentionBackend
from compile_attn.kernels.flash_providers import PROVIDERS
from compile_attn.kernels.flashinfer import FlashInferBackend, get_fp8_dtype_for_flashinfer
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.select import backend, choose, known_kernels
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.options import Options
from tests.paged import paged_batch

NAMED: dict[str, type[Backend]] = {
    "FLASH_ATTN": FlashAttentionBackend,
    "FLASHINFER": FlashInferBackend,
    "BLOCK_SPARSE": BlocksparseFlashAttentionBackend,
}
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", NAMED)
def test_names_and_classes(name: str) -> None:
    named = NAMED[name]
    assert named.get_name() == name and type(backend(name)) is named.get_impl_cls() is named
    assert backend(name) is backend(name.lower()), "one instance, so that plans are found again"
    assert named.get_metadata_cls() is AttentionMetadata and named.get_builder_cls() is AttentionMetadataBuilder


def test_a_kernel_is_asked_for_in_either_case() -> None:
    spec = AttentionSpec(2, 1, 8, 8)
    small, large = (choose(spec, torch.device("cpu"), torch.float32, 4, kernel) for kernel in ("reference", "REFERENCE"))
    assert small == large and large.kernel == "reference"
    assert choose(spec, torch.device("cpu"), torch.float32, 4, "AUTO") == choose(spec, torch.device("cpu"), torch.float32, 4)
    assert backend("FLASH_ATTN|General") is backend("flash_attn|general")
    assert Options(kernel="FLASH_ATTN|GENERAL").kernel.lower() == "flash_attn|general"
    with pytest.raises(ValueError, match="unknown kernel 'xformers'"):
        backend("XFORMERS")


def test_head_sizes() -> None:
    assert FlashAttentionBackend.get_supported_head_sizes() == list(range(8, 257, 8))
    assert {32, 64, 96, 128, 160, 192, 224, 256} <= set(FlashAttentionBackend.get_supported_head_sizes())
    assert FlashInferBackend.get_supported_head_sizes() == [64, 128, 256]
    assert BlocksparseFlashAttentionBackend.get_supported_head_sizes() == []


@pytest.mark.parametrize("size", [7, 8, 12, 32, 100, 128, 256, 257, 264])
def test_head_sizes_are_what_is_served(size: int) -> None:
    request = Request(AttentionSpec(4, 4, size, size), CUDA, torch.bfloat16, 256)
    served = any(not [why for why in provider.reasons(request) if "head size" in why] for provider in PROVIDERS)
    assert served == (size in FlashAttentionBackend.get_supported_head_sizes())
    refused = [why for why in backend("flashinfer").reasons(request) if "head size" in why]
    assert bool(refused) == (size not in FlashInferBackend.get_supported_head_sizes())


@pytest.mark.parametrize("name", known_kernels())
def test_one_cache_shape_for_all(name: str) -> None:
    shape = backend(name).get_kv_cache_shape(7, 16, 2, 8)
    assert shape == (2, 7, 16, 2, 8)
    for wrong in ((0, 16, 2, 8), (7, 0, 2, 8), (7, 16, 0, 8), (7, 16, 2, -1)):
        with pytest.raises(ValueError, match=r"no cache of \(num_blocks, .*; each is at least 1"):
            backend(name).get_kv_cache_shape(*wrong)


def test_a_cache_of_that_shape_is_written_and_read() -> None:
    batch = paged_batch(AttentionSpec(4, 2, 8, 8, scale=0.3), [(3, 5), (17, 1)], page_size=16)
    cache = torch.full(FlashAttentionBackend.get_kv_cache_shape(batch.k_pages.shape[0], 16, 2, 8), torch.nan)
    at = batch.metadata
    written = AttentionMetadata.build(at.block_table, at.seq_lens, at.seq_lens, int(at.seq_lens.sum()), 16)
    torch.ops.paged_attn.write_kv(torch.cat(batch.k), torch.cat(batch.v), cache[0], cache[1], written.slot_mapping)
    expected, (batch.k_pages, batch.v_pages) = batch.attend([]), cache
    assert torch.equal(batch.attend([]), expected)


def cache_of(blocks: int, dtype: torch.dtype, form: str) -> Any:
    """Page p of keys holds p, of values 8 + p: numbers that fp8 has."""
    pools = [torch.arange(first, first + blocks).to(dtype).view(-1, 1, 1, 1).expand(-1, 16, 2, 8) for first in (0, 8)]
    return torch.stack(pools) if form == "tensor" else tuple(pool.contiguous() for pool in pools)


def pages_of(cache: Any) -> list[list[float]]:
    """The number in each page, which is whole."""
    for pool in cache:
        assert all(page.float().unique().numel() == 1 for page in pool)
    return [pool.float()[:, 0, 0, 0].tolist() for pool in cache]


@pytest.mark.parametrize("form", ["tensor", "pair"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", known_kernels())
def test_whole_pages_are_swapped_and_copied(name: str, dtype: torch.dtype, form: str) -> None:
    """Of 4 pages, number 3 alone: where pages lay along the first axis, half of each of two others moved."""
    run, source = backend(name), cache_of(4, dtype, form)
    target = tuple(torch.zeros_like(pool) for pool in source) if form == "pair" else torch.zeros_like(source)
    run.swap_blocks(source, target, torch.tensor([[3, 3]]))
    assert pages_of(target) == [[0, 0, 0, 3], [0, 0, 0, 11]]
    layers = [cache_of(4, torch.float32, form), cache_of(4, torch.float32, form)]
    run.copy_blocks(layers, torch.tensor([[3, 0], [0, 1]]))
    assert [pages_of(layer) for layer in layers] == [[[3, 0, 2, 3], [11, 8, 10, 11]]] * 2
    run.copy_blocks([], torch.tensor([[3, 0]]))


@pytest.mark.parametrize("shape", [(4, 2, 16, 2, 8), (2, 16, 2, 8), (3, 16, 2, 8), (1, 2, 4, 16, 2, 8)], ids=str)
def test_another_layout_is_refused(shape: tuple[int, ...]) -> None:
    wrong, right, pairs = torch.zeros(shape), torch.zeros(2, 4, 16, 2, 8), torch.tensor([[0, 1]])
    for caches in ((wrong, right), (right, wrong)):
        with pytest.raises(ValueError, match=r"a cache of \[.*\]; give \[2, P, PS, Hkv, D\], or the pages \[P, PS, Hkv, D\]"):
            FlashInferBackend.swap_blocks(*caches, pairs)
    with pytest.raises(ValueError, match="a cache of"):
        FlashInferBackend.copy_blocks([right, wrong], pairs)
    with pytest.raises(ValueError, match=r"a cache of \[\[4, 16, 2, 8\]\]; give"):
        FlashInferBackend.copy_blocks([[right[0]]], pairs)


def test_a_refused_swap_moves_nothing() -> None:
    """Values that do not fit are found before the first key moves."""
    source, target = cache_of(4, torch.float32, "pair"), tuple(torch.zeros(4, 16, 2, size) for size in (8, 6))
    with pytest.raises(ValueError, match=r"pages \[16, 2, 8\] of torch.float32 do not fit \[16, 2, 6\]"):
        FlashInferBackend.swap_blocks(source, target, torch.tensor([[1, 2]]))
    short = (torch.zeros(4, 16, 2, 8), torch.zeros(2, 16, 2, 8))
    with pytest.raises(ValueError, match=r"no pages \[1, 2\] in pools of 4 and 2"):
        FlashInferBackend.swap_blocks(source, short, torch.tensor([[1, 2]]))
    assert not any(pool.any() for pool in (*target, *short))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp8", torch.float8_e4m3fn), ("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)],
)
def test_names_of_fp8(name: str, dtype: torch.dtype) -> None:
    assert get_fp8_dtype_for_flashinfer(name) == dtype and dtype in FP8


@pytest.mark.parametrize("name", ["auto", "fp8_e3m4", "float16", ""])
def test_other_names_are_no_fp8(name: str) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_dtype='{name}' is no name of fp8; choose one of fp8, fp8_e4m3, fp8_e5m2"):
        get_fp8_dtype_for_flashinfer(name)


@pytest.mark.parametrize("sizes", [(4, 3, 8, 8), (2, 4, 8, 8), (0, 1, 8, 8), (4, 0, 8, 8), (4, 2, 0, 8), (4, 2, 8, -8)])
def test_heads_that_do_not_fit_each_other(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="each is at least 1, and query heads are a multiple of KV heads"):
        AttentionSpec(*sizes)
    text = AttentionSpec(4, 2, 8, 8).encode().replace("num_kv_heads=2", "num_kv_heads=3")
    with pytest.raises(ValueError, match="4 query heads on 3 KV heads, of sizes 8 and 8"):
        AttentionSpec.decode(text)

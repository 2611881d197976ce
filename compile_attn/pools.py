"""Which memory holds the keys and values of a model's attention sites?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from compile_attn.kernels.blocks import copy_blocks
from compile_attn.kv_dtype import Scales, check_site_dtype, fill_nan, fp8_of, read_kv_dtype, read_scales, scale_tensors

if TYPE_CHECKING:
    from compile_attn.passes.pipeline import LayerKV


class Pools:
    """Pages of K and of V for every attention site of one model, each [1 + pages, page_size, heads, dim]; page 0 is nobody's.

    kv_dtype, scales    as in PagedKVCache: kv_dtype, kv_scales
    poison              pages begin as NaN, not as zeros
    """

    def __init__(
        self, page_size: int, device: torch.device, kv_dtype: torch.dtype | str, scales: Scales | None, poison: bool
    ) -> None:
        self.page_size, self.device, self.poisoned = page_size, device, poison
        self.kv_dtype = read_kv_dtype(kv_dtype)
        self.fp8 = fp8_of(self.kv_dtype, device)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.k_scales: list[torch.Tensor] = []  # by site, where pages are fp8
        self.v_scales: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []  # what the paged graph takes after the step's inputs
        self._scales = read_scales(scales, self.fp8)
        self._bound: tuple[tuple[LayerKV, ...], object] | None = None

    def bind(self, layers: Sequence[LayerKV], owner: object, pages: int) -> None:
        """Make pages for each attention site of `owner`; once. The same owner may come again with equal layers."""
        asked = tuple(layers)
        if self._bound is not None:
            self._check_same(asked, owner)
            return
        self._check_layers(asked)
        if self.fp8 is not None:
            self.k_scales, self.v_scales = scale_tensors(self._scales, len(asked), self.device)
        self._make(asked, pages)
        self._bound = (asked, owner)

    def stored(self, layer: LayerKV) -> torch.dtype:
        """The dtype of a site's pages."""
        return self.fp8 or layer.dtype

    def remake(self, pages: int) -> None:
        """So many pages, empty, instead of those there are."""
        if self._bound is not None:
            self._make(self._bound[0], pages)

    def poison(self, pages: Sequence[int]) -> None:
        """Fill these pages with NaN."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for pool in (*self.k, *self.v):
            fill_nan(pool, index)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy the first page of each pair to the second, in every pool."""
        if pairs and self.k:
            copy_blocks(self.k, self.v, torch.tensor(pairs, dtype=torch.int64, device="cpu"))

    def drop(self) -> None:
        """Let go of the memory."""
        self.kept, self.k, self.v, self.k_scales, self.v_scales = [], [], [], [], []

    def _make(self, layers: tuple[LayerKV, ...], pages: int) -> None:
        self.kept, self.k, self.v = [], [], []  # the old ones go first: both may not fit
        self.k = [self._pool(pages, layer.num_kv_heads, layer.head_dim, layer) for layer in layers]
        self.v = [self._pool(pages, layer.num_kv_heads, layer.head_dim_v, layer) for layer in layers]
        sites = zip(self.k, self.v, *([self.k_scales, self.v_scales] if self.fp8 else []), strict=True)
        self.kept = [tensor for site in sites for tensor in site]

    def _pool(self, pages: int, heads: int, dim: int, layer: LayerKV) -> torch.Tensor:
        pool = torch.zeros((1 + pages, self.page_size, heads, dim), dtype=self.stored(layer), device=self.device)
        if self.poisoned:
            fill_nan(pool, torch.arange(len(pool), device=self.device))
        return pool

    def _check_same(self, layers: tuple[LayerKV, ...], owner: object) -> None:
        assert self._bound is not None
        held, first = self._bound
        if first != owner:
            raise ValueError(
                f"this cache already serves a model with {len(held)} attention sites, and a cache serves one model; "
                "make another PagedKVCache for the second one. If it is the first one with other weights, it has other Parameters, "
                "and so may be any model: keep those it had, and write into them, as load_state_dict does, or set their .data"
            )
        if held != layers:
            raise ValueError(
                f"this model was compiled with {len(held)} attention sites and now has {len(layers)}, or other heads "
                "or dtypes; the keys in the cache no longer fit it: make a new PagedKVCache after changing the model"
            )

    def _check_layers(self, layers: tuple[LayerKV, ...]) -> None:
        for at, layer in enumerate(layers):
            device = indexed(torch.device(layer.device))
            if device != self.device:
                raise ValueError(
                    f"attention site {at} of the model is on {device}, the cache on {self.device}; "
                    f"make it with PagedKVCache(device={str(device)!r}) or move the model"
                )
            check_site_dtype(at, layer.dtype, self.kv_dtype)


def indexed(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`, so that devices compare equal."""
    if device.type not in ("cpu", "meta") and device.index is None:
        return torch.device(device.type, torch.accelerator.current_device_index())
    return device

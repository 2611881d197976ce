"""In which dtype are keys and values kept, and by which scales?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from compile_attn.kernels.backend import FP8, FP8_NAMES

Scales = Sequence[tuple[float, float]]

WHOLE = (torch.float32, torch.bfloat16, torch.float16)  # as the model makes them
_NAMES = {**{str(dtype).removeprefix("torch."): dtype for dtype in WHOLE}, **FP8_NAMES}
_ALSO = {str(dtype).removeprefix("torch."): dtype for dtype in FP8}
_NAN = 0x7F  # a byte that is NaN in both formats of fp8


def read_kv_dtype(asked: torch.dtype | str) -> torch.dtype | None:
    """The dtype of pages; None for "auto", the model's own."""
    if asked == "auto":
        return None
    name = str(asked).removeprefix("torch.")
    found = _NAMES.get(name, _ALSO.get(name))
    if found is None:
        raise ValueError(f"kv_dtype={asked!r} is not supported; choose 'auto' or one of {', '.join(_NAMES)}")
    return found


def fp8_of(kv_dtype: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    """The kv_dtype where it is fp8 and the device can convert to it."""
    if kv_dtype not in FP8:
        return None
    if kv_dtype == torch.float8_e4m3fn and device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            raise ValueError(
                f"kv_dtype='fp8_e4m3' needs a GPU of compute capability 8.9, this one has {major}.{minor}; use kv_dtype='fp8_e5m2'"
            )
    return kv_dtype


def check_site_dtype(site: int, own: torch.dtype, kv_dtype: torch.dtype | None) -> None:
    """Refuse a model whose keys are of no dtype that can be kept, or of another than was asked for."""
    wanted = own if kv_dtype is None or kv_dtype in FP8 else kv_dtype
    if own != wanted or own not in WHOLE:
        raise ValueError(
            f"attention site {site} of the model has keys of {own}, the cache holds {wanted}; "
            f"supported are {', '.join(map(str, WHOLE))}: use kv_dtype='auto' or convert the model"
        )


def read_scales(scales: Scales | None, fp8: torch.dtype | None) -> Scales | None:
    """Scales as they were given, checked."""
    if scales is None:
        return None
    if fp8 is None:
        raise ValueError(
            f"kv_scales of {len(scales)} attention sites, but the cache is not fp8; pass kv_dtype='fp8_e4m3', or no kv_scales"
        )
    for site, pair in enumerate(scales):
        good = isinstance(pair, Sequence) and len(pair) == 2 and all(0 < _rounded(scale) < math.inf for scale in pair)
        if not good:
            raise ValueError(f"kv_scales[{site}]={pair!r}; give each attention site a pair of positive numbers, for K and for V")
    return scales


def _rounded(scale: float) -> float:
    """As it is kept."""
    return torch.tensor(scale, dtype=torch.float32).item()


def scale_tensors(scales: Scales | None, sites: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One float32 [] for the keys of each site, and one for the values; 1 where none were given."""
    pairs = [(1.0, 1.0)] * sites if scales is None else scales
    if len(pairs) != sites:
        raise ValueError(
            f"kv_scales holds {len(pairs)} pairs, the model has {sites} attention sites; give one pair (K, V) a site, in the "
            "order of lm.report.sites, as calibrate() does"
        )
    k_scales, v_scales = ([torch.tensor(pair[part], dtype=torch.float32, device=device) for pair in pairs] for part in (0, 1))
    return k_scales, v_scales


def fill_nan(pool: torch.Tensor, pages: torch.Tensor) -> None:
    """Make these pages NaN."""
    if pool.dtype in FP8:
        pool.view(torch.uint8).index_fill_(0, pages, _NAN)
    else:
        pool.index_fill_(0, pages, float("nan"))

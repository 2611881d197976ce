"""Which launches go to the kernel for Hopper, and how is it launched?

It serves the tiles of many tokens of `general` and `block_sparse` where all that it asks for is given: 16-bit numbers, a head
size that it has tiles for, whole pages in a block of keys or whole blocks in a page, and tensors that TMA can describe. Whatever
else comes goes to the kernel for every GPU, which computes the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.tiles import Launch, Size, Tiles
from compile_attn.kernels.visible import block_of

if TYPE_CHECKING:
    from compile_attn.kernels.general_triton import Batch

ON = True  # False: the kernel for every GPU takes all launches here, too
_DTYPES = (torch.float16, torch.bfloat16)
_DIMS = (64, 128)
_WIDTH = 64  # channels: 128 bytes, the widest row that TMA swizzles, and so that wgmma reads without conflicts
_SMALLEST_PAGE = 8  # tokens: as many rows as a swizzle repeats after
_ROWS = 64  # of a tile of the other kernel: with fewer, reading keys is what takes time
_LONG = 4096  # tokens of a sequence, of small heads: exponentials are then all that takes time, and the other kernel makes more
_KEPT = 1 << 10  # bytes of shared memory for barriers, and for sums over warps


@dataclass(frozen=True)
class Cut:
    """How the work of a program is cut."""

    rows: int = 64  # of a group of warps
    keys: int = 64  # of a block, at most
    groups: int = 2
    stages: int = 5  # slots for keys, and for values, at most
    q_stages: int = 2  # for queries
    registers: int = 224  # of a thread of the second group; what the others leave is the first group's
    few_registers: int = 56  # of a thread of the fetching warp
    part: int = _WIDTH  # channels of a box that TMA copies
    pages: int = 0  # of a block of keys
    box: int = 0  # tokens of a page's box


CUT = Cut()


@dataclass(frozen=True, eq=False)
class Prepared:
    """One launch as all calls of a shape make it. Equal to itself alone, so that it can be part of a key."""

    cut: Cut
    group: int
    kernel: Any
    grid: tuple[int, int, int]
    rest: tuple[Any, ...]  # of the arguments, behind those that differ from call to call
    options: dict[str, Any]

    def takes(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Can TMA describe these? Rows of 16 bytes at multiples of 16 bytes, numbered in 32 bits."""
        token, head, channel = q.stride()
        aligned = q.data_ptr() % 16 == 0 and token % 8 == 0 and head % 8 == 0 and channel == 1 and token > 0 and head > 0
        pools = all(each.is_contiguous() and each.data_ptr() % 16 == 0 and each.dtype == q.dtype for each in (k, v))
        return aligned and pools and 0 < k.shape[0] * k.shape[1] < 1 << 31

    def args(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, captured: tuple[Any, ...], out: torch.Tensor
    ) -> tuple[Any, ...]:
        cut, (pages, page_size, heads, dim) = self.cut, k.shape
        slots, row = pages * page_size, heads * dim
        queries = _described(q, [*q.shape], [*q.stride()], [cut.rows // self.group, self.group, cut.part])
        pools = (_described(each, [slots, row], [row, 1], [cut.box, cut.part]) for each in (k, v))
        numbers = batch.width, q.shape[0], batch.table.shape[0], slots
        return (queries, *pools, batch.table, batch.lengths, batch.starts, captured, out, *numbers, *self.rest)


def prepare(
    spec: AttentionSpec,
    launch: Launch,
    size: Size,
    limits: tuple[int, int],
    constants: Callable[[Tiles, Callable[[str], str]], tuple[Any, ...]],
) -> Prepared | None:
    """What takes the place of a launch, if it can be served here.

    limits: shared memory, and multiprocessors. `constants` makes, for tiles, the printed functions and the plan, given how their
    source is to be written.
    """
    tiles = launch.tiles
    cut = cut_of(spec, tiles, size.page_size, limits[0])
    if spec.head_dim < _DIMS[-1] and size.tokens_each() > _LONG:  # measured: 744 to 756 us for 8192 tokens, and 654 to 657
        return None
    if cut is None or launch.few > 0 or launch.in_parts or tiles.block_m < _ROWS or tiles.block_q == 1:
        return None
    rows = cut.groups * cut.rows
    tiles = replace(tiles, block_m=rows, block_q=rows // tiles.group, block_n=cut.keys)
    if size.blocks(tiles.block_q, launch.few) * spec.num_q_heads // tiles.group < limits[1]:
        return None  # some multiprocessors would have no tile
    return Prepared(cut, tiles.group, kernel().attend, (limits[1], 1, 1), (*constants(tiles, gluon), cut), {"num_warps": 4})


def cut_of(spec: AttentionSpec, tiles: Tiles, page_size: int, shared: int) -> Cut | None:
    """How tiles are cut; None where there are none for this."""
    dim, keys = spec.head_dim, min(CUT.keys, block_of(spec.mask) or CUT.keys)
    box = min(page_size, keys)
    if dim not in _DIMS or spec.head_dim_v != dim or tiles.dot not in _DTYPES:
        return None
    if box < _SMALLEST_PAGE or keys % box or page_size % box or CUT.rows % tiles.group:
        return None
    queries, block = CUT.q_stages * CUT.groups * CUT.rows * dim * 2, 2 * keys * dim * 2
    stages = min(CUT.stages, (shared - _KEPT - queries) // block)
    return None if stages < 2 else replace(CUT, keys=keys, stages=stages, pages=keys // box, box=box)


def gluon(source: str) -> str:
    """Printed Triton as Gluon: the same words in another module."""
    head = "import triton.experimental.gluon.language as tl\nfrom triton.experimental import gluon\n"
    return source.replace("import triton\nimport triton.language as tl", head).replace("@triton.jit", "@gluon.jit")


def kernel() -> Any:
    from compile_attn.kernels import hopper_triton

    return hopper_triton


@functools.cache
def available(device: torch.device) -> bool:
    """Is it a Hopper, and has Triton Gluon's words for one? It has since 3.6, but they are not yet promised to stay."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    try:
        kernel()
    except (ImportError, AttributeError):
        return False
    return tuple(map(int, version("triton").split(".")[:2])) >= (3, 6)


def _described(tensor: torch.Tensor, shape: list[int], strides: list[int], box: list[int]) -> Any:
    """For TMA, which copies a box of it at a time, and gives zeros where there is nothing. Encoded at every launch, by value."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(tensor, shape, strides, box, _layout(len(box), box[-1]))


@functools.cache
def _layout(rank: int, width: int) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=width * 2, element_bitwidth=16, rank=rank)

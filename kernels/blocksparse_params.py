"""By which block-sparse mask may a user narrow the attention of a model?

The parameters, and the signs of what follows from them, are those under which Phi-3-small's block-sparse attention is known
in vLLM. What they mean is one mask: prefill, chunks and decode are computed from its predicate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from compile_attn.kernels.evaluate import evaluator
from compile_attn.kernels.mask import BlockSparse

_WHOLE = ("max_seqlen", "num_heads", "num_kv_heads", "block_size", "local_blocks", "vert_stride", "tp_size", "total_num_kv_heads")


@dataclass(frozen=True)
class BlocksparseParams:
    """Each query sees the last blocks of keys, and every `vert_stride`-th block before them, which heads choose differently.

    max_seqlen          the longest sequence
    num_heads, num_kv_heads    of the model as it is compiled: those of one rank
    block_size          positions of a block, any number
    local_blocks        blocks that a query sees before it, its own counted
    vert_stride         of so many blocks further back it sees one; 1: all, which is causal attention
    homo_head           all heads see the same blocks
    homo_head_group     heads that share keys and values see the same blocks (`homo_head` wins)
    tp_size, tp_rank    over how many ranks the model's heads are spread, and which part this is
    total_num_kv_heads  of all ranks; default tp_size * num_kv_heads. Fewer where ranks hold copies of one KV head
    layers              which attention sites of the model, counted from 0, as its report lists them; default: all
    """

    max_seqlen: int
    num_heads: int
    num_kv_heads: int
    block_size: int
    local_blocks: int
    vert_stride: int
    homo_head: bool = False
    homo_head_group: bool = False
    tp_size: int = 1
    tp_rank: int = 0
    total_num_kv_heads: int | None = None
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("homo_head", "homo_head_group"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}={getattr(self, name)!r}; it is True or False")
        for name, least in {**dict.fromkeys(_WHOLE, 1), "tp_rank": 0}.items():
            value = getattr(self, name)
            if (type(value) is not int or value < least) and not (name == "total_num_kv_heads" and value is None):
                raise ValueError(f"{name}={value!r}; it must be a whole number of at least {least}")
        self._check_heads()
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, Sequence) else ()  # a list is as good
            if not layers or any(type(layer) is not int or layer < 0 for layer in layers):
                raise ValueError(f"layers={self.layers!r}; give numbers of attention sites, counted from 0, or None for all")
            object.__setattr__(self, "layers", layers)

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}")
        if self.tp_rank >= self.tp_size:
            raise ValueError(f"tp_rank={self.tp_rank}; ranks count from 0 to tp_size - 1 = {self.tp_size - 1}")
        total, held = self.kv_heads_of_all, self.tp_size * self.num_kv_heads
        copied = self.num_kv_heads == 1 and self.tp_size % total == 0
        if total != held and not copied:
            raise ValueError(
                f"total_num_kv_heads={total}, but {self.tp_size} ranks hold {self.num_kv_heads} each; it is {held}, or with one "
                f"on each rank a number that divides {self.tp_size}"
            )

    @property
    def kv_heads_of_all(self) -> int:
        """Different KV heads of all ranks."""
        return self.tp_size * self.num_kv_heads if self.total_num_kv_heads is None else self.total_num_kv_heads

    @property
    def heads_of_all(self) -> int:
        """Query heads of all ranks."""
        return self.tp_size * self.num_heads

    @property
    def active_head_range(self) -> tuple[int, int]:
        """This rank's first query head, and the one after its last, among those of all ranks."""
        return self.tp_rank * self.num_heads, (self.tp_rank + 1) * self.num_heads

    @property
    def head_sliding_step(self) -> int:
        """By so many blocks the vertical blocks of a head lie before those of the head before it; below 0: those of a KV head."""
        if self.homo_head:
            return 0
        heads = self.kv_heads_of_all if self.homo_head_group else self.heads_of_all
        step = max(1, self.vert_stride // heads)
        return -step if self.homo_head_group else step

    def mask(self) -> BlockSparse:
        """What a query of this rank's heads sees."""
        step = self.head_sliding_step
        if step == 0:
            return BlockSparse(self.block_size, self.local_blocks, self.vert_stride)
        group = self.heads_of_all // self.kv_heads_of_all if step < 0 else 1
        return BlockSparse(self.block_size, self.local_blocks, self.vert_stride, abs(step), self.active_head_range[0], group)

    def block_mask(self, rows: int) -> torch.Tensor:
        """Which blocks of keys the first `rows` blocks of queries see, for pictures and tests.

        bool, by head of this rank, block of queries, block of keys. Inside a block of its own a query sees keys up to itself.
        """
        starts = torch.arange(rows) * self.block_size  # what the first query of a block sees of the first key of another
        axes = {"h": torch.arange(self.num_heads)[:, None, None], "i": starts[:, None], "j": starts}
        return torch.as_tensor(evaluator(self.mask().predicate())(axes)).expand(self.num_heads, rows, rows)

"""What may a user ask of the backend?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from compile_attn.cache import PagedKVCache
    from compile_attn.kernels.blocksparse_params import BlocksparseParams

OnRejected = Literal["keep", "warn", "error"]
Inner = Literal["inductor", "eager"]


@dataclass(frozen=True)
class Options:
    """The options of `torch.compile(model, backend="paged_attn", options={...})`.

    kernel       "auto", or the name of one kernel for every site, or of several ("flash_attn|general"), of which each paged
                 step takes one by its shapes; a kernel that cannot serve a site is an error.
    on_rejected  what a stateless compilation does about attention it cannot rewrite: "keep" it silently in the report,
                 "warn" once (default), or raise ("error"). A paged compilation always raises.
    cache        a `PagedKVCache`: compile the paged form of the model. `Batch.rows` takes its logits.
    inner        "inductor" (default), or "eager": no inner compiler, for tests and debugging.
    merge_linears  linears that read one tensor become one; their weights become parts of one tensor, the model's parameters and
                 state_dict stay what they are. Default (None): with a cache yes, without one no.
    block_sparse  a `BlocksparseParams`: queries see no other keys than its mask shows them, which the model need not have been
                 written with. A model for which that cannot be done is an error, whatever on_rejected says, and so is one with
                 sums over tokens without a softmax, such as linear attention, unless `layers` says where the mask is meant. What
                 mixes tokens without one product over all of them (a cumulative sum, a loop, a convolution, a sum in parts) is not
                 seen as attention, and stays as it is. What torch runs eagerly (torch.compiler.set_stance) has no mask.
    """

    kernel: str = "auto"
    on_rejected: OnRejected = "warn"
    cache: PagedKVCache | None = None
    inner: Inner = "inductor"
    merge_linears: bool | None = None
    block_sparse: BlocksparseParams | None = None

    def __post_init__(self) -> None:
        _check_choice("on_rejected", self.on_rejected, get_args(OnRejected))
        _check_choice("inner", self.inner, get_args(Inner))
        if self.merge_linears not in (None, True, False):
            raise ValueError(f"paged_attn: merge_linears={self.merge_linears!r}; choose True, False, or None for the default")
        if self.block_sparse is not None:
            from compile_attn.kernels.blocksparse_params import BlocksparseParams

            if not isinstance(self.block_sparse, BlocksparseParams):
                raise ValueError(f"paged_attn: block_sparse={self.block_sparse!r}; give a compile_attn.BlocksparseParams")
        if self.kernel != "auto":
            from compile_attn.kernels.select import known_kernels
            from compile_attn.kernels.speeds import parts_of

            parts = parts_of(self.kernel)
            for part in parts:
                _check_choice("kernel", part, known_kernels() if len(parts) > 1 else ("auto", *known_kernels()))

    @property
    def merges(self) -> bool:
        """Whether linears are merged."""
        return self.cache is not None if self.merge_linears is None else self.merge_linears

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Options:
        """Options from torch.compile's dictionary; an unknown key is a ValueError that lists the known ones."""
        given = dict(options or {})
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"paged_attn: unknown option {', '.join(map(repr, unknown))}; known options are {', '.join(known)}")
        return cls(**given)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"paged_attn: {name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}")

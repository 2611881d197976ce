"""Which ops may stand in a graph? `torch.ops.paged_attn.*`: schemas that declare every mutation, and fakes.

Importing this module registers them. They run on any device; the kernel that an `attention` or `attend` node names does
the work. `captured` is None where native code of AOTInductor has an empty list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from compile_attn.kernels import batch, blocks
from compile_attn.kernels import write_kv as pages
from compile_attn.kernels.backend import DeviceStep, Paged, plan_size
from compile_attn.kernels.select import backend
from compile_attn.kernels.spec import AttentionSpec

_LIBRARY = torch.library.Library("paged_attn", "DEF")  # type: ignore[no-untyped-call]


def _op(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.split("(")[0]
        # needs_exact_strides: pages must reach the op as they lie, never as a restrided copy.
        _LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))  # type: ignore[no-untyped-call]
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"paged_attn::{name}", fake, lib=_LIBRARY)
        return function

    return register


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _attention_fake(q: Any, k: Any, v: Any, captured: Any, spec: str, kernel: str) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))  # type: ignore[no-any-return]


@_op("attention(Tensor q, Tensor k, Tensor v, Tensor[] captured, str spec, str kernel) -> Tensor", _attention_fake)
def attention(q: Any, k: Any, v: Any, captured: list[torch.Tensor] | None, spec: str, kernel: str) -> torch.Tensor:
    """Stateless: q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv] -> [B, Hq, Tq, Dv] contiguous."""
    return backend(kernel).attention(q, k, v, captured or [], AttentionSpec.decode(spec)).contiguous()


def _no_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Called in the forward when an input requires grad in grad mode: eagerly, and while autograd is traced."""
    raise RuntimeError(
        f"paged_attn::attention has no gradient (kernel={inputs[5]!r}), but an input requires grad; call the "
        f"model under torch.no_grad(), or compile it with options={{'kernel': 'sdpa'}} where its spec allows that"
    )


torch.library.register_autograd("paged_attn::attention", lambda ctx, grad: None, setup_context=_no_gradient, lib=_LIBRARY)


@_op("once(Tensor x) -> Tensor", lambda x: x.clone())
def once(x: Any) -> torch.Tensor:
    """x itself, to be kept where a compiler would compute it again at each use."""
    return x.clone()  # type: ignore[no-any-return]


def _metadata_fake(block_table: Any, seq_lens: Any, query_lens: Any, num_tokens: Any, page_size: int) -> tuple[Any, ...]:
    int32, int64 = torch.int32, torch.int64
    starts = seq_lens.new_empty((seq_lens.shape[0] + 1,), dtype=int32)
    return starts, *(seq_lens.new_empty((num_tokens,), dtype=dtype) for dtype in (int64, int64, int32))


@_op(
    "build_metadata(Tensor block_table, Tensor seq_lens, Tensor query_lens, SymInt num_tokens, int page_size) "
    "-> (Tensor cu_seqlens_q, Tensor positions, Tensor slot_mapping, Tensor token_seq)",
    _metadata_fake,
)
def build_metadata(block_table: Any, seq_lens: Any, query_lens: Any, num_tokens: int, page_size: int) -> tuple[Any, ...]:
    """See `metadata.AttentionMetadata`."""
    return batch.build_metadata(block_table, seq_lens, query_lens, num_tokens, page_size)


@_op(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    _nothing,
)
def write_kv(k: Any, v: Any, k_pages: Any, v_pages: Any, slots: Any, k_scale: Any = None, v_scale: Any = None) -> None:
    """See `write_kv.write_kv`."""
    pages.write_kv(k, v, k_pages, v_pages, slots, k_scale, v_scale)


def _plan_fake(
    table: Any,
    seq_lens: Any,
    starts: Any,
    at: Any,
    rows: Any,
    page_size: int,
    dtype: str,
    spec: str,
    kernel: str,
    numbers: Any = None,
) -> torch.Tensor:
    made = backend(kernel).plan_numbers if numbers is None else numbers
    return seq_lens.new_empty((plan_size(seq_lens.shape[0], made),), dtype=torch.int32)  # type: ignore[no-any-return]


@_op(
    "plan(Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, Tensor positions, Tensor token_seq, int page_size, "
    "str dtype, str spec, str kernel, int? numbers=None) -> Tensor",
    _plan_fake,
)
def plan(
    block_table: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    positions: Any,
    token_seq: Any,
    page_size: int,
    dtype: str,
    spec: str,
    kernel: str,
    numbers: int | None = None,
) -> torch.Tensor:
    """Once a step: what the kernel's `attend` needs of the batch and not of the layer. See `Backend.plan`.

    `dtype`: of queries, such as "bfloat16" (native code of torch 2.11 takes one ScalarType for another). `numbers`: the kernel's
    `plan_numbers` when a graph was made, so that a cache of compiled graphs holds none of another size.
    """
    run = backend(kernel)
    if numbers not in (None, run.plan_numbers):
        raise ValueError(f"this graph plans {numbers} numbers a sequence, kernel {kernel!r} {run.plan_numbers}; compile it again")
    step = DeviceStep(block_table, seq_lens, cu_seqlens_q, positions, token_seq, page_size, getattr(torch, dtype))
    return run.plan(step, AttentionSpec.decode(spec))


def _attend_fake(q: Any, k_pages: Any, v_pages: Any, *_: Any, **__: Any) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_pages.shape[3]))  # type: ignore[no-any-return]


@_op(
    "attend(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, "
    "Tensor positions, Tensor token_seq, Tensor[] captured, str spec, str kernel, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? plan=None) -> Tensor",
    _attend_fake,
)
def attend(
    q: Any,
    k_pages: Any,
    v_pages: Any,
    block_table: Any,
    seq_lens: Any,
    cu_seqlens_q: Any,
    positions: Any,
    token_seq: Any,
    captured: list[torch.Tensor] | None,
    spec: str,
    kernel: str,
    k_scale: Any = None,
    v_scale: Any = None,
    plan: Any = None,
) -> torch.Tensor:
    """Paged: q [T, Hq, D] -> [T, Hq, Dv] contiguous; query t stands at positions[t] of token_seq[t]; pads give 0.

    Pages are found by seq_lens, unasked: no row may be longer than the columns of its block table have room for, and all those that
    it fills are numbers of pages. `AttentionMetadata` sees to the first.
    """
    if not (k_pages.shape[0] and block_table.shape[1]):
        room = f"{k_pages.shape[0]} pages and a block table of {block_table.shape[1]}"
        raise ValueError(f"attend: {room} hold no keys; a profile run goes through attention(), on keys and values themselves")
    kv = Paged(k_pages, v_pages, block_table, seq_lens, cu_seqlens_q, positions, token_seq, k_scale, v_scale, plan)
    return backend(kernel).attend(q, kv, captured or [], AttentionSpec.decode(spec)).contiguous()


@_op(
    "advance_step(Tensor(a!) input_ids, Tensor(b!) position_ids, Tensor(c!) seq_lens, Tensor sampled, int? limit=None) -> ()",
    _nothing,
)
def advance_step(input_ids: Any, position_ids: Any, seq_lens: Any, sampled: Any, limit: int | None = None) -> None:
    """See `batch.advance_step`."""
    batch.advance_step(input_ids, position_ids, seq_lens, sampled, limit)


@_op("swap_blocks(Tensor src, Tensor(a!) dst, Tensor pairs) -> ()", _nothing)
def swap_blocks(src: Any, dst: Any, pairs: Any) -> None:
    """See `blocks.swap_blocks`."""
    blocks.swap_blocks(src, dst, pairs)


@_op("copy_blocks(Tensor(a!)[] k_pages, Tensor(b!)[] v_pages, Tensor pairs) -> ()", _nothing)
def copy_blocks(k_pages: Any, v_pages: Any, pairs: Any) -> None:
    """See `blocks.copy_blocks`."""
    blocks.copy_blocks(k_pages, v_pages, pairs)

"""Do the worked examples of three serving backends come out of the one metadata class? Each by torch and by Triton.

Numbers are theirs; where ours differ on purpose, the line says so. B rows, T tokens, page size PS as in `kernels/spec.py`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import partialmethod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.kernels import batch as in_torch
from compile_attn.kernels import mask as m
from compile_attn.kernels import metadata as home
from compile_attn.kernels.flashinfer_plans import Requests, parts
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.visible import FIRST, HEAD, LAST, LENGTH, spans
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from compile_attn.step import StepBuffers
from tests.test_batch import equal
from tests.test_general import interpreted
from tests.tiny import TinyDecoder, alone, as_on_a_gpu, prompts_of, tiny

Row = tuple[list[int], int, int]  # pages, tokens, and how many of them are new
Advance = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


@pytest.fixture(params=["torch", pytest.param("triton", marks=interpreted), pytest.param("gpu", marks=pytest.mark.gpu)])
def advance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Advance:
    """The advance by one token, by torch or by the kernels of GPUs, which then make all metadata too."""
    if request.param == "gpu":
        monkeypatch.setattr(AttentionMetadataBuilder, "build", partialmethod(AttentionMetadataBuilder.build, "cuda"))
    if request.param != "triton":
        return in_torch.advance_step
    from compile_attn.kernels import batch_triton

    monkeypatch.setattr(home, "build_metadata", batch_triton.build_metadata)
    return batch_triton.advance_step


def batch_of(rows: Sequence[Row], page_size: int, tokens: int | None = None, prefills: int = 0) -> AttentionMetadata:
    builder = AttentionMetadataBuilder(page_size, max(1, *(len(pages) for pages, *_ in rows)))
    for at, (pages, length, new) in enumerate(rows):
        builder.add(pages, length, new, prefill=at < prefills)
    return builder.build(num_tokens=tokens)


def buffers_of(*sizes: int) -> AttentionMetadata:
    """Buffers where batches are built."""
    return AttentionMetadata.pads(*sizes, batch_of([([], 0, 0)], 4).seq_lens.device)


# Slots


@pytest.mark.usefixtures("advance")
@pytest.mark.parametrize(
    ("page_size", "pages", "context", "new", "slots"),
    [
        (4, [7, 3], 0, 6, [28, 29, 30, 31, 12, 13]),
        (4, [7, 3], 4, 3, [12, 13, 14]),
        (4, [7, 3, 9], 8, 1, [36]),
        # These two and that of `test_a_ring_of_pages` had a window of 4, 4 and 8 tokens, and -1 for 4, 0 and 2 tokens that it hides
        # from the last one. Other new tokens see them: here each has its slot (see `test_a_window_takes_no_slot_away`).
        (4, [0, 1, 2, 3], 4, 12, [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]),
        (4, [0, 1, 2], 6, 6, [6, 7, 8, 9, 10, 11]),
    ],
)
def test_slots(page_size: int, pages: list[int], context: int, new: int, slots: list[int]) -> None:
    made = batch_of([(pages, context + new, new)], page_size)
    assert made.slot_mapping.tolist() == slots and made.slot_mapping.dtype == torch.int64
    assert made.positions.tolist() == list(range(context, context + new))


@pytest.mark.usefixtures("advance")
def test_a_ring_of_pages() -> None:
    """A table may name a page twice; two new tokens in one slot are a race, which theirs decided by -1 for the first two."""
    table, lengths = torch.tensor([[0, 1, 0]], dtype=torch.int32), torch.tensor([10], dtype=torch.int32)
    device = batch_of([([], 0, 0)], 4).seq_lens.device
    made = AttentionMetadata.build(table.to(device), lengths.to(device), lengths.to(device), 10, 4)
    assert made.slot_mapping.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    builder = AttentionMetadataBuilder(4, 3)
    with pytest.raises(
        ValueError, match=r"page 0 stands twice in \[0, 1, 0\], so the new tokens at positions 0 and 8 have one slot"
    ):
        builder.add([0, 1, 0], 10, 10)
    for length, new in ((8, 8), (10, 2), (10, 6), (6, 6), (10, 0)):  # a page that no two of them write
        builder.add([0, 1, 0], length, new)
    assert builder.build().slot_mapping.tolist() == [*range(8), 0, 1, 4, 5, 6, 7, 0, 1, *range(6)]


@pytest.mark.parametrize(("context", "new", "window"), [(0, 10, 8), (4, 12, 4), (6, 6, 4)])
@pytest.mark.parametrize("kernel", ["reference", *(pytest.param(name, marks=interpreted) for name in ("general", "block_sparse"))])
def test_a_window_takes_no_slot_away(kernel: str, context: int, new: int, window: int) -> None:
    """Keys go through `write_kv` to their slots, in pages of NaN: one that had none would show in the tokens that see it."""
    spec, ops = AttentionSpec(2, 1, 8, 8, m.Window(window - 1), scale=0.4), torch.ops.paged_attn
    make, length = torch.Generator().manual_seed(0), context + new
    q, k, v = (torch.randn(length, heads, 8, generator=make) for heads in (2, 1, 1))
    k_pages, v_pages = (torch.full((6, 4, 1, 8), torch.nan) for _ in range(2))
    found = torch.empty(0)
    for begin, end in ((0, context), (context, length)):
        at = batch_of([([5, 1, 3, 0], end, end - begin)], 4)
        ops.write_kv(k[begin:end], v[begin:end], k_pages, v_pages, at.slot_mapping)
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        found = ops.attend(q[begin:end], k_pages, v_pages, *where, [], spec.encode(), kernel)
    whole = (each.transpose(0, 1)[None] for each in (q, k, v))
    expected = ops.attention(*whole, [], spec.encode(), "reference")[0].transpose(0, 1)[context:]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("advance")
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("new", [255, 256, 257])
def test_slots_of_long_chunks(new: int, context: int) -> None:
    """Theirs were counted in another way from 256 tokens on."""
    pages = [(7 * at + 3) % 64 for at in range(17)]
    made = batch_of([(pages, context + new, new)], 16)
    assert made.slot_mapping.tolist() == [pages[at // 16] * 16 + at % 16 for at in range(context, context + new)]


def test_an_empty_table_is_a_table() -> None:
    with pytest.raises(ValueError, match="5 of them new, in 0 pages of 4"):
        AttentionMetadataBuilder(4, 3).add([], 5, 5)
    made = batch_of([([], 0, 0)], 4, tokens=2)
    assert made.slot_mapping.tolist() == [-1, -1] and not made.is_profile_run


@pytest.mark.parametrize(
    ("pages", "length", "new", "why"),
    [
        ([3, -1], 5, 1, "page -1"),
        ([1.5, 2], 5, 1, "page 1.5"),
        ([True, 2], 5, 1, "page True"),
        ([2**31, 2], 5, 1, "page 2147483648"),
        (["3", 2], 5, 1, "page '3'"),
        ([3, 2], 5.0, 1, "length 5.0"),
        ([3, 2], 5, True, "length True"),
        (None, 2.5, 2.5, "length 2.5"),
    ],
)
def test_pages_and_lengths_are_whole_numbers(pages: list[int] | None, length: int, new: int, why: str) -> None:
    builder = AttentionMetadataBuilder(4, 3)
    with pytest.raises(ValueError, match=f"{why} of a sequence is no whole number"):
        builder.add(pages, length, new)
    builder.add(array("i", [3, 2]), 5, 1)
    builder.add(np.array([4, 5]), np.int64(5), 2)  # type: ignore[arg-type]
    assert builder.build().slot_mapping.tolist() == [8, 19, 20]


# A profile run: no cache yet


@pytest.mark.usefixtures("advance")
def test_a_profile_run_has_no_slots() -> None:
    builder = AttentionMetadataBuilder(4, 3)
    for length in (3, 3, 2, 20):  # the last is longer than three pages
        builder.add(None, length, length, prefill=True)
    made = builder.build(num_tokens=30)
    assert made.slot_mapping.tolist() == [-1] * 30 and made.is_profile_run
    assert made.block_table.shape == (4, 0)
    assert made.positions.tolist() == [*range(3), *range(3), *range(2), *range(20), 0, 0]
    assert made.cu_seqlens_q.tolist() == made.seq_start_loc.tolist() == [0, 3, 6, 8, 28]
    assert (made.num_prefills, made.num_prefill_tokens, made.max_prefill_seq_len) == (4, 28, 20)


def test_a_profile_run_stays_without_pages() -> None:
    builder = AttentionMetadataBuilder(4, 3)
    for length, new in ((5, 4), (-1, -1)):
        with pytest.raises(ValueError, match=rf"a sequence of {length} tokens, {new} of them new, in no pages .*pages=None"):
            builder.add(None, length, new)
    builder.add(None, 4, 4)
    with pytest.raises(ValueError, match="sequences with pages beside one with pages=None"):
        builder.add([1], 4, 4)
    made = builder.build()
    for use in (made.advance_step, made.paged_kv):
        with pytest.raises(ValueError, match="a profile run has no pages, and ends after its step"):
            use()
    with pytest.raises(ValueError, match="a profile run of 1 rows, 4 tokens and 0 pages of 4 a row does not fit"):
        AttentionMetadata.pads(2, 8, 3, 4).copy_(made)


def test_a_profile_run_writes_nothing_and_attends_to_its_own_keys() -> None:
    spec, ops = AttentionSpec(2, 1, 8, 8, scale=0.4), torch.ops.paged_attn
    builder = AttentionMetadataBuilder(4, 3)
    builder.add(None, 6, 6)
    at = builder.build()
    q, k, v = (torch.randn(6, heads, 8) for heads in (2, 1, 1))
    empty = torch.empty(0, 4, 1, 8)
    ops.write_kv(k, v, empty, empty.clone(), at.slot_mapping)
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    for pages in (empty, torch.zeros(5, 4, 1, 8)):
        with pytest.raises(ValueError, match=r"\d pages and a block table of 0 hold no keys; a profile run goes through attention"):
            ops.attend(q, pages, pages.clone(), *where, [], spec.encode(), "reference")
    table = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="0 pages and a block table of 2 hold no keys"):
        ops.attend(q, empty, empty.clone(), table, *where[1:], [], spec.encode(), "reference")
    whole = (each.transpose(0, 1)[None] for each in (q, k, v))
    out = ops.attention(*whole, [], spec.encode(), "sdpa")[0].transpose(0, 1)
    weights = (torch.einsum("ihd,jd->hij", q, k[:, 0]) * 0.4).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(out, torch.einsum("hij,jd->ihd", weights, v[:, 0]))


# Views


MIXED: list[Row] = [([3, 5], 20, 20), ([1, 2, 4], 42, 10), ([8, 9], 17, 1), ([10, 11, 12], 33, 1)]


@pytest.mark.usefixtures("advance")
def test_a_mixed_batch_and_its_views() -> None:
    made = batch_of(MIXED, 16, prefills=2)
    assert made.cu_seqlens_q.tolist() == [0, 20, 30, 31, 32] and made.seq_start_loc.tolist() == [0, 20, 62, 79, 112]
    assert made.block_table.tolist() == [[3, 5, 0], [1, 2, 4], [8, 9, 0], [10, 11, 12]]
    assert made.slot_mapping[30:].tolist() == [144, 192] and made.context_lens.tolist() == [0, 32, 16, 32]
    assert (made.num_prefills, made.num_prefill_tokens, made.num_decode_tokens) == (2, 30, 2)
    assert (made.max_query_len, made.max_decode_query_len, made.max_prefill_seq_len, made.max_decode_seq_len) == (20, 1, 42, 33)
    prefill, decode = made.prefill_metadata, made.decode_metadata
    assert prefill is not None and decode is not None
    assert prefill.cu_seqlens_q.tolist() == [0, 20, 30] and prefill.seq_start_loc.tolist() == [0, 20, 62]
    # Both starts count from 0 again, lengths are of these rows: theirs kept 62, 79, 112 and the longest query of all, 20.
    assert decode.cu_seqlens_q.tolist() == [0, 1, 2] and decode.seq_start_loc.tolist() == [0, 17, 50]
    assert (decode.max_query_len, decode.max_decode_query_len, decode.max_prefill_seq_len, decode.max_decode_seq_len) == (
        1,
        1,
        0,
        33,
    )
    assert (prefill.num_prefills, prefill.num_prefill_tokens, prefill.num_decode_tokens, prefill.decode_metadata) == (
        2,
        30,
        0,
        None,
    )
    assert (decode.num_prefills, decode.num_prefill_tokens, decode.num_decode_tokens, decode.prefill_metadata) == (0, 0, 2, None)
    equal(prefill, batch_of(MIXED[:2], 16, prefills=2), but=("block_table",))
    equal(decode, batch_of(MIXED[2:], 16))
    assert prefill.max_decode_query_len == 1 and prefill.max_decode_seq_len == 0


@pytest.mark.usefixtures("advance")
def test_views_of_a_padded_batch() -> None:
    made = batch_of([*MIXED, ([], 0, 0)], 16, tokens=35, prefills=2)
    decode = made.decode_metadata
    assert decode is not None and made.num_decode_tokens == decode.num_decode_tokens == 5  # pads are counted
    equal(decode, batch_of([*MIXED[2:], ([], 0, 0)], 16, tokens=5))
    assert batch_of(MIXED, 16).prefill_metadata is None
    whole = batch_of(MIXED, 16).decode_metadata
    assert whole is not None
    equal(whole, batch_of(MIXED, 16))
    assert batch_of(MIXED, 16, prefills=4).decode_metadata is None


def test_prefills_come_first() -> None:
    builder = AttentionMetadataBuilder(16, 3)
    builder.add([1], 5, 5, prefill=True)
    builder.add([2], 7, 1)
    with pytest.raises(ValueError, match="a prefill after 1 decodes; add prefills first"):
        builder.add([3], 5, 5, prefill=True)


def test_rows_of_drafts_are_decodes() -> None:
    made = batch_of([([3, 5], 20, 20), ([8, 9], 17, 4), ([10], 9, 2)], 16, prefills=1)
    assert (made.max_query_len, made.max_decode_query_len, made.num_decode_tokens) == (20, 4, 6)


def test_what_only_the_device_knows_is_none() -> None:
    built = batch_of(MIXED, 16)
    made = AttentionMetadata.build(built.block_table, built.seq_lens, built.query_lens, 32, 16)
    assert made.max_query_len is made.max_decode_query_len is made.max_prefill_seq_len is made.max_decode_seq_len is None
    advanced, view = made.advance_step(), made.decode_metadata
    assert view is not None and view.lengths is advanced.lengths is made.lengths is None


# Padding for a graph


@pytest.mark.usefixtures("advance")
@pytest.mark.parametrize("way", ["pad row", "buffers"])
def test_three_decodes_padded_to_four(way: str) -> None:
    """Theirs: a pad row has length 1, starts [0, 1, 2, 3], context not padded. Here it has no key, and all have four rows."""
    rows: list[Row] = [([8, 9], 17, 1), ([10, 11, 12], 33, 1), ([2], 5, 1)]
    if way == "pad row":
        made = batch_of([*rows, ([], 0, 0)], 16, tokens=4)
    else:
        buffers = AttentionMetadata.pads(4, 4, 3, 16)
        buffers.copy_(batch_of([([7, 7, 7], 48, 1)] * 4, 16))  # nothing of it may stay
        made = buffers.copy_(batch_of(rows, 16))  # from wherever it is
        assert made.slot_mapping is buffers.slot_mapping and made.block_table is buffers.block_table
    assert made.slot_mapping.tolist() == [144, 192, 36, -1] and made.positions.tolist() == [16, 32, 4, 0]
    assert made.seq_lens.tolist() == [17, 33, 5, 0] and made.cu_seqlens_q.tolist() == [0, 1, 2, 3, 3]
    assert made.seq_start_loc.tolist() == [0, 17, 50, 55, 55] and made.context_lens.tolist() == [16, 32, 4, 0]
    assert made.block_table.tolist() == [[8, 9, 0], [10, 11, 12], [2, 0, 0], [0, 0, 0]]
    assert made.lengths == ((17, 1), (33, 1), (5, 1), (0, 0))


@pytest.mark.usefixtures("advance")
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_buffers_hold_what_was_copied_last(data: st.DataObject) -> None:
    sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=4)
    buffers = buffers_of(5, 24, 4, 4)
    for _ in range(2):
        lengths = data.draw(sizes)
        rows = [([at * 4 + page for page in range(4)], context + new, new) for at, (context, new) in enumerate(lengths)]
        made = buffers.copy_(batch_of(rows, 4, prefills=1))
        pads: list[Row] = [([], 0, 0)] * (5 - len(rows))
        equal(made, batch_of([*rows, *pads], 4, tokens=24, prefills=1))


@pytest.mark.usefixtures("advance")
def test_buffers_take_what_they_hold() -> None:
    """Advanced, or its decodes alone: they share tensors with the buffers."""
    pad: Row = ([], 0, 0)
    buffers = buffers_of(5, 34, 3, 16)
    before = buffers.copy_(batch_of(MIXED, 16, prefills=2))
    advanced: list[Row] = [([3, 5], 21, 1), ([1, 2, 4], 43, 1), ([8, 9], 18, 1), ([10, 11, 12], 34, 1)]
    equal(buffers.copy_(before.advance_step()), batch_of([*advanced, pad], 16, tokens=34))
    buffers = buffers_of(4, 32, 3, 16)
    decode = buffers.copy_(batch_of(MIXED, 16, prefills=2)).decode_metadata
    assert decode is not None
    equal(buffers.copy_(decode), batch_of([([8, 9], 17, 1), MIXED[3], pad, pad], 16, tokens=32))


def test_what_does_not_fit_is_refused() -> None:
    buffers = AttentionMetadata.pads(2, 4, 2, 4)
    before = buffers.copy_(batch_of([([1], 3, 2)], 4))
    for rows, page_size in (([([1], 3, 1)] * 3, 4), ([([1, 2, 3], 3, 1)], 4), ([([1, 2], 6, 5)], 4), ([([1], 3, 1)], 8)):
        with pytest.raises(ValueError, match="does not fit into the buffers of a batch of 2 rows, 4 tokens and 2 pages of 4"):
            buffers.copy_(batch_of(rows, page_size))
    equal(before, batch_of([([1, 0], 3, 2), ([], 0, 0)], 4, tokens=4), but=("held_pages",))


def test_rows_of_a_table_are_cleared() -> None:
    """Theirs stayed as they were: [8, 9, 0, 0], then a table of one page, gave [1, 9, 0, 0]."""
    buffers = StepBuffers(2, 4, 64, torch.device("cpu"))
    for pages, shown in (([8, 9], [8, 9, 0, 0]), ([1], [1, 0, 0, 0])):
        buffers.write_table([array("i", pages)], 4)
        assert buffers._tables[4].on_device.tolist() == [shown, [0] * 4]


# Advancing


def test_lengths_positions_and_slots_of_the_next_step(advance: Advance) -> None:
    """Theirs: the pad row has length 1, before and after."""
    made = batch_of([([8, 9], 16, 1), ([10, 11, 12], 32, 1), ([2], 5, 1), ([], 0, 0)], 16, tokens=4)
    tokens, positions, sampled = torch.tensor([[7, 7, 7, 0], [5, 5, 5, 0], [50, 51, 52, 53]], device=made.seq_lens.device)
    lengths = made.seq_lens.clone()
    advance(tokens, positions, lengths, sampled)
    after = made.advance_step()
    assert lengths.tolist() == after.seq_lens.tolist() == [17, 33, 6, 0]
    assert positions.tolist() == after.positions.tolist() == [16, 32, 5, 0]
    assert tokens.tolist() == [50, 51, 52, 0]
    assert after.slot_mapping.tolist() == [144, 192, 37, -1]
    indptr, indices, last, bound = after.paged_kv()
    assert bound.tolist() == [2, 3, 1, 0] and last.tolist() == [1, 1, 6, 0] and indptr.tolist() == [0, 2, 5, 6, 6]
    assert indices.tolist() == [8, 9, 10, 11, 12, 2, *[0] * 6]


@pytest.mark.usefixtures("advance")
def test_prefills_turn_into_decodes() -> None:
    """Theirs went on with starts [0, 20, 21] and a view of one decode."""
    after = batch_of([([*pages, 6], length, new) for pages, length, new in MIXED], 16, prefills=2).advance_step()
    assert after.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4] and after.slot_mapping.tolist() == [84, 74, 145, 193]
    assert (after.num_prefills, after.num_prefill_tokens, after.num_decode_tokens, after.prefill_metadata) == (0, 0, 4, None)
    assert after.lengths == ((21, 1), (43, 1), (18, 1), (34, 1)) and after.max_query_len == 1 and after.max_decode_seq_len == 43
    decode = after.decode_metadata
    assert decode is not None and decode.seq_lens.tolist() == [21, 43, 18, 34]


@pytest.mark.usefixtures("advance")
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=5),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_advancing_equals_rebuilding(rows: list[tuple[int, int]], page_size: int, steps: int, pads: int) -> None:
    """Whatever the batch begins with: chunks, drafts, rows without new tokens, pads."""
    tables = [list(range(at * 24, at * 24 + 24)) for at in range(len(rows))]
    start: list[Row] = [(pages, context + new, new) for pages, (context, new) in zip(tables, rows, strict=True)]
    total = sum(new for _, _, new in start)
    made = batch_of([*start, *[([], 0, 0)] * pads], page_size, tokens=total + pads)
    for _ in range(steps):
        made = made.advance_step()
    live = [(pages, length + steps * (new > 0), int(new > 0)) for pages, length, new in start]
    built = batch_of([*live, *[([], 0, 0)] * pads], page_size, tokens=len(rows) + pads)
    equal(made, built)
    for ours, theirs in zip(made.paged_kv(), built.paged_kv(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(made.context_lens, built.context_lens) and torch.equal(made.seq_start_loc, built.seq_start_loc)


FULL: list[Row] = [([8, 9], 30, 1), ([10], 16, 1), ([11, 12], 16, 0)]


@pytest.mark.usefixtures("advance")
def test_a_row_advances_within_its_own_pages() -> None:
    """Behind them the table is padded with page 0, which may be another's. A row without new tokens does not grow."""
    builder = AttentionMetadataBuilder(16, 3)
    for pages, length, new in FULL:
        builder.add(pages, length, new)
    padded = AttentionMetadata.pads(5, 5, 3, 16).copy_(builder.build())
    view = padded.decode_metadata
    assert view is not None
    why = r"advance_step: row 1 has 16 tokens in 1 pages of 16, and no room for another; build the batch with 2 pages for it"
    for made in (builder.build(), padded, view):
        before = made.slot_mapping.tolist()
        with pytest.raises(ValueError, match=why):
            made.advance_step()
        assert made.slot_mapping.tolist() == before
    after = batch_of([FULL[0], FULL[2]], 16).advance_step().advance_step()
    assert after.seq_lens.tolist() == [32, 16] and after.slot_mapping.tolist() == [9 * 16 + 15, -1]
    with pytest.raises(ValueError, match="row 0 has 32 tokens in 2 pages of 16"):
        after.advance_step()


def tensors(table: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(table, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize(("length", "table"), [(8, [[3, 4]]), (4, [[3, -1]]), (4, [[3, -7]])], ids=["its end", "-1", "-7"])
def test_without_lengths_on_the_host_no_other_page_is_written(length: int, table: list[list[int]]) -> None:
    """Where a CPU advances, the lengths are at hand."""
    made = AttentionMetadata.build(*tensors(table, [length]), torch.ones(1, dtype=torch.int32), 1, 4)
    assert made.lengths is None
    with pytest.raises(ValueError, match=rf"row 0: the token at position {length} has no page of 4 in a block table of 2 columns"):
        made.advance_step()


@interpreted
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_a_gpu_a_token_without_a_page_has_no_slot(device: str) -> None:
    from compile_attn.kernels import batch_triton

    table, lengths = (each.to(device) for each in tensors([[3, 4], [3, -1], [3, -7], [3, 4]], [9, 5, 6, 7]))
    *_, slots, _ = batch_triton.build_metadata(table, lengths, torch.ones_like(lengths), 5, 4)
    assert slots.tolist() == [-1, -1, -1, 18, -1]


# Pages one after the other


def gathered(made: AttentionMetadata, fixed: bool) -> list[list[int]]:
    """indptr, indices and last_page_len as FlashInfer's plans hold them: a pad has one page, page 0, and no key."""
    from compile_attn.kernels.flashinfer_triton import gather_pages

    asked = Requests.of(made.seq_lens, made.query_lens, made.num_tokens, made.page_size, fixed=fixed, pinned=False)
    rows, _, indptr, last = parts(asked[0].packed)
    out = torch.full((asked[0].pages,), -9, dtype=torch.int32)
    gather_pages(made.block_table, rows, indptr, asked[0].most_pages, out)
    return [indptr.tolist(), out.tolist(), last.tolist()]


@interpreted
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("third", "pads", "indptr", "last"),
    [([3, 4], 0, [0, 3, 6, 8], [1, 16, 1]), ([1, 6, 7, 9], 1, [0, 3, 6, 8, 8], [1, 16, 1, 0])],
    ids=["a table each", "pages ahead and a pad"],
)
def test_paged_arrays(third: list[int], pads: int, indptr: list[int], last: list[int], fixed: bool) -> None:
    rows: list[Row] = [([0, 5, 8], 33, 1), ([1, 6, 7], 48, 1), (third, 17, 1), *[([], 0, 0)] * pads]
    made = batch_of(rows, 16, tokens=len(rows))
    indices = [0, 5, 8, 1, 6, 7, *third[:2]]
    found = made.paged_kv()
    assert found.indptr.tolist() == indptr and found.last_page_len.tolist() == last
    assert found.block_table_bound.tolist() == [3, 3, 2, *[0] * pads]
    assert found.indices.tolist() == indices + [0] * (made.block_table.numel() - len(indices))
    assert {each.dtype for each in found} == {torch.int32}
    # FlashInfer before 0.7.2 gave NaN for a row of no page.
    ends = indptr[: len(indptr) - pads] + [indptr[-1] + 1] * pads
    assert gathered(made, fixed) == [ends, indices + [0] * pads, last]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=7), st.integers(1, 8))
def test_pages_and_the_last_one_make_the_length(lengths: list[int], page_size: int) -> None:
    rows: list[Row] = [(list(range(at * 50, at * 50 + 41)), length, min(length, 1)) for at, length in enumerate(lengths)]
    indptr, indices, last, bound = batch_of(rows, page_size).paged_kv()
    for at, (pages, length, _) in enumerate(rows):
        begin, end = indptr[at : at + 2].tolist()
        assert bound[at] == end - begin and indices[begin:end].tolist() == pages[: end - begin]
        assert length == 0 or ((end - begin - 1) * page_size + last[at] == length and 0 < last[at] <= page_size)
        assert length > 0 or (begin == end and last[at] == 0)
    assert not indices[int(indptr[-1]) :].any()


# Windows


@pytest.mark.parametrize(
    ("window", "page_size", "length", "seen", "pages"),
    [(8, 4, 9, 9, 3), (8, 4, 12, 8, 2), (8, 4, 13, 9, 3), (8, 4, 20, 8, 2), (4096, 16, 5000, 4104, 257)],
)
def test_pages_that_a_decode_in_a_window_touches(window: int, page_size: int, length: int, seen: int, pages: int) -> None:
    """Theirs cut the table to them. Here it stays whole, and kernels begin at the first key that is seen."""
    (span,) = spans(m.Window(window - 1), 1)
    at = {FIRST: length - 1, LAST: length - 1, HEAD: 0, LENGTH: length}
    low, stop = int(span.low.subs(at)), int(span.stop.subs(at))
    assert (low, stop) == (max(0, length - window), length)
    assert length - low // page_size * page_size == seen and (stop - 1) // page_size - low // page_size + 1 == pages


def keys_seen(kernel: str, window: int, pages: list[int], length: int, new: int) -> list[list[int]]:
    """By each of the last `new` tokens, in pages of 4: all keys weigh the same, and value j is the j-th unit vector."""
    k_pages, v_pages = torch.zeros(8, 4, 1, 16), torch.full((8, 4, 1, 16), torch.nan)
    for j in range(length):
        v_pages[pages[j // 4], j % 4, 0] = torch.eye(16)[j]
    at, spec = batch_of([(pages, length, new)], 4), AttentionSpec(1, 1, 16, 16, m.Window(window - 1))
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    out = torch.ops.paged_attn.attend(torch.ones(new, 1, 16), k_pages, v_pages, *where, [], spec.encode(), kernel)[:, 0]
    torch.testing.assert_close(out.amax(1), 1 / (out > 0).sum(1))
    return [row.nonzero().flatten().tolist() for row in out]


@pytest.mark.parametrize("kernel", ["reference", *(pytest.param(name, marks=interpreted) for name in ("general", "block_sparse"))])
def test_a_decode_sees_its_window(kernel: str) -> None:
    """Theirs once passed none, and saw 11 keys; or cut a table from its end, also where it had pages ahead: blocks 1 to 3."""
    assert keys_seen(kernel, 8, [5, 2, 7], 11, 1) == [[*range(3, 11)]]
    assert keys_seen(kernel, 8, [5, 2, 7, 3], 9, 1) == [[*range(1, 9)]]
    assert keys_seen(kernel, 8, [5, 2, 7, 3], 9, 3) == [[*range(7)], [*range(8)], [*range(1, 9)]]


@pytest.mark.parametrize("window", [1, 3, 6])
def test_chunks_longer_than_a_window(window: int) -> None:
    """Theirs gave no slot to what the last token of a chunk does not see, though others of the chunk do."""

    def model() -> TinyDecoder:
        made = tiny()
        for attention in made.attention:
            attention.seen &= attention.seen.triu(1 - window)
        return made

    prompts, how = prompts_of([25, 3, 14, 31], seed=1), Sampling(max_new_tokens=6)
    with PagedLM(model(), inner="eager", kv_tokens=256, page_size=4, max_seqs=4, max_batch_tokens=11, poison=True) as lm:
        assert [type(site.spec.mask) for site in lm.report.sites] == [m.Window] * 2
        assert lm.generate(prompts, how) == [alone(model(), prompt, how) for prompt in prompts]


# Sizes that show what is counted in too few bits, or by too few programs


@pytest.mark.usefixtures("advance")
@pytest.mark.parametrize("page", [(1 << 27) - 1, 1 << 27, (1 << 31) - 1])
def test_slots_beyond_int32(page: int) -> None:
    """Theirs once wrote 64-bit slots through a 32-bit pointer, and moved pads too."""
    made = batch_of([([4, page], 18, 3), ([page], 2, 1), ([], 0, 0)], 16, tokens=5)
    assert made.slot_mapping.tolist() == [79, page * 16, page * 16 + 1, page * 16 + 1, -1]
    assert made.advance_step().slot_mapping.tolist() == [page * 16 + 2, page * 16 + 2, -1]


@interpreted
@pytest.mark.parametrize("fixed", [False, True])
def test_pads_of_many_rows_hold_no_stale_page(fixed: bool) -> None:
    """700 rows of 2,100 pages each at most: more than any launch has threads. Theirs left the pads' indptr as it was."""
    lengths = [1 + (at * 37) % 900 for at in range(600)]
    lengths[5] = 2100
    rows: list[Row] = [([at, *range(1, length)], length, 1) for at, length in enumerate(lengths)]
    made = batch_of([*rows, *[([], 0, 0)] * 100], 1, tokens=700)
    found, total = made.paged_kv(), sum(lengths)
    assert found.indptr[600:].tolist() == [total] * 101
    assert found.indices[:total].tolist() == [page for pages, *_ in rows for page in pages] and not found.indices[total:].any()
    ends, indices, last = gathered(made, fixed)
    assert ends[600:] == list(range(total, total + 101)) and last[600:] == [0] * 100
    assert indices == [*found.indices[:total].tolist(), *[0] * 100]


def test_buckets() -> None:
    """Theirs: 1, 2, 4, then eights: 257 -> 264. Here none of one row, which a compiler takes for a constant, and coarser ones."""
    with as_on_a_gpu(PagedLM(tiny(), inner="eager", kv_tokens=64, page_size=4, max_seqs=4)) as lm:
        graphs = lm._runner.graphs
        assert graphs is not None
        lm.cache.max_seqs, lm.cache.max_tokens = 1024, None
        assert [graphs.sizes(rows, rows, rows) for rows in (1, 3, 4, 5, 9, 257)] == [(size,) * 3 for size in (2, 4, 4, 8, 16, 288)]

"""Does a step know where its tokens stand, whatever the batch, and does advancing equal rebuilding?"""

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compile_attn.kernels.ops  # noqa: F401
from compile_attn.kernels.batch import build_metadata, table_width
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from tests.test_general import interpreted

SEQUENCES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=7)


def build(tables: list[list[int]], lengths: list[int], news: list[int], page_size: int, tokens: int) -> AttentionMetadata:
    builder = AttentionMetadataBuilder(page_size, max(1, *map(len, tables)))
    for table, length, new in zip(tables, lengths, news, strict=True):
        builder.add(table, length, new)
    return builder.build(num_tokens=tokens)


def make(sequences: list[tuple[int, int]], page_size: int, pad_tokens: int) -> AttentionMetadata:
    tables, used = [], 0
    for context, new in sequences:
        count = -(-(context + new + 1) // page_size)
        tables.append(list(range(used, used + count)))
        used += count
    tokens = sum(new for _, new in sequences) + pad_tokens
    return build(tables, [sum(each) for each in sequences], [new for _, new in sequences], page_size, tokens)


def equal(a: AttentionMetadata, b: AttentionMetadata, but: Sequence[str] = ()) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if name not in but and isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), name
        elif name not in but:
            assert value == other, name


@pytest.mark.parametrize(
    ("page_size", "table", "context", "new", "slots"),
    [
        (4, [7, 3], 0, 6, [28, 29, 30, 31, 12, 13]),
        (4, [7, 3], 4, 3, [12, 13, 14]),
        (4, [7, 3, 9], 8, 1, [36]),
    ],
)
def test_slots(page_size: int, table: list[int], context: int, new: int, slots: list[int]) -> None:
    metadata = build([table], [context + new], [new], page_size, new)
    assert metadata.slot_mapping.tolist() == slots
    assert metadata.positions.tolist() == list(range(context, context + new))


def test_a_mixed_batch_with_padding() -> None:
    metadata = build([[3, 5], [], [1], [8, 9]], [20, 0, 6, 17], [3, 0, 2, 1], 16, 8)
    assert metadata.cu_seqlens_q.tolist() == [0, 3, 3, 5, 6]
    assert metadata.positions.tolist() == [17, 18, 19, 4, 5, 16, 0, 0]
    assert metadata.slot_mapping.tolist() == [81, 82, 83, 20, 21, 144, -1, -1]
    assert metadata.token_seq.tolist() == [0, 0, 0, 2, 2, 3, 3, 3]
    dtypes = [getattr(metadata, name).dtype for name in ("cu_seqlens_q", "positions", "slot_mapping", "token_seq")]
    assert dtypes == [torch.int32, torch.int64, torch.int64, torch.int32]


@settings(max_examples=150, deadline=None)
@given(SEQUENCES, st.integers(1, 8), st.integers(0, 4))
def test_any_batch(sequences: list[tuple[int, int]], page_size: int, pad_tokens: int) -> None:
    metadata = make(sequences, page_size, pad_tokens)
    expected = [(row, at) for row, (context, new) in enumerate(sequences) for at in range(context, context + new)]
    count = len(expected)
    assert list(zip(metadata.token_seq.tolist()[:count], metadata.positions.tolist()[:count], strict=True)) == expected
    table = metadata.block_table.tolist()
    slots = [table[row][at // page_size] * page_size + at % page_size for row, at in expected]
    assert metadata.slot_mapping.tolist() == slots + [-1] * pad_tokens
    assert len(set(slots)) == count  # no slot is written twice
    assert not metadata.positions[count:].any()
    assert all(0 <= row < len(sequences) for row in metadata.token_seq.tolist())
    ends = [0]
    for _, new in sequences:
        ends.append(ends[-1] + new)
    assert metadata.cu_seqlens_q.tolist() == ends


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 6))
def test_advancing_equals_rebuilding(lengths: list[int], page_size: int, steps: int) -> None:
    """Steps in place, beside the metadata of a batch built at the final lengths. Length 0: a pad row, at the end."""
    lengths = sorted(lengths, reverse=True)
    live = [int(length > 0) for length in lengths]
    tables = [list(range(row * 20, row * 20 + 20)) if alive else [] for row, alive in enumerate(live)]
    rows = len(lengths)
    metadata = build(tables, lengths, live, page_size, rows)
    seq_lens = metadata.seq_lens.clone()
    input_ids, position_ids = torch.full((1, rows + 1), 7), torch.zeros(1, rows + 1, dtype=torch.int64)
    for step in range(steps):
        metadata = metadata.advance_step()
        sampled = torch.arange(rows)[:, None] + 100 * step
        torch.ops.paged_attn.advance_step(input_ids, position_ids, seq_lens, sampled)
    final = [length + steps * alive for length, alive in zip(lengths, live, strict=True)]
    equal(metadata, build(tables, final, live, page_size, rows))
    assert torch.equal(seq_lens, metadata.seq_lens)
    assert position_ids[0, :rows].tolist() == [length - 1 if alive else 0 for length, alive in zip(final, live, strict=True)]
    tokens = [row + 100 * (steps - 1) if alive else 7 for row, alive in enumerate(live)]
    assert input_ids[0].tolist() == [*tokens, 7]  # the pad token stays


def test_no_row_grows_past_the_limit() -> None:
    lengths, ids, positions = torch.tensor([6, 7, 8, 0], dtype=torch.int32), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    torch.ops.paged_attn.advance_step(ids, positions, lengths, torch.full((4,), 9), 8)
    assert (lengths.tolist(), positions.tolist(), ids.tolist()) == ([7, 8, 8, 0], [6, 7, 2, 3], [9, 9, 0, 0])


@pytest.mark.parametrize(
    ("page_size", "widths"),
    [
        (1, [256, 1024, 4096]),
        (16, [16, 64, 256]),
        (48, [5, 21, 85]),
        (128, [2, 8, 32]),
        (256, [2, 4, 16]),
        (512, [2, 8, 32]),
    ],
)
def test_tables_have_room_for_256_tokens_or_some_fours_of_it(page_size: int, widths: list[int]) -> None:
    """Never for one page alone: torch.compile would take the width for a constant."""
    for begin, width in zip([1, *(width + 1 for width in widths)], widths, strict=False):
        assert {table_width(pages, page_size) for pages in range(begin, width + 1)} == {width}


def test_bad_input_is_named() -> None:
    builder = AttentionMetadataBuilder(page_size=4, max_pages=2)
    with pytest.raises(ValueError, match="a sequence of 5 tokens, 1 of them new, in 1 pages of 4: give 0 to 5 new tokens and 2 to"):
        builder.add([3], 5, 1)
    with pytest.raises(ValueError, match="9 of them new"):
        builder.add([3, 4], 5, 9)
    with pytest.raises(ValueError, match="in 3 pages"):
        builder.add([3, 4, 5], 5, 1)
    with pytest.raises(ValueError, match="0 sequences"):
        builder.build()
    builder.add([3, 4], 5, 3)
    with pytest.raises(ValueError, match="3 new tokens in num_tokens=2"):
        builder.build(num_tokens=2)
    ids, lengths = torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="input_ids holds 2 values, the batch 3 rows"):
        torch.ops.paged_attn.advance_step(ids, ids.clone(), lengths, torch.zeros(3, dtype=torch.int64))


def metadata_by_triton(sequences: list[tuple[int, int]], page_size: int, pad_tokens: int, device: str) -> None:
    from compile_attn.kernels import batch_triton

    expected = make(sequences, page_size, pad_tokens)
    table = torch.nn.functional.pad(expected.block_table, (0, 3), value=-7)[:, : expected.block_table.shape[1]]  # rows apart
    given = [each.to(device) for each in (table, expected.seq_lens, expected.query_lens)]
    found = batch_triton.build_metadata(*given, expected.positions.shape[0], page_size)
    for name, tensor in zip(("cu_seqlens_q", "positions", "slot_mapping", "token_seq"), found, strict=True):
        wanted = getattr(expected, name)
        assert tensor.dtype == wanted.dtype and torch.equal(tensor.cpu(), wanted), name


@interpreted
@settings(max_examples=60, deadline=None)
@given(SEQUENCES, st.integers(1, 8), st.integers(0, 40))
def test_triton_agrees_on_any_batch(sequences: list[tuple[int, int]], page_size: int, pad_tokens: int) -> None:
    metadata_by_triton(sequences, page_size, pad_tokens, "cpu")


@interpreted
def test_a_token_beyond_its_table_is_written_nowhere() -> None:
    from compile_attn.kernels import batch_triton

    lengths, news = torch.tensor([9, 2], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    *_, slots, _ = batch_triton.build_metadata(torch.tensor([[5, 6], [7, 8]], dtype=torch.int32), lengths, news, 4, 4)
    assert slots.tolist() == [26, 27, -1, 29]


def ragged(rows: int, most: int) -> list[tuple[int, int]]:
    draw = random.Random(rows)
    return [(draw.randint(0, 50), draw.choice((0, 1, 1, draw.randint(0, most)))) for _ in range(rows)]


@interpreted
@pytest.mark.parametrize(("rows", "most"), [(64, 3), (65, 3), (700, 2), (70, 200)])
def test_triton_agrees_on_many_rows_and_tokens(rows: int, most: int) -> None:
    metadata_by_triton(ragged(rows, most), 4, 5, "cpu")


@interpreted
@pytest.mark.parametrize("rows", [1, 5, 130])
@pytest.mark.parametrize("limit", [None, 3])
def test_triton_advances_alike(rows: int, limit: int | None) -> None:
    advances_alike(rows, limit, "cpu")


def advances_alike(rows: int, limit: int | None, device: str) -> None:
    from compile_attn.kernels import batch_triton

    lengths = torch.arange(rows, dtype=torch.int32) % 4  # 0: a pad row
    ids, positions, sampled = torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.arange(rows) * 7 - 8
    there = [each.clone().to(device) for each in (ids, positions, lengths, sampled)]
    batch_triton.advance_step(*there, limit)
    torch.ops.paged_attn.advance_step(ids, positions, lengths, sampled, limit)
    for found, expected in zip(there, (ids, positions, lengths, sampled), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.gpu
def test_triton_agrees_on_a_gpu() -> None:
    for rows, most in ((1, 9), (2, 0), (64, 3), (65, 3), (512, 1), (700, 40), (70, 900), (3, 8000)):
        for page_size in (1, 16, 256):
            metadata_by_triton(ragged(rows, most), page_size, rows % 3, "cuda")
    for rows in (1, 5, 512):
        advances_alike(rows, None, "cuda")
        advances_alike(rows, 3, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_in_a_cuda_graph() -> None:
    """No host read, no shape from data: captured once, right for another batch in the same buffers."""
    host = make([(3, 5), (9, 1), (0, 0), (17, 1)], 4, 3)
    other = make([(1, 1), (2, 6), (5, 1), (0, 0)], 4, 2)
    width = host.block_table.shape[1]
    buffers = [each.cuda() for each in (host.block_table, host.seq_lens, host.query_lens)]
    build_metadata(*buffers, 10, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = build_metadata(*buffers, 10, 4)
    for metadata in (host, other):
        table = torch.nn.functional.pad(metadata.block_table, (0, width - metadata.block_table.shape[1]))
        for buffer, new in zip(buffers, (table, metadata.seq_lens, metadata.query_lens), strict=True):
            buffer.copy_(new)
        graph.replay()
        for a, b in zip(found, build_metadata(table, metadata.seq_lens, metadata.query_lens, 10, 4), strict=True):
            assert torch.equal(a.cpu(), b)


@pytest.mark.gpu
def test_decoding_in_a_cuda_graph() -> None:
    """Advance, then the metadata of the step, replayed: after n steps as if built at those lengths."""
    lengths = [5, 16, 1, 30, 0]
    live = [int(length > 0) for length in lengths]
    tables = [list(range(row * 20, row * 20 + 20)) if alive else [] for row, alive in enumerate(live)]
    at = build(tables, lengths, live, 16, 5)
    table, seq_lens, query_lens = (each.cuda() for each in (at.block_table, at.seq_lens, at.query_lens))
    ids, positions, sampled = (torch.zeros(1, 5, dtype=torch.int64, device="cuda") for _ in range(3))

    def step() -> tuple[torch.Tensor, ...]:
        torch.ops.paged_attn.advance_step(ids, positions, seq_lens, sampled)
        return build_metadata(table, seq_lens, query_lens, 5, 16)

    step()
    seq_lens.copy_(at.seq_lens)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for count in range(1, 20):
        sampled.fill_(count)
        graph.replay()
        final = build(tables, [length + count * alive for length, alive in zip(lengths, live, strict=True)], live, 16, 5)
        assert torch.equal(seq_lens.cpu(), final.seq_lens) and ids.tolist() == [[count] * 4 + [0]]
        for name, tensor in zip(("cu_seqlens_q", "positions", "slot_mapping", "token_seq"), found, strict=True):
            assert torch.equal(tensor.cpu(), getattr(final, name)), name
        assert torch.equal(positions.cpu()[0], final.positions)

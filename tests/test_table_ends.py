"""Does no row of a batch that was made by hand end behind its table, where the pages of the next row stand?"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import compile_attn.kernels.ops  # noqa: F401  registers torch.ops.paged_attn
from compile_attn.kernels import mask as m
from compile_attn.kernels.metadata import AttentionMetadata, AttentionMetadataBuilder
from compile_attn.kernels.spec import AttentionSpec
from tests.test_general import interpreted


def tensors(table: list[list[int]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(table, dtype=torch.int32), torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize(
    ("table", "length", "new", "why"),
    [
        ([[3, 4], [5, 6]], 9, 0, r"row 0: the token at position 8 has no page of 4 in a block table of 2 columns"),
        ([[3, 4], [5, 6]], 12, 1, r"row 0: the token at position 8 has no page of 4"),
        ([[-1, 4], [5, 6]], 7, 1, r"row 0: the token at position 0 has no page of 4"),
        ([[3, 4], [5, 6]], 2, 3, r"row 0: 3 new tokens in a sequence of 2; seq_lens count the new ones, too"),
    ],
)
def test_a_row_longer_than_its_table_is_refused(table: list[list[int]], length: int, new: int, why: str) -> None:
    """Whether its tokens are new or not: the reference read its last page twice, as if it were the one behind."""
    at, lengths = tensors(table, [length, 3])
    with pytest.raises(ValueError, match=why):
        AttentionMetadata.build(at, lengths, torch.tensor([new, 1], dtype=torch.int32), new + 1, 4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_lengths_on_the_host_fit_into_the_table(device: str) -> None:
    """Where a GPU has the tensors it is not waited for, so what the host was told decides."""
    builder = AttentionMetadataBuilder(4, 2)
    builder.add([8, 9], 5, 1)
    builder.add([10], 4, 1)
    made = builder.build(device)
    why = r"row 1 of 2 has 9 tokens, a block table of 2 columns room for 2 pages of 4; give each row 3 columns"
    with pytest.raises(ValueError, match=why):
        replace(made, lengths=((5, 1), (9, 1)))
    whole = replace(made, seq_lens=made.seq_lens + 3, lengths=((8, 1), (7, 1)), held_pages=None)
    with pytest.raises(ValueError, match=r"row 0 of 2 has 9 tokens|row 0: the token at position 8 has no page"):
        whole.advance_step()


def attended_beyond(at: tuple[torch.Tensor, ...], kernel: str, causal: bool) -> torch.Tensor:
    """By the new tokens of 2 rows of 2 pages of 4; what is another's page, or nobody's, is NaN."""
    dtype = torch.float32 if at[0].device.type == "cpu" else torch.bfloat16  # FlashAttention has no other
    pages = torch.full((9, 4, 1, 16), torch.nan, device=at[0].device, dtype=dtype)
    pages[3:7] = torch.randn(4, 4, 1, 16, generator=torch.Generator().manual_seed(0)).to(pages)
    spec = AttentionSpec(1, 1, 16, 16, m.Causal() if causal else m.Bidirectional())
    q = torch.ones(at[3].shape[0], 1, 16, device=pages.device, dtype=dtype)
    return torch.ops.paged_attn.attend(q, pages, pages.clone(), *at, [], spec.encode(), kernel)


BEYOND = [(9, 1), (14, 4), (40, 1)]


@interpreted
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["reference", "general", "block_sparse"])
@pytest.mark.parametrize(("length", "new"), BEYOND)
def test_triton_ends_a_row_with_its_table(length: int, new: int, kernel: str, causal: bool) -> None:
    """The table is a part of a wider one: behind each row stand numbers of pages that are another's."""
    from compile_attn.kernels import batch_triton

    table, lengths = tensors([[3, 4, 7, 8], [5, 6, 7, 8]], [length, 8])
    news, held = torch.full_like(lengths, new), torch.empty_like(lengths)
    starts, positions, slots, rows = batch_triton.build_metadata(table[:, :2], lengths, news, 2 * new, 4, held)
    assert held.tolist() == [8, 8] and lengths.tolist() == [length, 8]
    assert positions.tolist() == [min(at, 7) for at in range(length - new, length)] + [*range(8 - new, 8)]
    assert slots[:new].tolist() == [-1] * new
    assert attended_beyond((table[:, :2], held, starts, positions, rows), kernel, causal).isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["reference", "general", "block_sparse", "flash_attn"])
@pytest.mark.parametrize(("length", "new"), BEYOND)
def test_a_row_ends_with_its_table_on_a_gpu(length: int, new: int, kernel: str, causal: bool) -> None:
    table, lengths = (each.cuda() for each in tensors([[3, 4, 7, 8], [5, 6, 7, 8]], [length, 8]))
    made = AttentionMetadata.build(table[:, :2], lengths, torch.full_like(lengths, new), 2 * new, 4)
    assert made.seq_lens.tolist() == [8, 8] and lengths.tolist() == [length, 8]
    for at in (made, made.advance_step()):
        where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        assert at.seq_lens.tolist() == [8, 8] and attended_beyond(where, kernel, causal).isfinite().all()


@interpreted
def test_a_token_before_the_first_has_no_slot() -> None:
    """More new tokens than tokens, which a CPU refuses: theirs went to the row before."""
    from compile_attn.kernels import batch_triton

    table, lengths = tensors([[3, 4], [5, 6]], [4, 1])
    _, positions, slots, _ = batch_triton.build_metadata(table, lengths, torch.tensor([1, 3], dtype=torch.int32), 4, 4)
    assert slots.tolist() == [15, -1, -1, 20] and positions.tolist() == [3, 0, 0, 0]

"""Does a dense model with the option block_sparse compute what the same model with masks of its own does, in every phase?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compile_attn
from compile_attn import BlocksparseParams, PagedKVCache, PagedLM, RefusedError, Sampling, calibrate, explain
from compile_attn.backend import paged_attn
from compile_attn.kernels import mask as m
from compile_attn.kernels import tiles, triton_launch
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.select import backend, choose
from compile_attn.kernels.spec import AttentionSpec
from tests.paged import paged_batch
from tests.sparse_decoder import HEADS, KV_HEADS, POSITIONS, Decoder, Sparse, decoder
from tests.test_block_sparse import PHASES, check_on_gpu, hide
from tests.test_blocksparse_params import CONFIGURATIONS, every_rank, phases
from tests.test_general import NO_TRITON, compile_for_an_h200, interpreted, on_gpu
from tests.test_reference import FLOAT32
from tests.tiny import alone, as_on_a_gpu, prompts_of

CUDA = torch.device("cuda")
EAGER = {"inner": "eager"}


def params(stride: int = 4, local: int = 1, block: int = 4, **more: Any) -> BlocksparseParams:
    return BlocksparseParams(POSITIONS, HEADS, KV_HEADS, block, local, stride, **more)


# The option, and the masks that say the same.
KINDS = {
    "each head its own": (params(), Sparse(4, 1, 4, 1)),
    "heads alike": (params(3, 2, homo_head=True), Sparse(4, 2, 3)),
    "KV heads": (params(homo_head_group=True), Sparse(4, 1, 4, 2, 0, 2)),
    "rank 2 of 4": (params(64, 2, tp_size=4, tp_rank=2), Sparse(4, 2, 64, 4, 8)),
    "KV heads of rank 1": (params(8, block=5, tp_size=2, tp_rank=1, homo_head_group=True), Sparse(5, 1, 8, 2, 4, 2)),
    "large blocks": (params(2, block=16), Sparse(16, 1, 2, 1)),
}
IDS = torch.tensor(prompts_of([70, 70]))


def compiled(model: nn.Module, sparse: Any, **more: Any) -> Any:
    return torch.compile(model, backend=paged_attn, options={**EAGER, "block_sparse": sparse, **more})


# A model without block-sparse masks, and the option


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("kind", KINDS)
def test_the_option_is_the_mask(kind: str) -> None:
    """Dense layers between sparse ones, as in Phi-3-small."""
    sparse, own = KINDS[kind]
    model = decoder(own, None, own)
    expected = model(IDS)
    found = compiled(decoder(None, None, None), replace(sparse, layers=(0, 2)))(IDS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (decoder(None, None, None)(IDS) - expected).abs().max() > 0.1
    every = compiled(decoder(None, None, None), sparse)(IDS)
    torch.testing.assert_close(every, decoder(own, own, own)(IDS), atol=1e-4, rtol=1e-4)


def masks_of(model: nn.Module, **more: Any) -> list[m.Mask]:
    with PagedLM(model, kv_tokens=512, max_seqs=2, inner="eager", **more) as lm:
        assert lm.report is not None
        return [site.spec.mask for site in lm.report.sites]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_a_model_are_recognised_and_chosen(kind: str) -> None:
    """Written out or asked for, it is one mask, and asking for what there is changes nothing."""
    sparse, own = KINDS[kind]
    written = [site.spec.mask for site in explain(decoder(own, None), IDS).sites]
    assert isinstance(written[0], m.BlockSparse) and written[1] == m.Causal()
    assert masks_of(decoder(None, None), block_sparse=replace(sparse, layers=(0,))) == written
    assert masks_of(decoder(own, None), block_sparse=replace(sparse, layers=(0,))) == written
    size = 16 * written[0].block_size
    spec = AttentionSpec(32, 8, 128, 128, replace(written[0], block_size=size))
    assert choose(spec, CUDA, torch.bfloat16, 16).kernel == "block_sparse"


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "steps") for kind in KINDS), ("KV heads", "graphs"), ("KV heads", "fp8"), ("rank 2 of 4", "graphs")],
)
def test_a_server_with_the_option(kind: str, how: str) -> None:
    """Prompts in chunks beside decodes, pages that are no whole blocks: every request as the model with masks has it alone."""
    sparse, own = KINDS[kind]
    prompts, how_many = prompts_of([41, 3, 67, 18], seed=3), Sampling(max_new_tokens=9)
    more: dict[str, Any] = {"kv_dtype": "fp8_e4m3"} if how == "fp8" else {}

    def served(model: Decoder, **options: Any) -> list[list[int]]:
        with PagedLM(
            model, 300, 3, max_seqs=3, inner="eager", max_batch_tokens=16, poison=True, kernel="reference", **more, **options
        ) as lm:
            lm = as_on_a_gpu(lm) if how == "graphs" else lm
            return lm.generate(prompts, how_many)

    found = served(decoder(None, None), block_sparse=replace(sparse, layers=(0,)))
    expected = (
        [alone(decoder(own, None), prompt, how_many, POSITIONS) for prompt in prompts]
        if how != "fp8"
        else served(decoder(own, None))
    )
    assert found == expected
    assert found != [alone(decoder(None, None), prompt, how_many, POSITIONS) for prompt in prompts]


@interpreted
@pytest.mark.parametrize("kind", ["KV heads", "rank 2 of 4"])
def test_a_server_with_the_option_on_the_kernel(kind: str) -> None:
    sparse, own = KINDS[kind]
    prompts, how_many = prompts_of([41, 3, 30], seed=3), Sampling(max_new_tokens=4)
    with PagedLM(
        decoder(None), 300, 4, max_seqs=3, inner="eager", max_batch_tokens=16, kernel="block_sparse", block_sparse=sparse
    ) as lm:
        assert lm.generate(prompts, how_many) == [alone(decoder(own), prompt, how_many, POSITIONS) for prompt in prompts]
        assert [site.kernel for site in lm.report.sites] == ["block_sparse"]


def test_the_report_says_who_asked(tmp_path: Any) -> None:
    """The seeds' runner never passed the flag on, and nothing said so."""
    with PagedLM(decoder(None, None), kv_tokens=64, inner="eager", block_sparse=params(layers=[1])) as lm:
        report = lm.report
    assert [site.asked for site in report.sites] == ["", "asked for by block_sparse"]
    assert report.sites[1].spec.mask == m.BlockSparse(4, 1, 4, 1)
    for text in (str(report), report.to_html()):
        assert text.count("asked for by block_sparse") == 1


def test_explaining_and_calibrating_follow_it() -> None:
    asked, prompts = params(local=1, stride=64), prompts_of([40])
    for report in (explain(decoder(None), IDS, block_sparse=asked), explain(decoder(None), paged=True, block_sparse=asked)):
        assert [site.asked for site in report.sites] == ["asked for by block_sparse"]
    dense, sparse = (calibrate(decoder(None, None), prompts, block_sparse=each) for each in (None, asked))
    assert dense[0] == sparse[0] and dense[1] != sparse[1]  # what the first layer says, the second layer keeps
    assert sparse == calibrate(decoder(Sparse(4, 1, 64, 16), None), prompts, block_sparse=replace(asked, layers=[1]))


@pytest.mark.usefixtures("no_grad")
def test_beside_a_window() -> None:
    """Both bound the keys, and both stay named: a kernel skips by both."""
    sparse, own = KINDS["each head its own"]
    [both] = masks_of(decoder(None, window=20), block_sparse=sparse)
    assert isinstance(both, m.All) and set(both.masks) == {m.Window(19), m.BlockSparse(4, 1, 4, 1)}
    prompts, how_many = prompts_of([50, 7]), Sampling(max_new_tokens=6)
    with PagedLM(decoder(None, window=20), 300, 4, inner="eager", max_batch_tokens=32, block_sparse=sparse) as lm:
        found = lm.generate(prompts, how_many)
    assert found == [alone(decoder(own, window=20), prompt, how_many, POSITIONS) for prompt in prompts]


# What cannot be is an error, never a dense answer


def served_with(model: nn.Module, sparse: Any, **more: Any) -> None:
    PagedLM(model, kv_tokens=64, max_seqs=2, inner="eager", block_sparse=sparse, **more).close()


@pytest.mark.parametrize(
    ("sparse", "why"),
    [
        (replace(params(), num_heads=8), r"site 0 \(layers.0\) has 4 query heads and 2 KV heads, and num_heads=8, num_kv_heads=2"),
        (replace(params(), num_kv_heads=4), "4 query heads and 2 KV heads, and num_heads=4, num_kv_heads=4"),
        (params(layers=(0, 2)), r"layers=\(0, 2\); attention that can be read is at 2 sites"),
        ({"block_size": 4}, "give a compile_attn.BlocksparseParams"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(sparse: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        served_with(decoder(None, None), sparse)
    with pytest.raises(ValueError, match=why):
        compiled(decoder(None, None), sparse)(IDS)


def test_longer_sequences_than_were_asked_for(no_grad: None) -> None:
    short = replace(params(), max_seqlen=32)
    with PagedLM(decoder(None), kv_tokens=640, max_seqs=3, inner="eager", block_sparse=short) as lm:
        with pytest.raises(ValueError, match="a prompt of 33 tokens; the cache holds at most 32 a sequence"):
            lm.submit([1] * 33)
        assert len(lm.generate([[1] * 30], max_new_tokens=9)[0]) == 3  # two more tokens fit, and one is not kept
    run = compiled(decoder(None), short)
    cache = PagedKVCache(640, device="cpu")
    paged = compiled(decoder(None), short, cache=cache)
    batch = cache.batch([compile_attn.Chunk(cache.add(), [1, 2, 3])])
    with pytest.raises(ValueError, match=r"sequences of 640 tokens fit in the cache, .*PagedKVCache\(max_seq_len=32\)"):
        paged(batch.input_ids)
    torch._dynamo.mark_dynamic(ids := IDS[:, :20].clone(), 1)
    assert run(ids).shape == (2, 20, 31)
    run(IDS[:, :32])
    with pytest.raises(ValueError, match="block_sparse: 33 keys, and max_seqlen=32"):
        run(IDS[:, :33])


def test_a_cache_that_grows_past_them(no_grad: None) -> None:
    cache = PagedKVCache(32, device="cpu")
    run = compiled(decoder(None), replace(params(), max_seqlen=32), cache=cache)
    seq = cache.add()
    run(cache.batch([compile_attn.Chunk(seq, [1, 2, 3])]).input_ids)
    cache.free(seq)
    cache.resize(640)
    with pytest.raises(ValueError, match="sequences of 640 tokens fit in the cache"):
        run(cache.batch([compile_attn.Chunk(cache.add(), [1, 2, 3])]).input_ids)


class OneHead(nn.Module):
    """Attention of one head over x itself."""

    def __init__(self, seen: Callable[[Tensor, Tensor], Tensor], shows: bool = False) -> None:
        super().__init__()
        self.seen, self.shows = seen, shows

    def forward(self, x: Tensor) -> Any:
        place = torch.arange(x.shape[2])
        scores = (x @ x.mT).masked_fill(~self.seen(place[:, None], place), float("-inf"))
        shares = scores.softmax(-1)
        return (shares @ x, shares) if self.shows else shares @ x


ONE = BlocksparseParams(64, 1, 1, 4, 1, 4)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize(
    ("model", "error", "why"),
    [
        (OneHead(lambda i, j: i > j - 100), ValueError, "is not causal"),
        (OneHead(lambda i, j: (j <= i) & (j < 1)), ValueError, "might leave a query without keys"),
        (OneHead(lambda i, j: j <= i, shows=True), RefusedError, "of which all attention can be read; paged_attn left 1 attention"),
        (nn.Linear(8, 8), ValueError, "no attention was found"),
    ],
    ids=["not causal", "no key", "unreadable", "none"],
)
def test_models_that_it_does_not_fit(model: nn.Module, error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        compiled(model, ONE, on_rejected="keep")(torch.randn(1, 1, 20, 8))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_sequences_of_one_head_are_no_heads(batch: int) -> None:
    """Their number may be a constant. Without an axis of heads nothing says which they are, but the reason says what to do."""
    blocks = ONE.block_mask(5)[0].repeat_interleave(4, 0).repeat_interleave(4, 1)
    own = OneHead(lambda i, j: (j <= i) & blocks)
    x, dense = torch.randn(batch, 1, 20, 8), OneHead(lambda i, j: j <= i)
    torch.testing.assert_close(compiled(dense, ONE)(x), own(x), atol=1e-5, rtol=1e-5)
    assert (dense(x) - own(x)).abs().max() > 0.1
    spec = explain(dense, x).sites[0].spec
    assert (spec.num_q_heads, spec.num_kv_heads) == (1, 1)

    def flat(x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        return (x @ x.mT).masked_fill(place[:, None] < place, float("-inf")).softmax(-1) @ x

    if batch > 1:
        with pytest.raises(ValueError, match=rf"has {batch} query heads .*sequences of one head, .* of their own: unsqueeze\(1\)"):
            compiled(flat, ONE)(x[:, 0])


def causal(shares: Tensor) -> Tensor:
    return shares * torch.ones(shares.shape[-2:]).tril()


NO_SOFTMAX: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda q, k, v: causal((q @ k.mT).sigmoid()) @ v,
    "linear, causal": lambda q, k, v: causal(q @ k.mT) @ v,
    "linear, keys by values": lambda q, k, v: q @ (k.mT @ v),
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", causal(torch.einsum("bhid,bhjd->bhij", q, k).relu()), v),
    "product and sum": lambda q, k, v: (causal(q @ k.mT).unsqueeze(-1) * v.unsqueeze(2)).sum(3),
}


class Beside(nn.Module):
    """Softmax attention, and something else that sums over tokens."""

    def __init__(self, other: Callable[..., Tensor]) -> None:
        super().__init__()
        self.other, self.w = other, nn.Linear(8, 8)
        self.register_buffer("mix", torch.randn(32, 32))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.w(out) + self.other(q, k, self.w(v))


TWO = BlocksparseParams(64, 2, 2, 4, 1, 4)


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("length", [20, "dynamic"])
@pytest.mark.parametrize("name", NO_SOFTMAX)
def test_attention_without_a_softmax_is_not_passed_over(name: str, length: Any) -> None:
    """Where a mask is asked for everywhere; `layers` says where it is meant."""
    qkv = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    for each in qkv if length == "dynamic" else ():
        torch._dynamo.mark_dynamic(each, 2)
    model = Beside(NO_SOFTMAX[name])
    why = r"no softmax before it, which block_sparse cannot narrow; say by layers=range\(1\)"
    with pytest.raises(RefusedError, match=why) as refused:
        compiled(model, TWO, on_rejected="keep")(*qkv)
    [rejected] = refused.value.report.rejected
    assert "test_seeds_block_sparse.py" in rejected.where.source
    torch._dynamo.reset()
    found = compiled(model, replace(TWO, layers=range(1)))(*qkv)
    assert (found - model(*qkv)).abs().max() > 0.1
    torch._dynamo.reset()
    assert explain(model, *qkv).rejected == ()  # without the option it is not attention that could be served


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("length", [20, "dynamic"])
@pytest.mark.parametrize("name", ["a mean", "a mixing weight", "shares of channels"])
def test_sums_over_tokens_that_are_no_attention(name: str, length: Any) -> None:
    others: dict[str, Callable[..., Tensor]] = {
        "a mean": lambda q, k, v: (v * q[..., :1]).sum(2, keepdim=True) / q[..., :1].sum(2, keepdim=True),
        "a mixing weight": lambda q, k, v: causal(model.mix[: q.shape[2], : q.shape[2]]) @ v,
        "shares of channels": lambda q, k, v: (v.unsqueeze(-1) * k.unsqueeze(-2)).sum(-1),
    }
    model = Beside(others[name])
    qkv = [torch.randn(1, 2, 20, 8) for _ in range(3)]
    for each in qkv if length == "dynamic" else ():
        torch._dynamo.mark_dynamic(each, 2)
    compiled(model, TWO)(*qkv)


@pytest.mark.usefixtures("no_grad")
def test_a_model_of_two_graphs_is_refused() -> None:
    """Which site is which layer could not be known."""

    def broken(x: Tensor) -> Tensor:
        x = x @ x.mT @ x
        torch._dynamo.graph_break()
        return OneHead(lambda i, j: j <= i)(x)

    with pytest.raises(ValueError, match="block_sparse: the model does not compile as one graph"):
        compiled(broken, ONE)(torch.randn(1, 1, 20, 8))


# The kernel


def a_tenth() -> list[BlocksparseParams]:
    """Of the configurations that a loop decides, those of a last rank; blocks that the kernel can skip."""
    found = [
        every_rank(*layout, stride, local, 16 * block, homo_head=alike)[-1]
        for layout, stride, local, block, alike in CONFIGURATIONS
    ]
    found += [replace(one, block_size=4 * one.block_size) for one, _ in phases()]
    return found[::10]


@interpreted
@pytest.mark.parametrize("part", range(5))
def test_a_tenth_of_all_configurations_on_the_kernel(part: int) -> None:
    """Decodes, chunks and rows of several tokens in one batch."""
    every = a_tenth()
    assert len(every) == 65
    for one in every[part::5]:
        spec = AttentionSpec(one.num_heads, one.num_kv_heads, 16, 16, one.mask(), 0.3)
        batch = paged_batch(spec, [(150, 1), (90, 4), (33, 20), (0, 7)], page_size=16, pad_tokens=1)
        at = batch.metadata
        kv = Paged(batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
        found, expected = (backend(name).attend(batch.q, kv, [], spec) for name in ("block_sparse", "reference"))
        torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0, msg=lambda text, one=one: f"{one}: {text}")


@interpreted
@pytest.mark.parametrize("more", [{}, {"homo_head_group": True}], ids=repr)
def test_tiles_of_several_programs(more: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads that slide see more or fewer blocks than the first ones, by which the work of a sequence is told."""
    for name, size in {"_KEYS_A_PROGRAM": 16, "_KEYS_ALONE": 0, "_KEYS_A_SPLIT": 32}.items():
        monkeypatch.setattr(tiles, name, size)
    triton_launch.forget()
    for rank in range(2):
        mask = BlocksparseParams(512, 4, 2, 16, 1, 5, tp_size=2, tp_rank=rank, **more).mask()
        for sequences in ([(210, 1), (97, 1), (15, 1)], [(150, 3), (70, 20)]):
            batch = paged_batch(AttentionSpec(4, 2, 16, 16, mask, 0.3), sequences, page_size=16, pad_tokens=1)
            found, expected = (batch.attend([], name) for name in ("block_sparse", "reference"))
            torch.testing.assert_close(found, expected, atol=FLOAT32, rtol=0)
    triton_launch.forget()


@interpreted
def test_pages_that_no_head_of_a_kv_head_sees_are_never_read() -> None:
    """Where KV heads slide, each has pages of its own to read: NaN in all others."""
    spec = AttentionSpec(
        4, 2, 16, 16, BlocksparseParams(512, 4, 2, 16, 1, 8, homo_head_group=True, tp_size=2, tp_rank=1).mask(), 0.3
    )
    for sequences in ([(350, 1), (200, 1)], [(350, 4)], [(336, 16), (200, 1)]):
        batch = paged_batch(spec, sequences, page_size=16)
        expected = batch.attend([], "reference")
        assert hide(batch) > 30
        torch.testing.assert_close(batch.attend([], "block_sparse"), expected, atol=FLOAT32, rtol=0)


def test_heads_of_a_kv_head_share_a_tile_where_they_see_the_same() -> None:
    from compile_attn.kernels.block_sparse import CUTS

    def group(together: int) -> int:
        spec = AttentionSpec(32, 8, 128, 128, m.BlockSparse(64, 1, 16, 2, 8, together))
        return backend("block_sparse").tiles(spec, torch.bfloat16, 4096, 227 << 10, 0).group  # type: ignore[attr-defined]

    assert (group(4), group(8), group(2), group(1)) == (4, 4, 1, 1)
    assert CUTS[128, False] != CUTS[128, True]


@pytest.mark.skipif(NO_TRITON, reason="there is no Triton for this platform")
def test_compiles_for_an_h200(tmp_path: Any) -> None:
    compile_for_an_h200(tmp_path, "sparse, KV heads slide", "sparse decode, KV heads slide")


@pytest.mark.gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    "mask", [m.BlockSparse(64, 1, 8, 2, 8, 4), m.BlockSparse(64, 2, 8, 1, 5), m.BlockSparse(16, 1, 32, 8, 4, 8)], ids=repr
)
def test_slides_on_a_gpu(mask: m.BlockSparse, phase: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        check_on_gpu(on_gpu(AttentionSpec(8, 2, 128, 128, mask, 0.09), PHASES[phase], dtype, pad_tokens=3))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["KV heads", "rank 2 of 4"])
def test_a_server_with_the_option_on_a_gpu(kind: str) -> None:
    """From CUDA graphs, on the kernel that skips."""
    sparse, own = KINDS[kind]
    prompts, how_many = prompts_of([41, 3, 67, 18], seed=3), Sampling(max_new_tokens=9)
    with PagedLM(
        decoder(None, None).cuda(), 320, 4, max_seqs=4, kernel="block_sparse", cuda_graphs=True, block_sparse=sparse
    ) as lm:
        found = lm.generate(prompts, how_many)
        assert lm.cuda_graphs
    assert found == [alone(decoder(own, own), prompt, how_many, POSITIONS) for prompt in prompts]


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_site_that_reads_another(place: int, through: bool) -> None:
    """Its operand is what replaces the first one, not what that was."""
    params = BlocksparseParams(32, 4, 4, 2, 1, 3)
    mask = (
        params.block_mask(7).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :13, :13]
        & torch.ones(13, 13, dtype=torch.bool).tril()
    )

    def attend(*qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=mask, is_causal=mask is None)

    def twice(*qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        first = attend(*qkv, mask=mask)
        if through:
            first = first.transpose(1, 2).reshape(1, 13, 32).view(1, 13, 4, 8).transpose(1, 2)
        return attend(*qkv[:place], first, *qkv[place + 1 :], mask=mask)

    torch.manual_seed(0)
    qkv = [torch.randn(1, 4, 13, 8) for _ in range(3)]
    options = {"inner": "eager", "block_sparse": params}
    with torch.no_grad():
        compiled = torch.compile(twice, backend="paged_attn", options=options)
        torch.testing.assert_close(compiled(*qkv), twice(*qkv, mask=mask[None]), atol=1e-5, rtol=1e-5)

"""Do ops that hide an attention compute the same when they are taken apart, and is the result one dialect on every path?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from compile_attn.passes.decompositions import DECOMPOSITIONS
from tests.capture import captured
from tests.models.families import enliven
from tests.models.handwritten import HEADS, VOCAB, WIDTH
from tests.models.handwritten_more import decoder
from tests.models.harness import assert_same_logits, assert_same_tokens, paged

_aten = torch.ops.aten
B, T, E, H = 2, 5, 16, 4
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch._dynamo.reset()
    yield
    torch.backends.mha.set_fastpath_enabled(before)
    torch._dynamo.reset()


def _masks() -> list[tuple[Tensor | None, int | None]]:
    causal = torch.ones(T, T).triu(1) > 0
    padding = torch.arange(T).ge(torch.tensor([[T], [3]]))
    both = (causal | padding[:, None, None]).expand(B, H, T, T).contiguous()
    return [(None, None), (causal, 0), (padding, 1), (both, 2), (torch.zeros(B, H, T, T).masked_fill(both, -torch.inf), 2)]


def _weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) / 4 for shape in shapes]


@pytest.mark.filterwarnings("ignore:Converting mask")
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("need, average", [(False, False), (True, True), (True, False)])
def test_native_multi_head_attention(case: int, need: bool, average: bool) -> None:
    mask, kind = _masks()[case]
    x, *state = _weights((B, T, E), (3 * E, E), (3 * E,), (E, E), (E,))
    with torch.no_grad():
        wanted = torch._native_multi_head_attention(x, x, x, E, H, *state, mask, need, average, kind)
        found = DECOMPOSITIONS[_aten._native_multi_head_attention.default](x, x, x, E, H, *state, mask, need, average, kind)
    torch.testing.assert_close(found[0], wanted[0], atol=TOLERANCE, rtol=TOLERANCE)
    if need:
        torch.testing.assert_close(found[1], wanted[1], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Converting mask")
@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer(case: int, gelu: bool, norm_first: bool) -> None:
    mask, kind = _masks()[case]
    x, *attention = _weights((B, T, E), (3 * E, E), (3 * E,), (E, E), (E,))
    rest = _weights((E,), (E,), (E,), (E,), (24, E), (24,), (E, 24), (E,))
    args = (x, E, H, *attention, gelu, norm_first, 1e-5, *rest, mask, kind)
    with torch.no_grad():
        wanted = torch._transformer_encoder_layer_fwd(*args)
        found = DECOMPOSITIONS[_aten._transformer_encoder_layer_fwd.default](*args)
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("fast", [True, False])
def test_encoder_is_one_dialect_on_either_path(fast: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(fast)
    layer = nn.TransformerEncoderLayer(E, H, 24, batch_first=True).eval()
    with torch.no_grad():
        normalized = captured(layer, torch.randn(1, T, E))
    names = {str(node.target) for node in normalized.module.graph.nodes if node.op == "call_function"}
    assert "aten.scaled_dot_product_attention.default" in names
    assert not any("native" in name or "encoder" in name for name in names)


class Attention(nn.Module):
    """nn.MultiheadAttention, batch first, a mask of bools: its fast path in eval mode."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.tok, self.head, self.need_weights = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB), need_weights
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tok(input_ids)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.head(x + self.attn(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["torch_encoder", "torch_mha", "weights", "no_weights"])
def test_models_page_on_either_path(name: str, fast: bool) -> None:
    torch.backends.mha.set_fastpath_enabled(fast)
    model = Attention(name == "weights") if name.endswith("weights") else decoder(name)
    enliven(model)
    case = paged(model.eval(), VOCAB)
    assert_same_logits(case, assert_same_tokens(case))


MASK2, MASK3 = torch.rand(T, T) > 0.5, torch.rand(B, T, E) > 0.5


@pytest.mark.parametrize(
    ("x", "places", "value"),
    [
        (torch.randn(B, T, E), [MASK3], torch.tensor(2)),
        (torch.randn(B, T, E), [MASK3], torch.tensor([2.5])),
        (torch.randn(B, H, T, T), [None, None, MASK2], torch.tensor(-1e9)),
        (torch.randn(B, T, E), [MASK3[..., 0]], torch.randn(E)),
        (torch.randn(T, T, E), [MASK2], torch.randn(1)),
        (torch.randn(B, T, E), [None, MASK2[0]], torch.randn(E)),
        (torch.randn(B, T, E).half(), [MASK3], torch.tensor(1e-3, dtype=torch.float64)),
    ],
)
def test_masked_writing(x: Tensor, places: list[Tensor | None], value: Tensor) -> None:
    written = _aten.index_put(x, places, value.to(x.dtype))
    assert torch.equal(DECOMPOSITIONS[_aten.index_put.default](x, places, value.to(x.dtype)), written)
    assert DECOMPOSITIONS[_aten.index_put.default](x, places, value.to(x.dtype), True) is NotImplemented


@pytest.mark.parametrize(
    ("places", "value"),
    [
        ([MASK3], torch.randn(int(MASK3.sum()))),
        ([torch.tensor([0, 1])], torch.tensor(1.0)),
        ([MASK3[..., 0, 0]] * 2, torch.tensor(1.0)),
    ],
)
def test_writing_elsewhere_stays(places: list[Tensor], value: Tensor) -> None:
    assert DECOMPOSITIONS[_aten.index_put.default](torch.randn(B, T, E), places, value) is NotImplemented

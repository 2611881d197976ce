"""Form 20: attention that is one op already: SDPA with its arguments, its ATen forms, flex_attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from compile_attn.kernels.mask import Bidirectional, Causal, Window
from tests.forms.form import SCALE, Form, NearMiss, additive, repeat_kv, seen, spec


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nanoGPT's fast path, transformers with no mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=True)


def sdpa_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Granite, Gemma: a scale of their own."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)


def sdpa_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3)


def sdpa_bool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """transformers' sdpa form: a mask of bools, here with a window, and repeated keys."""
    n = q.shape[2]
    mask = (seen(n) & torch.ones(n, n, dtype=torch.bool).triu(-3))[None, None].expand(q.shape[0], 1, n, n)
    return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=mask, scale=SCALE)


def sdpa_strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=mask, scale=SCALE)


def sdpa_additive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Older transformers: an additive mask."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=additive(q.shape[2]))


def sdpa_by_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = additive(q.shape[2]) + v.sum(-1)[:, :, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Encoders."""
    return F.scaled_dot_product_attention(q, k, v)


def safe_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ATen's decomposition of SDPA: rows without keys give 0."""
    scores = (q * SCALE) @ k.mT + torch.where(seen(q.shape[2]), 0.0, -torch.inf)
    return torch.ops.aten._safe_softmax(scores, -1) @ v


def safe_softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._safe_softmax((q * SCALE) @ k.mT, -2) @ v


def flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What SDPA becomes on a CPU in graphs exported after dispatch."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]


def flash_cpu_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with a mask and a scale."""
    n = q.shape[2]
    mask = torch.zeros(n, n).masked_fill(~(seen(n) & torch.ones(n, n, dtype=torch.bool).triu(-3)), -torch.inf)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=0.25)[0]


def math_op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What SDPA becomes where no fused kernel serves, and under a forced math backend."""
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, True, scale=0.7)[0]


def flash_cpu_statistics(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)


def math_op_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(q, k, v, None, 0.3, True)[0]


def _documents(batch: int, tokens: int) -> Tensor:
    return (torch.arange(tokens) // 5).repeat(batch, 1)


def _causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return (i >= j) & (i - j <= 3)


def _flex(mask: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask, None, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=blocks, scale=0.5)  # type: ignore[return-value]


def flex_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torchtitan, attention-gym: flex_attention with a mask_mod."""
    return _flex(_near, q, k, v)


def flex_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """attention-gym: flex_attention with a score_mod, here a softcap with the mask inside."""
    from torch.nn.attention.flex_attention import flex_attention

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, 2.0 * torch.tanh(s / 2.0), -torch.inf)

    return flex_attention(q, k, v, score_mod=score)  # type: ignore[return-value]


def flex_groups(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """torchtune, transformers' flex form: shared heads, a captured tensor, mask and score apart."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + slopes[h] * (j - i)

    blocks = create_block_mask(_causal, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)  # type: ignore[return-value]


def flex_documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    """attention-gym's document masking."""

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (document[b, i] == document[b, j])

    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(same, q.shape[0], None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=blocks)  # type: ignore[return-value]


def flex_other_documents(q: Tensor, k: Tensor, v: Tensor, document: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def other(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((i >= j) & (document[b, i] != document[b, j]), s, -torch.inf)

    return flex_attention(q, k, v, score_mod=other).nan_to_num()  # type: ignore[return-value, union-attr]


def flex_other_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

    made = create_block_mask(_near, None, None, q.shape[2], k.shape[2], device="cpu")
    tables = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    blocks = BlockMask.from_kv_blocks(*tables, mask_mod=_causal, seq_lengths=(q.shape[2], k.shape[2]))
    return flex_attention(q, k, v, block_mask=blocks)  # type: ignore[return-value]


def flex_statistics(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def flex_of_rows(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + slopes.sum() * (j - i)

    return flex_attention(q, k, v, score_mod=score, enable_gqa=True)  # type: ignore[return-value]


_BIDIRECTIONAL = "bidirectional|causal|future|left"
_STATISTICS = NearMiss(flash_cpu_statistics, "statistics")
FORMS = (
    Form(sdpa_causal, spec(), near=(NearMiss(sdpa_dropout, "dropout"),)),
    Form(sdpa_scaled, spec(scale=0.7), near=(NearMiss(sdpa_dropout, "dropout"),)),
    Form(sdpa_bool, spec(Window(3), kv=2), near=(NearMiss(sdpa_strict, "may see no key at all"),)),
    Form(sdpa_additive, spec(), near=(NearMiss(sdpa_by_values, "computed from the tokens", paged=True),)),
    Form(sdpa_all, spec(Bidirectional()), paged=_BIDIRECTIONAL, near=(NearMiss(sdpa_dropout, "dropout"),)),
    Form(safe_softmax, spec(), near=(NearMiss(safe_softmax_over_queries, "another axis|not the key axis"),)),
    Form(flash_cpu, spec(), near=(_STATISTICS,)),
    Form(flash_cpu_masked, spec(Window(3), scale=0.25), near=(_STATISTICS,)),
    Form(math_op, spec(scale=0.7), near=(NearMiss(math_op_dropout, "dropout"),)),
)
FLEX = (
    Form(flex_window, spec(Window(3), scale=0.5), near=(NearMiss(flex_other_blocks, "blocks were made from"),)),
    Form(flex_score, spec(Causal(), softcap=2.0), near=(NearMiss(flex_statistics, "logsumexp"),)),
    Form(
        flex_groups,
        spec(kv=2),
        lambda s: s.bias is not None,
        {"slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
        near=(NearMiss(flex_of_rows, "sum in score_mod_0"),),
    ),
)
FLEX_DATA = (
    Form(
        flex_documents,
        spec(Causal()),
        inputs={"document": _documents},
        paged="data of the call",
        near=(NearMiss(flex_other_documents, "may see no key at all"),),
    ),
)

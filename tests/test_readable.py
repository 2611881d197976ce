"""Can two graphs be compared line by line?"""

from __future__ import annotations

import difflib
import re

import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from compile_attn.passes.readable import readable
from tests.capture import captured


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        return x.flatten(0, 1).sin(), x


def _written(length: int) -> str:
    ids = torch.arange(length)[None] % 8
    normalized = captured(Model(), ids, dynamic=[(ids, 1)])
    return readable(normalized.module.graph, normalized.sources)


def test_a_graph_as_text() -> None:
    """Inputs under the user's names, sizes as symbols, each node under its module and line."""
    text = re.sub(r"\S*test_readable.py:\d+", "FILE:LINE", _written(5))
    assert_expected_inline(
        text,
        """\
input table.weight: float32[8, 4]
input s0
input ids: int64[1, s0]

# table  FILE:LINE: x = self.table(ids)
embedding: float32[1, s0, 4] = aten.embedding.default(table.weight, ids)

# FILE:LINE: return x.flatten(0, 1).sin(), x
view: float32[s0, 4] = aten.view.default(embedding, [s0, 4])
sin: float32[s0, 4] = aten.sin.default(view)
return (sin, embedding)""",
    )


def test_names_do_not_depend_on_the_call() -> None:
    assert not list(difflib.unified_diff(_written(5).splitlines(), _written(7).splitlines()))

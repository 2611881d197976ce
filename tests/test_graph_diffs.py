"""Do the goldens in graph_diffs/ still say what is read in these models, and what it becomes?

After a deliberate change `pytest tests/test_graph_diffs.py --update-graph-diffs` writes them anew: read their diff before it is
committed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.models.handwritten_more import decoder
from tests.models.refused import REFUSED

IDS = torch.arange(12)[None]
HANDWRITTEN = (
    *("einsum", "head_list", "exp_sum", "alibi", "rope_table_grouped", "t5_bias", "sinks", "window_softcap_qknorm", "dilated"),
    *("temperature", "learned_slope", "bshd_mqa"),
)
REJECTED = ("talking_heads", "double_normalise")
PAGED = ("nanogpt", "alibi", "last_row")


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten(name: str, graph_diff: Callable[..., None]) -> None:
    graph_diff(decoder(name), (IDS,))


@pytest.mark.parametrize("name", PAGED)
def test_paged(name: str, graph_diff: Callable[..., None]) -> None:
    graph_diff(decoder(name).eval(), paged=True)


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str, graph_diff: Callable[..., None]) -> None:
    graph_diff(REFUSED[name][0](), (IDS,))

"""Does a server say the same, whatever mode of torch its caller is in?"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compile_attn.cache import Chunk, PagedKVCache
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from compile_attn.step import StepBuffers
from tests.tiny import alone, as_on_a_gpu, by_hand, prompts_of, tiny

PROMPTS = prompts_of([30, 5, 9])
HOW = Sampling(max_new_tokens=4)
SETTINGS: dict[str, Any] = {"kv_tokens": 160, "page_size": 4, "max_seqs": 4, "inner": "eager"}


def wanted() -> list[list[int]]:
    return [alone(tiny(), prompt, HOW) for prompt in PROMPTS]


@pytest.mark.parametrize("graphs", [False, True])
def test_what_inference_mode_made_serves_outside_of_it(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepBuffers, "width", lambda self, pages, page_size: -(-pages // 3) * 3)  # tables are made at many steps
    want = wanted()
    with torch.inference_mode():
        lm = PagedLM(tiny(), **SETTINGS)
        assert (as_on_a_gpu(lm) if graphs else lm).generate(PROMPTS[:1], HOW) == want[:1]
    assert lm.generate(PROMPTS, HOW) == want
    with torch.inference_mode():
        lm.cache.resize(320)
        assert lm.generate(PROMPTS[:1], HOW) == want[:1]
    assert lm.generate(PROMPTS, HOW) == want


def test_no_mode_compiles_or_records_again() -> None:
    with as_on_a_gpu(PagedLM(tiny(), **SETTINGS)) as lm:
        lm.warm_up()
        before = lm.cache.compilations, lm.cuda_graphs
        for mode in (torch.inference_mode(), torch.enable_grad(), torch.no_grad()):
            with mode:
                assert lm.generate(PROMPTS, HOW) == wanted()
        assert (lm.cache.compilations, lm.cuda_graphs) == before


def test_a_cache_that_inference_mode_has_filled() -> None:
    model = tiny()
    cache = PagedKVCache(160, 4, 4)
    step = by_hand(model, cache)
    seq = cache.add()
    want = model(torch.tensor([PROMPTS[0]]))[0]
    with torch.inference_mode():
        first = step(cache.batch([Chunk(seq, PROMPTS[0][:20], "all")]).input_ids)[0]
    with torch.no_grad():
        second = step(cache.batch([Chunk(seq, PROMPTS[0][20:], "all")]).input_ids)[0]
    torch.testing.assert_close(torch.cat([first, second]), want)


def test_another_default_device() -> None:
    """As torch.set_default_device("cuda") beside a model on the CPU; "meta" fails wherever a tensor lands on it."""
    model, want = tiny(), wanted()
    with torch.device("meta"), as_on_a_gpu(PagedLM(model, **SETTINGS)) as lm:
        assert lm.generate(PROMPTS, HOW) == want


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_inference_mode_on_a_gpu(graphs: bool) -> None:
    with torch.inference_mode():
        lm = PagedLM(tiny().cuda(), cuda_graphs=graphs, **SETTINGS)
        assert lm.generate(PROMPTS, HOW) == wanted()
    assert lm.generate(PROMPTS, HOW) == wanted()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_another_gpu_than_the_current_one() -> None:
    """The host waits for the copy of its tokens on the stream of the model's device."""
    with PagedLM(tiny().to("cuda:1"), **SETTINGS) as lm:
        for _ in range(5):
            assert lm.generate(PROMPTS, HOW) == wanted()
        assert lm.cuda_graphs

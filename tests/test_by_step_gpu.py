"""Does a model whose steps are shared by several kernels say on a GPU what it should, in steps of all kinds?

Two kernels round differently, so where two tokens are as likely either is right: each new token must be the best, or as good as it,
after the tokens before it, by a float32 model that computes everything anew.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch

from bench.naive_llama import NaiveLlama, Shape, random_llama
from compile_attn.kernels import by_step, measured
from compile_attn.kernels.backend import Paged
from compile_attn.kernels.flash_providers import HopperExtension, HopperPackage
from compile_attn.kernels.reference import ReferenceBackend
from compile_attn.kernels.select import backend, choose
from compile_attn.kernels.spec import AttentionSpec
from compile_attn.kernels.speeds import PAGED, Point, parts_of
from compile_attn.lm import PagedLM
from compile_attn.sampling import Sampling
from tests.test_by_step import watched

SMALL = Shape(512, 512, 2, 4, 2, 512)  # heads of 128, two on a KV head
AS_LIKELY = 0.2  # of the spread of logits; rounding moves them by 0.03, a wrong key by 2
Inner = Literal["eager", "inductor"]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    yield
    by_step.forget()


def model_on(device: str) -> NaiveLlama:
    """Random, but attention is sharp enough that a wrong key changes tokens."""
    model = random_llama(SMALL, torch.device(device), torch.bfloat16)
    for block in model.blocks:
        block.attention.q_proj.weight.mul_(8)
    return model


def check_greedy(model: NaiveLlama, prompts: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> None:
    exact, same, count = copy.deepcopy(model).float(), 0, 0
    device = next(model.parameters()).device
    for prompt, new in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = exact(torch.tensor([[*prompt, *new]], device=device))[0, len(prompt) - 1 : -1]
        best, own = logits.max(-1).values, logits.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
        behind = (best - own) / logits.std(-1)
        assert float(behind.max()) < AS_LIKELY, (len(prompt), behind)
        same, count = same + int((behind == 0).sum()), count + len(new)
    assert same > 0.8 * count, (same, count)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(SMALL.vocabulary) for _ in range(length)] for length in lengths]


def serving(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """As if kernels had been measured so that tables of each width, and other steps than decodes, are served by others."""
    parts = parts_of(kernel)
    by_room = {256: 2, 1024: 1, 4096: 0, 16384: 2}  # `general` or FlashInfer for short sequences
    best = {point: parts[(by_room[point.shape.room] + (point.phase != "decode")) % len(parts)] for point in PAGED}
    monkeypatch.setattr(measured, "MICROSECONDS", {key_of(point): times_of(parts, name) for point, name in best.items()})
    by_step.forget()


def key_of(point: Point) -> tuple[str, int, int, int, int]:
    return point.phase, 128, 2, point.sequences, point.length


def times_of(parts: Sequence[str], best: str) -> Mapping[str, float]:
    return {name: 1.0 if name == best else 2.0 for name in parts}


def needs(kernel: str) -> None:
    """Skips where a library is not installed, and only there."""
    if "flash_attn" in parts_of(kernel) and not HopperExtension().found() and not HopperPackage().found():
        pytest.skip(f"FlashAttention 3 is not installed: {HopperExtension.install}")
    if "flashinfer" in parts_of(kernel) and importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed here: pip install flashinfer-python")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # FlashInfer warns of its own use of torch when it is imported
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kernel", ["general", "flash_attn|general", "flash_attn|flashinfer|general"])
def test_a_model_generates_through_several(kernel: str, inner: Inner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, chunks among decodes, and decodes from graphs, in tables that grow from 256 to 16384 tokens."""
    needs(kernel)
    serving(monkeypatch, kernel)
    seen, model = watched(monkeypatch, *parts_of(kernel)), model_on("cuda")
    prompts = prompts_of([3, 40, 990, 17, 4070, 300, 1, 120, 5000])
    settings = {"kv_tokens": 16384, "page_size": 16, "max_seqs": 6, "max_batch_tokens": 1024}
    with PagedLM(model, kernel=kernel, inner=inner, cuda_graphs=True, **settings) as lm:  # type: ignore[arg-type]
        lm.generate(prompts[:1], max_new_tokens=1)
        seen.clear()  # of compiling, which runs ops on made-up lengths
        for how in (slice(0, 2), slice(0, 4), slice(None)):  # short ones, long ones, all
            found = lm.generate(prompts[how], Sampling(max_new_tokens=48))
            check_greedy(model, prompts[how], found)
        assert {site.kernel for site in lm.report.sites} == {kernel}
        assert {one.tokens for one in lm.cuda_graphs} == {256, 1024, 4096, 16384}
    decodes = {(name, shape.room) for name, method, shape in seen if method == "attend" and shape.tokens == shape.sequences}
    names = [parts_of(kernel)[place % len(parts_of(kernel))] for place in (2, 1, 0, 2)]
    assert decodes == set(zip(names, (256, 1024, 4096, 16384), strict=True))
    assert {name for name, method, shape in seen if shape.tokens > shape.sequences} == set(parts_of(kernel))
    assert {name for name, method, _ in seen if method == "plan on host"} <= {"flash_attn", "flashinfer"}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kernel", ["general", "block_sparse", "flash_attn", "flashinfer"])
@pytest.mark.parametrize(
    ("most", "sizes"),
    [(256, {(2, 128), (2, 256), (6, 256)}), (1024, {(2, 128), (2, 256), (6, 512), (6, 1024)})],
    ids=["few tokens", "many tokens"],
)
def test_prompts_from_graphs(kernel: str, most: int, sizes: set[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, their chunks, and both beside decodes, of other lengths at every replay: no step runs without a graph."""
    needs(kernel)
    model = model_on("cuda")  # prompts that begin alike, and again, are computed whole
    settings = {"kv_tokens": 8192, "max_seqs": 6, "max_batch_tokens": most, "prefix_cache": False}
    prompts = [prompts_of([3, 40, 200, 17, 130, 1]), prompts_of([250, 9, 600, 77]), prompts_of([128]), prompts_of([1200, 2])]
    with PagedLM(model, kernel=kernel, inner="eager", cuda_graphs=True, **settings) as lm:  # type: ignore[arg-type]
        monkeypatch.setattr(lm._runner, "_run_once", None)
        for _ in range(2):
            for some in prompts:
                check_greedy(model, some, lm.generate(some, Sampling(max_new_tokens=24)))
            recorded = {(one.rows, one.new_tokens) for one in lm.cuda_graphs if one.new_tokens > one.rows}
            prompts = [some[::-1] for some in prompts]
        assert recorded == sizes


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_what_auto_takes() -> None:
    """By the committed measurements, on this machine; every part can."""
    for dim in (64, 128, 256):
        for group in (1, 4, 8):
            choice = choose(AttentionSpec(32, 32 // group, dim, dim), torch.device("cuda"), torch.bfloat16, 16)
            print(f"head size {dim}, group {group}: {choice.kernel}. {choice.steps}")
            assert backend(choice.kernel).name == choice.kernel and bool(choice.steps) == (len(parts_of(choice.kernel)) > 1)


def test_the_check_would_see_a_wrong_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine: right attention passes it, and one that forgets the newest key does not."""
    model, prompts, attend = model_on("cpu"), prompts_of([20, 3]), ReferenceBackend.attend

    def forgetful(self: Any, q: Any, kv: Paged, captured: Any, spec: Any) -> Any:
        return attend(self, q, kv._replace(positions=(kv.positions - 1).clamp(min=0)), captured, spec)

    with PagedLM(model, 256, max_seqs=2, kernel="reference", inner="eager") as lm:
        check_greedy(model, prompts, lm.generate(prompts, Sampling(max_new_tokens=12)))
        monkeypatch.setattr(ReferenceBackend, "attend", forgetful)
        with pytest.raises(AssertionError):
            check_greedy(model, prompts, lm.generate(prompts, Sampling(max_new_tokens=12)))

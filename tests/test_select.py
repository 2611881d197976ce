"""Is the kernel that serves a site one that can, and are the reasons against the others sentences with a cure?"""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compile_attn.kernels import flash_attn, measured, select
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Backend, Request
from compile_attn.kernels.select import UnsupportedError, _reasons, backend, choose, known_kernels
from compile_attn.kernels.spec import AttentionSpec, Feature
from compile_attn.kernels.speeds import parts_of
from tests.oracle import CAPTURED, SPECS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PLAIN = SPECS["gqa"]


def test_fp8_pages_on_a_gpu() -> None:
    """FlashAttention, the first for plain attention, reads none; one that does is chosen, and it is said how to get either."""
    for spec in (PLAIN, SPECS["window"]):
        choice = choose(spec, CUDA, torch.bfloat16, 16, kv_dtype=torch.float8_e4m3fn)
        assert choice.kernel == "general"
        assert (
            choice.passed_over["flash_attn"][0] == "reads no pages of float8_e4m3fn; use kv_dtype='auto', or choose kernel='auto'"
        )
        with pytest.raises(UnsupportedError, match=r"'flash_attn' was asked for, but it reads no pages of .* choose kernel='auto'"):
            choose(spec, CUDA, torch.bfloat16, 16, "flash_attn", kv_dtype=torch.float8_e4m3fn)


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MICROSECONDS", {})


@given(
    st.sampled_from(sorted(SPECS)),
    st.sampled_from([CPU, CUDA]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([None, 1, 16]),
)
def test_the_chosen_kernel_has_no_reason_against_it(
    name: str, device: torch.device, dtype: torch.dtype, page_size: int | None
) -> None:
    choice = choose(SPECS[name], device, dtype, page_size)
    assert not _reasons(choice.kernel, Request(SPECS[name], device, dtype, page_size))
    assert {*parts_of(choice.kernel), *choice.passed_over} == set(known_kernels())
    assert all(choice.passed_over.values())
    assert not {*parts_of(choice.kernel)} & {*choice.passed_over}


def test_preferences_on_a_cpu() -> None:
    assert choose(PLAIN, CPU, torch.float32, None).kernel == "sdpa"
    assert choose(PLAIN, CPU, torch.float32, 16).kernel == "reference"
    assert choose(SPECS["softcap"], CPU, torch.float32, None).kernel == "reference"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this platform")
def test_preferences_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured."""
    monkeypatch.setattr(select, "speeds", lambda request: None)
    monkeypatch.setattr(flash_attn, "_against_providers", lambda request: ("needs a provider",))
    assert choose(PLAIN, CUDA, torch.bfloat16, None).kernel == "sdpa"
    assert choose(SPECS["window"], CUDA, torch.bfloat16, None).kernel == "general"  # SDPA would read a mask from memory
    assert choose(SPECS["sinks"], CUDA, torch.bfloat16, None).kernel == "general"
    for spec in SPECS.values():
        choice = choose(spec, CUDA, torch.bfloat16, 16)
        assert choice.kernel == "general"
        assert choice.passed_over["reference"] == ("could; 'general' is preferred on cuda",)
    choice = choose(PLAIN, CUDA, torch.float64, 16)
    assert choice.kernel == "reference"
    assert "not in float64; cast the model" in choice.passed_over["general"][0]


def test_a_forced_kernel() -> None:
    choice = choose(PLAIN, CPU, torch.float32, None, "reference")
    assert choice.kernel == "reference"
    assert choice.passed_over["sdpa"] == ("kernel='reference' was asked for",)
    with pytest.raises(UnsupportedError) as error:
        choose(SPECS["everything"], CPU, torch.float32, 16, "sdpa")
    assert str(error.value) == (
        "kernel 'sdpa' was asked for, but it does not serve paged calls; choose kernel='auto'; "
        "it does not compute softcap 2.5; choose kernel='auto'; "
        "it does not compute attention sinks; choose kernel='auto'. "
        f"The site: {SPECS['everything'].words()}"
    )
    known = ", ".join(map(repr, known_kernels()))
    with pytest.raises(ValueError, match=f"unknown kernel 'flash'; known kernels are {known}, and 'auto'"):
        choose(PLAIN, CPU, torch.float32, None, "flash")


class Narrow(Backend):
    name = "narrow"
    features = frozenset({Feature.GQA})
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    head_dims = frozenset({64, 128})


def test_every_declared_limit_is_a_reason() -> None:
    spec = AttentionSpec(8, 2, 80, 64, m.Window(9), softcap=30.0)
    assert Narrow().reasons(Request(spec, CPU, torch.float32, 16)) == (
        "runs on cuda, not on cpu; move the model, or choose kernel='auto'",
        "computes in bfloat16, float16, not in float32; cast the model, or choose kernel='auto'",
        "has no head size 80 (only 64, 128); pad the heads, or choose kernel='auto'",
        "does not compute softcap 30.0; choose kernel='auto'",
        "does not compute the mask 'causal, window of 10 keys'; choose kernel='auto'",
        "does not compute head size 80 for queries and keys, 64 for values; choose kernel='auto'",
    )
    assert not Narrow().reasons(Request(AttentionSpec(8, 2, 64, 64), CUDA, torch.float16, 16))


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if choose(spec, CPU, torch.float32, None).kernel == "sdpa"])
def test_sdpa_equals_the_reference(name: str) -> None:
    spec, make = SPECS[name], torch.Generator().manual_seed(0)
    for tq, tk in ((12, 12), (5, 12)):  # positions of queries count from 0 even when there are fewer than keys
        q = torch.randn(2, spec.num_q_heads, tq, spec.head_dim, generator=make)
        k = torch.randn(2, spec.num_kv_heads, tk, spec.head_dim, generator=make)
        v = torch.randn(2, spec.num_kv_heads, tk, spec.head_dim_v, generator=make)
        found = backend("sdpa").attention(q, k, v, CAPTURED, spec)
        expected = backend("reference").attention(q, k, v, CAPTURED, spec)
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)  # float32, as in test_reference


def test_sdpa_with_documents_and_a_bias_per_head() -> None:
    """The mask has a batch axis, the bias a head axis."""
    spec = AttentionSpec(4, 2, 8, 8, m.All(m.Causal(), m.SameDocument(0)), bias=SPECS["buckets"].bias)
    q, k = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8)
    found, expected = (backend(name).attention(q, k, k, CAPTURED, spec) for name in ("sdpa", "reference"))
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)

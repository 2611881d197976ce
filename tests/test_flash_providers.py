"""What is each build of FlashAttention told, and which requests does it refuse?

Recording modules stand for the libraries, none of which need be installed.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compile_attn.kernels import flash_attn, flash_providers, select
from compile_attn.kernels import mask as m
from compile_attn.kernels.backend import Request
from compile_attn.kernels.expr import B, H, I, J, Load
from compile_attn.kernels.flash_providers import Call, Classic, Grid, HopperExtension, HopperPackage, Provider, Torch
from compile_attn.kernels.select import backend, choose
from compile_attn.kernels.spec import AttentionSpec
from tests.oracle import SLOPE, SPECS
from tests.test_flash_attn import forget

CUDA = torch.device("cuda")


class Recorder(types.ModuleType):
    """A module whose functions, of these names, note their arguments and return zeros, or a log of the normaliser with them."""

    def __init__(self, name: str, *functions: str) -> None:
        super().__init__(name)
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for function in functions:
            setattr(self, function, self.recording(function))

    def recording(self, function: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((function, args, kwargs))
            return torch.zeros(args[0].shape if isinstance(args[0], torch.Tensor) else 1), None

        return call


SPEC = AttentionSpec(4, 2, 8, 8, scale=0.5, softcap=3.0)


def call_of(grid: dict[str, Any] | None = None, **changed: Any) -> Call:
    """A paged decode of three rows."""
    made = {
        "spec": SPEC, "dtype": torch.float32, "page_size": 256, "starts": torch.arange(4, dtype=torch.int32),
        "lengths": torch.tensor([1, 2, 0], dtype=torch.int32), "left_pads": torch.zeros(3, dtype=torch.int32),
        "of_table": torch.tensor([1, 1, 0], dtype=torch.int32),
        "most_queries": 1, "most_keys": 768, "left": 7, "right": 0, "splits": 4,
    }  # fmt: skip
    pools = {name: torch.zeros(5, 256, 2, 8) for name in ("k", "v")}
    tensors = {"q": torch.zeros(3, 4, 8), "table": torch.arange(6, dtype=torch.int32).view(2, 3)} | pools | changed
    return Call(Grid(**(made | (grid or {}))), **tensors)


def packed_call() -> Call:
    """The same queries over two keys each, shifted by one."""
    grid = {
        "lengths": None,
        "of_table": None,
        "left_pads": None,
        "page_size": None,
        "most_keys": 2,
        "right": 1,
        "left": -1,
        "splits": 1,
    }
    k_starts = torch.arange(0, 7, 2, dtype=torch.int32)
    return call_of(grid, k=torch.zeros(6, 2, 8), v=torch.zeros(6, 2, 8), table=None, k_starts=k_starts)


def test_the_hopper_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("flash_attn_interface", "flash_attn_with_kvcache", "flash_attn_varlen_func")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    call = call_of(schedule=torch.zeros(9, dtype=torch.int32))
    assert HopperPackage().run(call).shape == (3, 4, 8)
    name, args, given = module.seen[-1]
    assert (name, args) == ("flash_attn_with_kvcache", (call.q, call.k, call.v))
    assert given == {
        "softmax_scale": 0.5, "causal": True, "window_size": (7, 0), "softcap": 3.0, "num_splits": 4,
        "cache_seqlens": call.grid.lengths, "cache_batch_idx": call.grid.of_table, "cache_leftpad": call.grid.left_pads,
        "page_table": call.table,
        "cu_seqlens_q": call.grid.starts, "max_seqlen_q": 1, "scheduler_metadata": call.schedule,
    }  # fmt: skip
    module.get_scheduler_metadata = module.recording("get_scheduler_metadata")
    HopperPackage().schedule(call.grid)
    name, args, given = module.seen[-1]
    assert args == (3, 1, 768, 4, 2, 8, call.grid.lengths, torch.float32, 8)
    assert given == {
        "cu_seqlens_q": call.grid.starts, "cache_leftpad": call.grid.left_pads, "page_size": 256,
        "causal": True, "window_size": (7, 0), "has_softcap": True,
        "num_splits": 4,
    }  # fmt: skip
    packed = packed_call()
    HopperPackage().run(packed)
    name, args, given = module.seen[-1]
    assert (name, args) == ("flash_attn_varlen_func", (packed.q, packed.k, packed.v, packed.grid.starts, packed.k_starts, 1, 2))
    assert given == {"softmax_scale": 0.5, "causal": False, "window_size": (-1, 1), "softcap": 3.0, "num_splits": 1}


@pytest.fixture
def extension() -> Iterator[dict[str, dict[str, Any]]]:
    """The schemas that vLLM's library registers, so that a wrong number or order of arguments is an error; what they were given."""
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        pytest.skip("the library itself is loaded in this process")
    library = torch.library.Library("_vllm_fa3_C", "FRAGMENT")
    library.define(
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, "
        "int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
        "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float softmax_scale, bool is_causal, "
        "int window_size_left, int window_size_right, float softcap, bool is_rotary_interleaved, Tensor? scheduler_metadata, "
        "int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, int cp_world_size, int cp_rank, "
        "Tensor? cp_tot_seqused_k) -> Tensor[]"
    )
    library.define(
        "get_scheduler_metadata(int batch_size, int max_seqlen_q, int max_seqlen_k, int num_heads, int num_heads_k, int headdim, "
        "int headdim_v, ScalarType qkv_dtype, Tensor seqused_k, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
        "Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? leftpad_k, int? page_size, int max_seqlen_k_new, bool is_causal, "
        "int window_size_left, int window_size_right, bool has_softcap, int num_splits, bool? pack_gqa, int sm_margin) -> Tensor"
    )
    schemas = {name: getattr(torch.ops._vllm_fa3_C, name).default._schema for name in ("fwd", "get_scheduler_metadata")}
    seen: dict[str, dict[str, Any]] = {}

    def record(name: str) -> Any:
        def call(*args: Any) -> Any:
            seen[name] = dict(zip([each.name for each in schemas[name].arguments], args, strict=True))
            return [torch.zeros(3, 4, 8)] if name == "fwd" else torch.zeros(1)

        return call

    for name in schemas:
        library.impl(name, record(name), "CPU")
    yield seen
    library._destroy()
    assert not hasattr(torch.ops._vllm_fa3_C, "fwd")


def test_the_hopper_extension(extension: dict[str, dict[str, Any]]) -> None:
    assert HopperExtension().found()
    call = call_of(sinks=torch.zeros(4), schedule=torch.zeros(9, dtype=torch.int32))
    assert HopperExtension().run(call).shape == (3, 4, 8)
    given = {name: value for name, value in extension["fwd"].items() if value is not None}
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    wanted = {
        "q": call.q, "k": call.k, "v": call.v, "cu_seqlens_q": call.grid.starts,
        "seqused_k": call.grid.lengths, "page_table": call.table,
        "kv_batch_idx": call.grid.of_table, "leftpad_k": call.grid.left_pads,
        "scheduler_metadata": call.schedule, "s_aux": call.sinks,
    }  # fmt: skip
    assert tensors.keys() == wanted.keys()
    assert all(tensors[name].data_ptr() == value.data_ptr() for name, value in wanted.items() if value is not None)
    assert {name: value for name, value in given.items() if name not in tensors} == {
        "max_seqlen_q": 1, "max_seqlen_k": 768, "softmax_scale": 0.5, "is_causal": True, "window_size_left": 7,
        "window_size_right": 0, "softcap": 3.0, "is_rotary_interleaved": True, "num_splits": 4, "sm_margin": 0,
        "cp_world_size": 1, "cp_rank": 0,
    }  # fmt: skip
    HopperExtension().schedule(call.grid)
    numbers = {name: value for name, value in extension["get_scheduler_metadata"].items() if not isinstance(value, torch.Tensor)}
    assert {name: value for name, value in numbers.items() if value is not None} == {
        "batch_size": 3, "max_seqlen_q": 1, "max_seqlen_k": 768, "num_heads": 4, "num_heads_k": 2, "headdim": 8, "headdim_v": 8,
        "qkv_dtype": torch.float32, "page_size": 256, "max_seqlen_k_new": 0, "is_causal": True, "window_size_left": 7,
        "window_size_right": 0, "has_softcap": True, "num_splits": 4, "sm_margin": 0,
    }  # fmt: skip
    packed = packed_call()
    HopperExtension().run(packed)
    assert extension["fwd"]["page_table"] is extension["fwd"]["seqused_k"] is None
    assert extension["fwd"]["cu_seqlens_k"].tolist() == [0, 2, 4, 6]
    assert (extension["fwd"]["is_causal"], extension["fwd"]["window_size_left"], extension["fwd"]["window_size_right"]) == (
        False,
        -1,
        1,
    )


def test_the_classic(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("flash_attn", "flash_attn_with_kvcache", "flash_attn_varlen_func")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    slopes = torch.ones(4)
    call = call_of(slopes=slopes)
    assert Classic().run(call).shape == (3, 4, 8)
    name, args, given = module.seen[-1]
    assert name == "flash_attn_with_kvcache"
    assert args[0].shape == (3, 1, 4, 8)
    assert given.pop("block_table").tolist() == [[3, 4, 5], [3, 4, 5], [0, 1, 2]]
    shared = {"softmax_scale": 0.5, "causal": True, "window_size": (7, 0), "softcap": 3.0, "alibi_slopes": slopes}
    assert given == {"cache_seqlens": call.grid.lengths, "num_splits": 0} | shared
    call = call_of({"most_queries": 3, "left": -1})
    Classic().run(call)
    name, args, given = module.seen[-1]
    assert (name, args[:4]) == ("flash_attn_varlen_func", (call.q, call.k, call.v, call.grid.starts))
    assert args[4].tolist() == [0, 1, 3, 3]
    assert args[5:] == (3, 768)
    assert given.pop("block_table").shape == (3, 3)
    assert given == shared | {"window_size": (-1, 0), "alibi_slopes": None}
    packed = packed_call()
    Classic().run(packed)
    name, args, given = module.seen[-1]
    assert (name, args) == ("flash_attn_varlen_func", (packed.q, packed.k, packed.v, packed.grid.starts, packed.k_starts, 1, 2))
    assert given["block_table"] is None
    with pytest.raises(
        ValueError, match="flash_attn: 4 queries on 2 keys; FlashAttention 2 takes fewer than twice as many; choose"
    ):
        Classic().run(packed._replace(grid=replace(packed.grid, most_queries=4, right=2)))
    assert len(module.seen) == 3


def test_torch_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Recorder("torch.nn.attention.varlen", "varlen_attn")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    call = call_of()
    Torch().run(call)
    _, args, given = module.seen[-1]
    assert args == (call.q, call.k, call.v, call.grid.starts, None, 1, 768)
    assert given.pop("block_table").shape == (3, 3)
    assert given == {"scale": 0.5, "window_size": (7, 0), "enable_gqa": True, "seqused_k": call.grid.lengths, "num_splits": 1}


# What they refuse.

PLAIN = AttentionSpec(8, 2, 64, 64, scale=0.125)
ALIBI = AttentionSpec(8, 2, 64, 64, bias=SLOPE * (J - I))
CURE = "; choose kernel='auto'"
THROUGH = " (through vLLM's FlashAttention 3)" + CURE


def asked(spec: AttentionSpec, page_size: int | None = 16, dtype: torch.dtype = torch.bfloat16) -> Request:
    return Request(spec, CUDA, dtype, page_size)


def test_fp8_pages_are_refused(installed: Any) -> None:
    """FlashAttention 3 would round queries and weights to fp8 as well, which nobody asked for."""
    installed(HopperExtension)
    asked_for = Request(PLAIN, CUDA, torch.bfloat16, 16, torch.float8_e4m3fn)
    [reason] = backend("flash_attn").reasons(asked_for)
    assert reason == "reads no pages of float8_e4m3fn; use kv_dtype='auto', or choose kernel='auto'"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Says which providers are installed, on whatever machine this runs."""

    def only(*kinds: type[Provider]) -> None:
        for provider in flash_providers.PROVIDERS:
            monkeypatch.setattr(type(provider), "found", lambda self: isinstance(self, kinds))
            monkeypatch.setattr(type(provider), "trouble", lambda self: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    yield only
    forget()


REFUSED = {
    "mask": (
        AttentionSpec(8, 2, 64, 64, m.Chunked(64)),
        "knows causal, windowed and bidirectional masks, not 'causal inside chunks of 64 positions'",
    ),
    "both masks": (
        AttentionSpec(8, 2, 64, 64, m.All(m.Window(5), m.Bidirectional())),
        "knows causal, windowed and bidirectional masks, not 'causal, window of 6 keys and bidirectional'",
    ),
    "scale": (AttentionSpec(8, 2, 64, 64, scale=-0.5), "takes its maximum before the scale, which must be positive, not -0.5"),
    "sinks": (
        AttentionSpec(8, 2, 64, 64, sinks=Load(0, B, H)),
        "takes one sink a head, not Load(0, b, h)",
    ),
    "head size": (AttentionSpec(8, 2, 68, 68), "has no kernel for head size 68: it takes multiples of 8, up to 256"),
    "large": (AttentionSpec(8, 2, 320, 320), "has no kernel for head size 320: it takes multiples of 8, up to 256"),
    "unequal": (AttentionSpec(8, 2, 128, 64), "has no kernel for head size 128 for queries and keys, 64 for values"),
    "many sinks": (AttentionSpec(80, 8, 64, 64, sinks=Load(0, H)), "takes sinks of at most 64 heads, not 80"),
    "unequal sinks": (
        AttentionSpec(8, 2, 192, 128, sinks=Load(0, H)),
        "takes no sinks with head size 192 for queries and keys, 128 for values",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_extension_refuses(name: str, installed: Any) -> None:
    installed(HopperExtension)
    spec, reason = REFUSED[name]
    found = backend("flash_attn").reasons(asked(spec))
    assert any(each in (reason + CURE, reason + THROUGH) for each in found), found


def test_low_precision_sinks(installed: Any) -> None:
    installed(HopperExtension)
    spec = AttentionSpec(8, 2, 64, 64, sinks=Load(0, H))
    assert backend("flash_attn").reasons(asked(spec)) == ()
    refused = backend("flash_attn").reasons(asked(spec, dtype=torch.float16))
    assert refused == ("takes sinks in bfloat16, not in float16" + THROUGH,)


@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (128, 128), (192, 192), (256, 256), (192, 128), (64, 256)], ids=str)
@pytest.mark.parametrize("page_size", [None, 16, 48, 256])
def test_what_the_extension_takes(dims: tuple[int, int], page_size: int | None, installed: Any) -> None:
    installed(HopperExtension)
    for mask in (m.Causal(), m.Window(0), m.Bidirectional()):
        assert backend("flash_attn").reasons(asked(AttentionSpec(32, 2, *dims, mask, softcap=20.0), page_size)) == ()


def test_an_absent_provider_is_named_with_its_line(installed: Any) -> None:
    installed()
    every = "needs flash_attn_interface (build hopper/ of github.com/Dao-AILab/flash-attention: python setup.py install), or "
    vllm = "vLLM's FlashAttention 3 (pip install vllm, or set PAGED_ATTN_FA3 to its vllm_flash_attn/_vllm_fa3_C.abi3.so)"
    end = ", not installed here; install one, or choose kernel='auto'"
    assert backend("flash_attn").reasons(asked(PLAIN)) == (every + vllm + end,)
    large = (
        every + vllm + ", or flash_attn (pip install flash-attn), or torch.nn.attention.varlen (pip install 'torch>=2.12')" + end
    )
    assert backend("flash_attn").reasons(asked(PLAIN, 256)) == (large,)
    installed(HopperExtension)
    assert backend("flash_attn").reasons(asked(ALIBI, 256)) == (
        "does not compute an ALiBi bias" + THROUGH,
        "needs flash_attn (pip install flash-attn)" + end,
    )
    assert backend("flash_attn").reasons(asked(ALIBI, 16)) == ("does not compute an ALiBi bias" + THROUGH,)
    installed()
    nobody = backend("flash_attn").reasons(asked(ALIBI, 16))
    assert "takes pages of a multiple of 256 tokens, not 16 (through flash_attn)" + CURE in nobody


def test_alibi_means_distance(installed: Any) -> None:
    """To FlashAttention 2 it is -|i - j|, and with fewer keys than queries i counts from elsewhere."""
    installed(Classic)
    reason = "takes an ALiBi bias in paged calls with a causal mask only" + CURE
    assert backend("flash_attn").reasons(asked(ALIBI, 256)) == ()
    assert reason in backend("flash_attn").reasons(asked(ALIBI, None))
    both = AttentionSpec(8, 2, 64, 64, m.Bidirectional(), bias=SLOPE * (J - I))
    assert reason in backend("flash_attn").reasons(asked(both, 256))


def test_the_first_that_can_serves(installed: Any) -> None:
    installed(HopperExtension, Classic, Torch)
    served = {
        HopperExtension: [asked(PLAIN, None), asked(PLAIN, 16), asked(AttentionSpec(8, 2, 64, 64, sinks=Load(0, H)), 256)],
        Classic: [asked(ALIBI, 256)],
    }
    for kind, requests in served.items():
        for each in requests:
            assert choose(each.spec, CUDA, each.dtype, each.page_size, "flash_attn").kernel == "flash_attn"
            assert type(flash_attn._chosen(each.spec, CUDA, each.dtype, each.page_size)) is kind
    installed(Torch)
    forget()
    assert type(flash_attn._chosen(PLAIN, CUDA, torch.bfloat16, 256)) is Torch
    with pytest.raises(ValueError, match=r"flash_attn cannot: is used for paged calls only \(through torch.nn.attention.varlen\)"):
        flash_attn._chosen(PLAIN, CUDA, torch.bfloat16, None)


def test_the_device_must_fit(monkeypatch: pytest.MonkeyPatch, installed: Any) -> None:
    installed(HopperExtension, Classic)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert backend("flash_attn").reasons(asked(PLAIN, 256)) == ()
    [reason] = [each for each in backend("flash_attn").reasons(asked(PLAIN, 16)) if "capability" in each]
    assert reason == "needs a device of compute capability 9.0 only, not 10.0" + THROUGH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert any("needs a device of compute capability 8.0 or newer, not 7.5 (through flash_attn)" in each
               for each in backend("flash_attn").reasons(asked(PLAIN, 256)))  # fmt: skip


def test_it_is_preferred_on_cuda_where_it_can(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing was measured."""
    installed(HopperExtension)
    monkeypatch.setattr(select, "speeds", lambda request: None)
    assert choose(PLAIN, CUDA, torch.bfloat16, 16).kernel == "flash_attn"
    assert choose(AttentionSpec(8, 2, 64, 64, m.Window(9)), CUDA, torch.bfloat16, None).kernel == "flash_attn"
    assert choose(AttentionSpec(8, 2, 64, 64, softcap=9.0), CUDA, torch.float16, None).kernel == "flash_attn"
    assert choose(PLAIN, CUDA, torch.bfloat16, None).kernel == "sdpa"
    assert choose(PLAIN, CUDA, torch.float32, 16).kernel == "general"
    assert choose(SPECS["documents"], CUDA, torch.bfloat16, 16).kernel == "general"


# Where they are looked for.


def test_the_extension_is_found_by_name_and_beside_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if hasattr(torch.ops._vllm_fa3_C, "fwd"):
        pytest.skip("the library itself is loaded in this process")
    file = tmp_path / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    file.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError('vLLM is never imported')")
    monkeypatch.delenv("PAGED_ATTN_FA3", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not HopperExtension().found()
    file.write_text("no library")
    assert HopperExtension().found()
    assert "_vllm_fa3_C.abi3.so cannot be loaded (" in (HopperExtension().trouble() or "")
    monkeypatch.setenv("PAGED_ATTN_FA3", str(tmp_path / "absent.so"))
    assert not HopperExtension().found()


def test_flash_attention_4_is_not_taken_for_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not Classic().found()
    (tmp_path / "flash_attn_2_cuda.py").write_text("")
    assert Classic().found()


def test_torch_is_asked_whether_it_takes_tables() -> None:
    assert Torch().found() == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12))


@pytest.mark.parametrize(
    ("version", "why"), [("2.5.9.post1", "is version 2.5.9.post1; from 2.6 on"), ("2.6.0", None), ("2.10.1", None)]
)
def test_an_old_classic(version: str, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"flash_attn": version}[name])
    trouble = Classic().trouble()
    assert trouble is None if why is None else trouble is not None and trouble.startswith(why)

"""Does the code that Inductor generates leave the pages where they are, and is a layer few kernels?"""

from __future__ import annotations

import re

import torch
from torch._inductor.utils import run_and_get_code  # private; what Inductor's own tests read its code with

from bench.naive_llama import NaiveLlama, Shape
from compile_attn.cache import Chunk, PagedKVCache
from compile_attn.demo_model import GPT
from tests.gpu_code import gpu_code
from tests.tiny import tiny

PAGES = 61  # a number that occurs in no other shape of the model


def test_no_page_is_copied_by_functionalization() -> None:
    model = tiny()
    cache = PagedKVCache(kv_tokens=PAGES * 4, page_size=4, max_seqs=4)
    step = torch.compile(model, backend="paged_attn", options={"cache": cache}, fullgraph=True)
    batch = cache.batch([Chunk(cache.add(), [1, 2, 3, 4, 5, 6, 7])])
    with torch.no_grad():
        _, codes = run_and_get_code(step, batch.input_ids)
    code = "\n".join(codes)
    writes = code.count("paged_attn.write_kv")
    assert writes >= len(cache.k_pages) > 0, "the pages are written by the op"
    shapes = re.findall(r"empty_strided\w*\(\s*\(([^)]*)\)", code)
    assert shapes, "Inductor allocates something: else this test reads the wrong text"
    pools = [shape for shape in shapes if re.match(rf"\s*{PAGES}\s*,", shape)]
    assert pools == [], f"a buffer as large as a page pool is allocated: {pools}"
    assert not re.search(rf"range\({PAGES * 4}|< {PAGES}L|x0<static_cast<int64_t>\({PAGES}", code)


def test_a_layer_on_a_gpu() -> None:
    """Beside four products, write_kv and attend: norm, rotated q and k, norm, gate. No copies, and no cosine made again."""
    two, three = (gpu_code(NaiveLlama(Shape(64, 96, layers, 4, 2, 61)).bfloat16()) for layers in (2, 3))
    launches = [len(re.findall(r"\btriton_\w+\.run\(", code)) for code in (two, three)]
    products = [len(re.findall(r"extern_kernels\.\w+\(", code)) for code in (two, three)]
    assert launches[1] - launches[0] == 4 and products[1] - products[0] == 4
    assert two.count("tl_math.cos(") == two.count("tl_math.sin(") == 1
    k, v = (rf"reinterpret_tensor\(\w+, \(\w+, 2, 16\), \({row}, 16, 1\), {at}\)" for row, at in ((96, 64), (128, 96)))
    writes = re.findall(rf"write_kv\.default\({k}, {v}", two)
    assert len(writes) == 2, "keys go to the pages beside the queries, values as they lie in the joined product"


def test_what_attention_returns_is_not_copied() -> None:
    """A model's y.transpose(1, 2).contiguous() finds the result laid out as it wants it."""
    model = GPT(31, width=16, heads=2, layers=2, context=64).eval().requires_grad_(False)
    cache = PagedKVCache(kv_tokens=256, page_size=4, max_seqs=4)
    step = torch.compile(model, backend="paged_attn", options={"cache": cache}, fullgraph=True)
    batch = cache.batch([Chunk(cache.add(), [1, 2, 3, 4, 5, 6, 7])])
    with torch.no_grad():
        _, codes = run_and_get_code(step, batch.input_ids)
    first = "\n".join(codes).split("def call")[-1].split("paged_attn.attend.default(")[1]
    after = [line.strip() for line in first.splitlines() if re.match(r"\s+(cpp_fused|extern_kernels)", line)]
    assert after[0].startswith("extern_kernels."), f"between the attention and the projection stands {after[0]}"

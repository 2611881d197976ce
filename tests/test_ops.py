"""Do the ops keep their schemas: declared mutations, fakes with symbolic sizes, nothing copied under torch.compile?"""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import compile_attn.kernels.ops  # noqa: F401
from tests.oracle import CAPTURED, SPECS
from tests.paged import paged_batch

OPS = torch.ops.paged_attn
MIXED = [(0, 7), (9, 1), (3, 5), (21, 1), (0, 0)]


def attend_arguments(name: str) -> tuple[Any, ...]:
    batch = paged_batch(SPECS[name], MIXED, pad_tokens=1)
    at = batch.metadata
    where = (at.block_table, at.seq_lens, at.cu_seqlens_q, at.positions, at.token_seq)
    return (batch.q, batch.k_pages, batch.v_pages, *where, list(CAPTURED), batch.spec.encode(), "reference")


def stateless_arguments(name: str, kernel: str) -> tuple[Any, ...]:
    spec = SPECS[name]
    q = torch.randn(2, 12, spec.num_q_heads, spec.head_dim).transpose(1, 2)
    k = torch.randn(2, 12, spec.num_kv_heads, spec.head_dim).transpose(1, 2)
    v = torch.randn(2, spec.num_kv_heads, 12, spec.head_dim_v)
    return (q, k, v, list(CAPTURED), spec.encode(), kernel)


def write_arguments() -> tuple[Any, ...]:
    pages = torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 6)
    return (torch.randn(3, 2, 8), torch.randn(3, 2, 6), *pages, torch.tensor([5, -1, 11]))


METADATA = (
    torch.arange(8, dtype=torch.int32).view(4, 2),
    torch.tensor([5, 8, 0, 3], dtype=torch.int32),
    torch.tensor([5, 1, 0, 2], dtype=torch.int32),
    10,
    4,
)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (OPS.attention.default, stateless_arguments("everything", "reference")),
        (OPS.attention.default, stateless_arguments("documents", "sdpa")),
        (OPS.attend.default, attend_arguments("everything")),
        (OPS.attend.default, attend_arguments("buckets")),
        (OPS.write_kv.default, write_arguments()),
        (OPS.build_metadata.default, METADATA),
        (OPS.once.default, (torch.randn(3, 4).T,)),
        (
            OPS.advance_step.default,
            (torch.ones(1, 3).long(), torch.ones(1, 3).long(), torch.tensor([4, 2, 0]).int(), torch.tensor([8, 9, 1])),
        ),
        (OPS.swap_blocks.default, (torch.randn(3, 2, 1, 4), torch.randn(5, 2, 1, 4), torch.tensor([[2, 4], [0, 1]]))),
        (OPS.copy_blocks.default, ([torch.randn(3, 2, 1, 4)], [torch.randn(3, 2, 1, 4)], torch.tensor([[2, 1]]))),
    ],
    ids=lambda value: value.name() if isinstance(value, torch._ops.OpOverload) else "",
)
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op, arguments)


@pytest.mark.gpu
def test_opcheck_on_a_gpu() -> None:
    k, v, k_pages, v_pages, slots = (each.cuda() for each in write_arguments())
    scales = torch.tensor(0.5, device="cuda"), torch.ones(2, device="cuda")  # fp8 pages cannot be compared by opcheck there
    torch.library.opcheck(OPS.write_kv.default, (k, v, k_pages, v_pages, slots))
    torch.library.opcheck(OPS.write_kv.default, (k, v, k_pages, v_pages, slots, *scales))
    torch.library.opcheck(OPS.build_metadata.default, (*(each.cuda() for each in METADATA[:3]), *METADATA[3:]))
    ids, lengths = torch.ones(1, 3, dtype=torch.int64, device="cuda"), torch.tensor([4, 2, 0], dtype=torch.int32, device="cuda")
    torch.library.opcheck(OPS.advance_step.default, (ids, ids.clone(), lengths, torch.tensor([8, 9, 1], device="cuda")))


def test_a_fake_step_has_no_guards() -> None:
    """Metadata and attention with symbolic sizes: no size is specialised or related to another, no data is read."""
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)

    def symbolic(tensor: torch.Tensor, dims: int) -> torch.Tensor:
        """Fake, the first sizes symbolic."""
        sizes = [DimDynamic.DYNAMIC] * dims + [DimDynamic.STATIC] * (tensor.dim() - dims)
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    q, k_pages, v_pages, table, lengths, *_, spec, kernel = attend_arguments("everything")
    q, table, lengths = symbolic(q, 1), symbolic(table, 2), symbolic(lengths, 1)
    k_pages, v_pages = symbolic(k_pages, 1), symbolic(v_pages, 1)
    with mode:
        starts, positions, slots, rows = OPS.build_metadata(table, lengths, lengths, q.shape[0], 4)
        plan = OPS.plan(table, lengths, starts, positions, rows, 4, "bfloat16", SPECS["gqa"].encode(), "flash_attn", 8)
        out = OPS.attend(q, k_pages, v_pages, table, lengths, starts, positions, rows, [], spec, kernel, None, None, plan)
    assert not shapes.guards
    assert str(out.shape) == f"torch.Size([{q.shape[0]}, 4, 6])"
    assert str(slots.shape) == f"torch.Size([{q.shape[0]}])"
    assert str(starts.shape) == f"torch.Size([{lengths.shape[0]} + 1])"


def step(q, k, v, k_pages, v_pages, table, lengths, news):  # type: ignore[no-untyped-def]
    starts, positions, slots, rows = OPS.build_metadata(table, lengths, news, q.shape[0], k_pages.shape[1])
    OPS.write_kv(k, v, k_pages, v_pages, slots)
    return OPS.attend(q, k_pages, v_pages, table, lengths, starts, positions, rows, [], SPECS["gqa"].encode(), "reference")


def test_one_graph_serves_every_batch() -> None:
    counter = CompileCounter()
    compiled = torch.compile(step, backend=counter, dynamic=True, fullgraph=True)
    for sequences in (MIXED, [(4, 3), (5, 1)], [(30, 1), (2, 1), (9, 1)]):
        batch = paged_batch(SPECS["gqa"], sequences)
        tokens, at = batch.q.shape[0], batch.metadata
        new = [
            torch.cat([kv[len(kv) - n :] for kv, n in zip(part, at.query_lens.tolist(), strict=True)])
            for part in (batch.k, batch.v)
        ]
        expected = batch.attend([])
        # Written again, from NaN: the step must write before it attends.
        for pages in (batch.k_pages, batch.v_pages):
            pages.flatten(0, 1)[at.slot_mapping] = torch.nan
        out = compiled(batch.q, *new, batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.query_lens)
        assert torch.equal(out, expected), tokens
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, on importing Inductor
def test_inductor_writes_pages_in_place() -> None:
    """No page is copied by functionalization: the generated code passes the pages themselves to write_kv."""
    from torch._inductor.utils import run_and_get_code

    batch = paged_batch(SPECS["gqa"], MIXED)
    at = batch.metadata
    new = torch.randn(batch.q.shape[0], 2, 8)
    arguments = (batch.q, new, new, batch.k_pages, batch.v_pages, at.block_table, at.seq_lens, at.query_lens)
    compiled = torch.compile(step, dynamic=True, fullgraph=True)
    with torch.no_grad():
        _, (code,) = run_and_get_code(compiled, *arguments)
    assert "torch.ops.paged_attn.write_kv.default" in code
    pool = str(tuple(batch.k_pages.shape))
    pages, page_shape = batch.k_pages.shape[0], f"{batch.k_pages.shape[1]}, 2, 8"
    made = [line for line in code.splitlines() if "empty_strided" in line and (page_shape in line or pool in line)]
    assert not made, (pages, made)
    assert "clone" not in code.split("def call")[1]


def test_a_gradient_is_refused_in_the_forward() -> None:
    q, *rest = stateless_arguments("gqa", "reference")
    q.requires_grad_()
    with pytest.raises(RuntimeError, match=r"paged_attn::attention has no gradient \(kernel='reference'\)"):
        OPS.attention(q, *rest)
    with torch.no_grad():
        OPS.attention(q, *rest)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_on_a_gpu_in_a_cuda_graph(name: str) -> None:
    """The reference on CUDA reads nothing on the host; same numbers as on the CPU."""
    batch = paged_batch(SPECS[name], MIXED, pad_tokens=2)
    there = paged_batch(SPECS[name], MIXED, pad_tokens=2, device="cuda")
    captured = [each.cuda() for each in CAPTURED]
    there.attend(captured)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = there.attend(captured)
    out.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(out.cpu(), batch.attend(CAPTURED), atol=1e-5, rtol=0)  # float32 in another order of sums

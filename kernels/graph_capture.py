"""How does a step that is written by hand go into a CUDA graph, and who tells its kernels of each replay?

What PagedLM records is `compile_attn/cuda_graph.py`'s; here is what needs no model and no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from compile_attn.kernels.backend import Backend, HostStep, PlannedSite, Shape, planners
from compile_attn.kernels.metadata import AttentionMetadata


@contextmanager
def graph_capture(
    buffers: AttentionMetadata, sites: Sequence[tuple[Backend, PlannedSite]] = ()
) -> Iterator[Callable[[AttentionMetadata], AttentionMetadata]]:
    """For as long as a CUDA graph over these buffers (`AttentionMetadata.pads`) is recorded and replayed.

    Gives a function to be called with a batch before the recording, and before every replay: it writes the batch into the buffers,
    lets the kernels of these sites plan for it, and returns it as it stands there. It raises ValueError, and changes nothing, if
    the batch is too large, or if a kernel plans on the host, which does not know the batch's lengths. Behind the block, also after
    an error, plans are dropped, and the graph must not be replayed.
    """
    table, tokens, page_size = buffers.block_table, buffers.num_tokens, buffers.page_size
    planning = planners(sites, Shape(tokens, table.shape[0], table.shape[1] * page_size))

    def load(batch: AttentionMetadata) -> AttentionMetadata:
        if planning and batch.lengths is None:
            names = ", ".join(kernel.name for kernel in planning)
            raise ValueError(f"{names} plans on the host, where the batch's lengths are unknown; use AttentionMetadataBuilder")
        at = buffers.copy_(batch)
        if at.lengths is not None:
            seq_lens, query_lens = torch.tensor(at.lengths, dtype=torch.int32, device="cpu").unbind(1)
            step = HostStep(table, seq_lens.contiguous(), query_lens.contiguous(), tokens, page_size, captured=True)
            for kernel, its in planning.items():
                kernel.plan_on_host(step, its)
        return at

    try:
        yield load
    finally:
        for kernel in planning:
            kernel.drop_plans(table)

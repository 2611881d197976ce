"""Serves a program of `compile_attn.save` by hand, greedily: what its inputs are, and nothing of the model's own code.

python docs/serve_program.py PROGRAM.pt2 NEW_TOKENS "3 14 15 9" "5 3" ...
"""

import sys

import torch

import compile_attn as ca

program = ca.load(sys.argv[1])
told, run = ca.Manifest.attached(program), program.module()
new_tokens, texts = int(sys.argv[2]), [[int(token) for token in prompt.split()] for prompt in sys.argv[3:]]

size, longest = told.page_size, max(map(len, texts)) + new_tokens
pages_each = -(-longest // size)
table = 1 + torch.arange(len(texts) * pages_each, dtype=torch.int32).view(len(texts), -1)  # page 0 is nobody's


def pools(dim: str) -> list[torch.Tensor]:
    shapes = [(1 + table.numel(), size, layer["num_kv_heads"], layer[dim]) for layer in told.layers]
    return [torch.zeros(shape, dtype=getattr(torch, layer["dtype"])) for shape, layer in zip(shapes, told.layers, strict=True)]


pages = {"k_pages": pools("head_dim"), "v_pages": pools("head_dim_v"), "k_scales": [], "v_scales": []}
work, done = texts, [0] * len(texts)  # the new tokens of each sequence, and how many are in its pages
for _ in range(new_tokens):
    counts = [len(tokens) for tokens in work]
    ids = torch.tensor([token for tokens in work for token in tokens])[None]
    positions = torch.cat([torch.arange(at, at + count) for at, count in zip(done, counts, strict=True)])[None]
    done = [at + count for at, count in zip(done, counts, strict=True)]
    lengths, news = torch.tensor(done, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32)
    rows = news.long().cumsum(0) - 1  # logits of the last token of each
    step = {"block_table": table, "seq_lens": lengths, "query_lens": news, "logits_rows": rows}
    with torch.no_grad():
        logits = run(input_ids=ids, position_ids=positions, **step, **pages)
    work = logits[0].argmax(-1)[:, None].tolist()
    print(*(token for [token] in work))

"""Does it work here? Train a small GPT, page it, and hold its tokens against full recomputation."""

from __future__ import annotations

import time
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import nn

from compile_attn.demo_model import GPT
from compile_attn.lm import PagedLM

PROMPTS = ("The import statement ", "A list is ", "Boolean operations", "for each item in ", "def ")


def demo(seconds: float, inner: Literal["inductor", "eager"], html: str | None, device: str, new_tokens: int = 48) -> bool:
    """Run it all; False where a token differs from recomputation."""
    console = Console()
    text, alphabet = _text()
    model = GPT(len(alphabet)).to(device)
    loss = _train(model, _encode(text, alphabet).to(device), seconds, console)
    console.print(f"trained a GPT of {sum(p.numel() for p in model.parameters()):,} parameters for {seconds:g} s, loss {loss:.2f}")
    prompts = [_encode(prompt, alphabet).tolist() for prompt in PROMPTS]
    if inner == "inductor" and not _has_compiler():
        console.print("no C++ compiler was found, so the graph runs without Inductor (--inner eager); install g++ to change that")
        inner = "eager"
    console.print(f"compiling the model, unchanged, for a paged cache (inner compiler: {inner}) ...")
    begin = time.perf_counter()
    with PagedLM(model, kv_tokens=4096, page_size=16, max_seqs=8, inner=inner) as lm:
        console.print(f"compiled in {time.perf_counter() - begin:.1f} s")
        console.print(lm.report)
        lm.generate(prompts, max_new_tokens=2)
        begin = time.perf_counter()
        paged = lm.generate(prompts, max_new_tokens=new_tokens)
        paged_time = time.perf_counter() - begin
        report = lm.report
    begin = time.perf_counter()
    full = [_recompute(model, prompt, new_tokens) for prompt in prompts]
    full_time = time.perf_counter() - begin
    for prompt, tokens in zip(PROMPTS, paged, strict=True):
        console.print(f"  [bold]{prompt!r}[/] {''.join(alphabet[token] for token in tokens)!r}")
    same = paged == full
    verdict = "[green]equal, token for token[/]" if same else "[red]DIFFERENT[/]"
    console.print(
        f"{len(prompts)} prompts together, {new_tokens} tokens each: "
        f"paged {paged_time:.2f} s, recomputed {full_time:.2f} s, {verdict}"
    )
    if html and report is not None:
        report.to_html(html)
        console.print(f"the report is in {html}")
    return same


def _text() -> tuple[str, str]:
    """Text that Python itself ships, and the characters in it."""
    from pydoc_data import topics

    text = " ".join(" ".join(map(str, topics.topics.values())).split())  # indentation would be what is learned first
    return text, "".join(sorted(set(text) | set("".join(PROMPTS))))


def _encode(text: str, alphabet: str) -> torch.Tensor:
    number = {character: place for place, character in enumerate(alphabet)}
    return torch.tensor([number[character] for character in text])


def _train(model: GPT, data: torch.Tensor, seconds: float, console: Console) -> float:
    """Train for that long; the model is left in eval mode. Returns the last loss."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 30, total_iters=30)
    span, rows, loss = 96, 8, float("nan")
    begin = time.perf_counter()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=seconds)
        while (spent := time.perf_counter() - begin) < seconds:
            starts = torch.randint(len(data) - span - 1, (rows,)).tolist()
            ids = torch.stack([data[start : start + span + 1] for start in starts])
            error = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            error.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            warm_up.step()
            loss = error.item()
            progress.update(task, completed=spent, description=f"training, loss {loss:.2f}")
    model.eval()
    return loss


@torch.no_grad()
def _recompute(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that runs the whole sequence through the model for every token."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    for _ in range(count):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()


def _has_compiler() -> bool:
    import shutil

    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))

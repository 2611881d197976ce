"""How far is generation?"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


def bar_if(wanted: bool | None, total: int) -> AbstractContextManager[Callable[[int], None] | None]:
    """`token_bar` if it is wanted, or, where that is not said, if standard error is a terminal."""
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        return nullcontext()
    return token_bar(total)


@contextmanager
def token_bar(total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` tokens on standard error; yields a function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokens"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tokens", total=total)
        yield lambda count: bar.advance(task, count)

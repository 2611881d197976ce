"""Is a Triton function searched for its compiled form once a key?"""

from __future__ import annotations

from typing import Any

from compile_attn.kernels.relaunch import Relaunch


class Function:
    """Like a Triton function: a launch compiles, and gives what it has compiled; that is launched with arguments alone."""

    def __init__(self, compiles: bool = True) -> None:
        self.calls: list[Any] = []
        self.compiles = compiles

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.calls.append((grid, args, options))
            return Compiled(self.calls) if self.compiles else None

        return run


class Compiled:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.calls.append(("compiled", grid, args))


def test_a_form_is_found_once_a_key() -> None:
    run, function = Relaunch(), Function()
    for grid, x in (((1, 1, 1), 5), ((2, 1, 1), 6)):
        run("a", function, grid, (x,), {"num_warps": 4})
    run("b", function, (1, 1, 1), (7,), {})
    assert function.calls == [((1, 1, 1), (5,), {"num_warps": 4}), ("compiled", (2, 1, 1), (6,)), ((1, 1, 1), (7,), {})]


def test_without_a_key_triton_searches() -> None:
    run, function = Relaunch(), Function()
    for _ in range(2):
        run(None, function, (1, 1, 1), (5,), {})
    assert [call[0] for call in function.calls] == [(1, 1, 1)] * 2


def test_the_interpreter_compiles_nothing() -> None:
    run, function = Relaunch(), Function(compiles=False)
    for _ in range(2):
        run("a", function, (1, 1, 1), (5,), {})
    assert len(function.calls) == 2

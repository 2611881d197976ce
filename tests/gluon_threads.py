"""What does a Gluon kernel for Hopper compute, and do its warps wait for each other? Run on a CPU, on top of Triton's interpreter.

Each partition of warps is a thread, of which one runs at a time. Copies of TMA arrive as late as they can, in any order; a product
of matrices reads its operands when it is waited for; barriers in shared memory block. So a kernel shows what it computes, and fails
where partitions wait for each other forever, where a slot is written while a product reads it, and where what is read has not
arrived: that is NaN. The warps of a partition are as one here, so that a barrier among them is nothing.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

Array = Any  # of numpy


class Machine:
    """The threads of a program that runs now, and the copies under way."""

    def __init__(self) -> None:
        self.turn = threading.Condition()
        self.random = random.Random(0)
        self.copies: list[Callable[[], None]] = []
        self.alive = self.waiting = 0
        self.failed: BaseException | None = None

    def run(self, parts: Sequence[tuple[Any, tuple[Any, ...]]]) -> None:
        self.alive, self.waiting, self.failed, self.copies = len(parts), 0, None, []
        threads = [threading.Thread(target=self.part, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed is not None:
            raise self.failed
        assert not self.copies, "copies that nobody waits for"

    def part(self, function: Any, args: tuple[Any, ...]) -> None:
        with self.turn:
            try:
                function(*args)
                assert not queue(), "a product that nobody waits for"
            except BaseException as error:
                self.failed = self.failed or error
            self.alive -= 1
            self.changed()

    def changed(self) -> None:
        self.waiting = 0
        self.turn.notify_all()

    def until(self, done: Callable[[], bool]) -> None:
        """Others go on; what is copied arrives when nobody can."""
        while not done():
            if self.failed is not None:
                raise RuntimeError("another partition failed")
            self.waiting += 1
            if self.waiting < self.alive:
                self.turn.wait()
            elif self.copies:
                self.copies.pop(self.random.randrange(len(self.copies)))()
            else:
                self.failed = RuntimeError("all partitions wait for each other")

    def pause(self) -> None:
        """Somebody else's turn, perhaps."""
        self.turn.release()
        self.turn.acquire()


machine = Machine()
_own = threading.local()


def queue() -> list[Product]:
    """The products of this partition that are under way."""
    found: list[Product] = _own.__dict__.setdefault("queue", [])
    return found


def number(x: Any) -> int:
    return int(x.handle.data.item()) if hasattr(x, "handle") else int(getattr(x, "value", x))


def tensor(array: Array, dtype: Any) -> Any:
    return tl.tensor(TensorHandle(np.ascontiguousarray(array), dtype), tl.block_type(dtype, list(array.shape)))


class Shared:
    """Shared memory, as it lies there."""

    def __init__(self, array: Array, dtype: Any) -> None:
        self.array, self.dtype = array, dtype

    def index(self, i: Any) -> Shared:
        assert 0 <= number(i) < len(self.array), f"slot {number(i)} of {len(self.array)}"
        return type(self)(self.array[number(i)], self.dtype)

    def reinterpret(self, dtype: Any, shape: Sequence[Any], layout: Any) -> Matrices:
        """From parts of the channels one after the other, as TMA copies them, to slots of rows."""
        slots, rows, channels = map(number, shape)
        flat = self.array.reshape(slots, channels // self.array.shape[-1], rows, self.array.shape[-1])
        assert np.shares_memory(flat, self.array)
        return Matrices(flat.transpose(0, 2, 1, 3), dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def now(self) -> Array:
        return self.array.copy()

    def store(self, x: Any) -> None:
        self.array[...] = x.handle.data.reshape(self.array.shape)

    def load(self, layout: Any) -> Any:
        return tensor(self.now(), self.dtype)


class Matrices(Shared):
    """Rows in parts, without a copy."""

    turned = False

    def permute(self, order: Any) -> Matrices:
        out = Matrices(self.array, self.dtype)
        out.turned = True
        return out

    def now(self) -> Array:
        whole = self.array.reshape(self.array.shape[0], -1)
        return (whole.T if self.turned else whole).copy()


class Barrier:
    """An mbarrier: a phase ends with the last arrival and the last byte."""

    def __init__(self) -> None:
        self.phase = self.count = self.left = self.bytes = 0

    def add(self, arrivals: int, more: int) -> None:
        self.left -= arrivals
        self.bytes += more
        assert self.left >= 0, "more arrivals than a phase takes"
        if self.left == 0 and self.bytes == 0:
            self.phase += 1
            self.left = self.count
            machine.changed()


class Barriers:
    def __init__(self, slots: int) -> None:
        self.each = [Barrier() for _ in range(slots)]

    def index(self, i: Any) -> Barrier:
        return self.each[number(i)]


class Product:
    """A product of matrices under way."""

    def __init__(self, a: Any, b: Matrices, acc: Any, added: bool) -> None:
        self.operands, self.acc, self.added = (a, b), acc, added
        self.before = [each.now() for each in self.operands if isinstance(each, Matrices)]
        self.done: Any = None

    def finish(self) -> None:
        shared = [each for each in self.operands if isinstance(each, Matrices)]
        same = all(old.tobytes() == each.now().tobytes() for old, each in zip(self.before, shared, strict=True))
        assert same, "written while a product reads it"
        a, b = (each.load(None) if isinstance(each, Matrices) else each for each in self.operands)
        acc = self.acc.done if isinstance(self.acc, Product) else self.acc
        self.done = acc + tl.dot(a, b) if self.added else tl.dot(a, b)


def multiply(a: Any, b: Matrices, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    queue().append(Product(a, b, acc, use_acc))
    return queue()[-1]


def wait_for_products(most: int, deps: Sequence[Any]) -> Any:
    machine.pause()
    while len(queue()) > number(most):
        queue().pop(0).finish()
    assert all(each.done is not None for each in deps if isinstance(each, Product)), "not waited for"
    out = tuple(each.done if isinstance(each, Product) else each for each in deps)
    return out if len(out) > 1 else out[0]


def copy(described: Any, at: Sequence[Any], bar: Barrier, buffer: Shared) -> None:
    """A box of a tensor, zeros where it has nothing."""
    source = described.base.as_strided(described.shape, described.strides).numpy()
    box, place = described.block_shape, [number(each) for each in at]

    def arrive() -> None:
        inside = source[tuple(slice(max(p, 0), min(p + b, s)) for p, b, s in zip(place, box, source.shape, strict=True))]
        found = np.zeros(box, source.dtype)
        found[tuple(slice(0, size) for size in inside.shape)] = inside
        buffer.array[...] = found.reshape(buffer.array.shape)
        bar.add(0, -found.nbytes)

    assert min(place) >= 0
    buffer.array[...] = np.nan
    machine.copies.append(arrive)


def room(dtype: Any, shape: Sequence[Any], layout: Any) -> Any:
    sizes = [number(each) for each in shape]
    if dtype == tl.int64:
        return Barriers(sizes[0])
    return Shared(np.full(sizes, -(1 << 20), np.int32) if dtype == tl.int32 else np.full(sizes, np.nan, np.float16), dtype)


def nothing(*_: Any, **__: Any) -> None:
    return None


def words() -> dict[str, types.ModuleType]:
    """Modules in place of Gluon's. What they do not name is Triton's."""

    def module(**found: Any) -> Any:
        made = types.ModuleType("gluon")
        made.__dict__.update(found)
        return made

    layouts = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout")
    shared_layouts = ("NVMMASharedLayout", "SwizzledSharedLayout")
    gl = module(
        **dict.fromkeys((*layouts, *shared_layouts, "barrier"), nothing),
        arange=lambda low, high, layout: tl.arange(low, high),
        full=lambda shape, value, dtype, layout: tl.full([number(each) for each in shape], value, dtype),
        to_tensor=lambda value: tl.full((), value, tl.int32),
        convert_layout=lambda x, layout: x,
        associative_scan=lambda x, axis, add: tl.cumsum(x, axis),
        allocate_shared_memory=room,
        shared_memory_descriptor=Shared,
        warp_specialize=lambda parts, warps, registers: machine.run(parts),
        __getattr__=lambda name: getattr(tl, name),
    )
    mbarrier = module(
        init=lambda bar, count: bar.__dict__.update(count=number(count), left=number(count)),
        wait=lambda bar, phase: machine.until(lambda: bar.phase & 1 != number(phase)),
        arrive=lambda bar, count: bar.add(number(count), 0),
        expect=lambda bar, size: bar.add(1, number(size)),
        MBarrierLayout=nothing,
    )
    hopper = module(
        mbarrier=mbarrier,
        tma=module(async_copy_global_to_shared=copy),
        warpgroup_mma=multiply,
        warpgroup_mma_wait=wait_for_products,
        fence_async_shared=nothing,
    )
    name = "triton.experimental.gluon"
    return {name: module(jit=triton.jit, language=gl), f"{name}.language": gl, f"{name}.language.nvidia.hopper": hopper}


@functools.cache
def interpreted(*names: str) -> tuple[Any, ...]:
    """These modules, each of which may import those before it, their Gluon kernels as Triton's interpreter runs them."""
    import triton.experimental

    made, modules = words(), []
    instead = mock.patch.object(triton.experimental, "gluon", made["triton.experimental.gluon"], create=True)
    with mock.patch.dict(sys.modules, made), instead:
        for each in names:
            found = importlib.util.find_spec(each)
            assert found is not None and found.loader is not None
            sys.modules[each] = module = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
            module.__dict__["tl"] = tl  # the interpreter finds Triton's words, which it replaces, in a function's module
            modules.append(module)
    return tuple(modules)

"""Runs a Gluon kernel on the CPU as it is written: every group of warps is a thread, barriers and the copy engine are kept to.

Layouts mean nothing here, and a group's own threads are one: what is checked is arithmetic, addresses, what is waited for.
Shared memory starts as NaN, and a load or store outside its tensor is an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from math import prod
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 60.0


def scalar(x: Any) -> Any:
    return torch.tensor(x) if isinstance(x, int) else x


class Pointer:
    """Elements of a tensor's storage, counted from its own first."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, torch.as_tensor(offset, dtype=torch.int64)
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + other)

    def flat(self) -> Tensor:
        size = self.tensor.untyped_storage().size() // self.tensor.itemsize - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))


class Shared:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, i: Any) -> Shared:
        return Shared(self.tensor[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        return Shared(self.tensor[start : start + length])

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.tensor.permute(order))

    def load(self, layout: Any) -> Tensor:
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        assert (value.dtype, value.shape) == (self.tensor.dtype, self.tensor.shape), "a store of another kind"
        self.tensor.copy_(value)


class Barrier:
    """Completes when all have arrived and all bytes announced are there."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.completed = 0

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            if self.pending == 0 and self.bytes == 0:
                self.completed += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, phase: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.completed % 2 != int(phase), PATIENCE), "waited for nothing"


class Barriers:
    def __init__(self, count: int) -> None:
        self.all = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.all[int(i)]


class Boxes:
    """A tensor descriptor."""

    def __init__(self, descriptor: Any) -> None:
        base, shape, strides = descriptor.base, descriptor.shape, descriptor.strides
        self.tensor = base.as_strided(shape, [stride if n > 1 else 0 for n, stride in zip(shape, strides, strict=True)])
        self.layout, box = descriptor.layout, descriptor.block_shape
        self.block_type = SimpleNamespace(shape=box, nbytes=prod(box) * base.itemsize)

    def span(self, start: list[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """(what of the box is in the tensor, where that is in the box)"""
        begins = [int(x) for x in start]
        assert all(0 <= b < n for b, n in zip(begins, self.tensor.shape, strict=True)), "a box begins outside"
        view = self.tensor
        for axis, (begin, size) in enumerate(zip(begins, self.block_type.shape, strict=True)):
            view = view.narrow(axis, begin, min(size, view.shape[axis] - begin))
        return view, tuple(slice(n) for n in view.shape)


def to_shared(boxes: Boxes, start: list[Any], barrier: Barrier, target: Shared) -> None:
    view, where = boxes.span(start)
    assert list(target.tensor.shape) == list(boxes.block_type.shape)
    target.tensor.zero_()
    target.tensor[where] = view
    barrier.update(0, -boxes.block_type.nbytes)


def to_global(boxes: Boxes, start: list[Any], source: Shared) -> None:
    view, where = boxes.span(start)
    view.copy_(source.tensor[where])


def load(pointer: Pointer, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Tensor:
    offset, mask = torch.broadcast_tensors(pointer.offset, torch.as_tensor(mask))
    flat, safe = pointer.flat(), torch.where(mask, offset, 0)
    assert ((safe >= 0) & (safe < len(flat))).all(), "a load outside"
    return torch.where(mask, flat[safe], torch.tensor(other, dtype=flat.dtype))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    value = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else pointer.tensor.dtype)
    offset, value, mask = torch.broadcast_tensors(pointer.offset, value, torch.as_tensor(mask))
    flat, there = pointer.flat(), offset[mask]
    assert ((there >= 0) & (there < len(flat))).all(), "a store outside"
    flat[there] = value[mask].to(flat.dtype)


def loop(*bounds: Any) -> Iterator[Tensor]:
    return map(torch.tensor, range(*map(int, bounds)))


def product(a: Shared, b: Shared, acc: Tensor, *, is_async: bool) -> Tensor:
    assert a.tensor.dtype == b.tensor.dtype == torch.bfloat16
    return acc + a.tensor.float() @ b.tensor.float()


def power_of_two_scale(x: Tensor) -> Tensor:
    largest = x.float().abs().amax(1)
    return torch.where(largest == 0, 1.0, torch.exp2(-torch.floor(torch.log2(largest))))


class Language:
    """What stands for ``gl`` in one program."""

    float32, bfloat16, int32, int64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
    exp, zeros, full = torch.exp, staticmethod(lambda shape, dtype, _: torch.zeros(shape, dtype=dtype)), torch.full
    expand_dims, sum = torch.unsqueeze, torch.sum
    static_range, load, store = range, staticmethod(load), staticmethod(store)

    def __init__(self, program: int, programs: int) -> None:
        self.lock = threading.Lock()
        self.program_id, self.num_programs = lambda axis: torch.tensor(program), lambda axis: torch.tensor(programs)
        nothing = lambda *args, **kwargs: None  # noqa: E731
        self.BlockedLayout = self.SliceLayout = self.NVMMADistributedLayout = self.thread_barrier = self.assume = (
            nothing
        )
        self.NVMMASharedLayout = SimpleNamespace(get_default_for=nothing)

    @staticmethod
    def arange(start: int, end: int, _: Any) -> Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    @staticmethod
    def where(condition: Tensor, a: Any, b: Any) -> Tensor:
        return torch.where(condition, scalar(a), scalar(b))

    @staticmethod
    def maximum(a: Any, b: Any) -> Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def minimum(a: Any, b: Any) -> Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        return Barriers(shape[0]) if dtype == torch.int64 else Shared(torch.full(shape, torch.nan, dtype=dtype))

    def atomic_add(self, pointer: Pointer, value: int, sem: str = "") -> Tensor:
        with self.lock:
            old = load(pointer)
            store(pointer, old + value)
        return old

    def atomic_xchg(self, pointer: Pointer, value: int) -> None:
        store(pointer, value)

    @staticmethod
    def warp_specialize(groups: list[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        errors: list[BaseException] = []

        def work(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:  # told by the thread that waits
                errors.append(error)

        threads = [threading.Thread(target=work, args=group) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class OnCPU:
    """A kernel of ``module`` that runs here; programs take turns, in an order of their own."""

    def __init__(self, module: ModuleType, name: str) -> None:
        functions = {key: x.fn for key, x in vars(module).items() if type(x).__name__ == "GluonJITFunction"}
        self.kernel, self.module, self.functions = functions[name], module, functions
        self.order = torch.Generator().manual_seed(0)
        setattr(module, name, self)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            given = [
                Pointer(x) if isinstance(x, Tensor) else Boxes(x) if hasattr(x, "block_shape") else torch.tensor(x)
                for x in arguments
            ]
            for program in torch.randperm(grid[0], generator=self.order).tolist():
                vars(self.module).update(self.replacements(Language(program, grid[0])))
                self.kernel(*given, **constants)

        return launch

    def replacements(self, language: Language) -> dict[str, Any]:
        def init(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.pending = count

        functions = {name: x for name, x in self.functions.items() if x is not self.kernel}
        return functions | {
            "gl": language,
            "range": loop,
            "power_of_two_scale": power_of_two_scale,
            "regular_inverse": lambda den, noise: (torch.nan_to_num(den / (den * den + noise * noise)), None),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": product,
            "warpgroup_mma_wait": lambda pending, deps: deps[0] if len(deps) == 1 else deps,
            "mbarrier": SimpleNamespace(
                init=init,
                MBarrierLayout=lambda: None,
                wait=Barrier.wait,
                expect=lambda barrier, size: barrier.update(1, size),
                arrive=lambda barrier, count: barrier.update(count, 0),
            ),
            "tma": SimpleNamespace(
                async_copy_global_to_shared=to_shared,
                async_copy_shared_to_global=to_global,
                store_wait=lambda pending: None,
            ),
        }

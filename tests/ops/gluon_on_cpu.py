"""Runs a Gluon kernel on the CPU as it is written: every group of warps is a thread, barriers and the copy engine are kept to.

Layouts mean nothing here, and a group's own threads are one: what is checked is arithmetic, addresses, what is waited for.
Shared memory starts as NaN, and a load or store outside its tensor is an error.
"""

from __future__ import annotations

import ast
import inspect
import random
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from math import prod
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from power_retention.ops.triton.hopper import common

PATIENCE = 60.0
failed = threading.Event()
"""Set once somebody has: what others wait for will not come."""


def keep_waiting(since: float) -> None:
    assert not failed.is_set(), "somebody else failed"
    assert time.monotonic() - since < PATIENCE, "waited for nothing"


def scalar(x: Any) -> Any:
    return torch.tensor(x) if isinstance(x, int) else x


class Pointer:
    """Elements of a tensor's storage, counted from its own first."""

    def __init__(self, tensor: Tensor, offset: Any = 0) -> None:
        self.tensor, self.offset = tensor, torch.as_tensor(offset, dtype=torch.int64)
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset + other)

    def __sub__(self, other: Any) -> Pointer:
        return Pointer(self.tensor, self.offset - other)

    def flat(self) -> Tensor:
        size = self.tensor.untyped_storage().size() // self.tensor.itemsize - self.tensor.storage_offset()
        return self.tensor.as_strided((size,), (1,))


class Shared:
    layout = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, i: Any) -> Shared:
        return Shared(self.tensor[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.tensor.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        return Shared(self.tensor.view(-1).view(dtype)[: prod(shape)].view(shape))

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
        self.late: list[Callable[[], None]] = []

    def update(self, arrivals: int, size: int) -> None:
        with self.changed:
            self.pending -= arrivals
            self.bytes += size
            assert self.pending >= 0, "more arrived than were expected"
            if self.pending == 0 and self.bytes == 0:
                self.completed += 1
                self.pending = self.count
                self.changed.notify_all()

    def wait(self, phase: Any) -> None:
        since = time.monotonic()
        with self.changed:
            while self.late or self.completed % 2 == int(phase):
                if self.late:
                    self.late.pop()()
                elif not self.changed.wait(1.0):
                    keep_waiting(since)

    def deliver(self, copy: Callable[[], None]) -> None:
        """Copies now or, as often, as late as can be: when somebody waits for it."""
        if random.random() < 0.5:
            return copy()
        with self.changed:
            self.late.append(copy)
            self.changed.notify_all()


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
        # The last rows are often fetched as two boxes, of which the second is all outside.
        ends = [self.tensor.shape[0] + 2 * self.block_type.shape[0], *self.tensor.shape[1:]]
        assert all(0 <= b < n for b, n in zip(begins, ends, strict=True)), "a box begins outside"
        view = self.tensor
        for axis, (begin, size) in enumerate(zip(begins, self.block_type.shape, strict=True)):
            begin = min(begin, view.shape[axis])
            view = view.narrow(axis, begin, min(size, view.shape[axis] - begin))
        return view, tuple(slice(n) for n in view.shape)


def to_shared(boxes: Boxes, start: list[Any], barrier: Barrier, target: Shared) -> None:
    view, where = boxes.span(start)
    assert list(target.tensor.shape) == list(boxes.block_type.shape)

    def copy() -> None:
        with torch.no_grad():
            target.tensor.zero_()
            target.tensor[where] = view
        barrier.update(0, -boxes.block_type.nbytes)

    barrier.deliver(copy)


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


def product(a: Shared | Tensor, b: Shared, acc: Tensor, *, is_async: bool, use_acc: bool = True) -> Tensor:
    left = a.tensor if isinstance(a, Shared) else a
    assert left.dtype == b.tensor.dtype == torch.bfloat16
    result = left.float() @ b.tensor.float()
    assert result.shape == acc.shape
    return acc + result if use_acc else result


def power_of_two_scale(x: Tensor) -> Tensor:
    largest = x.float().abs().amax(1)
    return torch.where(largest == 0, 1.0, torch.exp2(-torch.floor(torch.log2(largest))))


def nothing(*arguments: Any, **options: Any) -> None:
    pass


class Language:
    """What stands for ``gl`` in one program."""

    float32, bfloat16, int32, int64 = torch.float32, torch.bfloat16, torch.int32, torch.int64
    exp, abs, sum, expand_dims, reshape, permute = (
        torch.exp, torch.abs, torch.sum, torch.unsqueeze, torch.reshape, torch.permute
    )  # fmt: skip
    static_range, load, store = range, staticmethod(load), staticmethod(store)
    BlockedLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout = SwizzledSharedLayout = staticmethod(
        nothing
    )
    NVMMASharedLayout = SimpleNamespace(get_default_for=nothing)
    thread_barrier = assume = staticmethod(nothing)

    def __init__(self, program: int, programs: int, lock: threading.Lock) -> None:
        self.lock, self.since = lock, time.monotonic()
        self.program_id, self.num_programs = lambda axis: torch.tensor(program), lambda axis: torch.tensor(programs)

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def full(shape: list[int], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.full(shape, value, dtype=dtype)

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, ...]:
        return x.unbind(-1)

    @staticmethod
    def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
        return x

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
        if dtype == torch.int64:
            return Barriers(shape[0]) if len(shape) == 2 else Barrier()
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    def atomic_add(self, pointer: Pointer, value: int, sem: str = "") -> Tensor:
        if value == 0:  # who asks again and again lets others work
            time.sleep(1e-4)
            keep_waiting(self.since)
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
                with torch.no_grad():
                    function(*arguments)
            except BaseException as error:  # told by the thread that waits
                errors.append(error)
                failed.set()

        threads = [threading.Thread(target=work, args=group) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]


class Rewritten(ast.NodeTransformer):
    """Values are never changed: ``x += y`` makes another.  They have no layout."""

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        assert isinstance(node.target, ast.Name)
        changed = ast.BinOp(ast.Name(node.target.id, ast.Load()), node.op, node.value)
        return ast.copy_location(ast.Assign([node.target], changed), self.generic_visit(node))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr == "layout" and isinstance(node.value, ast.Attribute) and node.value.attr == "type":
            return ast.copy_location(ast.Constant(None), node)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = []
        return self.generic_visit(node)


def rewritten(function: FunctionType) -> Any:
    """Code that defines the function."""
    lines, first = inspect.getsourcelines(function)
    tree = Rewritten().visit(ast.parse(textwrap.dedent("".join(lines))))
    ast.increment_lineno(tree, first - 1)
    return compile(ast.fix_missing_locations(tree), inspect.getfile(function), "exec")


def plain(x: Any) -> Any:
    """What a kernel sees of a name of its module."""
    kind = type(x).__name__
    return nothing if kind == "ConstexprFunction" else x.value if kind == "constexpr" else x


class OnCPU:
    """A kernel of ``module`` that runs here; programs take turns, in an order of their own, or all run together."""

    def __init__(self, module: ModuleType, name: str, *, together: bool = False) -> None:
        self.names = {key: plain(x) for key, x in (vars(common) | vars(module)).items()} | STAND_INS
        jitted = {x.fn.__name__: x.fn for x in self.names.values() if type(x).__name__ == "GluonJITFunction"}
        self.code = [rewritten(function) for function in jitted.values()]
        self.name, self.together = name, together
        self.launches: list[dict[str, Any]] = []
        self.parameters = list(inspect.signature(jitted[name]).parameters)
        self.order = torch.Generator().manual_seed(0)
        setattr(module, name, self)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            given = [
                Pointer(x) if isinstance(x, Tensor) else Boxes(x) if hasattr(x, "block_shape") else torch.tensor(x)
                for x in arguments
            ]
            numbers = {k: x for k, x in zip(self.parameters, arguments, strict=False) if isinstance(x, int)}
            self.launches.append(numbers | constants)
            lock, programs = threading.Lock(), torch.randperm(grid[0], generator=self.order).tolist()
            work = [(self.run, (Language(n, grid[0], lock), given, constants)) for n in programs]
            if self.together:
                return Language.warp_specialize(work)
            for function, where in work:
                function(*where)

        return launch

    def run(self, language: Language, given: list[Any], constants: dict[str, Any]) -> None:
        if self.together:
            time.sleep(random.random() / 5)  # nobody may count on another's being there first
        names = self.names | {"gl": language}
        for code in self.code:
            exec(code, names)
        names[self.name](*given, **constants)


def init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.pending = count


STAND_INS = {
    "range": loop,
    "power_of_two_scale": power_of_two_scale,
    "fence_async_shared": nothing,
    "warpgroup_mma": product,
    "warpgroup_mma_wait": lambda pending, deps: deps[0] if len(deps) == 1 else deps,
    "mbarrier": SimpleNamespace(
        init=init,
        MBarrierLayout=nothing,
        wait=Barrier.wait,
        expect=lambda barrier, size: barrier.update(1, size),
        arrive=lambda barrier, count: barrier.update(count, 0),
    ),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=to_shared, async_copy_shared_to_global=to_global, store_wait=nothing
    ),
}
"""What stands for the machine's own operations."""

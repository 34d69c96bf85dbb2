"""The steps of a call on Hopper: the portable kernels prepare, those of this folder do the heavy work.

A state here consists of *units*: 64 rows for the products of eight columns with eight, the pairs of eights (i, j ≥ i) in
order.  Row 8·b + a of a unit holds x_(8i+a)·x_(8j+b); units with i = j hold every pair twice.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from power_retention.ops.backends import Call
from power_retention.ops.triton.order import index_matrix
from power_retention.ops.triton.plan import multiprocessors
from power_retention.ops.triton.run import NOISE_EPS, Gradients, Moments, QueryGradients, Run, kernels

_RESOURCES = {"num_warps": 4, "maxnreg": 168}
"""Two groups of four warps with 240 registers a thread, and one warp that fetches."""


def covers(call: Call) -> bool:
    """Whether the kernels of this folder run the call."""
    width, value_width = (next((w for w in (64, 128) if x <= w), None) for x in (call.k.shape[-1], call.v.shape[-1]))
    return (
        call.q.dtype == torch.bfloat16
        and call.p == 2
        and min(call.k.shape[-1], call.v.shape[-1]) > 32
        and width is not None
        and width == value_width
        and on_hopper(call.q.device)
        and _states_addressable(call, width)
    )


def _states_addressable(call: Call, width: int) -> bool:
    """The copy engine counts rows in 32 bits."""
    slots = call.q.shape[0] * call.q.shape[1] // (call.chunk_size or call.q.shape[1]) + call.runs
    return slots * call.k.shape[2] * len(unit_pairs(width)) * 64 < 1 << 31


@lru_cache
def on_hopper(device: torch.device) -> bool:
    """Whether that is a GPU the kernels of this folder are for, and this Triton has the language they are written in."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        import_module("power_retention.ops.triton.hopper.attend")
    except ImportError:
        return False
    return True


@lru_cache
def unit_pairs(width: int) -> list[tuple[int, int]]:
    """(i, j) of each unit."""
    return [(i, j) for i in range(width // 8) for j in range(i, width // 8)]


@lru_cache
def _pairs(width: int, device: torch.device) -> Tensor:
    return torch.tensor(unit_pairs(width), dtype=torch.int32, device=device)


@lru_cache
def _canonical_rows(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(canonical row of each row of the units, where a ≠ b, a row of the units for each canonical row)."""
    i, j = (x.repeat_interleave(64) for x in _pairs(width, device).long().T)
    within = torch.arange(64, device=device).repeat(len(unit_pairs(width)))
    a, b = 8 * i + within % 8, 8 * j + within // 8
    canonical = index_matrix(width, device)[a, b]
    source = torch.empty(width * (width + 1) // 2, dtype=torch.int64, device=device)
    source[canonical] = torch.arange(canonical.numel(), device=device)
    return canonical, a != b, source


@lru_cache
def _kernels(name: str) -> Any:
    return import_module(f"power_retention.ops.triton.hopper.{name}")


@lru_cache
def _descriptor(rows: int, columns: int) -> tuple[Any, list[int], Any]:
    gl = import_module("triton.experimental.gluon.language")
    hopper = import_module("triton.experimental.gluon.nvidia.hopper")
    box = [rows, columns]
    return hopper.TensorDescriptor, box, gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)


def _boxes(x: Tensor, rows: int, columns: int) -> Any:
    """How the copy engine sees a matrix: in boxes of ``rows`` by ``columns``."""
    describe, box, layout = _descriptor(rows, columns)
    return describe(x, list(x.shape), list(x.stride()), box, layout)


def _aligned(x: Tensor) -> Tensor:
    """The copy engine reads from multiples of sixteen bytes only."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


class HopperRun(Run):
    """One call through the Hopper kernels; interface and intermediates as in :class:`Run`."""

    ordered_columns = True
    split_moments = True

    def __init__(self, call: Call) -> None:
        super().__init__(call)
        self.q, self.k, self.v = (_aligned(x) for x in (self.q, self.k, self.v))
        self.rows = len(unit_pairs(self.d)) * 64

    @cached_property
    def processors(self) -> int:
        return multiprocessors(self.device)

    def heads_of(self, x: Tensor, size: int = 64) -> Any:
        """Boxes of ``size`` tokens of one head; x ``[B, T, heads, width]``."""
        return _boxes(x.view(self.tokens, -1), size, x.shape[-1])

    @cached_property
    def weighted_values(self) -> Tensor:
        """``[columns, H, e]``, zero after a slot's last token."""
        plan = self.plan
        out = torch.empty(plan.columns, self.heads, self.e, dtype=self.v.dtype, device=self.device)
        kernels("prepare").weigh_values_kernel[plan.columns // 64, self.heads](
            self.v, self.gates, plan.table, out, self.tokens, plan.pad, self.heads,
            HAS_GATES=self.has_gates, PADDED=True, E=self.e, BT=64,
        )  # fmt: skip
        return out

    @cached_property
    def roots(self) -> Tensor:
        """What each token weighs at the end of its 64, ``[H, tokens]``; empty ungated."""
        plan = self.plan
        roots = self.new(self.heads if self.has_gates else 0, self.tokens)
        if self.has_gates:
            kernels("prepare").block_roots_kernel[plan.columns // 64, self.heads](
                self.gates, plan.table, roots, self.tokens, plan.pad, BT=64
            )
        return roots

    def boxed(self, moments: Moments, rows: int = 64) -> tuple[Any, Any, Tensor]:
        """Second moments as two bfloat16 parts in boxes of ``rows``, and their traces ``[slots, H]``."""
        high, low = (_boxes(x.view(-1, self.d), rows, self.d) for x in (moments.high, moments.low))
        return high, low, moments.traces.sum(-1)

    def accumulate(
        self,
        columns: Tensor,
        u: Tensor,
        groups: int,
        initial: Tensor | None,
        *,
        keep_states: bool,
        keep_final: bool,
        other: Tensor | None = None,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        plan, runs, tiles = self.plan, self.call.runs, self.rows // 256
        canonical, twice, source = _canonical_rows(self.d, self.device)
        states = torch.empty(plan.slots, self.heads, self.rows, self.e, dtype=torch.bfloat16, device=self.device)
        # Whole walks do not divide evenly among the processors: cut them where there are enough slots, and few runs.
        segments = max(1, min(8, plan.slots // runs // 4)) if tiles * self.heads * runs > self.processors else 1
        carried = self.new(runs, self.heads, self.rows, self.e)
        if initial is not None:
            torch.index_select(initial, 2, canonical, out=carried)
            if reverse:
                carried *= torch.where(twice, 0.5, 1.0)[:, None]
        arrived = _pairs(self.d, self.device)  # not looked at with one segment
        if segments > 1:
            arrived = torch.zeros(runs * self.heads * tiles * 2, dtype=torch.int32, device=self.device)
        _kernels("accumulate").accumulate_kernel[(min(self.processors, tiles * self.heads * runs * segments),)](
            _boxes(columns.view(-1, plan.columns), 8, 64), _boxes(u.view(plan.columns, -1), 64, self.e),
            self.gates, plan.table, plan.borders, _pairs(self.d, self.device), carried, arrived, states,
            plan.pad, self.tokens, self.heads, groups, tiles, runs, segments, int(reverse), int(initial is not None),
            int(keep_final), HAS_GATES=self.has_gates, D=self.d, E=self.e, STAGES=6, **_RESOURCES,
        )  # fmt: skip
        final = self.new(0)
        if keep_final:
            final = carried.index_select(2, source)
            if reverse:
                final *= torch.where(twice[source], 2.0, 1.0)[:, None]
        return states, final, self.new(0) if other is None else self._flows(other, states)

    def _flows(self, states: Tensor, gradients: Tensor) -> Tensor:
        """⟨state, gradient⟩ entering each slot, in parts ``[slots, H, units]``; zero for the first."""
        slots, units = self.plan.slots, self.rows // 64
        out = torch.zeros(slots, self.heads, units, device=self.device)
        if slots > 1:
            kernels("prepare").flows_kernel[units, (slots - 1) * self.heads](
                states, gradients, out[1:], self.heads * self.rows * self.e, D=self.d, E=self.e
            )
        start, end, begins, _ = self.plan.table.T
        return out.masked_fill_(((start == end) | (begins != 0))[:, None, None], 0)

    def read_states(
        self, x: Tensor, columns: Tensor | None, states: Tensor, groups: int, *, at_end: bool, always: bool, scale: bool
    ) -> Tensor:
        heads, count = self.heads * groups, -(-self.plan.size // 256)
        out = self.new(self.tokens, heads, self.e)
        _kernels("read").read_state_kernel[(self.plan.slots * heads * count,)](
            _boxes(states.view(-1, self.e), 64, self.e), x, self.plan.table, out, self.heads, groups, count,
            int(at_end), int(always), int(scale), D=self.d, E=self.e, ROWS=128, STAGES=8, **_RESOURCES,
        )  # fmt: skip
        return out

    def contract_states(
        self, u: Tensor, x: Tensor, states: Tensor, groups: int, *, at_end: bool, always: bool
    ) -> Tensor:
        """As in :class:`Run`, from rows instead of columns; queries (what is not at a slot's end) are scaled."""
        out = self.new(self.tokens, self.heads * groups, self.d)
        blocks = -(-self.plan.size // 64)
        tiles = -(-groups * blocks // 3)
        _kernels("contract").contract_state_kernel[(self.plan.slots * self.heads * tiles,)](
            _boxes(states.view(-1, self.e), 64, self.e), u, x, self.plan.table, out, self.heads, groups, blocks, tiles,
            int(at_end), int(always), int(not at_end), D=self.d, E=self.e, STAGES=4 if self.d == 128 else 8,
            num_warps=4, maxnreg=128,
        )  # fmt: skip
        return out

    def read(self) -> Tensor:
        y = torch.empty(*self.q.shape[:-1], self.e, dtype=self.v.dtype, device=self.device)
        reads, always, plan = self.reads_state, self.call.memory is not None, self.plan
        partial = y.new_empty(0, dtype=torch.float32)
        high = low = self.heads_of(self.k)  # any, where nothing enters a slot
        traces = partial
        if reads:
            states = self.entering[0]
            partial = self.read_states(self.q, None, states, self.groups, at_end=False, always=always, scale=True)
            high, low, traces = self.boxed(self.entering_moments, self.d)
        tiles = -(-plan.size // 128)
        items = tiles * plan.slots * self.query_heads
        _kernels("attend").attend_kernel[(min(self.processors, items),)](
            self.heads_of(self.q), self.heads_of(self.k, 128), self.heads_of(self.v, 128), high, low,
            self.gates, self.roots, plan.table, partial, traces, y,
            self.tokens, self.heads, self.groups, tiles, plan.slots, int(always),
            HAS_GATES=self.has_gates, HAS_STATE=reads, NOISE=NOISE_EPS, D=self.d, E=self.e,
            STAGES=2 if self.d == 128 else 4, **_RESOURCES,
        )  # fmt: skip
        return y

    def backward(
        self, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return HopperGradients(self, dy, d_memory, d_normalizer).all()


class HopperGradients(Gradients):
    """The backward pass of one run through the Hopper kernels.

    Here ``dn`` stands in columns ``[columns, Hq, e]``, and ``rows`` ``[Hq, columns / 64, 2, 4, 64]`` holds the factors of
    ``key_grad_kernel``.
    """

    run: HopperRun

    def __init__(self, run: HopperRun, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None) -> None:
        super().__init__(run, dy, d_memory, d_normalizer)
        self.dy = _aligned(self.dy)

    @property
    def stages(self) -> int:
        """As many as shared memory holds."""
        return 4 if self.run.d == 128 else 6

    def _row_boxes(self, rows: Tensor) -> Any:
        hopper = import_module("triton.experimental.gluon.nvidia.hopper")
        layout = _kernels("attend_backward").factors_layout()
        return hopper.TensorDescriptor.from_tensor(rows.view(-1, 256), [1, 256], layout)

    def _query(self) -> QueryGradients:
        run = self.run
        plan, reads, always = run.plan, run.reads_state, self.call.memory is not None
        rows = (run.query_heads, run.tokens)
        shape = (plan.columns, run.query_heads, run.e) if self.has_state else (0,)
        dn = torch.empty(shape, dtype=torch.bfloat16, device=run.device)
        factors = run.new(run.query_heads, plan.columns // 64, 2, 4, 64)
        out = QueryGradients(torch.empty_like(run.q), dn, run.new(*rows), run.new(*rows), factors)
        partial, keys = run.new(0), run.heads_of(run.k)
        high, low, traces = keys, keys, partial
        if reads:
            partial = run.contract_states(self.dy, run.q, run.entering[0], run.groups, at_end=False, always=always)
            high, low, traces = run.boxed(run.entering_moments)
        tiles = -(-plan.size // 128)
        _kernels("attend_backward").query_grad_kernel[(min(run.processors, tiles * plan.slots * run.query_heads),)](
            run.heads_of(run.q), keys, run.heads_of(run.v), run.heads_of(self.dy), high, low,
            run.gates, run.roots, plan.table, partial, traces, out.dq, out.dn, out.rows, out.dz, out.flow,
            run.tokens, plan.pad, run.heads, run.groups, tiles, plan.slots, int(always),
            HAS_GATES=run.has_gates, HAS_STATE=reads, WITH_DN=self.has_state, NOISE=NOISE_EPS,
            D=run.d, E=run.e, STAGES=self.stages, **_RESOURCES,
        )  # fmt: skip
        return out

    def _keys_and_values(
        self, of_query: QueryGradients, leaving: tuple[Tensor, Moments]
    ) -> tuple[Tensor, Tensor, Tensor]:
        run, always = self.run, self.d_memory is not None
        plan, keys = run.plan, run.heads_of(run.k)
        dk, dv, flow = torch.empty_like(run.k), torch.empty_like(run.v), run.new(run.heads, run.tokens)
        partial_k = partial_v = run.new(0)
        high, low = keys, keys
        if self.has_state:
            partial_v = run.read_states(run.k, None, leaving[0], 1, at_end=True, always=always, scale=False)
            partial_k = run.contract_states(run.v, run.k, leaving[0], 1, at_end=True, always=always)
            high, low, _ = run.boxed(leaving[1])
        tiles = -(-plan.size // 128)
        _kernels("attend_backward").key_grad_kernel[(min(run.processors, tiles * plan.slots * run.heads),)](
            run.heads_of(run.q), keys, run.heads_of(run.v), run.heads_of(self.dy),
            self._row_boxes(of_query.rows), high, low,
            run.gates, plan.table, partial_k, partial_v, dk, dv, flow,
            run.tokens, plan.pad, run.heads, run.groups, tiles, plan.slots, int(always),
            HAS_GATES=run.has_gates, HAS_STATE=self.has_state, D=run.d, E=run.e, STAGES=self.stages, **_RESOURCES,
        )  # fmt: skip
        return dk, dv, flow

"""The steps of a call through the portable kernels, forward and backward.

The kernels are reached through :func:`kernels`, so that importing this file does not import Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from power_retention.ops.backends import Call
from power_retention.ops.chunk import NOISE
from power_retention.ops.triton.order import from_matrix, narrow_state, row_order, to_matrix, widen, widen_state
from power_retention.ops.triton.plan import WIDTHS, Plan, Tile, Tiles, interpreted, make_plan, power_of_two, tiles_for

FORGET = -110.0
"""exp of it is 0 in float32, and sums of it over a tile keep the digits of ordinary gates."""

_CLOSED = -16.0
"""A gate below exp of it passes less than float32 resolves."""

NOISE_EPS = NOISE * torch.finfo(torch.float32).eps


def kernels(name: str) -> Any:
    """One of the modules beside this one."""
    return import_module(f"power_retention.ops.triton.{name}")


def operands(dtype: torch.dtype) -> dict[str, Any]:
    """Operands of matrix products: bfloat16 as it is; float16 as tf32, which holds it and does not overflow.

    The interpreter has no products in bfloat16.
    """
    tl = import_module("triton.language")
    if dtype == torch.bfloat16 and not interpreted():
        return {"CT": tl.bfloat16, "PREC": "tf32"}
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return {"CT": tl.float32, "PREC": "ieee" if exact else "tf32"}


def _fit(width: int) -> int:
    return next(w for w in WIDTHS if w >= width)


class Moments(NamedTuple):
    """Second moments entering each slot ``[slots, H, d, d]``, after the last ``[R, H, d, d]``; if asked for also those
    entering in two bfloat16 parts, and parts of their traces ``[slots, H, ·]``."""

    states: Tensor
    final: Tensor
    high: Tensor
    low: Tensor
    traces: Tensor


class Run:
    """One call on the way through the kernels: padded inputs, and every intermediate made once, when first asked for."""

    ordered_columns = False
    split_moments = False

    def __init__(self, call: Call) -> None:
        self.call = call
        self.d, self.e = _fit(call.k.shape[-1]), _fit(call.v.shape[-1])
        self.q, self.k, self.v = widen(call.q, self.d), widen(call.k, self.d), widen(call.v, self.e)
        self.device = call.q.device
        batch, length, self.query_heads, _ = call.q.shape
        self.heads, self.tokens = call.k.shape[2], batch * length
        self.groups = self.query_heads // self.heads
        self.plan = self._plan(batch, length)
        self.tiles: Tiles = tiles_for(max(self.d, self.e), call.q.dtype, self.device, self.groups)
        self.rows, self.block = self.d * (self.d // 2 + 1), min(self.d, self.tiles.block)

    def _plan(self, batch: int, length: int) -> Plan:
        size = min(self.call.chunk_size or length, length)
        return make_plan(batch, length, self.call.cu_seqlens, size, self.device)

    @property
    def has_gates(self) -> bool:
        return self.call.log_g is not None

    @property
    def reads_state(self) -> bool:
        """Whether any slot may have something entering it."""
        return self.call.memory is not None or self.plan.slots > self.call.runs

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.call.q.dtype == torch.bfloat16 else torch.float32

    @property
    def precision(self) -> dict[str, Any]:
        return operands(self.call.q.dtype)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def tile_count(self, tile: Tile) -> int:
        return -(-self.plan.size // tile.rows)

    @cached_property
    def gates(self) -> Tensor:
        """Cumulative within slots, float64 ``[H, tokens]``."""
        if self.call.log_g is None:
            return self.new(0, dtype=torch.float64)
        out = self.new(self.heads, self.tokens, dtype=torch.float64)
        block = min(1024, power_of_two(self.plan.size))
        kernels("prepare").gates_kernel[self.plan.slots, self.heads](
            self.call.log_g.contiguous(), self.plan.table, out, self.tokens, self.heads, FORGET=FORGET, BLOCK=block
        )
        return out

    def _columns(self, x: Tensor, heads: int, scale: bool) -> Tensor:
        out = self.new(heads, self.d, self.plan.columns, dtype=x.dtype)
        kernels("prepare").columns_kernel[self.plan.columns // 64, heads](
            x,
            self.plan.table,
            out,
            self.plan.columns,
            self.plan.pad,
            heads,
            D=self.d,
            BT=64,
            SCALE=scale,
            ORDERED=self.ordered_columns,
        )
        return out

    @cached_property
    def key_columns(self) -> Tensor:
        return self._columns(self.k, self.heads, scale=False)

    @cached_property
    def query_columns(self) -> Tensor:
        return self._columns(self.q, self.query_heads, scale=True)

    @cached_property
    def scaled_queries(self) -> Tensor:
        out = torch.empty_like(self.q)
        rows = self.tokens * self.query_heads
        kernels("prepare").scale_kernel[(-(-rows // 64),)](self.q, out, rows, D=self.d, BT=64)
        return out

    @cached_property
    def weighted_values(self) -> Tensor:
        if not self.has_gates:
            return self.v
        out = torch.empty_like(self.v)
        plan = self.plan
        kernels("prepare").weigh_values_kernel[plan.columns // 64, self.heads](
            self.v,
            self.gates,
            plan.table,
            out,
            self.tokens,
            plan.pad,
            self.heads,
            HAS_GATES=True,
            PADDED=False,
            E=self.e,
            BT=64,
        )
        return out

    def moments(
        self, x: Tensor, weight: Tensor | None, groups: int, initial: Tensor | None, *, reverse: bool
    ) -> Moments:
        """Σ decay·weight·x xᵀ of each slot's past (of its future with ``reverse``: then x are queries, to be scaled)."""
        prepare, plan, d = kernels("prepare"), self.plan, self.d
        out, final = self.new(plan.slots, self.heads, d, d), self.new(self.call.runs, self.heads, d, d)
        prepare.moments_kernel[plan.slots, self.heads, -(-d // 64)](
            x, weight, self.gates, plan.table, out, self.tokens, self.heads, groups,
            SCALE=reverse, TO_END=not reverse, HAS_GATES=self.has_gates, HAS_WEIGHT=weight is not None,
            D=d, BD=min(d, 64), BT=32, **self.precision,
        )  # fmt: skip
        parts, split = -(-d * d // 1024), self.split_moments
        halves = [torch.empty(out.shape if split else (0,), dtype=torch.bfloat16, device=self.device) for _ in range(2)]
        traces = self.new(*((plan.slots, self.heads, parts) if split else (0,)))
        prepare.scan_moments_kernel[self.call.runs, self.heads, parts](
            out, initial, final, *halves, traces, self.gates, plan.table, plan.borders, self.tokens, self.heads,
            HAS_INITIAL=initial is not None, HAS_GATES=self.has_gates, REVERSE=reverse, SPLIT=split, D=d, BLOCK=1024,
        )  # fmt: skip
        return Moments(out, final, halves[0], halves[1], traces)

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
        """States entering each slot, after the last slot, and the flows of ``accumulate_kernel``."""
        plan, tile = self.plan, self.tiles.accumulate
        shape = (plan.slots, self.heads, self.rows, self.e)
        states = self.new(*(shape if keep_states else (0,)), dtype=self.state_dtype)
        width = self.d * (self.d + 1) // 2
        final = self.new(*((self.call.runs, self.heads, width, self.e) if keep_final else (0,)))
        block = min(self.e, 128)
        near = self.d * (self.block // 2 + 1)
        programs = (-(-near // tile.rows) - (near - self.rows) // tile.rows) * (self.e // block)
        flows = torch.zeros(
            (plan.slots, self.heads, programs) if other is not None else (0,), dtype=torch.float32, device=self.device
        )
        kernels("states").accumulate_kernel[programs, self.heads, self.call.runs](
            columns, u, row_order(self.d, self.block, self.device), self.gates, plan.table, plan.borders,
            initial, states, other, flows, final,
            plan.columns, plan.pad, self.tokens, self.heads, groups,
            HAS_GATES=self.has_gates, HAS_INITIAL=initial is not None, KEEP_STATES=keep_states, KEEP_FINAL=keep_final,
            REVERSE=reverse, FLOWS=other is not None, D=self.d, W=self.block, E=self.e, BR=tile.rows, BE=block, BT=tile.steps,
            **self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return states, final, flows

    @cached_property
    def initial_memory(self) -> Tensor | None:
        return (
            None if self.call.memory is None else widen_state(self.call.memory, self.call.k.shape[-1], self.d, self.e)
        )

    @cached_property
    def initial_moment(self) -> Tensor | None:
        return None if self.call.normalizer is None else to_matrix(self.call.normalizer, self.call.k.shape[-1], self.d)

    @cached_property
    def entering(self) -> tuple[Tensor, Tensor]:
        """(states entering each slot, final states); whichever nobody wants is empty."""
        wanted = self.call.return_state
        states, final, _ = self.accumulate(
            self.key_columns,
            self.weighted_values,
            1,
            self.initial_memory,
            keep_states=self.reads_state,
            keep_final=wanted,
        )
        return states, final

    @cached_property
    def entering_moments(self) -> Moments:
        return self.moments(self.k, None, 1, self.initial_moment, reverse=False)

    def final_state(self) -> tuple[Tensor, Tensor]:
        width = self.call.k.shape[-1]
        memory = narrow_state(self.entering[1], width, self.d, self.call.v.shape[-1])
        return memory, from_matrix(self.entering_moments.final, width)

    def read_states(
        self, x: Tensor, columns: Tensor, states: Tensor, groups: int, *, at_end: bool, always: bool, scale: bool
    ) -> Tensor:
        """φ(x)·state of each token's slot, float32 ``[tokens, H·groups, e]``; unwritten where a slot has no state."""
        tile, heads = self.tiles.read, self.heads * groups
        out = self.new(self.tokens, heads, self.e)
        block, count = min(self.e, 128), self.tile_count(tile)
        kernels("forward").read_state_kernel[self.plan.slots * heads * count, self.e // block](
            x, columns, self.plan.table, states, out, self.plan.columns, self.plan.pad, self.heads, groups, count,
            AT_END=at_end, ALWAYS=always, SCALE=scale, D=self.d, W=self.block, E=self.e, BM=tile.rows, BE=block,
            **self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    def contract_states(
        self, u: Tensor, columns: Tensor, states: Tensor, groups: int, *, at_end: bool, always: bool
    ) -> Tensor:
        """The gradient of u·(φ(x)·state) with respect to x, float32 ``[tokens, H·groups, d]``; as :meth:`read_states`."""
        tile, heads = self.tiles.contract, self.heads * groups
        out = self.new(self.tokens, heads, self.d)
        count = self.tile_count(tile)
        kernels("backward").contract_state_kernel[(self.plan.slots * heads * count,)](
            u, columns, self.plan.table, states, out, self.plan.columns, self.plan.pad, self.heads, groups, count,
            AT_END=at_end, ALWAYS=always, D=self.d, W=self.block, E=self.e, BM=tile.rows,
            BE=self.e if max(self.d, self.e) <= 128 else min(self.e, 64),
            **self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    def read(self) -> Tensor:
        """y ``[B, T, Hq, e]``, padded in e."""
        y = torch.empty(*self.q.shape[:-1], self.e, dtype=self.v.dtype, device=self.device)
        tile, reads, always = self.tiles.attend, self.reads_state, self.call.memory is not None
        partial = None
        if reads:
            partial = self.read_states(
                self.q, self.query_columns, self.entering[0], self.groups, at_end=False, always=always, scale=True
            )
        block, count = min(self.e, 128), self.tile_count(tile)
        kernels("forward").read_kernel[self.plan.slots * self.heads * self.groups * count, self.e // block](
            self.q, self.k, self.v, self.gates, self.plan.table, partial, self.entering_moments.states if reads else None, y,
            self.tokens, self.heads, self.groups, count,
            HAS_GATES=self.has_gates, HAS_STATE=reads, HAS_INITIAL=always, P=self.call.p,
            NOISE=NOISE_EPS, D=self.d, E=self.e, BM=tile.rows, BN=tile.steps, BE=block,
            **self.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return y

    def backward(
        self, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the call's inputs."""
        return Gradients(self, dy, d_memory, d_normalizer).all()


@dataclass
class QueryGradients:
    """The gradients of the queries, and what the rest of the backward pass needs of them."""

    dq: Tensor  # [B, T, Hq, d]
    dn: Tensor  # [B, T, Hq, e], of the numerators, times exp(G_i); empty where no state has a gradient
    dz: Tensor  # [Hq, tokens], of the denominators
    flow: Tensor  # [Hq, tokens], q·dq
    rows: Tensor  # what the keys' gradients need of each query; its shape is the kernels' own


class Gradients:
    """The backward pass of one run."""

    def __init__(self, run: Run, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None) -> None:
        self.run, self.call = run, run.call
        self.dy = widen(dy, run.e)
        width = run.call.k.shape[-1]
        self.d_memory = None if d_memory is None else widen_state(d_memory, width, run.d, run.e)
        self.d_moment = None if d_normalizer is None else to_matrix(d_normalizer, width, run.d, gradient=True)

    @property
    def has_state(self) -> bool:
        return self.run.reads_state or self.d_memory is not None

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        run, call = self.run, self.call
        of_query = self._query()
        leaving, d_initial, flows = self._states(of_query)
        dk, dv, key_flow = self._keys_and_values(of_query, leaving)
        width, value_width = call.k.shape[-1], call.v.shape[-1]
        dlog_g = None if call.log_g is None else self._gates(of_query.flow, key_flow, flows, call.log_g)
        d_memory = d_normalizer = None
        if call.memory is not None and call.normalizer is not None:
            d_memory = narrow_state(d_initial[0], width, run.d, value_width).to(call.memory.dtype)
            d_normalizer = from_matrix(d_initial[1], width, gradient=True).to(call.normalizer.dtype)
        dq, dk, dv = of_query.dq[..., :width], dk[..., :width], dv[..., :value_width]
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), dlog_g, d_memory, d_normalizer

    def _query(self) -> QueryGradients:
        run = self.run
        rows = (run.query_heads, run.tokens)
        dn = torch.empty_like(self.dy, dtype=run.state_dtype) if self.has_state else run.new(0)
        inverses_and_peaks = run.new(2, *rows)
        out = QueryGradients(torch.empty_like(run.q), dn, run.new(*rows), run.new(*rows), inverses_and_peaks)
        reads, tile, always = run.reads_state, run.tiles.query_grad, self.call.memory is not None
        partial = None
        if reads:
            partial = run.contract_states(
                self.dy, run.query_columns, run.entering[0], run.groups, at_end=False, always=always
            )
        count = run.tile_count(tile)
        kernels("backward").query_grad_kernel[(run.plan.slots * run.heads * run.groups * count,)](
            run.q, run.k, run.v, self.dy, run.gates, run.plan.table, partial, run.entering_moments.states if reads else None,
            out.dq, out.dn, out.rows[0], out.dz, out.rows[1], out.flow, run.tokens, run.heads, run.groups, count,
            HAS_GATES=run.has_gates, HAS_STATE=reads, HAS_INITIAL=always, WITH_DN=self.has_state,
            P=self.call.p, NOISE=NOISE_EPS, D=run.d, E=run.e, BM=tile.rows, BN=tile.steps,
            **run.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return out

    def _states(self, of_query: QueryGradients) -> tuple[tuple[Tensor, Moments], tuple[Tensor, Tensor], Tensor]:
        """(Gradients of what leaves each slot, of the initial state, ⟨state, gradient⟩ entering each slot [slots, H])."""
        run, call = self.run, self.call
        nothing = run.new(0)
        if not self.has_state:
            return (nothing, Moments(*(nothing,) * 5)), (nothing, nothing), nothing
        states, d_initial, flows = run.accumulate(
            run.query_columns, of_query.dn, run.groups, self.d_memory, keep_states=True,
            keep_final=call.memory is not None, reverse=True,
            other=run.entering[0] if run.has_gates and run.reads_state else None,
        )  # fmt: skip
        moments = run.moments(run.q, of_query.dz, run.groups, self.d_moment, reverse=True)
        flows = flows.sum(-1, dtype=torch.float64)
        if run.has_gates and run.reads_state:
            # What enters a slot has left the one before it.
            flows[1:] += (run.entering_moments.states[1:] * moments.states[:-1]).sum((-1, -2), dtype=torch.float64)
        return (states, moments), (d_initial, moments.final), flows

    def _keys_and_values(
        self, of_query: QueryGradients, leaving: tuple[Tensor, Moments]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dk, dv, and k·dk ``[H, tokens]``."""
        dv, _ = self._keys(of_query, leaving, values=True)
        dk, flow = self._keys(of_query, leaving, values=False)
        return dk, dv, flow

    def _keys(
        self, of_query: QueryGradients, leaving: tuple[Tensor, Moments], *, values: bool
    ) -> tuple[Tensor, Tensor]:
        """dv or dk, and k·dk ``[H, tokens]``."""
        run = self.run
        grad = torch.empty_like(run.v if values else run.k)
        flow = run.new(run.heads, run.tokens)
        tile = run.tiles.value_grad if values else run.tiles.key_grad
        count = run.tile_count(tile)
        partial, always = None, self.d_memory is not None
        if self.has_state and values:
            partial = run.read_states(run.k, run.key_columns, leaving[0], 1, at_end=True, always=always, scale=False)
        elif self.has_state:
            partial = run.contract_states(run.v, run.key_columns, leaving[0], 1, at_end=True, always=always)
        kernels("backward").key_grad_kernel[(run.plan.slots * run.heads * count,)](
            run.scaled_queries, run.k, run.v, self.dy, of_query.rows[0], of_query.dz, of_query.rows[1], run.gates,
            run.plan.table, partial, leaving[1].states, grad, flow, run.tokens, run.heads, run.groups, count,
            VALUES=values, HAS_GATES=run.has_gates, HAS_STATE=self.has_state, HAS_FINAL=always,
            P=self.call.p, D=run.d, E=run.e, BM=tile.rows, BN=tile.steps,
            **run.precision, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return grad, flow

    def _gates(self, query_flow: Tensor, key_flow: Tensor, flows: Tensor, log_g: Tensor) -> Tensor:
        run, plan = self.run, self.run.plan
        # A slot's first flow crossed the border of the slot before it, unless a run starts there.
        leaving = torch.zeros(plan.slots, run.heads, dtype=torch.float64, device=run.device)
        if run.reads_state:
            leaving[:-1] = flows[1:] * (plan.table[1:, 2:3] == 0)
        if self.d_memory is not None and self.d_moment is not None:
            last = (plan.borders[1:] - 1).long()
            final, moment = run.entering[1], run.entering_moments.final
            leaving[last] += (final * self.d_memory).sum((-1, -2), dtype=torch.float64)
            leaving[last] += (moment * self.d_moment).sum((-1, -2), dtype=torch.float64)
        grad = torch.empty(log_g.shape, dtype=log_g.dtype, device=run.device)
        kernels("backward").gate_grad_kernel[plan.slots, run.heads](
            query_flow, key_flow, leaving, log_g.contiguous(), plan.table, grad, run.tokens, run.heads, run.groups,
            P=self.call.p, CLOSED=_CLOSED, BLOCK=min(1024, power_of_two(plan.size)),
        )  # fmt: skip
        return grad

"""Which calls the kernels cover, and which kernels run them: those of the GPU's family, or the portable ones.

Kernels are reached through :func:`kernels`, so that importing this file does not import Triton.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from power_retention.ops.backends import Call
from power_retention.ops.layout import state_width
from power_retention.ops.triton.plan import (
    WIDTHS,
    DecodeShape,
    decode_shape,
    interpreted,
    multiprocessors,
    power_of_two,
)
from power_retention.ops.triton.run import FORGET, NOISE_EPS, Run, kernels, operands
from power_retention.ops.triton.sizes import cheapest_chunk, workspace

if TYPE_CHECKING:
    from power_retention.ops.ring import RingState


class TritonBackend:
    """Triton kernels: the chunk form at p = 2 and the attention form at every even p."""

    name = "triton"

    @property
    def devices(self) -> tuple[str, ...]:
        """Device types it serves; it does not speak up about tensors elsewhere."""
        return ("cpu",) if interpreted() else ("cuda",)

    def refusal(self, call: Call) -> str | None:
        if call.q.device.type not in self.devices:
            return f"its kernels run on {self.devices[0]}, not on {call.q.device.type}"
        if call.q.dtype == torch.float64:
            return "its kernels compute in float32; float64 was asked for"
        widths = {"key": call.k.shape[-1], "value": call.v.shape[-1]}
        for kind, width in widths.items():
            if width > WIDTHS[-1]:
                return f"it has no kernel for {kind} heads wider than {WIDTHS[-1]}, these are {width} wide"
        if call.q.dtype != torch.bfloat16 and max(widths.values()) > 128:
            return "its kernels for heads wider than 128 are for bfloat16 only: others take minutes to compile"
        if call.chunk_size and call.p != 2 and (call.chunk_size < call.q.shape[1] or _has_states(call)):
            return f"its state kernels are for p = 2, not p = {call.p}"
        if call.runs > 65535:
            return "it takes at most 65,535 sequences a call"
        return None

    def chunk_size(self, call: Call, *, backward: bool) -> int:
        """Tokens a chunk, 0 for the attention form: the cheapest by what was measured on this GPU or its family."""
        if call.p != 2 or call.q.device.type == "cpu":
            return call.chunk_size
        return cheapest_chunk(_with_queries(call), backward)

    def workspace(self, call: Call, *, backward: bool) -> dict[str, int]:
        """Bytes of the large tensors that a call needs besides its inputs and results, by name."""
        return workspace(_with_queries(call), backward)

    def forward(self, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        with _on(call.q.device):
            run = _prepare(_with_queries(call))
            y = run.read() if call.q.shape[2] else call.v.new_empty(*call.q.shape[:-1], call.v.shape[-1])
            nothing = y.new_empty(0, dtype=torch.float32)
            memory, normalizer = run.final_state() if call.return_state else (nothing, nothing.clone())
        return y[..., : call.v.shape[-1]].contiguous(), memory, normalizer

    def backward(
        self, call: Call, dy: Tensor, d_memory: Tensor | None, d_normalizer: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        with _on(call.q.device):
            if call.q.shape[2]:
                return _prepare(call).backward(dy, d_memory, d_normalizer)
            nobody = dy.new_zeros(*call.k.shape[:-1], call.v.shape[-1])
            grads = _prepare(_with_queries(call)).backward(nobody, d_memory, d_normalizer)
        return torch.empty_like(call.q), *grads[1:]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, memory: Tensor, normalizer: Tensor
    ) -> Tensor | None:
        """One token of decoding at p = 2, the state extended in place; None where there is no kernel for it.

        Args:
            q: ``[B, Hq, d]``; k ``[B, H, d]``; v ``[B, H, e]``; log_g ``[B, H]`` or None.
            memory: ``[B, H, D, e]`` and normalizer ``[B, H, D]``, contiguous; any floating dtype.
        """
        (batch, heads, d), e, groups = k.shape, v.shape[-1], q.shape[1] // k.shape[1]
        contiguous = memory.is_contiguous() and normalizer.is_contiguous()
        if q.device.type not in self.devices or torch.float64 in (q.dtype, memory.dtype) or not contiguous:
            return None
        if max(d, e) > WIDTHS[-1] or batch * heads > 65535:
            return None
        rows = state_width(d)
        block = 64 if batch * heads <= 32 else 128
        splits, wide = -(-rows // block), power_of_two(e)
        y = torch.empty(batch, heads * groups, e, dtype=v.dtype, device=q.device)
        partial = torch.empty(batch * heads * splits * groups * (wide + 2), dtype=torch.float32, device=q.device)
        with _on(q.device):
            kernels("decode").decode_kernel[splits, batch * heads](
                q.contiguous(), k.contiguous(), v.contiguous(), None if log_g is None else log_g.contiguous(),
                memory, normalizer, partial, _arrivals(batch * heads, q.device), y, heads, splits,
                HAS_GATES=log_g is not None, FORGET=FORGET, NOISE=NOISE_EPS, GROUPS=groups, D=d,
                DP=power_of_two(d), E=e, EP=wide, BR=block, SPLITS=power_of_two(splits), num_warps=4,
            )  # fmt: skip
        return y

    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None,
        ring: RingState,
        slot_indices: Tensor | None,
        shape: DecodeShape | None = None,
    ) -> Tensor | None:
        """Decoding through a ring in one launch; None where there is no kernel for the call.

        Args:
            q, k, v, log_g, ring, slot_indices: as in :func:`power_retention.ops.power_retention_decode`.
            shape: launch shape of the portable kernel, also where another would be chosen.
        """
        (_, tokens, _, d), e, groups = k.shape, v.shape[-1], q.shape[2] // k.shape[2]
        stored = (ring.memory, ring.normalizer, ring.keys, ring.values, ring.gates)
        contiguous = all(x[0].is_contiguous() for x in stored) and ring.cursor.is_contiguous()
        if q.device.type not in self.devices or torch.float64 in (q.dtype, ring.memory.dtype) or not contiguous:
            return None
        if ring.p != 2 or max(d, e) > WIDTHS[-1] or power_of_two(tokens * groups) > 64 or ring.capacity > 256:
            return None
        hopper = import_module("power_retention.ops.triton.hopper.ring")
        with _on(q.device):
            if shape is None and hopper.covers(q, v, ring):
                y: Tensor = hopper.decode(q, k, v, log_g, ring, slot_indices)
                return y
            return _launch_ring(q, k, v, log_g, ring, slot_indices, shape or decode_shape(d, e, ring.memory.itemsize))


def _launch_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    ring: RingState,
    slot_indices: Tensor | None,
    shape: DecodeShape,
) -> Tensor:
    (batch, tokens, heads, d), e, groups = k.shape, v.shape[-1], q.shape[2] // k.shape[2]
    splits = shape.splits(batch * heads, state_width(d), multiprocessors(q.device))
    parts, rows, wide = splits + 1, power_of_two(tokens * groups), power_of_two(e, 16)
    y = torch.empty(batch, tokens, heads * groups, e, dtype=v.dtype, device=q.device)
    partial = torch.empty(batch * heads * parts * rows * wide, dtype=torch.float32, device=q.device)
    sums = torch.empty(batch * heads * parts * rows * 2, dtype=torch.float32, device=q.device)
    precision = operands(q.dtype)
    narrow = q.dtype == ring.memory.dtype == torch.bfloat16
    options = {"maxnreg": shape.registers} if shape.registers and torch.version.cuda else {}
    kernels("ring").ring_kernel[(batch * heads * parts,)](
        q.contiguous(), k.contiguous(), v.contiguous(), ring.gates if log_g is None else log_g.contiguous(),
        ring.cursor if slot_indices is None else slot_indices,
        ring.memory, ring.normalizer, ring.keys, ring.values, ring.gates, ring.cursor, ring.arrived, partial, sums, y,
        heads, splits, ring.memory.stride(0), ring.normalizer.stride(0), ring.keys.stride(0), ring.values.stride(0),
        ring.gates.stride(0),
        HAS_GATES=log_g is not None, HAS_SLOTS=slot_indices is not None, FORGET=FORGET, NOISE=NOISE_EPS,
        T=tokens, TP=power_of_two(tokens), GROUPS=groups, M=max(16, rows), N=max(8, rows), R=rows,
        D=d, DP=power_of_two(d, 16), E=e, EP=wide,
        L=ring.fold_size, LP=power_of_two(ring.fold_size, 16), CP=power_of_two(ring.capacity, 16), BR=shape.rows,
        CHUNK=max(1, min(power_of_two(splits), 2048 * shape.warps // (rows * wide))), PARTS=power_of_two(parts),
        ST=precision["CT"] if narrow else import_module("triton.language").float32, STAGES=shape.stages,
        **precision, num_warps=shape.warps, **options,
    )  # fmt: skip
    return y


@lru_cache
def _arrivals(size: int, device: torch.device) -> Tensor:
    """Counters of finished programs, zero between launches; calls on different streams must not overlap."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _prepare(call: Call) -> Run:
    hopper = import_module("power_retention.ops.triton.hopper.run")
    run: Run = hopper.HopperRun(call) if hopper.covers(call) else Run(call)
    return run


def _with_queries(call: Call) -> Call:
    """The call itself, or, where it has no queries, one with some that are not looked at: no kernel is made for none."""
    return call if call.q.shape[2] else replace(call, q=call.k)


def _has_states(call: Call) -> bool:
    return call.memory is not None or call.return_state

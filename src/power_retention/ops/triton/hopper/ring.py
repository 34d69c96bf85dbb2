"""Decoding through a ring on Hopper: which calls the kernel takes, and its launch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from power_retention.ops.layout import state_width
from power_retention.ops.triton.hopper.run import on_hopper
from power_retention.ops.triton.plan import multiprocessors, power_of_two
from power_retention.ops.triton.run import FORGET, NOISE_EPS

if TYPE_CHECKING:
    from power_retention.ops.ring import RingState

TILE = 64
"""Rows of the state that arrive together."""

_RESOURCES = {"num_warps": 4, "maxnreg": 168}
"""Two groups of four warps with 240 registers a thread, and one warp that fetches."""

MOST_GROUPS = 16
FEWEST_STATES = 128
"""Below so many sequences times heads the portable kernel is faster: 0.0153 and 0.0499 ms against 0.0180 and 0.0525 at 8 and 64
of them (40/8 heads of 128); at 256, 0.160 against 0.155."""
LONGEST_FOLD = 64


def covers(q: Tensor, v: Tensor, ring: RingState) -> bool:
    """Whether the kernel takes one token of each row of q ``[B, 1, Hq, d]``, v ``[B, 1, H, e]``."""
    heads, width = v.shape[2], q.shape[-1]
    return (
        on_hopper(q.device)
        and {q.dtype, v.dtype, ring.keys.dtype, ring.memory.dtype} == {torch.bfloat16}
        and ring.p == 2
        and q.shape[1] == 1
        and q.shape[0] * heads >= FEWEST_STATES
        and width == v.shape[-1] in (64, 128)
        and q.shape[2] // heads <= MOST_GROUPS
        and ring.fold_size <= LONGEST_FOLD
        and _countable(q.shape[0] * heads, width, q.device)
        and addressable(ring)
    )


def addressable(ring: RingState) -> bool:
    """Whether the copy engine sees all slots' states as one matrix, and all normalisers as one row.

    It counts in 32 bits, and in rows: slots that are pages of a larger memory must be a whole number of them apart.
    """
    memory, normalizer = ring.memory, ring.normalizer
    return (
        memory.stride(0) % memory.shape[-1] == 0
        and normalizer.stride(0) % 4 == 0
        and memory.data_ptr() % 16 == normalizer.data_ptr() % 16 == 0
        and memory.shape[0] * memory.stride(0) // memory.shape[-1] < 1 << 31
        and normalizer.shape[0] * normalizer.stride(0) < 1 << 31
    )


def _countable(items: int, width: int, device: torch.device) -> bool:
    """Whether the pieces' borders can be told in 32 bits."""
    return items * tiles_of(width) * multiprocessors(device) < 1 << 31


def tiles_of(width: int) -> int:
    """Tiles of one state; the last may be half a tile."""
    return -(-state_width(width) // TILE)


def most_parts(programs: int, items: int, width: int) -> int:
    """Parts that the sums of an item may come in: the pieces it may touch, and attention."""
    smallest = items * tiles_of(width) // programs
    return (tiles_of(width) - 2) // smallest + 3


def descriptors(ring: RingState) -> tuple[Any, Any]:
    """How the copy engine sees the memory: in boxes of a tile, or of half; and the normalisers: in boxes of 64 numbers."""
    gl = import_module("triton.experimental.gluon.language")
    hopper = import_module("triton.experimental.gluon.nvidia.hopper")
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    slots, heads, rows, e = ring.memory.shape
    box = [TILE if rows % TILE == 0 else TILE // 2, e]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    states = [(slots - 1) * (ring.memory.stride(0) // e) + heads * rows, e]
    entries = (slots - 1) * ring.normalizer.stride(0) + heads * rows
    return (
        hopper.TensorDescriptor(ring.memory, states, [e, 1], box, layout),
        hopper.TensorDescriptor(ring.normalizer, [1, entries], [-(-entries // 4) * 4, 1], [1, TILE], plain),
    )


def decode(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, ring: RingState, slot_indices: Tensor | None
) -> Tensor:
    """One token of each row; arguments as in :func:`power_retention.ops.power_retention_decode`."""
    return launch(q, k, v, log_g, ring, slot_indices, multiprocessors(q.device))


def launch(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, ring: RingState, slot_indices: Tensor | None, programs: int
) -> Tensor:
    """:func:`decode` by at most so many programs, each of which fills a multiprocessor's shared memory."""
    (batch, _, heads, d), e, groups = k.shape, v.shape[-1], q.shape[2] // k.shape[2]
    items, lines, fold = batch * heads, 8 if q.shape[2] // k.shape[2] <= 8 else 16, power_of_two(ring.fold_size, 16)
    programs = min(programs, items * tiles_of(d))
    parts = most_parts(programs, items, d)
    y = torch.empty(batch, 1, heads * groups, e, dtype=v.dtype, device=q.device)
    partial = torch.empty(items * parts * e * lines, dtype=torch.float32, device=q.device)
    sums = torch.empty(items * parts * 2 * lines, dtype=torch.float32, device=q.device)
    kernel = import_module("power_retention.ops.triton.hopper.decode").decode_kernel
    kernel[(programs,)](
        *descriptors(ring), q.contiguous(), k.contiguous(), v.contiguous(),
        ring.gates if log_g is None else log_g.contiguous(), ring.cursor if slot_indices is None else slot_indices.contiguous(),
        ring.normalizer, ring.keys, ring.values, ring.gates, ring.cursor, ring.arrived, partial, sums, y,
        heads, items * tiles_of(d), parts, ring.memory.stride(0) // e, ring.normalizer.stride(0),
        ring.keys.stride(0), ring.values.stride(0), ring.gates.stride(0),
        HAS_GATES=log_g is not None, HAS_SLOTS=slot_indices is not None, FORGET=FORGET, NOISE=NOISE_EPS,
        GROUPS=groups, N=lines, D=d, E=e, L=ring.fold_size, LP=fold, CP=max(TILE, 2 * fold),
        STAGES=20 if d == 64 else 12 if fold <= 32 else 11, **_RESOURCES,
    )  # fmt: skip
    return y

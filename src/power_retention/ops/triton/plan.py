"""How a call is cut: runs into slots (chunks), slots into tiles."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from power_retention.ops.triton.tuned import ShapeClass, generation, setting_for

PAD = 64
"""Every slot owns a whole number of this many columns, so that transposed tiles are aligned and need no mask."""


@dataclass(frozen=True)
class Plan:
    """The slots of a call.

    Attributes:
        table: int32 ``[slots, 4]``: first token, one past the last, whether the slot is its run's first, its last.
        borders: int32 ``[runs + 1]``: the first slot of each run.
        slots: how many rows the table has; packed runs may leave the last ones empty.
        size: most tokens a slot may have.
        pad: columns a slot owns in transposed tensors.
    """

    table: Tensor
    borders: Tensor
    slots: int
    size: int

    @property
    def pad(self) -> int:
        return -(-self.size // PAD) * PAD

    @property
    def columns(self) -> int:
        return self.slots * self.pad


def make_plan(batch: int, tokens: int, cu_seqlens: Tensor | None, size: int, device: torch.device) -> Plan:
    """Cut B sequences of T tokens, or the packed runs, into slots of ``size``; never waits for the device."""
    if cu_seqlens is None:
        return _even_plan(batch, tokens, size, device)
    runs = cu_seqlens.numel() - 1
    slots = runs if size >= tokens else tokens // size + runs
    return Plan(*_cut(cu_seqlens.to(device, torch.int64), slots, size), slots, size)


@lru_cache(maxsize=64)
def _even_plan(batch: int, tokens: int, size: int, device: torch.device) -> Plan:
    slots = batch * -(-tokens // size)
    ends = torch.arange(batch + 1, device=device, dtype=torch.int64) * tokens
    return Plan(*_cut(ends, slots, size), slots, size)


def _cut(ends: Tensor, slots: int, size: int) -> tuple[Tensor, Tensor]:
    counts = (ends.diff() + size - 1) // size
    borders = torch.cat((ends.new_zeros(1), counts.cumsum(0)))
    slot = torch.arange(slots, device=ends.device)
    run = (torch.searchsorted(borders, slot, right=True) - 1).clamp(max=counts.numel() - 1)
    place = slot - borders[run]
    used = place < counts[run]
    start = torch.where(used, ends[run] + place * size, ends[-1])
    end = torch.where(used, torch.minimum(start + size, ends[run + 1]), ends[-1])
    table = torch.stack((start, end, place == 0, place == counts[run] - 1), 1)
    return table.to(torch.int32), borders.to(torch.int32)


@dataclass(frozen=True)
class Tile:
    """Launch shape of one kernel: rows a program owns, rows of the tiles it walks over, warps, pipeline stages."""

    rows: int
    steps: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Launch shapes of the heavy kernels, and the block width of a state's rows inside them."""

    accumulate: Tile
    read: Tile
    attend: Tile
    contract: Tile
    query_grad: Tile
    key_grad: Tile
    value_grad: Tile
    block: int = 32


TILED = tuple(field.name for field in fields(Tiles) if field.name != "block")
"""Kernels that have a tile."""

WIDTHS = (16, 32, 64, 128, 256)
"""Key and value widths that have kernels; others are padded to the next."""


def tiles_for(width: int, dtype: torch.dtype, device: torch.device, groups: int = 1) -> Tiles:
    """What was measured to be best on this GPU, or on its family; never a matter of the sequence's length.

    Args:
        width: the larger of the two head widths, one of :data:`WIDTHS`.
        dtype: of the inputs.
        device: where the kernels run.
        groups: query heads that share a key/value head.
    """
    return _tiles(ShapeClass.of(width, dtype, groups), device, generation())


@lru_cache(maxsize=64)
def _tiles(shape: ShapeClass, device: torch.device, _: int) -> Tiles:
    tiles = {name: Tile(**setting_for(name, shape, device)) for name in TILED}
    return Tiles(**tiles, block=setting_for("block", shape, device)["width"])


@dataclass(frozen=True)
class DecodeShape:
    """Launch shape of decoding: rows of a tile, programs meant to share a multiprocessor, warps, stages, register limit."""

    rows: int
    resident: int
    warps: int
    stages: int
    registers: int | None = None

    def splits(self, heads: int, width: int, multiprocessors: int) -> int:
        """Programs that share one head's state of ``width`` rows where ``heads`` heads (of all sequences) are read.

        As many as fill the machine; a program's start and its part of the sum cost about as much as three tiles.
        """
        tiles, places = -(-width // self.rows), self.resident * multiprocessors

        def cost(splits: int) -> int:
            return -(-heads * splits // places) * (-(-tiles // splits) + 3)

        return min(range(1, min(tiles, 63) + 1), key=cost)


def decode_shape(key_width: int, value_width: int, state_bytes: int) -> DecodeShape:
    """Tiles of about 32 kB, two programs a multiprocessor with two tiles in flight each: the best of those measured.

    The loop of the kernel must spill nothing; a spill there, like any load, waits behind the tiles in flight.
    """
    rows = 16384 // power_of_two(value_width) * 2 // state_bytes
    return DecodeShape(rows=max(16, min(rows, 128)), resident=2, warps=4, stages=3, registers=None)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is no less than ``size`` and ``least``."""
    return max(least, 1 << (size - 1).bit_length())


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once; on a CPU, where they are interpreted, two stand for them."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (``TRITON_INTERPRET=1``), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"

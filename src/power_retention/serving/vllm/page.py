"""What one sequence keeps in one layer, as one page of vLLM's memory: the state, the ring of newest tokens and a short record.

A page is all there is of a sequence's past: copied, it is a fork; written to a file and read back, it goes on elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionConfig
from power_retention.ops import RingState
from power_retention.ops.layout import state_width

RECORD = 16
"""int64 numbers at the head of a page; as many as keep what follows aligned to 128 bytes."""

BASE, SEEN, LOADED = range(3)
"""Places in the record: the position that the request's first token has; tokens read in all; 1 where a state was put into the
page that the request has not read on from yet."""

FOLD_SIZE = 16
"""L of the ring, unless the environment says otherwise."""


@dataclass(frozen=True)
class PageLayout:
    """Shapes and dtypes of one page, for the part of the heads that one worker has.

    Attributes:
        heads: key/value heads H.
        head_width: d, of keys and values.
        p: the power.
        fold_size: L; the ring has 2L places.
        dtype: of keys and values in the ring.
        state_dtype: of the memory: float32 or bfloat16.
    """

    heads: int
    head_width: int
    p: int
    fold_size: int
    dtype: torch.dtype
    state_dtype: torch.dtype

    @classmethod
    def of(
        cls, config: PowerRetentionConfig, workers: int, *, fold_size: int, dtype: torch.dtype, state_dtype: torch.dtype
    ) -> PageLayout:
        """The layout of a model whose heads are shared among ``workers``."""
        assert config.num_key_value_heads is not None  # filled in by the configuration
        assert config.head_dim is not None
        if config.num_key_value_heads % workers:
            raise ArgumentError(
                f"{config.num_key_value_heads} key/value heads cannot be shared among {workers} workers: choose a "
                "--tensor-parallel-size that divides them."
            )
        heads = config.num_key_value_heads // workers
        return cls(heads, config.head_dim, config.power, fold_size, dtype, state_dtype)

    @property
    def parts(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
        """Shape and dtype of what a page holds, in order, the filling at its end included."""
        heads, places, d = self.heads, 2 * self.fold_size, self.head_width
        width = state_width(d, self.p)
        parts: list[tuple[tuple[int, ...], torch.dtype]] = [
            ((RECORD,), torch.int64),
            ((heads, width, d), self.state_dtype),
            ((heads, width), torch.float32),
            ((heads, places, d), self.dtype),
            ((heads, places, d), self.dtype),
            ((heads, places), torch.float32),
            ((heads, 2), torch.int32),
        ]
        # The kernels want pages a whole number of rows apart.
        row = max(128, 4 * d) if d & (d - 1) == 0 else 128 * d
        used = sum(prod(shape) * dtype.itemsize for shape, dtype in parts)
        return (*parts, ((row - used % row,), torch.uint8))  # never of no bytes, which has no view

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the parts."""
        return tuple(shape for shape, _ in self.parts)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the parts."""
        return tuple(dtype for _, dtype in self.parts)

    @property
    def state_bytes(self) -> int:
        """Bytes of the state alone, as files keep it."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.parts[1:3])

    @property
    def nbytes(self) -> int:
        """Bytes of one page."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.parts)


@dataclass(frozen=True)
class Pages:
    """All pages of one layer, part by part.

    Attributes:
        record: ``[pages, RECORD]`` int64.
        ring: states and rings; its cursor is a part of the pages and not contiguous.
    """

    record: Tensor
    ring: RingState

    @classmethod
    def of(cls, parts: tuple[Tensor, ...], layout: PageLayout) -> Pages:
        """The views that vLLM bound, by name."""
        record, memory, normalizer, keys, values, gates, cursor = parts[:7]
        arrived = torch.zeros(memory.shape[:2], dtype=torch.int32, device=memory.device)
        ring = RingState(memory, normalizer, keys, values, gates, cursor, arrived, layout.p, layout.head_width)
        return cls(record, ring)

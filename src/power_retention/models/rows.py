"""The cache of a server: many sequences decode together, each in a row of its own, and come and go between steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from power_retention.errors import StateError
from power_retention.models.cache import PowerRetentionCache, PowerRetentionLayerCache
from power_retention.ops import RingState, power_retention_decode


class PowerRetentionRowsLayer(PowerRetentionLayerCache):
    """One layer's rings, of which the first ``taken`` are in use."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.taken = rows, 0
        self._all: RingState | None = None
        self._view: RingState | None = None

    def make_room(self, ring: RingState) -> None:
        """Take memory for all rows, where that has not been done yet."""
        if self._all is None:
            self._all = _room_for(ring, self.rows)

    def join(self, ring: RingState) -> None:
        """Copy a ring of one slot behind the rows taken."""
        assert self._all is not None
        _copy(self._all, self.taken, ring, 0)
        self._resize(self.taken + 1)

    def leave(self, row: int) -> None:
        """Give a row up; the last one moves there."""
        assert self._all is not None
        if row != self.taken - 1:
            _copy(self._all, row, self._all, self.taken - 1)
        self._resize(self.taken - 1)

    def ring_of(self, row: int) -> RingState:
        """A copy of one row."""
        assert self._all is not None
        return self._all.select(torch.tensor([row]))

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_g: Tensor,
        *,
        p: int,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Read T tokens of every row taken, in order, and answer their queries."""
        assert self._view is not None
        return power_retention_decode(q, k, v, log_g, self._view, mask=mask, chunk_size=chunk_size)

    def show(self, rows: int) -> None:
        """Let steps read the first rows, taken or not."""
        assert self._all is not None
        # A slice of the memory, where a choice of rows would be a copy.
        self._view = self._all._map(lambda tensor: tensor[:rows])

    def _resize(self, taken: int) -> None:
        self.taken = taken
        self.show(taken)  # the rows in use are always the first ones


class PowerRetentionRows(PowerRetentionCache):
    """``past_key_values`` of up to ``rows`` sequences that read one token a step each; ``position_ids`` say where each is.

    Memory is taken for all rows when the first sequence joins, and never grows.

    Args:
        num_layers: layers of the model.
        rows: sequences there is room for.
    """

    def __init__(self, num_layers: int, rows: int) -> None:
        super().__init__(0)
        self.layers = [PowerRetentionRowsLayer(rows) for _ in range(num_layers)]
        self.rows, self.taken = rows, 0

    def join(self, cache: PowerRetentionCache) -> int:
        """Let a sequence go on here from what ``cache`` (of one row) has read, which stays as it is.

        Returns:
            The sequence's row: the first free one.

        Raises:
            StateError: all rows are taken, or the cache has read nothing.
        """
        if self.taken == self.rows:
            raise StateError(f"All {self.rows} rows are taken; one must leave first.")
        rings = [layer._ring for layer in cache.layers]
        if any(ring is None for ring in rings):
            raise StateError("A cache that has read no token cannot join; read the prompt first.")
        for layer, ring in zip(self.layers, rings, strict=True):
            layer.make_room(ring)  # all of it before anybody moves in: it may fail
        for layer, ring in zip(self.layers, rings, strict=True):
            layer.join(ring)
        self.taken += 1
        return self.taken - 1

    def leave(self, row: int) -> None:
        """Free a row: the sequence in the last row takes its place.

        Raises:
            StateError: nobody is there.
        """
        self._check(row)
        for layer in self.layers:
            layer.leave(row)
        self.taken -= 1

    @contextmanager
    def shown(self, rows: int) -> Iterator[None]:
        """Inside, steps read the first ``rows`` rows; those behind the ones taken hold nothing that anybody wants."""
        if rows == self.taken:
            yield
            return
        for layer in self.layers:
            layer.show(rows)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.show(self.taken)

    def cache_of(self, row: int, seen: int) -> PowerRetentionCache:
        """A copy of one row, as the cache of a sequence that has read ``seen`` tokens."""
        self._check(row)
        cache = PowerRetentionCache(0)
        cache.layers = [PowerRetentionLayerCache() for _ in self.layers]
        for layer, own in zip(cache.layers, self.layers, strict=True):
            layer.store(own.ring_of(row).to_state(), seen)
        return cache

    def _check(self, row: int) -> None:
        if not 0 <= row < self.taken:
            raise StateError(f"Row {row} is not taken; rows 0 to {self.taken - 1} are.")


def _room_for(ring: RingState, rows: int) -> RingState:
    room: RingState = ring._map(lambda tensor: tensor.new_zeros(rows, *tensor.shape[1:]))
    return room


def _copy(target: RingState, to: int, source: RingState, row: int) -> None:
    for name, value in source._tensors().items():
        getattr(target, name)[to].copy_(value[row])

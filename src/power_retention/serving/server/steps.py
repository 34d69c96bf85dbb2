"""One token for every answer being written; on a GPU replayed from CUDA graphs, or launching takes longer than running."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from power_retention.models import PowerRetentionForCausalLM
from power_retention.models.rows import PowerRetentionRows

_WARM_UPS = 2
"""Steps of a size before it is recorded, in which kernels are compiled and constants are made."""

Compute = Callable[[], Tensor]


class Steps:
    """The steps of a batch that sequences join and leave.

    Recorded steps come in sizes of powers of two: the rows behind those taken read along, and nobody looks at them.

    Args:
        model: on the device of the steps.
        rows: the cache of the batch.
        record: makes of a computation one that repeats it on the same memory; None: every step is computed anew.
    """

    def __init__(
        self, model: PowerRetentionForCausalLM, rows: PowerRetentionRows, record: Callable[[Compute], Compute] | None
    ) -> None:
        self.model, self.rows, self.record = model, rows, record
        self._given = torch.zeros(2, rows.rows, 1, dtype=torch.int64, device=model.device)
        self._taken_before: dict[int, int] = {}
        self._recorded: dict[int, Compute] = {}

    @classmethod
    def of(cls, model: PowerRetentionForCausalLM, rows: PowerRetentionRows) -> Steps:
        """Recorded on a GPU."""
        return cls(model, rows, CudaGraphs() if model.device.type == "cuda" else None)

    def take(self, ids: Sequence[int], places: Sequence[int]) -> Tensor:
        """Read one token of every row taken.

        Args:
            ids: the tokens.
            places: how many tokens each row has read before.

        Returns:
            Logits ``[rows taken, vocab]``, good until the next step.
        """
        taken = len(ids)
        size = taken if self.record is None else min(1 << (taken - 1).bit_length(), self.rows.rows)
        self._given[:, :taken].copy_(torch.tensor([ids, places]).unsqueeze(-1))
        return self._step_of(size)()[:taken]

    def _step_of(self, size: int) -> Compute:
        compute = partial(self._compute, size)
        before = self._taken_before.get(size, 0)
        self._taken_before[size] = before + 1
        if before < _WARM_UPS or self.record is None:
            return compute
        if size not in self._recorded:
            try:
                self._recorded[size] = self.record(compute)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                warnings.warn(f"Steps cannot be recorded and will be slower: {error}", RuntimeWarning, stacklevel=2)
                self.record = None
                return compute
        return self._recorded[size]

    def _compute(self, size: int) -> Tensor:
        ids, places = self._given[:, :size]
        with self.rows.shown(size):
            out: Any = self.model(ids, position_ids=places, past_key_values=self.rows, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits


class CudaGraphs:
    """Records computations of which one runs at a time, in memory that they share."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """The computation, replayed; what it returns is overwritten by the next replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may meanwhile bring states to the disk.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

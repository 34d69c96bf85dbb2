"""Gradients recorded once as a CUDA graph: a small model's thousands of launches take longer than they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

_WARM_UPS = 3
"""Runs before the recording, in which kernels are compiled and constants are made."""

Inputs = TypeVar("Inputs")
Figures = dict[str, Tensor]


class Recording(Generic[Inputs]):
    """A computation of gradients, recorded; replays read other inputs of the same shapes.

    Args:
        compute: from inputs to what is to be known about them; leaves gradients in ``parameters``, never waits for the device.
        inputs: a dataclass of tensors on the GPU, all of whose replays have these shapes.
        parameters: whose gradients it computes, all or some.
        pool: of the memory that several recordings share, of which one replays at a time.
    """

    def __init__(
        self, compute: Callable[[Inputs], Figures], inputs: Inputs, parameters: Sequence[Tensor], pool: Any = None
    ) -> None:
        self.parameters = parameters
        self.inputs = type(inputs)(**{name: value.clone() for name, value in _tensors(inputs).items()})
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                compute(self.inputs)
                self._set_gradients({})
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, NCCL's for one, may go on asking the device what it has done.
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.figures = compute(self.inputs)
        self.gradients = {i: p.grad for i, p in enumerate(parameters) if p.grad is not None}

    def fits(self, inputs: Inputs) -> bool:
        """Whether these inputs have the recorded shapes."""
        mine, theirs = _tensors(self.inputs), _tensors(inputs)
        return all(value.shape == theirs[name].shape for name, value in mine.items())

    def replay(self, inputs: Inputs) -> Figures:
        """Compute the gradients of other inputs; what comes back holds until the next replay."""
        for name, value in _tensors(inputs).items():
            getattr(self.inputs, name).copy_(value, non_blocking=True)
        self._set_gradients(self.gradients)
        self.graph.replay()
        return dict(self.figures)

    def _set_gradients(self, gradients: dict[int, Tensor]) -> None:
        for i, parameter in enumerate(self.parameters):
            parameter.grad = gradients.get(i)


def _tensors(inputs: Any) -> dict[str, Tensor]:
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return {name: value for name, value in values.items() if value is not None}

"""States at the borders of segments: in host memory while they wait, on the device when their turn comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from power_retention.ops import PowerState

States = list[PowerState]

_ALIGNED = 64
"""Elements: kernels read states from aligned addresses."""


@dataclass
class _Waiting:
    """States on their way.

    Attributes:
        states: what arrives.
        buffer: what they are views of; None where nothing was copied.
        done: what to wait for before they are read.
    """

    states: States
    buffer: Tensor | None = None
    done: torch.cuda.Event | None = None


class BorderStates:
    """One list of states a border, put while a sequence is read forwards and taken while it is read backwards.

    On a GPU they wait in pinned host memory, one buffer a border, which PyTorch keeps for the next step.  Copies run on a
    stream of their own: to the host beside the segment that is read next, and back one border ahead (:meth:`prefetch`), so
    that neither direction is waited for.

    Args:
        device: where the states are made and needed.
        offload: whether they wait in host memory; None: where the device is a GPU.
    """

    def __init__(self, device: torch.device, *, offload: bool | None = None) -> None:
        self.offload = device.type == "cuda" if offload is None else offload
        self._stream = torch.cuda.Stream(device) if self.offload and device.type == "cuda" else None
        self._device = device
        self._held: dict[int, _Waiting] = {}
        self._coming: dict[int, _Waiting] = {}

    def put(self, border: int, states: States) -> None:
        """Keep the states of a border; they must not be changed afterwards."""
        if not self.offload:
            self._held[border] = _Waiting(states)
            return
        stream = self._stream
        if stream is None:
            self._held[border] = _to_host(states)
            return
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            self._held[border] = _to_host(states)
            self._held[border].done = stream.record_event()
        for x in _tensors(states):
            x.record_stream(stream)  # their memory must not be handed out again before they are copied

    def prefetch(self, border: int) -> None:
        """Begin to fetch the states of a border, if there are any."""
        held = self._held.pop(border, None)
        if held is None:
            return
        stream = self._stream
        if held.buffer is None or stream is None:
            self._coming[border] = held
            return
        with torch.cuda.stream(stream):  # which has copied them before
            buffer = held.buffer.to(self._device, non_blocking=True)
            self._coming[border] = _Waiting(_views(buffer, held.states), buffer, stream.record_event())

    def take(self, border: int) -> States | None:
        """The states of a border on the device, once; None if none were put there."""
        self.prefetch(border)
        coming = self._coming.pop(border, None)
        if coming is None:
            return None
        if coming.done is not None and coming.buffer is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(coming.done)
            coming.buffer.record_stream(stream)  # its memory was handed out on the other one
        return coming.states

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(state.nbytes for waiting in self._held.values() for state in waiting.states)


def _to_host(states: States) -> _Waiting:
    """Copies in one buffer, pinned where they come from a GPU."""
    tensors = _tensors(states)
    size = sum(_padded(x) for x in tensors)
    buffer = torch.empty(size, dtype=tensors[0].dtype, device="cpu", pin_memory=tensors[0].is_cuda)
    copies = _views(buffer, states)
    for copy, x in zip(_tensors(copies), tensors, strict=True):
        copy.copy_(x, non_blocking=True)
    return _Waiting(copies, buffer)


def _views(buffer: Tensor, like: States) -> States:
    """Parts of a buffer, shaped as states."""
    parts = iter(buffer.split([_padded(x) for x in _tensors(like)]))

    def part(x: Tensor) -> Tensor:
        whole: Tensor = next(parts)
        return whole[: x.numel()].view(x.shape)

    return [state._replace(memory=part(state.memory), normalizer=part(state.normalizer)) for state in like]


def _padded(x: Tensor) -> int:
    return -(-x.numel() // _ALIGNED) * _ALIGNED


def _tensors(states: States) -> list[Tensor]:
    return [x for state in states for x in state[:2]]

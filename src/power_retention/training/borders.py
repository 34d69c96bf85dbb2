"""States at the borders of segments: in host memory while they wait, on the device when their turn comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from power_retention.ops import PowerState

States = list[PowerState]


@dataclass
class _Waiting:
    """States on their way: the copies, and what to wait for before they are read."""

    states: States
    done: torch.cuda.Event | None


class BorderStates:
    """One list of states a border, put while a sequence is read forwards and taken while it is read backwards.

    On a GPU they wait in pinned host memory.  Copies run on a stream of their own: to the host beside the segment that is
    read next, and back one border ahead (:meth:`prefetch`), so that neither direction is waited for.

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
        self._held[border] = self._copy(states, to_host=True) if self.offload else _Waiting(states, None)

    def prefetch(self, border: int) -> None:
        """Begin to fetch the states of a border, if there are any."""
        if border in self._held:
            held = self._held.pop(border)
            self._coming[border] = self._copy(held.states, to_host=False, after=held.done) if self.offload else held

    def take(self, border: int) -> States | None:
        """The states of a border on the device, once; None if none were put there."""
        self.prefetch(border)
        coming = self._coming.pop(border, None)
        if coming is None:
            return None
        if coming.done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(coming.done)
            for x in _tensors(coming.states):
                x.record_stream(stream)  # its memory was handed out on the other stream
        return coming.states

    @property
    def nbytes(self) -> int:
        """Bytes that wait."""
        return sum(state.nbytes for waiting in self._held.values() for state in waiting.states)

    def _copy(self, states: States, *, to_host: bool, after: torch.cuda.Event | None = None) -> _Waiting:
        stream = self._stream
        if stream is None:
            return _Waiting([_moved(state, self._device, to_host) for state in states], None)
        if after is not None:
            stream.wait_event(after)
        if to_host:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            copies = [_moved(state, self._device, to_host) for state in states]
            for x in _tensors(states):
                if x.is_cuda:
                    x.record_stream(stream)
            done = torch.cuda.Event()
            done.record(stream)
        # Pinned memory is given back by its own allocator, which knows the stream; until then the copy holds it.
        return _Waiting(copies, done)


def _tensors(states: States) -> list[Tensor]:
    return [x for state in states for x in state[:2]]


def _moved(state: PowerState, device: torch.device, to_host: bool) -> PowerState:
    return state._replace(
        memory=_move(state.memory, device, to_host), normalizer=_move(state.normalizer, device, to_host)
    )


def _move(x: Tensor, device: torch.device, to_host: bool) -> Tensor:
    if not to_host:
        return x.to(device, non_blocking=True)
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
    return host.copy_(x, non_blocking=True)

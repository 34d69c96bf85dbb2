"""The state of power retention, and the file it travels in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from power_retention.errors import StateError
from power_retention.ops.layout import state_width


class PowerState(NamedTuple):
    """Everything a head remembers of the tokens it has read: fixed in size, whatever their number.

    Attributes:
        memory: ``[B, H, D, e]``, S = Σ decay · φ_p(k) vᵀ.
        normalizer: ``[B, H, D]``, s = Σ decay · φ_p(k).
        p: the power.
        head_width: key width d; D = C(d + p − 1, p).
    """

    memory: Tensor
    normalizer: Tensor
    p: int
    head_width: int

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        head_width: int,
        value_width: int | None = None,
        *,
        p: int = 2,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> PowerState:
        """The state before the first token: all zeros."""
        width = state_width(head_width, p)
        memory = torch.zeros(batch, heads, width, value_width or head_width, dtype=dtype, device=device)
        return cls(memory, torch.zeros(batch, heads, width, dtype=dtype, device=device), p, head_width)

    def select(self, batch_indices: Tensor) -> PowerState:
        """The states of the given batch rows, in that order; a row may be taken more than once."""
        return self._replace(memory=self.memory[batch_indices], normalizer=self.normalizer[batch_indices])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory.nbytes + self.normalizer.nbytes


def check_state(
    state: PowerState, *, batch: int, heads: int, head_width: int, value_width: int, p: int, device: torch.device
) -> None:
    """Refuse a state that does not fit a call, with what came and what was expected."""
    if not isinstance(state, PowerState):
        raise StateError(
            f"initial_state must be a PowerState, not {type(state).__name__}; an earlier call with return_state=True "
            "gives one, PowerState.empty starts one, and power_retention.compat takes bare tensors."
        )
    if (state.p, state.head_width) != (p, head_width):
        raise StateError(
            f"The state was made with p={state.p} and head width {state.head_width}; this call has p={p} and head "
            f"width {head_width}. A state only fits the power and width it was made with."
        )
    expected = (batch, heads, state_width(head_width, p), value_width)
    for name, tensor, shape in (("memory", state.memory, expected), ("normalizer", state.normalizer, expected[:3])):
        if tuple(tensor.shape) != shape:
            raise StateError(f"The state's {name} has shape {list(tensor.shape)}; this call needs {list(shape)}.")
        if tensor.device != device:
            raise StateError(f"The state's {name} is on {tensor.device}, the inputs are on {device}: move one of them.")
        if not tensor.is_floating_point():
            raise StateError(f"The state's {name} has dtype {tensor.dtype}; a floating-point state was expected.")

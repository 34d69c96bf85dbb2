"""The operator: its layout, its forms, its state, and the call that joins them."""

from power_retention.ops.backends import Backend, Call, backend_names, register_backend
from power_retention.ops.layout import LAYOUT, expand, from_blocks16, multiplicity, state_width, to_blocks16
from power_retention.ops.operator import MemoryExhausted, power_retention, power_retention_state
from power_retention.ops.ring import RingState, power_retention_decode
from power_retention.ops.state import PowerState
from power_retention.ops.step import power_retention_step
from power_retention.ops.triton import register as _register_triton

_register_triton()

__all__ = [
    "LAYOUT",
    "Backend",
    "Call",
    "MemoryExhausted",
    "PowerState",
    "RingState",
    "backend_names",
    "expand",
    "from_blocks16",
    "multiplicity",
    "power_retention",
    "power_retention_decode",
    "power_retention_state",
    "power_retention_step",
    "register_backend",
    "state_width",
    "to_blocks16",
]

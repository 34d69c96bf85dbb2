"""Language models whose memory does not grow: power retention, from operator to served model.

The names a user needs are here; each is loaded when first asked for, so that the operator does not wait for transformers,
nor ``--help`` for torch.  The Auto classes of transformers know the models from then on.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from power_retention.errors import PowerRetentionError
from power_retention.registration import register_models

if TYPE_CHECKING:
    from power_retention.conversion.calibrate import calibrate_mixers
    from power_retention.conversion.swap import swap_attention
    from power_retention.models import PowerRetentionCache, PowerRetentionConfig, PowerRetentionForCausalLM
    from power_retention.ops import PowerState, RingState, power_retention, power_retention_decode, power_retention_step

__version__ = "0.1.0"

_HOMES = {
    "PowerRetentionCache": "models",
    "PowerRetentionConfig": "models",
    "PowerRetentionForCausalLM": "models",
    "PowerState": "ops",
    "RingState": "ops",
    "calibrate_mixers": "conversion.calibrate",
    "power_retention": "ops",
    "power_retention_decode": "ops",
    "power_retention_step": "ops",
    "swap_attention": "conversion.swap",
}

__all__ = [
    "PowerRetentionCache",
    "PowerRetentionConfig",
    "PowerRetentionError",
    "PowerRetentionForCausalLM",
    "PowerState",
    "RingState",
    "calibrate_mixers",
    "power_retention",
    "power_retention_decode",
    "power_retention_step",
    "swap_attention",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


register_models()

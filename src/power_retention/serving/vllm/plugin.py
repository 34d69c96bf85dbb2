"""What vLLM calls at start-up, in each of its processes: it learns our models, nothing else is imported yet."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from power_retention.serving.vllm import versions

ARCHITECTURES = ("PowerRetentionForCausalLM", "BrumbyForCausalLM", "PowerCoderForCausalLM")

BACKEND = "POWER_RETENTION"
"""Name of our metadata backend in vLLM's enumeration."""

OPS = ("vllm::power_retention_read", "vllm::power_retention_positions")
"""What looks at the rows of a step, so that compiled graphs are cut there."""

_HOME = "power_retention.serving.vllm"


def register() -> None:
    """The entry point in the group ``vllm.general_plugins``; harmless when called again."""
    from vllm import ModelRegistry
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from power_retention.serving.vllm import admission
    from power_retention.serving.vllm.engine import EngineConfig

    import_module("power_retention.models")  # transformers' AutoConfig learns our formats
    register_metadata()
    admission.install()
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{_HOME}.model:PowerRetentionForCausalLM")
        MODELS_CONFIG_MAP[name] = EngineConfig
    CompilationConfig._attention_ops.extend(op for op in OPS if op not in CompilationConfig._attention_ops)


def register_metadata() -> Any:
    """The member of vLLM's enumeration that stands for our backend."""
    return versions.register_backend(BACKEND, f"{_HOME}.metadata.PowerRetentionBackend")

"""Which Transformers can be converted, and how their configurations read in ours."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from power_retention.errors import SourceError
from power_retention.models import PowerRetentionConfig

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that can be converted."""

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)


def _family_fields(config: PreTrainedConfig) -> dict[str, bool]:
    """What differs between the families: biases and norms of the projections."""
    if config.model_type == "qwen2":
        return {"qkv_bias": True}
    bias = bool(getattr(config, "attention_bias", False))
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "qk_norm": config.model_type == "qwen3",
    }


def parent_config_to_ours(
    config: PreTrainedConfig,
    *,
    p: int,
    gate_bias: bool,
    key_bias: bool,
    chunk_size: int | None,
    parent: dict[str, Any] | None,
) -> PowerRetentionConfig:
    """The configuration of the power-retention model that keeps the parent's weights."""
    if config.model_type == PowerRetentionConfig.model_type:
        raise SourceError("The model is already a power-retention model; convert its Transformer parent instead.")
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise SourceError(
            f"A {config.model_type!r} model cannot be converted; supported are {', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return PowerRetentionConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        **_family_fields(config),
        head_dim=head_dim,
        power=p,
        gate_bias=gate_bias,
        key_bias=key_bias,
        chunk_size=chunk_size,
        parent=parent,
        dtype=config.dtype,
    )

"""Which Transformers can be converted, and how their configurations read in ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from power_retention.errors import SourceError
from power_retention.models import BrumbyConfig, PowerCoderConfig, PowerRetentionConfig
from power_retention.models.sizes import head_width

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
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)


def _llama(config: PreTrainedConfig) -> dict[str, Any]:
    bias = bool(getattr(config, "attention_bias", False))
    return {
        "rms_norm_eps": config.rms_norm_eps,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
    }


def _qwen2(config: PreTrainedConfig) -> dict[str, Any]:
    return {"rms_norm_eps": config.rms_norm_eps, "qkv_bias": True}


def _qwen3(config: PreTrainedConfig) -> dict[str, Any]:
    return {**_llama(config), "qk_norm": True}


def _qwen3_moe(config: PreTrainedConfig) -> dict[str, Any]:
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step
    ]
    return {**_qwen3(config), **_experts(config), "dense_layers": dense}


def _glm4_moe(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        **_llama(config),
        **_experts(config),
        "out_bias": False,
        "qk_norm": config.use_qk_norm,
        "dense_layers": list(range(config.first_k_dense_replace)),
        "router": "sigmoid",
        "n_shared_experts": config.n_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
    }


def _experts(config: PreTrainedConfig) -> dict[str, Any]:
    shared = ("num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
    return {name: getattr(config, name) for name in shared}


def _starcoder2(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        "rms_norm_eps": config.norm_epsilon,
        "norm_kind": "layer",
        "mlp_kind": "plain",
        "qkv_bias": config.use_bias,
        "out_bias": config.use_bias,
        "mlp_bias": config.use_bias,
    }


_FAMILIES: dict[str, Callable[[PreTrainedConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "starcoder2": _starcoder2,
}
"""What each family adds to the fields that all have."""

SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)
"""Values of ``model_type`` that can be converted."""

CONVERTED_MODEL_TYPES = tuple(c.model_type for c in (PowerRetentionConfig, BrumbyConfig, PowerCoderConfig))
"""Values of ``model_type`` that are power-retention models already."""


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
    if config.model_type in CONVERTED_MODEL_TYPES:
        raise SourceError("The model is already a power-retention model; convert its Transformer parent instead.")
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise SourceError(
            f"A {config.model_type!r} model cannot be converted; supported are {', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    return PowerRetentionConfig(
        **{name: getattr(config, name) for name in _SHARED_FIELDS},
        **_FAMILIES[config.model_type](config),
        head_dim=head_width(config),
        power=p,
        gate_bias=gate_bias,
        key_bias=key_bias,
        chunk_size=chunk_size,
        parent=parent,
        dtype=config.dtype,
        experts_implementation=config._experts_implementation,
    )

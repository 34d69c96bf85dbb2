"""Tiny random models for the tests, with weights that make every part of them matter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM

VOCABULARY = 97
PADDING = 0

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PADDING,
    "bos_token_id": None,
    "eos_token_id": None,
}

BIASES = ("qkv_bias", "out_bias", "mlp_bias")
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"chunk_size": 8},
    "tied, every bias": {"tie_word_embeddings": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "qwen2, no groups": {"qkv_bias": True, "num_key_value_heads": 4, "chunk_size": 16},
    "qwen3, wide heads": {"qk_norm": True, "head_dim": 16, "num_key_value_heads": 1},
    "p = 4": {"power": 4, "chunk_size": 8},
    "starcoder2": {
        "norm_kind": "layer",
        "mlp_kind": "plain",
        "hidden_act": "gelu_pytorch_tanh",
        **dict.fromkeys(BIASES, True),
    },
    "qwen3-moe": {"qk_norm": True, "dense_layers": [0], "norm_topk_prob": True, **EXPERTS},
    "glm-4.5": {
        "dense_layers": [0],
        "router": "sigmoid",
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        **EXPERTS,
    },
    "bare gates": {"gate_bias": False, "key_bias": False},
}

PARENTS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama, every bias": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, head_dim=16, **EXPERTS, norm_topk_prob=True, mlp_only_layers=[0]),
    "glm4_moe": Glm4MoeConfig(
        **SHAPE,
        **EXPERTS,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        routed_scaling_factor=1.5,
        num_mtp_layers=0,
    ),
    "starcoder2": Starcoder2Config(**SHAPE, hidden_act="gelu_pytorch_tanh", norm_epsilon=1e-3),
}


def tiny_config(**changes: Any) -> PowerRetentionConfig:
    return PowerRetentionConfig(**{**SHAPE, **changes})


def tiny_model(**changes: Any) -> PowerRetentionForCausalLM:
    return randomise(PowerRetentionForCausalLM(tiny_config(**changes))).eval()


def tiny_parent(kind: str) -> PreTrainedModel:
    """A random Transformer of a family that can be converted."""
    return randomise(AutoModelForCausalLM.from_config(copy.deepcopy(PARENTS[kind]))).eval()


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int = 0) -> Any:
    """Biases and norms included; the gates' half-lives span some tokens to some dozens."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        std = 1 / value.shape[-1] ** 0.5 if value.ndim >= 2 and "embed" not in name else 1.0
        if name.endswith("norm.weight"):
            nn.init.uniform_(value, 0.5, 1.5, generator=generator)
        elif name.endswith("g_proj.bias"):
            nn.init.uniform_(value, 1.0, 5.0, generator=generator)
        else:
            nn.init.normal_(value, std=std, generator=generator)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Random token ids, none of them padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """Equal as far as float32 goes."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)

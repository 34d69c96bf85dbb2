"""The parts of a trunk that families differ in: norms, MLPs, experts, rotary embedding.

They are the library's own where it has them, so that a parent's weights keep their names and fit as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.glm4_moe.modeling_glm4_moe import (
    Glm4MoeExperts,
    Glm4MoeMoE,
    Glm4MoeRotaryEmbedding,
    Glm4MoeTopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeExperts,
    Qwen3MoeSparseMoeBlock,
    Qwen3MoeTopKRouter,
)

from power_retention.models.configuration import PowerRetentionConfig


class PowerRetentionRotaryEmbedding(Glm4MoeRotaryEmbedding):  # type: ignore[misc]
    """Angles of every rotary type that the library knows; the first part of a head only where the configuration says so.

    Its frequencies stay in float32 when the model is moved to another dtype: in bfloat16 they would be off by up to 0.2 %, a
    whole turn over 4,000 tokens.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = self._buffers[name]
            if value is not None and now is not None and now.dtype != value.dtype and not value.is_meta:
                self._buffers[name] = value.to(now.device)
        return self


class PlainMLP(nn.Module):
    """Two linear layers around an activation: StarCoder2's."""

    def __init__(self, config: PowerRetentionConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, hidden]`` → ``[B, T, hidden]``."""
        mapped: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return mapped


def build_norm(config: PowerRetentionConfig) -> nn.Module:
    """A norm over the residual stream."""
    if config.norm_kind == "layer":
        return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm: nn.Module = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    return norm


def build_mlp(config: PowerRetentionConfig, layer: int) -> nn.Module:
    """What follows the mixer of a layer."""
    if config.has_experts(layer):
        experts: nn.Module = (Glm4MoeMoE if config.router == "sigmoid" else Qwen3MoeSparseMoeBlock)(config)
        return experts
    mlp: nn.Module = (PlainMLP if config.mlp_kind == "plain" else LlamaMLP)(config)
    return mlp


@torch.no_grad()
def init_experts(module: nn.Module, std: float) -> None:
    """Initialise experts and routers, which hold bare parameters; other modules are left alone."""
    if isinstance(module, (Qwen3MoeExperts, Glm4MoeExperts)):
        nn.init.normal_(module.gate_up_proj, std=std)
        nn.init.normal_(module.down_proj, std=std)
    elif isinstance(module, (Qwen3MoeTopKRouter, Glm4MoeTopkRouter)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, Glm4MoeTopkRouter):
            nn.init.zeros_(module.e_score_correction_bias)

"""Configuration of a power-retention model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from power_retention.errors import ArgumentError
from power_retention.ops.layout import check_power, has_state

_CHOICES = {"norm_kind": ("rms", "layer"), "mlp_kind": ("gated", "plain"), "router": ("softmax", "sigmoid")}


@strict
class PowerRetentionConfig(PreTrainedConfig):
    """A decoder-only trunk whose token mixer is power retention; one set of modules, driven by these fields.

    The trunk's fields carry the names of the Llama and Qwen families, those of its experts the names of Qwen3-MoE and GLM-4.
    Fields of our own:

    Attributes:
        norm_kind: "rms", or "layer" for LayerNorm with a bias (StarCoder2); ``rms_norm_eps`` is the epsilon of either.
        mlp_kind: "gated" (gate_proj, up_proj, down_proj), or "plain" (c_fc, c_proj: StarCoder2).
        router: how experts are chosen: "softmax" (Qwen3-MoE), or "sigmoid" with a correction bias and shared experts (GLM-4).
        dense_layers: indices of the layers that keep one MLP where the others have ``num_local_experts`` of them.
        power: the even power p.  Where the width of a head leaves it no state, there is no cache either.
        qkv_bias: biases on the q, k, v projections (Qwen2).
        out_bias: a bias on the output projection.
        qk_norm: RMS norm over each query and key (Qwen3).
        gate_bias: a bias on the gate projection.
        key_bias: a learned bias on rotated keys.  Conversion leaves it out unless asked to; the default here serves
            configurations that do not name it.
        chunk_size: tokens a chunk; None leaves the choice to the operator.
        use_exp: put the parent's softmax back in the power's place.  A diagnostic, and where training that mixes the two
            starts: no gates, no state, no cache.
        parent: what the model was converted from: ``{"name": …, "model_type": …, "fingerprint": …}``.
    """

    model_type = "power_retention"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the library's own class attribute)
    attribute_map = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}  # noqa: RUF012
    ignore_keys_at_rope_validation = {"partial_rotary_factor"}  # noqa: RUF012

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    mlp_bias: bool = False
    norm_kind: str = "rms"
    mlp_kind: str = "gated"
    num_local_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    dense_layers: list[int] | None = None
    router: str = "softmax"
    norm_topk_prob: bool = False
    n_shared_experts: int = 0
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    power: int = 2
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    gate_bias: bool = True
    key_bias: bool = True
    chunk_size: int | None = None
    use_exp: bool = False
    parent: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.dense_layers = self.dense_layers or []
        if not self.keeps_state:
            self.use_cache = False
        super().__post_init__(**kwargs)

    @property
    def keeps_state(self) -> bool:
        """Whether what was read fits into a fixed state: not for wide heads at p > 2, and not for softmax."""
        return has_state(self.head_dim or 0, self.power) and not self.use_exp

    @property
    def operator_chunk_size(self) -> int | None:
        """The operator's ``chunk_size``; published formats use that name for something else."""
        return self.chunk_size

    def has_experts(self, layer: int) -> bool:
        """Whether a layer routes its tokens to experts."""
        return self.num_local_experts > 0 and layer not in (self.dense_layers or ())

    def validate_architecture(self) -> None:
        """Part of the library's validation: the numbers must fit together."""
        check_power(self.power)
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ArgumentError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if self.num_local_experts and not 0 < self.num_experts_per_tok <= self.num_local_experts:
            raise ArgumentError(
                f"num_experts_per_tok must be between 1 and the {self.num_local_experts} experts, not "
                f"{self.num_experts_per_tok}."
            )

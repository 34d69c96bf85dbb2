"""Configuration of a power-retention model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from power_retention.errors import ArgumentError
from power_retention.ops.layout import check_power, has_state


@strict
class PowerRetentionConfig(PreTrainedConfig):
    """A decoder-only trunk whose token mixer is power retention; one set of modules, driven by these fields.

    The trunk's fields carry the names of the Llama and Qwen families.  Fields of our own:

    Attributes:
        power: the even power p.  Where the width of a head leaves it no state, there is no cache either.
        qkv_bias: biases on the q, k, v projections (Qwen2).
        out_bias: a bias on the output projection.
        qk_norm: RMS norm over each query and key (Qwen3).
        gate_bias: a bias on the gate projection.
        key_bias: a learned bias on rotated keys.
        chunk_size: tokens a chunk; None leaves the choice to the operator.
        parent: what the model was converted from: ``{"name": …, "model_type": …, "fingerprint": …}``.
    """

    model_type = "power_retention"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (the library's own class attribute)

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
    power: int = 2
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    gate_bias: bool = True
    key_bias: bool = True
    chunk_size: int | None = None
    parent: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if not has_state(self.head_dim, self.power):
            self.use_cache = False
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the library's validation: the numbers must fit together."""
        check_power(self.power)
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ArgumentError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}."
            )

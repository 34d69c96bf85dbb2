"""Published power-retention checkpoints, in their own format: configuration fields and weight names stay as they are.

``brumby`` is Manifest AI's Brumby-14B-Base (from Qwen3-14B-Base), ``powercoder`` their PowerCoder-3B (from StarCoder2-3B).
They are our trunk in two of its configurations; only the files differ.
"""

from __future__ import annotations

from dataclasses import fields
from inspect import get_annotations
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen3Config, Starcoder2Config

from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.modeling import PowerRetentionForCausalLM, PowerRetentionModel

_OPTIONAL = ("pad_token_id", "chunk_size")


class PublishedConfig(PowerRetentionConfig):
    """A configuration whose file holds the fields of a published format, and not ours."""

    parent_class: ClassVar[type[PreTrainedConfig]]

    @property
    def operator_chunk_size(self) -> None:
        """The published ``chunk_size`` says when a cache is folded, not how the operator cuts a sequence."""
        return None

    def to_diff_dict(self) -> dict[str, Any]:
        """What the file holds: the published fields, under the names that the published code reads."""
        theirs = {field.name for field in fields(self.parent_class)} | set(get_annotations(type(self)))
        ours = {field.name for field in fields(PowerRetentionConfig)} - theirs
        values = {name: value for name, value in super().to_diff_dict().items() if name not in ours}
        rope = dict(values.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
        values["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        if "dtype" in values:
            values["torch_dtype"] = values.pop("dtype")
        return {name: value for name, value in values.items() if value is not None or name not in _OPTIONAL}


@strict
class BrumbyConfig(PublishedConfig):
    """Brumby-14B-Base.

    Attributes:
        attention_bias: biases on q, k, v and o.
        use_exp: softmax in the power's place.
        chunk_size: cached tokens at which the published decoder folds its cache.
        prefill_chunk_size: tokens a piece of the prompt that ``generate`` reads at a time.
        switch_over_seq_len: length up to which the published code takes the attention form; kept for the file.
    """

    model_type = "brumby"
    parent_class = Qwen3Config

    vocab_size: int = 151936
    hidden_size: int = 5120
    intermediate_size: int = 17408
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    head_dim: int | None = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    use_exp: bool = False
    chunk_size: int | None = 64
    prefill_chunk_size: int | None = 1024
    switch_over_seq_len: int | None = 8192

    def __post_init__(self, **kwargs: Any) -> None:
        self.qk_norm, self.key_bias, self.gate_bias = True, False, False
        self.qkv_bias = self.out_bias = self.attention_bias
        super().__post_init__(**kwargs)


@strict
class PowerCoderConfig(PublishedConfig):
    """PowerCoder-3B.

    Attributes:
        norm_epsilon: epsilon of the layer norms.
        use_bias: biases on every linear layer, the gates' too.
    """

    model_type = "powercoder"
    parent_class = Starcoder2Config

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int | None = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.018042
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    tie_word_embeddings: bool = True
    chunk_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.norm_kind, self.mlp_kind, self.key_bias = "layer", "plain", False
        self.rms_norm_eps = self.norm_epsilon
        self.qkv_bias = self.out_bias = self.mlp_bias = self.gate_bias = self.use_bias
        super().__post_init__(**kwargs)


class BrumbyModel(PowerRetentionModel):
    """The trunk of Brumby-14B-Base."""

    config_class = BrumbyConfig


class BrumbyForCausalLM(PowerRetentionForCausalLM):
    """Brumby-14B-Base."""

    config_class = BrumbyConfig


class PowerCoderModel(PowerRetentionModel):
    """The trunk of PowerCoder-3B."""

    config_class = PowerCoderConfig


class PowerCoderForCausalLM(PowerRetentionForCausalLM):
    """PowerCoder-3B."""

    config_class = PowerCoderConfig

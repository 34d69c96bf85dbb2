"""Our trunk in vLLM's parallel layers, with the names of the Hugging Face class, so that its files load as they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsLoRA,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from power_retention.errors import SourceError
from power_retention.models import PowerRetentionConfig
from power_retention.models.parts import PowerRetentionRotaryEmbedding
from power_retention.serving.vllm.engine import page_layout
from power_retention.serving.vllm.mixer import PowerRetentionMixer

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_SHARDS: dict[str, tuple[str, Any]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class GatedMLP(nn.Module):
    """act(gate(x)) · up(x), then down."""

    def __init__(self, config: PowerRetentionConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, inner, bias, quantized = (
            config.hidden_size,
            config.intermediate_size,
            config.mlp_bias,
            vllm_config.quant_config,
        )
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias, quant_config=quantized, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(inner, hidden, bias, quant_config=quantized, prefix=f"{prefix}.down_proj")
        self.act = get_act_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, hidden]`` → ``[N, hidden]``."""
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(self.act(gate) * up)[0]  # type: ignore[no-any-return]


class PlainMLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, config: PowerRetentionConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, inner, bias, quantized = (
            config.hidden_size,
            config.intermediate_size,
            config.mlp_bias,
            vllm_config.quant_config,
        )
        self.c_fc = ColumnParallelLinear(hidden, inner, bias, quant_config=quantized, prefix=f"{prefix}.c_fc")
        self.c_proj = RowParallelLinear(inner, hidden, bias, quant_config=quantized, prefix=f"{prefix}.c_proj")
        self.act = get_act_fn(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, hidden]`` → ``[N, hidden]``."""
        return self.c_proj(self.act(self.c_fc(x)[0]))[0]  # type: ignore[no-any-return]


class LayerNorm(nn.LayerNorm):
    """With the calling convention of vLLM's norms: a residual comes and goes with the input."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:  # type: ignore[override]
        """The norm of x + residual, and that sum; the norm alone where there is no residual."""
        if residual is None:
            return super().forward(x)
        residual = x + residual
        return super().forward(residual), residual


def build_norm(config: PowerRetentionConfig) -> nn.Module:
    """A norm over the residual stream."""
    kind = LayerNorm if config.norm_kind == "layer" else RMSNorm
    norm: nn.Module = kind(config.hidden_size, eps=config.rms_norm_eps)
    return norm


class DecoderLayer(nn.Module):
    """Norm → mixer → residual, norm → MLP → residual."""

    def __init__(self, config: PowerRetentionConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = PowerRetentionMixer(config, vllm_config, f"{prefix}.self_attn")
        self.mlp = (PlainMLP if config.mlp_kind == "plain" else GatedMLP)(config, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)

    def forward(self, x: Tensor, residual: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """What this layer adds, and the stream it is to be added to, ``[N, hidden]`` both."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x, residual = self.post_attention_layernorm(self.self_attn(x, cos, sin), residual)
        assert residual is not None
        return self.mlp(x), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "inputs_embeds": 0})
class PowerRetentionModel(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: PowerRetentionConfig = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "embed_tokens")
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, vllm_config, maybe_prefix(prefix, f"layers.{i}"))
            for i in range(config.num_hidden_layers)
        )
        self.norm = build_norm(config)
        self.rotary_emb = PowerRetentionRotaryEmbedding(config)
        self.first = maybe_prefix(prefix, "layers.0.self_attn")

    def mixers(self) -> Iterator[PowerRetentionMixer]:
        """The mixer of every layer, first to last."""
        return (module for module in self.modules() if isinstance(module, PowerRetentionMixer))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[N]`` → ``[N, hidden]``."""
        return self.embed_tokens(input_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """``[N, hidden]`` of N tokens of any requests; a position counts from the beginning of its request."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds  # type: ignore[arg-type]
        # A request that goes on from a state with a name starts where that one ended.
        shifted = torch.empty_like(positions)
        torch.ops.vllm.power_retention_positions(positions, shifted, self.first)
        cos, sin = self.rotary_emb(x, shifted.unsqueeze(0))
        cos, sin = cos.squeeze(0), sin.squeeze(0)
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, cos, sin)
        normed, _ = self.norm(x, residual)
        return normed  # type: ignore[no-any-return]


class PowerRetentionForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsLoRA, SupportsMambaPrefixCaching):
    """Every dense model of :class:`power_retention.models.PowerRetentionConfig`, published formats included."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED
    # Beside its weights a converted folder keeps what it was calibrated to.
    allow_patterns_overrides: ClassVar[list[str]] = ["model*.safetensors"]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: PowerRetentionConfig = vllm_config.model_config.hf_config
        self.config, self.vllm_config = config, vllm_config
        self.model = PowerRetentionModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # What reads the last token of a request that is saved; weakly, for the layer is a part of it.
        next(iter(self.model.mixers())).model = weakref.ref(self)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """``[N]`` → ``[N, hidden]``."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The trunk."""
        hidden: Tensor = self.model(input_ids, positions, intermediate_tensors, inputs_embeds)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[N, hidden]`` → ``[N, vocab]``."""
        return self.logits_processor(self.lm_head, hidden_states)  # type: ignore[no-any-return]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what a Hugging Face folder holds.

        Raises:
            SourceError: a weight has no place, or a place no weight.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        for name, weight in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            place, shard = _place_of(name)
            if name.endswith(".g_idx") and bool((weight.diff() < 0).any()):
                raise SourceError(
                    f"{name!r} reorders the groups of a weight, which is not supported: quantise with desc_act=False."
                )
            if place not in parameters:
                if self.vllm_config.quant_config is not None and _says_nothing(name, weight):
                    continue
                raise SourceError(_why_no_place(name))
            parameter = parameters[place]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, weight) if shard is None else load(parameter, weight, shard)
            loaded.add(place)
        missing = sorted(parameters.keys() - loaded)
        if missing:
            raise SourceError(f"No weight was found for {', '.join(missing[:3])}; {len(missing)} are missing in all.")
        return loaded

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Shapes of what a page holds."""
        return page_layout(vllm_config).shapes

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Their dtypes."""
        return page_layout(vllm_config).dtypes

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        """Every part of a page is copied as it is."""
        return (get_temporal_copy_spec,) * 8


def _says_nothing(name: str, weight: Tensor) -> bool:
    """Whether a tensor is one that GPTQ's tools add to every layer: groups in their natural order, a bias of zeros."""
    return name.endswith(".g_idx") or (name.endswith(".bias") and not bool(weight.any()))


def _why_no_place(name: str) -> str:
    if ".g_proj." in name:
        return (
            f"The gates' projection is quantised ({name!r}) and should stay as it is: leave g_proj out when quantising."
        )
    return f"The weight {name!r} has no place in this model: its config.json describes another one."


def _place_of(name: str) -> tuple[str, Any]:
    """The parameter that a weight of a file goes to, and which part of it where several share one."""
    *path, module, kind = name.split(".")
    if module not in _SHARDS or "layers" not in path:
        return name, None
    packed, shard = _SHARDS[module]
    return ".".join((*path, packed, kind)), shard

"""What the benchmarks of training have in common: shapes, random models of both kinds, the end of a step."""

from __future__ import annotations

import gc
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM

Kind = Literal["ours", "transformer"]

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1.7b": {
        "vocab_size": 49152,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 211,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}
"""SmolLM2-135M, SmolLM2-1.7B, and one to see that everything runs."""
_POSITIONS = 1 << 20


def our_config(shape: str, **changes: Any) -> PowerRetentionConfig:
    """The configuration of a converted model of that shape."""
    return PowerRetentionConfig(**SHAPES[shape] | changes, max_position_embeddings=_POSITIONS)


def random_model(
    kind: Kind, shape: str, device: torch.device, *, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """A model of random weights in float32 on the device, ready to be trained."""
    torch.manual_seed(0)
    with device:
        if kind == "ours":
            return PowerRetentionForCausalLM(our_config(shape, **changes)).train()
        config = LlamaConfig(
            **SHAPES[shape] | changes, max_position_embeddings=_POSITIONS, attn_implementation=attention
        )
        return LlamaForCausalLM(config).train()


def random_ids(model: PreTrainedModel, rows: int, tokens: int, device: torch.device) -> Tensor:
    """``[rows, tokens]``, always the same."""
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, tokens), device=device, generator=generator)


def finish(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """The rest of a step: clipping, AdamW."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def clear() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""How large a model is, from its configuration alone: parameters, state, what a step reads, what a token computes.

Per token and head group, with D the width of a state (``docs/operator.md``), d and e the widths of keys and values:

- the recurrence multiplies φ(q) with [S, s] for each query head and adds φ(k)·[v, 1] for each key/value head:
  2·D·(e + 1)·(Hq + H) operations;
- attention over n tokens, causal, takes 2·(d + e)·Hq operations a token pair, n/2 pairs a token on average.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from power_retention.models.configuration import PowerRetentionConfig
from power_retention.models.modeling import PowerRetentionForCausalLM
from power_retention.ops.layout import state_width
from power_retention.ops.ring import FOLD_SIZE

NORMALIZER_BYTES = 4
GATE_BYTES = 4
COUNTER_BYTES = 12


def head_width(config: PreTrainedConfig) -> int:
    """d of the heads of any Transformer; some families' configurations leave it to be worked out."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def count_parameters(config: PowerRetentionConfig) -> int:
    """Parameters of the whole model, a tied head counted once; built without memory, in well under a second."""
    with torch.device("meta"):
        model = PowerRetentionForCausalLM(config)
    return sum(value.numel() for value in model.parameters())


def expert_parameters(config: PowerRetentionConfig) -> int:
    """Parameters of all routed experts; shared ones are read by every token and are not among them."""
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    return layers * config.num_local_experts * 3 * config.hidden_size * config.moe_intermediate_size


def parameters_read(config: PowerRetentionConfig, sequences: int = 1) -> float:
    """Parameters that one decoding step of so many sequences reads, in expectation.

    Of the embedding a step reads one row a sequence, which does not count.  Of E experts with k chosen, b independent tokens
    hit a share of 1 − (1 − k/E)^b.
    """
    read = float(count_parameters(config))
    if not config.tie_word_embeddings:
        read -= config.vocab_size * config.hidden_size
    if config.num_local_experts:
        missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** sequences
        read -= missed * expert_parameters(config)
    return read


def state_bytes(
    config: PowerRetentionConfig, element_bytes: int = 4, *, ring: int = FOLD_SIZE, activation_bytes: int = 2
) -> int:
    """Bytes that one sequence keeps, whatever its length.

    Args:
        config: of the model.
        element_bytes: of S; normalisers are float32 always.
        ring: L, with places for 2·L tokens' keys, values and gates (``docs/state.md``); 0 for the bare state.
        activation_bytes: of an element of keys and values.
    """
    heads, d = _heads(config)
    held = state_width(d, config.power) * (d * element_bytes + NORMALIZER_BYTES)
    kept = 2 * ring * (2 * activation_bytes * d + GATE_BYTES) + COUNTER_BYTES if ring else 0
    return config.num_hidden_layers * heads * (held + kept)


def kv_bytes_per_token(config: PowerRetentionConfig, element_bytes: int = 2) -> int:
    """Bytes that the Transformer parent keeps for each token read."""
    heads, d = _heads(config)
    return config.num_hidden_layers * heads * 2 * d * element_bytes


def recurrence_flops(config: PowerRetentionConfig) -> int:
    """Operations of all mixers for one token through the state."""
    heads, d = _heads(config)
    width = 2 * state_width(d, config.power) * (d + 1)
    return config.num_hidden_layers * width * (config.num_attention_heads + heads)


def attention_flops(config: PowerRetentionConfig, tokens: int) -> int:
    """Operations of all mixers for one token of a causal attention form over so many tokens, on average."""
    _, d = _heads(config)
    return config.num_hidden_layers * config.num_attention_heads * 2 * d * tokens


def _heads(config: PowerRetentionConfig) -> tuple[int, int]:
    assert config.num_key_value_heads is not None  # filled in by the configuration
    assert config.head_dim is not None
    return config.num_key_value_heads, config.head_dim

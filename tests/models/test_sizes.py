"""What a configuration says a model takes is what its tensors take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from power_retention.models import PowerRetentionCache
from power_retention.models.sizes import (
    attention_flops,
    count_parameters,
    expert_parameters,
    kv_bytes_per_token,
    parameters_read,
    recurrence_flops,
    state_bytes,
)
from tiny_models import VARIANTS, tiny_config, tiny_model, tiny_parent, tokens

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
def test_parameters_and_states_are_those_of_the_tensors(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    assert count_parameters(model.config) == sum(value.numel() for value in model.parameters())
    cache = PowerRetentionCache(2)
    with torch.no_grad():
        model(tokens(3, 30), past_key_values=cache)
    assert 3 * state_bytes(model.config, activation_bytes=4) == cache.nbytes
    assert 3 * state_bytes(model.config, ring=0) == sum(s.memory.nbytes + s.normalizer.nbytes for s in cache.states)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "starcoder2", "glm4_moe"])
def test_a_token_of_the_parents_cache(kind: str) -> None:
    from power_retention import swap_attention

    parent = tiny_parent(kind)
    with torch.no_grad():
        layers = parent(tokens(1, 10), use_cache=True).past_key_values.layers
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    config = swap_attention(parent).config
    assert 10 * kv_bytes_per_token(config, element_bytes=4) == held


def test_experts_that_a_step_reads() -> None:
    """Expectation against draws: what share of the experts some tokens hit."""
    config = tiny_config(**VARIANTS["qwen3-moe"])
    model = tiny_model(**VARIANTS["qwen3-moe"])
    experts = model.model.layers[1].mlp.experts
    assert expert_parameters(config) == sum(value.numel() for value in experts.parameters())
    fixed = count_parameters(config) - expert_parameters(config) - config.vocab_size * config.hidden_size
    generator = torch.Generator().manual_seed(0)
    for sequences in (1, 3):
        hit = [torch.rand(sequences, 4, generator=generator).topk(2).indices.unique().numel() / 4 for _ in range(2000)]
        wanted = fixed + sum(hit) / 2000 * expert_parameters(config)
        assert parameters_read(config, sequences) == pytest.approx(wanted, rel=0.01)


def test_a_tied_head_is_read_an_embedding_is_not() -> None:
    tied, untied = (tiny_config(tie_word_embeddings=tie) for tie in (True, False))
    assert parameters_read(tied) == count_parameters(tied) == parameters_read(untied)


def test_operations_are_counted_as_the_formulas_are() -> None:
    """Against PyTorch's own counter, on the products written out."""
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config(num_hidden_layers=1)
    d, width, groups, heads = 8, 8 * 9 // 2, 2, 2
    with FlopCounterMode(display=False) as counted:
        torch.zeros(heads, groups, width) @ torch.zeros(heads, width, d + 1)
        torch.zeros(heads, width, 1) @ torch.zeros(heads, 1, d + 1)
    assert recurrence_flops(config) == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        scores = torch.zeros(4, 64, d) @ torch.zeros(4, d, 64)
        scores @ torch.zeros(4, 64, d)
    assert attention_flops(config, 64) == counted.get_total_flops() / 64 / 2  # causal: half the pairs


MEASURE = """
import ctypes, gc, psutil, torch
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.models.sizes import count_parameters, state_bytes

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed already must not count
    return psutil.Process().memory_full_info().uss

def read():
    return model(torch.zeros(12, 4, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values

shape = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64, intermediate_size=512)
config = PowerRetentionConfig(**shape, num_hidden_layers=4, vocab_size=32000)
warm = PowerRetentionForCausalLM(PowerRetentionConfig(**shape, num_hidden_layers=1, vocab_size=8))
with torch.no_grad():
    warm(torch.zeros(1, 4, dtype=torch.long))
    before = resident()
    model = PowerRetentionForCausalLM(config)
    weights = resident() - before
    read()  # what a first call makes for good is no state
    before = resident()
    cache = read()
    states = resident() - before
print(weights, 4 * count_parameters(config), states, 12 * state_bytes(config, activation_bytes=4))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc to return what is freed")
def test_predictions_against_measured_memory() -> None:
    """Memory of a process of its own, before and after: 150 MB of weights, 220 MB of states; 5 %."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    weights, predicted_weights, states, predicted_states = map(int, done.stdout.split())
    assert min(weights, states) > 5e7
    assert weights == pytest.approx(predicted_weights, rel=0.05)
    assert states == pytest.approx(predicted_states, rel=0.05)

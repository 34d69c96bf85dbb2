"""What a dry run says a rank holds is what a rank holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from power_retention.conversion.presets import preset
from power_retention.errors import ArgumentError
from power_retention.evaluation.dry_run import Layout, activation_bytes_per_token, lay_out, teacher_of
from power_retention.models import PowerRetentionForCausalLM
from tiny_models import PARENTS, tiny_config

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}


@pytest.mark.parametrize("kind", ["llama", "glm4_moe"])
@pytest.mark.parametrize(("ranks", "dp_replicate"), [(1, 1), (8, 1), (8, 4)])
def test_shards_add_up(kind: str, ranks: int, dp_replicate: int) -> None:
    """Each group holds everything once; a rank can hold a little more than its share where rows do not divide."""
    config = tiny_config(tie_word_embeddings=kind == "llama")
    memory = lay_out(config, Layout(ranks, dp_replicate, batch=8, length=64), PARENTS[kind])
    student = PowerRetentionForCausalLM(config)
    share = sum(value.numel() for value in student.parameters()) / (ranks // dp_replicate)
    assert share <= memory.weights / 4 < 1.25 * share + 64
    assert memory.weights == memory.gradients == memory.optimizer / 2
    assert memory.total == sum(memory.to_dict().values()) / 2
    assert not dist.is_initialized()


def kept_by_layer(model: PowerRetentionForCausalLM, tokens: int) -> int:
    """Bytes that the backward pass of a layer keeps, as autograd is asked to keep them; weights left out."""
    kept: dict[int, tuple[int, Tensor]] = {}

    def note(value: Tensor) -> Tensor:
        if tokens in value.shape:
            storage = value.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes(), value
        return value

    x = torch.randn(1, tokens, model.config.hidden_size, requires_grad=True)
    position_embeddings = model.model.rotary_emb(x, torch.arange(tokens)[None])
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model.model.layers[0](x, position_embeddings)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": True}, {"norm_kind": "layer", "mlp_kind": "plain", "hidden_act": "gelu_pytorch_tanh"}],
    ids=["llama", "qwen3", "starcoder2"],
)
def test_activations_are_those_that_autograd_keeps(changes: dict[str, Any]) -> None:
    config = tiny_config(**WIDE, **changes)
    measured = kept_by_layer(PowerRetentionForCausalLM(config).train(), 512) / 512
    assert activation_bytes_per_token(config, 0) == pytest.approx(measured, rel=0.07)


def test_more_gpus_hold_less_each_and_shorter_sequences_need_less() -> None:
    config, teacher = preset("qwen3-14b").config(), teacher_of("Qwen3-14B")
    eight, sixteen, grouped = (lay_out(config, Layout(n, r, batch=16), teacher) for n, r in ((8, 1), (16, 1), (16, 2)))
    assert sixteen.weights == pytest.approx(eight.weights / 2, rel=1e-3)
    assert grouped.weights == eight.weights
    assert eight.weights == pytest.approx(4 * 14.77e9 / 8, rel=0.01)
    assert eight.teacher == pytest.approx(2 * 14.77e9 / 8, rel=0.01)
    long = lay_out(config, Layout(8, batch=16, length=8192, recompute=False), teacher)
    assert long.activations > 10 * eight.activations


def test_layouts_that_cannot_be() -> None:
    with pytest.raises(ArgumentError, match="8 ranks cannot be divided into 3 groups"):
        Layout(8, 3)
    with pytest.raises(ArgumentError, match="batch of 12 sequences cannot be shared out evenly among 8"):
        Layout(8, batch=12)


def test_not_among_real_ranks(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ArgumentError, match="start it in one process"):
            lay_out(tiny_config(), Layout(2))
    finally:
        dist.destroy_process_group()

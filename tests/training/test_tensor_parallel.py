"""Layers divided by heads and channels compute what whole ones do, forward and backward, also sharded by data beneath."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from worlds import in_ranks

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training.parallel import Ranks
from power_retention.training.tensor_parallel import check_tensor_parallel, divide_layer
from tiny_models import VARIANTS, tiny_config, tiny_model, tokens

DENSE = ["llama", "qwen2, no groups", "qwen3, wide heads", "starcoder2", "bare gates"]
CHANGES = {"num_key_value_heads": 2}


def computed(ranks: Ranks, changes: dict[str, Any], tp: int, data: int) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter, of a model divided ``tp`` times and sharded ``data`` times."""
    model = tiny_model(**changes).train()
    if ranks.size > 1:
        mesh = init_device_mesh("cpu", (data, tp), mesh_dim_names=("dp_shard", "tp"))
        for layer in model.model.layers:
            divide_layer(layer, mesh["tp"])
            if data > 1:
                fully_shard(layer, mesh=mesh["dp_shard"])
        if data > 1:
            fully_shard(model, mesh=mesh["dp_shard"])
    ids = tokens(2, 24)  # the same for all, so that means over the data are what they are without
    output = model(ids, labels=ids, use_cache=False)
    output.loss.backward()
    found = {"logits": output.logits.detach()}
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        found[name] = value.grad.full_tensor() if isinstance(value.grad, DTensor) else value.grad
    return found


@pytest.mark.parametrize(("kind", "tp", "data"), [*((kind, 2, 1) for kind in DENSE), ("qwen3, wide heads", 2, 2)])
def test_divided_layers_compute_the_same(kind: str, tp: int, data: int) -> None:
    changes = VARIANTS[kind] | (CHANGES if VARIANTS[kind].get("num_key_value_heads", 2) % tp else {})
    wanted = computed(Ranks(), changes, 1, 1)
    for got in in_ranks(computed, tp * data, changes, tp, data):
        assert got.keys() == wanted.keys()
        for name, value in got.items():
            largest = float(wanted[name].abs().max())
            assert float((value - wanted[name]).abs().max()) < 2e-5 * max(largest, 1e-2), name


def parts_held(ranks: Ranks) -> dict[str, int]:
    model = tiny_model(qk_norm=True)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    divide_layer(model.model.layers[0], mesh)
    return {
        name: (value.to_local() if isinstance(value, DTensor) else value).numel()
        for name, value in model.model.layers[0].named_parameters()
    }


def test_each_rank_holds_its_heads_and_channels() -> None:
    whole = {
        name: value.numel()
        for name, value in PowerRetentionForCausalLM(tiny_config(qk_norm=True)).model.layers[0].named_parameters()
    }
    for held in in_ranks(parts_held, 2):
        for name, count in held.items():
            assert count == whole[name] / (1 if "norm" in name else 2), name


def test_models_that_cannot_be_divided() -> None:
    with pytest.raises(ArgumentError, match="num_key_value_heads = 2 cannot be divided among 4 ranks"):
        check_tensor_parallel(tiny_config(), 4)
    with pytest.raises(ArgumentError, match="Experts are not divided"):
        check_tensor_parallel(tiny_config(**VARIANTS["qwen3-moe"]), 2)
    check_tensor_parallel(tiny_config(), 2)

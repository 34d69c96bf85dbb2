"""Layers divided by heads and by channels: every rank computes all tokens with a part of each layer's weights.

The scheme is Megatron's, in PyTorch's own tensor parallelism: projections into heads are cut by columns, those out of them by
rows, so a layer sums twice over the ranks.  The state of a head lives where the head does, so nothing of the operator is cut.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionConfig

_INTO_HEADS = ("q_proj", "k_proj", "v_proj", "g_proj")
_INTO_CHANNELS = ("gate_proj", "up_proj", "c_fc")
_OUT = ("o_proj", "down_proj", "c_proj")


def check_tensor_parallel(config: PowerRetentionConfig, ranks: int) -> None:
    """Refuse a model whose heads or channels so many ranks cannot share.

    Raises:
        ArgumentError: says which.
    """
    if config.num_local_experts and ranks > 1:
        raise ArgumentError(
            "Experts are not divided by tensor parallelism here; use data or pipeline parallelism for them."
        )
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % ranks:
            raise ArgumentError(f"{name} = {getattr(config, name)} cannot be divided among {ranks} ranks.")


def divide_layer(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a decoder layer over a mesh of one dimension, in place; before it is sharded by data parallelism.

    Inputs and outputs are whole, the same on every rank; so are the gradients of what is not divided.

    Args:
        layer: of a power-retention model, without experts.
        mesh: its size divides the key/value heads and the MLP's channels.
    """
    plans: dict[str, Any] = {name: ColwiseParallel() for name in _INTO_HEADS + _INTO_CHANNELS}
    plans |= {name: RowwiseParallel() for name in _OUT}
    for part in (layer.get_submodule("self_attn"), layer.get_submodule("mlp")):
        parallelize_module(part, mesh, {name: plans[name] for name, _ in part.named_children() if name in plans})
    mixer = layer.get_submodule("self_attn")
    if getattr(mixer, "k_bias", None) is not None:
        _divide(mixer, "k_bias", mesh, Shard(0), Shard(0))
    for name in ("q_norm", "k_norm"):
        norm = getattr(mixer, name, None)
        if isinstance(norm, nn.Module):  # whole on every rank, which sees its own heads' part of the gradient
            _divide(norm, "weight", mesh, Replicate(), Partial())


def _divide(module: nn.Module, name: str, mesh: DeviceMesh, placement: Placement, gradient: Placement) -> None:
    """Make a parameter one of a mesh; while its module computes, it reads its own part as a plain tensor."""
    old = module.get_parameter(name)
    new = nn.Parameter(distribute_tensor(old.detach(), mesh, [placement]), requires_grad=old.requires_grad)
    module.register_parameter(name, new)

    def enter(module: nn.Module, args: Any) -> None:
        value = module._parameters[name]
        assert isinstance(value, DTensor)
        part: Tensor = value.to_local(grad_placements=[gradient])
        module.__dict__[name] = part  # found before the parameter of that name

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        module.__dict__.pop(name, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)

"""Context parallelism of a model: ranks hold consecutive pieces of a sequence and exchange one state a layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from power_retention.layers import ContextParallel
from power_retention.models import PowerRetentionConfig
from power_retention.models.sizes import state_bytes
from power_retention.training.segments import trunk_of


def share_context(model: nn.Module, ranks: DeviceMesh | dist.ProcessGroup) -> ContextParallel:
    """Let the ranks of a mesh dimension (``mesh["cp"]``) or a group share every sequence of a model, in place.

    From then on a call reads this rank's piece of a row (see :meth:`PowerRetentionModel.forward`, and
    :func:`power_retention.training.segments.share_of_rank`).  Gradients of the parameters are those of this rank's tokens:
    :func:`sum_gradients` adds them up, or FSDP2 over a mesh that the ranks are part of, after :func:`sum_when_sharded`.
    """
    context = ContextParallel(ranks.get_group() if isinstance(ranks, DeviceMesh) else ranks)
    trunk_of(model).context_parallel = context
    return context


@torch.no_grad()
def sum_gradients(model: nn.Module, context: ContextParallel) -> None:
    """Replace every gradient by its sum over the ranks, where no FSDP does that."""
    for parameter in model.parameters():
        if parameter.grad is not None and not isinstance(parameter.grad, DTensor):
            dist.all_reduce(parameter.grad, group=context.group)


def sum_when_sharded(model: nn.Module) -> None:
    """Let FSDP2 add the ranks' gradients up, where it would take their mean: each has a part of the same loss."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def bytes_received(config: PowerRetentionConfig, ranks: int, *, sequences: int = 1, wide: bool = False) -> int:
    """Bytes that each rank receives for one forward pass, whatever the length; a backward pass without recomputation takes
    the states' part once more.

    Args:
        config: of the model.
        ranks: that share a sequence.
        sequences: rows at a time.
        wide: states of a float64 model, instead of float32.
    """
    assert config.num_key_value_heads is not None
    decays = config.num_hidden_layers * config.num_key_value_heads * 8
    states = state_bytes(config, ring=0) * (2 if wide else 1)
    return (ranks - 1) * sequences * (states + decays)

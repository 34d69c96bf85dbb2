"""One run in many processes: who they are, what they tell each other, and how weights are divided among them.

The names of the mesh are torchtitan's: ``dp_replicate`` groups hold all weights each, the ``dp_shard`` ranks of a group share
them out (FSDP2; both above one is HSDP).  A run in one process is the case in which everything said comes straight back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from power_retention.errors import ArgumentError, PowerRetentionError, RunInterrupted

MESH = ("dp_replicate", "dp_shard")

_PATIENCE = timedelta(hours=3)
"""How long ranks wait for the first one to open or write a model; one that dies is noticed at once all the same."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this one.
        size: how many there are.
        mesh: ``(dp_replicate, dp_shard)``; None where there is one process.
        control: a group for small messages between hosts.
        background: another, for a thread that writes checkpoints meanwhile.
        before_leaving: called before the processes part: a CUDA graph that holds messages must be gone by then, or NCCL waits
            for it for ever.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    control: Any = field(default=None, repr=False)
    background: Any = field(default=None, repr=False)
    before_leaving: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the one that keeps the records."""
        return self.rank == 0

    @property
    def whole(self) -> bool:
        """Whether every rank holds all weights: nothing is divided but the batch."""
        return self.mesh is None or self.mesh["dp_shard"].size() == 1

    def rows(self, batch: int) -> slice:
        """Which sequences of a batch this rank reads.

        Raises:
            ArgumentError: they cannot be shared out evenly.
        """
        if batch % self.size:
            raise ArgumentError(
                f"A batch of {batch} sequences cannot be shared out evenly among {self.size} ranks: choose a multiple of "
                f"{self.size}."
            )
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over ranks of a tensor on the device of the run."""
        if self.size == 1:
            return x
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """The mean over ranks of gradients that each computed whole, in place; one message for all of them."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        mean = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = mean.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])

    def most(self, count: int) -> int:
        """The largest of the ranks' counts."""
        if self.size == 1:
            return count
        largest = torch.tensor(count)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def mean_of(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean over ranks of each number."""
        if self.size == 1:
            return dict(values)
        total = torch.tensor(list(values.values()), dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return dict(zip(values, (total / self.size).tolist(), strict=True))

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, if any rank raises it: what they do about it, they do together."""
        if self.size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, group=self.control)
        return tuple(bool(count) for count in raised.tolist())

    def same(self, value: T) -> T:
        """What the first rank has; the others' is dropped."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control, device=torch.device("cpu"))
        return values[0]

    def first_does(self, do: Callable[[], T]) -> T:
        """What the first rank gets from doing something; what it is refused, all are refused."""
        outcome: tuple[Any, PowerRetentionError | None] = None, None
        if self.first:
            try:
                outcome = do(), None
            except PowerRetentionError as error:
                outcome = None, error
        result, refusal = self.same(outcome)
        if refusal is not None:
            raise refusal
        return result  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier(self.control)


ALONE = Ranks()
"""A run in one process."""


def launched_ranks() -> int:
    """How many processes a launcher such as torchrun started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(kind: str) -> torch.device:
    """The device of this process: on a host with several GPUs, that of its local rank."""
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)


@contextmanager
def joined_ranks(device: torch.device, *, dp_replicate: int = 1) -> Iterator[Ranks]:
    """Join the processes that a launcher started; leave them at the end.

    Args:
        device: of this process.
        dp_replicate: groups of ranks that hold all weights each.

    Raises:
        ArgumentError: the ranks cannot be divided into so many groups.
    """
    size = launched_ranks()
    check_groups(size, dp_replicate)
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    control, background = (dist.new_group(backend="gloo", timeout=_PATIENCE) for _ in range(2))
    ranks = Ranks(dist.get_rank(), size, make_mesh(device.type, size, dp_replicate), control, background)
    try:
        yield ranks
        dist.barrier(control)  # gloo aborts where one leaves while another still listens
    except RunInterrupted:
        dist.barrier(control)
        raise
    finally:
        for leave in ranks.before_leaving:
            leave()
        dist.destroy_process_group()


def check_groups(size: int, dp_replicate: int) -> None:
    """Refuse a number of groups that does not divide the ranks."""
    if dp_replicate < 1 or size % dp_replicate:
        raise ArgumentError(f"{size} ranks cannot be divided into {dp_replicate} groups that hold all weights each.")


def make_mesh(device_type: str, size: int, dp_replicate: int = 1) -> DeviceMesh:
    """The mesh of all ranks, with torchtitan's names; a process group must be there, a fake one will do."""
    return init_device_mesh(device_type, (dp_replicate, size // dp_replicate), mesh_dim_names=MESH)


class Trunk(nn.Module):
    """A causal language model up to its last hidden state.

    The root of what is sharded, as a call of it gathers embedding, norm *and* head: a loss in chunks needs the head's weight
    beside the hidden states, until its backward pass is over.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.whole = model

    def forward(self, **inputs: Any) -> Tensor:
        """The last hidden state ``[B, T, hidden]``; inputs as of the model's own trunk."""
        hidden: Tensor = self.whole.model(**inputs).last_hidden_state
        return hidden


def parallelize(
    model: PreTrainedModel, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, root: nn.Module | None = None
) -> None:
    """Shard a causal language model over a mesh, in place (FSDP2): its mixers, its layers, and what is left.

    Parameters stay in their own dtype, and so do their gradients and what an optimiser keeps for them.  Mixers are units of
    their own because aligning calls them by themselves.

    Args:
        model: ours, or a Transformer; on the meta device if its weights are to come later.
        mesh: see :func:`make_mesh`.
        dtype: in which the weights of layers are gathered and multiplied; gradients are summed in float32.  Embedding, last
            norm and head are always gathered as they are.
        root: the module that will be called, if it is another that holds the model.
    """
    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if mesh["dp_replicate"].size() == 1:
        mesh = mesh["dp_shard"]
    for layer in model.model.layers:
        fully_shard(layer.self_attn, mesh=mesh, mp_policy=policy)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root or model, mesh=mesh)


def hold_whole(model: PreTrainedModel, device: torch.device) -> None:
    """Let a rank hold all of a model, in place; from the meta device without contents."""
    if model.device.type == "meta":
        model.to_empty(device=device)
        model.tie_weights()  # each got memory of its own
    else:
        model.to(device)


def hand_out(model: nn.Module, ranks: Ranks, device: torch.device, place: Callable[[], None]) -> None:
    """Place a model on all ranks and give each its part of the first rank's weights and buffers.

    Only the first rank needs them; elsewhere the model may be on the meta device.  One parameter at a time is whole.

    Args:
        model: in place.
        ranks: more than one.
        device: of this rank.
        place: shards it, or lets every rank hold all of it.
    """
    whole = {name: value.detach() for name, value in _named_tensors(model)} if ranks.first else {}
    dtypes = ranks.same({name: value.dtype for name, value in whole.items()})
    place()
    if any(value.is_meta for _, value in _named_tensors(model)):
        model.to_empty(device=device)
    for name, value in _named_tensors(model):
        if ranks.first:
            full = whole.pop(name).to(device, copy=True)
        else:
            full = torch.empty(value.shape, dtype=dtypes[name], device=device)
        dist.broadcast(full, src=0)
        if isinstance(value, DTensor):
            own = distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
            value.to_local().detach().copy_(own.to_local())
        else:
            value.detach().copy_(full)


def make_root(module: nn.Module) -> None:
    """Make a sharded module the root of those inside, before one of them is called by itself and takes itself for it."""
    module._get_fsdp_state()._lazy_init()  # type: ignore[operator, union-attr]  # what its first call would do


def whole_tensors(model: nn.Module, ranks: Ranks) -> dict[str, Tensor]:
    """Every parameter and kept buffer in host memory, tied ones under their first name; nothing on later ranks."""
    kept = set(model.state_dict())
    whole: dict[str, Tensor] = {}
    for name, value in _named_tensors(model):
        full = value.full_tensor().detach() if isinstance(value, DTensor) else value.detach()
        if ranks.first and name in kept:
            whole[name] = full.cpu()
    return whole


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, each once."""
    return chain(model.named_parameters(), model.named_buffers())

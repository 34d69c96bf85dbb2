"""Memory that a training step takes, from a model's configuration alone.

Nothing is guessed: the step's own code runs on tensors that have shapes but no contents, every allocation and release is
counted, and the operator's workspace is added where it is called.  A model's peak is a straight line in its number of layers,
so two small numbers of them say the rest.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.models.sizes import (
    attention_flops,
    count_parameters,
    parameters_read,
    recurrence_flops,
    state_bytes,
)
from power_retention.ops import Call, PowerState
from power_retention.ops.chunk import workspace as torch_workspace
from power_retention.ops.operator import usual_chunk_size
from power_retention.training.layers import recompute_layers
from power_retention.training.next_token import next_token_loss_of_rows

_ADAM_BYTES = 8
"""Of optimiser state for a parameter."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training step on one device.

    Attributes:
        tokens: of a sequence.
        segment: tokens of a segment.
        weights: float32.
        optimizer: AdamW's two moments.
        step: most held during a step above those: gradients, activations, states, workspace.
        borders: states at segment borders.
        offloaded: whether those lie in host memory.
        flops: operations of the step.
    """

    tokens: int
    segment: int
    weights: int
    optimizer: int
    step: int
    borders: int
    offloaded: bool
    flops: float

    @property
    def device_bytes(self) -> int:
        """Peak of the device's memory."""
        return self.weights + self.optimizer + self.step

    @property
    def host_bytes(self) -> int:
        """Pinned memory of the host."""
        return self.borders if self.offloaded else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"device_bytes": self.device_bytes, "host_bytes": self.host_bytes}


def predict_training(
    config: PowerRetentionConfig,
    *,
    tokens: int,
    segment: int,
    batch: int = 1,
    precision: torch.dtype | None = torch.bfloat16,
    checkpointed: bool = False,
    compiled: bool = False,
    offload: bool | None = None,
    device_type: str = "cuda",
) -> TrainingMemory:
    """What one step of :func:`power_retention.training.segments.backward_in_segments` and AdamW takes.

    Args:
        config: of the model, trained as a whole, with weights in float32.
        tokens: of each sequence.
        segment: tokens read at a time.
        batch: sequences side by side.
        precision: dtype of autocast; None for none.
        checkpointed: whether layers keep their inputs only.
        compiled: whether what layers do to each token is fused (:func:`power_retention.training.layers.compile_tokenwise`).
        offload: whether border states wait in host memory; None: on a GPU.
        device_type: ``cuda`` for the Triton kernels' workspace, ``cpu`` for plain PyTorch's.

    Raises:
        ArgumentError: the model keeps no state, or has experts.
    """
    if not config.keeps_state:
        raise ArgumentError("This model keeps no state of fixed size, so it cannot be trained in segments; use p = 2.")
    if config.num_local_experts:
        raise ArgumentError(
            "Memory of models with experts is not predicted: which tokens meet in an expert depends on the text."
        )
    offload = device_type == "cuda" if offload is None else offload
    length, segments = min(tokens, segment), -(-tokens // segment)
    peak = partial(_replay_peak, config, batch, length, segments > 1, precision, checkpointed, device_type)
    at_one, at_three = peak(1), peak(3)
    step = at_one + (config.num_hidden_layers - 1) * (at_three - at_one) // 2
    if compiled:
        layers_held = 1 if checkpointed else config.num_hidden_layers
        step -= layers_held * batch * length * bytes_saved_by_compiling(config, precision)
    one_border = batch * state_bytes(config, ring=0)
    # The last segment's entering states are among the replay's own; on a GPU the next ones are on their way meanwhile.
    waiting = max(segments - 2, 0)
    step += min(waiting, 1) * one_border if offload else waiting * one_border
    parameters = count_parameters(config)
    return TrainingMemory(
        tokens=tokens,
        segment=segment,
        weights=4 * parameters,
        optimizer=_ADAM_BYTES * parameters,
        step=step,
        borders=(segments - 1) * one_border,
        offloaded=offload,
        flops=batch * tokens * step_flops(config, tokens, segment, checkpointed=checkpointed),
    )


def bytes_saved_by_compiling(config: PowerRetentionConfig, precision: torch.dtype | None) -> int:
    """Of activations a token and layer: what torch.compile computes again from what is kept anyway.

    An RMS norm's float32 input, normed input and their narrow copies, and the MLP's product of gate and value.
    """
    if config.norm_kind != "rms":
        return 0
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    narrow = precision is not None
    normed = (10 if narrow else 8) * config.hidden_size
    product = (2 if narrow else 4) * config.intermediate_size if config.mlp_kind == "gated" else 0
    normed_heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim if config.qk_norm else 0
    return normed + product + (6 if narrow else 4) * normed_heads


def step_flops(config: PowerRetentionConfig, tokens: int, segment: int, *, checkpointed: bool) -> float:
    """Operations a token: forward, twice that backward, once more where activations are recomputed, and once more for all
    segments but the last."""
    forward = 2 * parameters_read(config) + recurrence_flops(config) + attention_flops(config, 512)
    again = 1 - 1 / -(-tokens // segment)
    return forward * (3 + checkpointed + again)


def _replay_peak(
    config: PowerRetentionConfig,
    batch: int,
    tokens: int,
    cut: bool,
    precision: torch.dtype | None,
    checkpointed: bool,
    device_type: str,
    layers: int,
) -> int:
    """Most bytes above the weights while a segment in the middle of a sequence is replayed, gradients included."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    with FakeTensorMode():
        model = PowerRetentionForCausalLM(small).train()
        if checkpointed:
            recompute_layers(model.model.layers)
        counter = _Counter(device_type, model)
        with counter:
            ids = torch.zeros(batch, tokens, dtype=torch.int64)
            for parameter in model.parameters() if cut else ():  # the segments read before have left theirs
                parameter.grad = torch.zeros_like(parameter)
            states = _states(model, batch) if cut else None
            with _autocast(precision):
                out = model(
                    input_ids=ids,
                    use_cache=False,
                    states=states,
                    return_states=cut,
                    hidden_loss=partial(_loss_on_every_row, device_type),
                )
            leaving = [x for state in out.states or [] for x in state[:2]]
            loss, gradients = out.loss, [torch.zeros_like(x) for x in leaving]
            del out
            torch.autograd.backward([loss, *leaving], [torch.ones_like(loss), *gradients])
        return counter.peak


def _loss_on_every_row(device_type: str, hidden: Tensor, head: nn.Module) -> Tensor:
    """With as many labels as tokens, which ones there are depends on no contents."""
    rows = hidden.flatten(0, -2)
    every = torch.arange(len(rows))
    loss = next_token_loss_of_rows(rows[every], head, every, 1.0, sized_for=device_type)
    return loss + 0 * hidden[..., :1].sum()


def _states(model: PowerRetentionForCausalLM, batch: int) -> list[PowerState]:
    config = model.config
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    heads, d = config.num_key_value_heads, config.head_dim
    made = [PowerState.empty(batch, heads, d, p=config.power) for _ in model.model.layers]
    return [s._replace(memory=s.memory.requires_grad_(), normalizer=s.normalizer.requires_grad_()) for s in made]


@contextmanager
def _autocast(precision: torch.dtype | None) -> Iterator[None]:
    with nullcontext() if precision is None else torch.autocast("cpu", precision):
        yield


class _Counter(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside, from its making to its end; those of a model were before."""

    def __init__(self, device_type: str, model: nn.Module) -> None:
        super().__init__()
        self.device_type = device_type
        self.held = self.peak = 0
        self._before = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        name = func.name() if hasattr(func, "name") else ""
        if name.startswith("power_retention::retain"):
            self.peak = max(self.peak, self.held + self._workspace(args, backward=name.endswith("backward")))
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._before:
            return
        size = storage.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)

        def end(_: Any) -> None:
            self.held -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, end)

    def _workspace(self, args: Any, *, backward: bool) -> int:
        inputs = args[3:] if backward else args
        q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk = inputs[:9]
        wanted = args[1] is not None if backward else inputs[9]
        call = Call(q, k, v, log_g, memory, normalizer, cu_seqlens, p, chunk, wanted)
        if self.device_type == "cuda":
            from power_retention.ops.triton.sizes import cheapest_chunk, workspace

            size = chunk if chunk >= 0 else cheapest_chunk(call, backward)
            return sum(workspace(replace(call, chunk_size=size), backward).values())
        needs_state = memory is not None or wanted
        size = chunk if chunk >= 0 else usual_chunk_size(q.shape[1], k.shape[-1], p, needs_state=needs_state)
        return torch_workspace(q, k, v, p, size, needs_state=needs_state, backward=backward)

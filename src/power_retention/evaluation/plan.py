"""What serving and retraining a model takes, from its configuration: memory, users, speed, crossover lengths, cost.

Speeds are bounds by memory bandwidth: a decoding step reads the weights once and everything that its sequences keep.
Nothing is measured here; every number that a machine or a market brings in is in
:class:`~power_retention.evaluation.gpus.Gpu` and :class:`Assumptions`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from power_retention.errors import ArgumentError
from power_retention.evaluation.gpus import GPUS, Gpu
from power_retention.models import PowerRetentionConfig
from power_retention.models.sizes import (
    attention_flops,
    count_parameters,
    kv_bytes_per_token,
    parameters_read,
    recurrence_flops,
    state_bytes,
)
from power_retention.ops.ring import FOLD_SIZE

STATE_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes an element of S in the dtypes that a state can have."""

_BACKWARD = 2.0
"""Operations of a backward pass in forward passes."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan takes for granted; every one can be set.

    Attributes:
        weight_bytes: an element of the weights: 2 is bfloat16, 1 is int8.
        state_dtype: of S, float32 or bfloat16; normalisers are float32.
        ring: tokens kept as keys and values until they are folded; 0 rewrites the state for each token.
        memory_share: of a GPU's memory that weights and states may fill; the rest is activations and allocator.
        bandwidth_share: of the stated bandwidth that a step reaches (a copy on an H200: 0.89).
        train_tokens: tokens to retrain on.
        train_length: tokens a sequence of them.
        utilisation: share of the stated operations that training reaches.
    """

    weight_bytes: float = 2
    state_dtype: str = "float32"
    ring: int = FOLD_SIZE
    memory_share: float = 0.95
    bandwidth_share: float = 0.89
    train_tokens: float = 1e9
    train_length: int = 4096
    utilisation: float = 0.4

    def __post_init__(self) -> None:
        if self.state_dtype not in STATE_BYTES:
            raise ArgumentError(f"A state is {' or '.join(STATE_BYTES)}, not {self.state_dtype!r}.")
        for name in ("weight_bytes", "train_tokens", "train_length"):
            if not getattr(self, name) > 0:
                raise ArgumentError(f"{name} must be positive, not {getattr(self, name)}.")
        for name in ("memory_share", "bandwidth_share", "utilisation"):
            if not 0 < getattr(self, name) <= 1:
                raise ArgumentError(f"{name} is a share between 0 and 1, not {getattr(self, name)}.")
        if self.ring < 0:
            raise ArgumentError(f"ring is a number of tokens, not {self.ring}.")


@dataclass(frozen=True)
class Serving:
    """All GPUs at one context length, each group holding as many users as fit.

    Attributes:
        context: tokens that each user has read.
        bytes_per_user: kept for one of them.
        gpus_per_group: the fewest, a power of two, that hold the weights and one user; groups are replicas.  0: not even all.
        users: of all GPUs together.
        users_per_gpu: of one.
        tokens_per_second: of all users together, at that many; 0 where nobody fits.
        tokens_per_second_alone: of one user who has a group of GPUs to himself; 0 where he does not fit.
    """

    context: int
    bytes_per_user: int
    gpus_per_group: int
    users: int
    users_per_gpu: float
    tokens_per_second: float
    tokens_per_second_alone: float


@dataclass(frozen=True)
class Crossovers:
    """Context lengths, in tokens, from which a fixed state costs less than its parent's key/value cache.

    Attributes:
        memory: bytes kept for a user.
        decoding: bytes moved for a decoded token.
        reading: operations for a token of a prompt, the mixers alone.
    """

    memory: float
    decoding: float
    reading: float


@dataclass(frozen=True)
class Retraining:
    """One retraining from the parent, by distillation.

    Attributes:
        tokens: read.
        flops_per_token: student forward and backward, teacher forward.
        gpu_hours: on the planned GPUs.
        dollars: at their price.
    """

    tokens: float
    flops_per_token: float
    gpu_hours: float
    dollars: float


@dataclass(frozen=True)
class Plan:
    """The answer of :func:`make_plan`.

    Attributes:
        name: of the model.
        parameters: of it.
        parameters_read: for one token of one sequence.
        weights_bytes: of all weights.
        state_bytes: of one sequence.
        kv_bytes_per_token: of the parent.
        gpu: the kind.
        gpus: how many.
        student: serving the model, one entry a context length.
        parent: serving its parent with a key/value cache in two bytes an element, the same lengths.
        crossovers: see there.
        retraining: see there.
        assumptions: what was taken for granted.
    """

    name: str
    parameters: int
    parameters_read: float
    weights_bytes: float
    state_bytes: int
    kv_bytes_per_token: int
    gpu: Gpu
    gpus: int
    student: list[Serving]
    parent: list[Serving]
    crossovers: Crossovers
    retraining: Retraining
    assumptions: Assumptions

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def parse_gpus(text: str, dollars_per_hour: float | None = None) -> tuple[int, Gpu]:
    """``4xH200`` → (4, the H200), with another price if one is given.

    Raises:
        ArgumentError: it is not of that form, or no GPU of that name is known.
    """
    found = re.fullmatch(r"(?:(\d+)\s*[x×])?\s*([\w-]+)", text.strip(), re.IGNORECASE)
    gpu = GPUS.get(found[2].lower()) if found else None
    count = int(found[1] or 1) if found else 0
    if gpu is None or count < 1:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        raise ArgumentError(f"GPUs are given as 4xH200, not {text!r}; known are {known}.")
    return count, gpu if dollars_per_hour is None else replace(gpu, dollars_per_hour=dollars_per_hour)


def parse_count(text: str) -> int:
    """``128k`` → 131072, ``1M`` → 1048576, ``1B`` → 10⁹: lengths come in powers of two, data sets do not.

    Raises:
        ArgumentError: it is no positive number.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower())
    value = float(found[1]) * {"": 1, "k": 1024, "m": 1024**2, "b": 1e9, "t": 1e12}[found[2]] if found else 0
    if value < 1:
        raise ArgumentError(f"A number of tokens is written 32768, 32k, 1M or 1B, not {text!r}.")
    return round(value)


def make_plan(
    config: PowerRetentionConfig,
    contexts: Sequence[int],
    gpu: Gpu,
    gpus: int = 1,
    assumptions: Assumptions | None = None,
    *,
    name: str = "model",
) -> Plan:
    """Plan the serving and retraining of a model.

    Args:
        config: of the model; its parent has the same shapes.
        contexts: lengths to serve, in tokens.
        gpu: the kind to use.
        gpus: how many.
        assumptions: see :class:`Assumptions`.
        name: for the report.

    Raises:
        ArgumentError: the model keeps no state, or the GPUs cannot hold its weights and one user.
    """
    if not config.keeps_state:
        raise ArgumentError(
            f"Heads of width {config.head_dim} keep no fixed state at p = {config.power}"
            f"{' with use_exp' if config.use_exp else ''}, so there is nothing to plan; use p = 2."
        )
    assume = assumptions or Assumptions()
    parameters = count_parameters(config)
    weights = parameters * assume.weight_bytes
    state = state_bytes(config, STATE_BYTES[assume.state_dtype], ring=assume.ring)
    kv = kv_bytes_per_token(config)
    fleet = _Fleet(config, gpu, gpus, weights, assume)
    if not fleet.group(state):
        raise ArgumentError(
            f"Weights and one state take {(weights + state) / 1e9:.0f} GB, and {gpus} × {gpu.name} hold "
            f"{gpus * fleet.room:.0f} GB: plan with more or larger GPUs."
        )
    moved = state_traffic(config, assume)
    return Plan(
        name=name,
        parameters=parameters,
        parameters_read=parameters_read(config),
        weights_bytes=weights,
        state_bytes=state,
        kv_bytes_per_token=kv,
        gpu=gpu,
        gpus=gpus,
        student=[fleet.serve(context, state, moved) for context in contexts],
        parent=[fleet.serve(context, context * kv, context * kv) for context in contexts],
        crossovers=Crossovers(state / kv, moved / kv, recurrence_flops(config) / attention_flops(config, 1)),
        retraining=_retraining(config, gpu, assume),
        assumptions=assume,
    )


def state_traffic(config: PowerRetentionConfig, assumptions: Assumptions) -> float:
    """Bytes moved for one token of one sequence: the state read, and written back at every fold; most of a ring read."""
    held = state_bytes(config, STATE_BYTES[assumptions.state_dtype], ring=0)
    if not assumptions.ring:
        return 2.0 * held
    ring = state_bytes(config, STATE_BYTES[assumptions.state_dtype], ring=assumptions.ring) - held
    return held * (1 + 1 / assumptions.ring) + ring * 3 / 4  # between L and 2·L of its places are read


@dataclass(frozen=True)
class _Fleet:
    """GPUs, and the model that they serve in groups."""

    config: PowerRetentionConfig
    gpu: Gpu
    gpus: int
    weights: float
    assume: Assumptions

    @property
    def room(self) -> float:
        """Of one GPU, for weights and users, in 10⁹ bytes."""
        return self.gpu.memory_gb * self.assume.memory_share

    def group(self, kept: int) -> int:
        """GPUs that hold the weights and one user, 0 if all of them do not."""
        sizes = (2**i for i in range(self.gpus.bit_length()))
        return next((size for size in sizes if self._users(size, kept)), 0)

    def serve(self, context: int, kept: int, moved: float) -> Serving:
        """As many users as fit, each keeping so many bytes and moving so many a token."""
        group = self.group(kept)
        groups = self.gpus // group if group else 0
        users = self._users(group, kept)
        return Serving(
            context=context,
            bytes_per_user=kept,
            gpus_per_group=group,
            users=users * groups,
            users_per_gpu=users * groups / self.gpus,
            tokens_per_second=groups * self._speed(group, users, moved),
            tokens_per_second_alone=self._speed(group, min(users, 1), moved),
        )

    def _users(self, group: int, kept: int) -> int:
        return max(0, math.floor((group * self.room * 1e9 - self.weights) / kept))

    def _speed(self, group: int, users: int, moved: float) -> float:
        """Tokens a second of one group."""
        if not users:
            return 0.0
        bandwidth = group * self.gpu.bandwidth_tb_s * 1e12 * self.assume.bandwidth_share
        read = parameters_read(self.config, users) * self.assume.weight_bytes
        return users * bandwidth / (read + users * moved)


def _retraining(config: PowerRetentionConfig, gpu: Gpu, assume: Assumptions) -> Retraining:
    linear = 2 * parameters_read(config)
    attention = attention_flops(config, assume.train_length)
    student = linear + min(attention, recurrence_flops(config) + attention_flops(config, 512))
    per_token = student * (1 + _BACKWARD) + linear + attention
    hours = assume.train_tokens * per_token / (gpu.tflops * 1e12 * assume.utilisation) / 3600
    return Retraining(assume.train_tokens, per_token, hours, hours * gpu.dollars_per_hour)

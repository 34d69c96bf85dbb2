"""A retraining laid out over many GPUs without any: what each of them would have to hold.

Both models are built without memory and sharded by the code that shards a real run, over a process group that is pretended.
What ranks keep (weights, optimiser state) is read off the shards and exact; what comes and goes within a step is reckoned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from power_retention.conversion.presets import presets
from power_retention.errors import ArgumentError
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.training.losses import LOGITS_AT_A_TIME
from power_retention.training.parallel import Trunk, check_groups, make_mesh, parallelize

_FLOAT32, _BFLOAT16 = 4, 2
_ADAM_BYTES = 2 * _FLOAT32
_BYTES_PER_LOGIT = 3 * _BFLOAT16
"""Of the student, of the teacher, and their gradient; compiled, as on GPUs, nothing lies between them."""


@dataclass(frozen=True)
class RankMemory:
    """What the fullest rank holds at the worst moment of a distillation step in bfloat16, in bytes.

    Attributes:
        weights: its shards of the student, float32.
        optimizer: its shards of Adam's two moments, float32.
        gradients: its shards of the gradients, float32.
        teacher: its shards of the teacher, bfloat16.
        gathered: whole for the moment: embeddings and heads of both models, two layers, and a layer's gradients.
        activations: kept for the backward pass, the teacher's hidden states among them.
        logits: of a chunk of tokens, and the gradient of the head.
    """

    weights: int
    optimizer: int
    gradients: int
    teacher: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Layout:
    """How a retraining is spread.

    Attributes:
        ranks: GPUs.
        dp_replicate: groups of them that hold all weights each.
        batch: sequences a step, of all ranks together.
        length: tokens a sequence.
        recompute: keep a layer's input only.
    """

    ranks: int
    dp_replicate: int = 1
    batch: int = 8
    length: int = 4096
    recompute: bool = True

    def __post_init__(self) -> None:
        check_groups(self.ranks, self.dp_replicate)
        if self.batch % self.ranks:
            raise ArgumentError(
                f"A batch of {self.batch} sequences cannot be shared out evenly among {self.ranks} ranks."
            )


def lay_out(config: PowerRetentionConfig, layout: Layout, teacher: PreTrainedConfig | None = None) -> RankMemory:
    """Lay a retraining out, with nothing but the shapes of its weights.

    Args:
        config: of the student.
        layout: see there.
        teacher: configuration of the Transformer; by default one with the student's shapes.

    Raises:
        ArgumentError: a process group is there already.
    """
    with pretended_mesh(layout.ranks, layout.dp_replicate) as mesh:
        student = _shapes(config, torch.float32)
        taught = _shapes(teacher or config, torch.bfloat16)
        for model, dtype in ((student, torch.bfloat16), (taught, None)):
            parallelize(model, mesh, dtype, root=Trunk(model))
        own = _own_elements(student)
        tokens = layout.batch // layout.ranks * layout.length
        return RankMemory(
            weights=own * _FLOAT32,
            optimizer=own * _ADAM_BYTES,
            gradients=own * _FLOAT32,
            teacher=_own_elements(taught) * _BFLOAT16,
            gathered=_gathered_bytes(student, taught),
            activations=_activation_bytes(config, tokens, layout.recompute),
            logits=_logit_bytes(config, tokens),
        )


def teacher_of(model: str) -> PreTrainedConfig | None:
    """The configuration of the Transformer behind a preset's name; None for what is no preset."""
    found = presets().get(model.lower())
    return None if found is None else found.parent_config()


@contextmanager
def pretended_mesh(ranks: int, dp_replicate: int = 1) -> Iterator[DeviceMesh]:
    """The mesh of so many ranks in one process: nothing is sent, so nothing can be computed either.

    Raises:
        ArgumentError: a process group is there already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ArgumentError("A dry run pretends its ranks: start it in one process, without torchrun.")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield make_mesh("cpu", ranks, dp_replicate)
    finally:
        dist.destroy_process_group()


def activation_bytes_per_token(config: PowerRetentionConfig, layer: int) -> int:
    """What the backward pass of a layer needs of a token, under autocast: a float32 residual stream, bfloat16 between.

    Norms keep their input, those without a mean its normalised form too.  Every projection keeps its own narrow copy of its
    input; the mixer keeps queries, keys, values and outputs, the MLP what it multiplies, for each expert a token is sent to.
    """
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    norms = 2 * config.hidden_size * _FLOAT32 * (1 if config.norm_kind == "layer" else 2)
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    mixer = 4 * config.hidden_size * _BFLOAT16 + 2 * (queries + keys) * _BFLOAT16
    if config.qk_norm:
        mixer += 2 * (queries + keys) * _FLOAT32
    inputs, products = (2, 4) if config.mlp_kind == "gated" else (1, 2)
    width = config.intermediate_size
    if config.has_experts(layer):
        inputs = 1 + 2 * config.num_experts_per_tok + 2 * config.n_shared_experts
        width = config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    return norms + mixer + (inputs * config.hidden_size + products * width) * _BFLOAT16


def _shapes(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        if isinstance(config, PowerRetentionConfig):
            return PowerRetentionForCausalLM(config).to(dtype)
        # Of a copy: the library notes the dtype in the configuration that it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return model


def _own_elements(model: nn.Module) -> int:
    """Of the first rank, whose shards are the largest."""
    return sum(value.to_local().numel() for value in model.parameters() if isinstance(value, DTensor))


def _gathered_bytes(student: PreTrainedModel, teacher: PreTrainedModel) -> int:
    """The roots of both stay; the student's has a gradient, float32 as itself.  Two layers of bfloat16 at a time, and the
    gradients of one, in bfloat16 and in the float32 that is summed over ranks.
    """
    layer = max(_elements(each) for each in student.model.layers)
    roots = 2 * _root_elements(student) * _FLOAT32 + _root_elements(teacher) * _BFLOAT16
    return roots + layer * (2 * _BFLOAT16 + _BFLOAT16 + _FLOAT32)


def _elements(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def _root_elements(model: PreTrainedModel) -> int:
    return _elements(model) - _elements(model.model.layers)


def _activation_bytes(config: PowerRetentionConfig, tokens: int, recompute: bool) -> int:
    layers = [activation_bytes_per_token(config, i) for i in range(config.num_hidden_layers)]
    kept = max(layers) + len(layers) * config.hidden_size * _FLOAT32 if recompute else sum(layers)
    ends = config.hidden_size * (2 * _FLOAT32 + 3 * _BFLOAT16)  # the last norm, both last hidden states, a gradient
    taught = len(layers) * config.hidden_size * _BFLOAT16
    return tokens * (kept + taught + ends)


def _logit_bytes(config: PowerRetentionConfig, tokens: int) -> int:
    head = config.vocab_size * config.hidden_size
    logits = min(LOGITS_AT_A_TIME["cuda"], tokens * config.vocab_size)
    return logits * _BYTES_PER_LOGIT + head * (_FLOAT32 + _BFLOAT16)

"""Swap the mixer of a loaded Transformer, in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from power_retention.conversion.families import parent_config_to_ours
from power_retention.models import PowerRetentionForCausalLM
from power_retention.ops.layout import check_power

NEW_PARAMETERS = ("self_attn.g_proj.weight", "self_attn.g_proj.bias", "self_attn.k_bias")
"""Endings of the parameter names that attention does not have."""


def swap_attention(
    model: PreTrainedModel,
    *,
    p: int = 2,
    gate_bias: bool = True,
    key_bias: bool = False,
    chunk_size: int | None = None,
    parent: dict[str, Any] | None = None,
) -> PowerRetentionForCausalLM:
    """Turn a Transformer into a power-retention model, in place, and return it.

    The object stays the same object and every parameter it had stays the same parameter (optimisers and references to
    it remain valid); only its class, its configuration and its mixers change.  Training resumes::

        model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        swap_attention(model)          # calibrate_mixers(model, ...) gives it a better start

    Args:
        model: a model for causal language modelling of a family in
            :data:`~power_retention.conversion.families.SUPPORTED_MODEL_TYPES`.
        p: even power.
        gate_bias: give the gates a bias; without it they start at ½, a half-life of one token.
        key_bias: give the rotated keys a learned bias: a better start, tied to the positions that the model can tell apart.
        chunk_size: see :func:`power_retention.power_retention`.
        parent: noted in the configuration as what the model came from.

    Raises:
        ArgumentError: p is not an even power.
        SourceError: the model is of a kind that cannot be converted.
    """
    check_power(p)
    config = parent_config_to_ours(
        model.config, p=p, gate_bias=gate_bias, key_bias=key_bias, chunk_size=chunk_size, parent=parent
    )
    reference = model.get_input_embeddings().weight
    with torch.device("meta"):
        student = PowerRetentionForCausalLM(config)
    parameters = dict(model.state_dict(keep_vars=True))
    for name, value in student.state_dict().items():
        if name.endswith(NEW_PARAMETERS):
            parameters[name] = nn.Parameter(torch.empty_like(value, dtype=reference.dtype, device=reference.device))
    frozen = [value for value in model.parameters() if not value.requires_grad]
    student.load_state_dict(parameters, assign=True)
    for value in frozen:  # which load_state_dict thaws
        value.requires_grad_(False)
    student.tie_weights()
    student.model.rotary_emb = type(student.model.rotary_emb)(config).to(reference.device)
    for mixer in student.mixers:
        mixer.reset_mixer_parameters()
    student.train(model.training)
    student.generation_config = model.generation_config
    return _become(model, student)


@contextmanager
def softmax_put_back(model: PowerRetentionForCausalLM) -> Iterator[None]:
    """While open, every mixer computes softmax attention: a fresh swap must then agree with its parent.

    Gates are not used, and a key bias shifts whole rows of scores, which softmax ignores.  What is left of a difference is a
    wrong mapping of weights or fields.  Call the model with ``use_cache=False``.
    """
    before = [mixer.softmax for mixer in model.mixers]
    try:
        for mixer in model.mixers:
            mixer.softmax = True
        yield
    finally:
        for mixer, softmax in zip(model.mixers, before, strict=True):
            mixer.softmax = softmax


def _become(model: PreTrainedModel, student: PowerRetentionForCausalLM) -> PowerRetentionForCausalLM:
    """Give ``model`` the class and the content of ``student``."""
    model.__class__ = PowerRetentionForCausalLM
    vars(model).clear()
    vars(model).update(vars(student))
    assert isinstance(model, PowerRetentionForCausalLM)
    return model

"""Give swapped mixers a start close to the attention they replace, in closed form, from a little text.

Set for each layer, from what the teacher's attention does on the text:

1. **Gates.** The bias of a gate is set so that its half-life is the head's mean look-back: the mean distance under the
   teacher's softmax, the mass on the first token left out.
2. **Output scale.** The mass that softmax parks on a first token with a small value has no counterpart, so heads come
   out too loud.  One factor a query head, least squares against the teacher's attention output, is folded into o_proj.
3. **Key bias**, of mixers that have one.  Softmax ignores a shift of the scores, an even power does not, and most scores
   of a trained Transformer are negative: squared, the least wanted keys would weigh most.  The bias b of a key/value head
   is the least-squares solution of  q_i·b/√d = target − mean_j s_ij  over all query rows, so that shifted scores are
   positive.

Every sequence is given its own position offset: the bias acts on rotated queries and has to hold at all positions.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from power_retention.errors import StateError
from power_retention.layers import PowerRetentionMixer
from power_retention.models import PowerRetentionForCausalLM

SCORE_TARGET = 3.0
"""Where the mean score of a row is shifted to (scores have a standard deviation of about 3)."""

HALF_LIVES = (4.0, 4096.0)
"""Shortest and longest half-life given to a gate, in tokens."""

_RIDGE = 1e-3
_QUIETEST = 0.05
"""Smallest output scale: a head that starts silent could not learn to speak."""
_WARM_UP = 64
"""Rows this early see too little to tell how far a head looks back."""


@dataclass
class LayerReport:
    """What calibration did to one layer.

    Attributes:
        layer: index.
        bias_fit: share of the wanted shift that the key bias explains, smallest over heads (1 is all of it); None without one.
        half_lives: of the gates, in tokens.
        output_scales: factors folded into o_proj, one a query head.
        error_before: relative error of the attention output with uncalibrated mixers, on the teacher's inputs.
        error_after: the same after calibration.
    """

    layer: int
    bias_fit: float | None
    half_lives: list[float]
    output_scales: list[float]
    error_before: float
    error_after: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def calibrate_mixers(
    student: PowerRetentionForCausalLM,
    teacher: PreTrainedModel,
    tokens: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[LayerReport]:
    """Calibrate every mixer of ``student`` against the attention of ``teacher``.

    Args:
        student: the swapped model; its gates, output projections and key biases, if any, are written.
        teacher: the Transformer it came from.
        tokens: ``[N, T]`` token ids of ordinary text; 8,000 tokens are enough.
        seed: of the position offsets.
        progress: called with (layers done, layers).

    Returns:
        One report a layer.
    """
    offsets = position_offsets(len(tokens), student.config.max_position_embeddings - tokens.shape[1], seed)
    positions = (torch.arange(tokens.shape[1]) + offsets[:, None]).to(tokens.device)
    reports: list[LayerReport] = []
    mixers = student.mixers

    def visit(index: int, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor) -> None:
        reports.append(_calibrate_layer(index, mixers[index], x, position_embeddings, wanted))
        if progress:
            progress(len(reports), len(mixers))

    with attention_visited(teacher, visit):
        teacher.model(input_ids=tokens, position_ids=positions, use_cache=False)
    return reports


def position_offsets(count: int, largest: int, seed: int) -> Tensor:
    """``[count]`` random first positions in [0, largest]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(1, largest + 1), (count,), generator=generator)


@contextmanager
def attention_visited(
    teacher: PreTrainedModel, visit: Callable[[int, Tensor, tuple[Tensor, Tensor], Tensor], None]
) -> Iterator[None]:
    """While open, ``visit(layer, input, position_embeddings, output)`` follows every attention of the teacher."""

    def hook(index: int) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, ...]) -> None:
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            visit(index, x, kwargs["position_embeddings"], output[0])

        return after

    handles = [
        layer.self_attn.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(teacher.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _calibrate_layer(
    index: int, mixer: PowerRetentionMixer, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor
) -> LayerReport:
    before = relative_error(mixer(x, position_embeddings)[0], wanted)
    q, k = mixer.queries_and_keys(x, *position_embeddings)
    fit = _set_key_bias(mixer, q, k)
    half_lives = _set_gates(mixer, q, k)
    scales, after = _scale_outputs(mixer, x, position_embeddings, wanted)
    return LayerReport(index, fit, half_lives, scales, before, after)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference over RMS of what was wanted."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _scores(q: Tensor, k: Tensor, head: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(queries ``[N, T, d]``, scaled scores ``[N, T, T]``) of each query head that reads key/value head ``head``."""
    groups = q.shape[2] // k.shape[2]
    for i in range(head * groups, (head + 1) * groups):
        yield q[:, :, i], q[:, :, i] @ k[:, :, head].mT / math.sqrt(q.shape[-1])


def _set_key_bias(mixer: PowerRetentionMixer, q: Tensor, k: Tensor) -> float | None:
    """Write the least-squares bias of each head; returns the smallest share of the wanted shift that it explains."""
    if mixer.k_bias is None:
        return None
    d, shares = q.shape[-1], []
    causal = torch.ones(q.shape[1], q.shape[1], device=q.device).tril()
    causal /= causal.sum(-1, keepdim=True)
    for head in range(k.shape[2]):
        rows, shifts = [], []
        for queries, scores in _scores(q, k, head):
            rows.append(queries.flatten(0, 1).double() / math.sqrt(d))
            shifts.append(SCORE_TARGET - (scores * causal).sum(-1).flatten().double())
        row, shift = torch.cat(rows), torch.cat(shifts)
        gram = row.mT @ row
        ridge = _RIDGE * gram.diagonal().mean() * torch.eye(d, dtype=gram.dtype, device=gram.device)
        bias = torch.linalg.solve(gram + ridge, row.mT @ shift)
        shares.append(1 - float((row @ bias - shift).square().sum() / shift.square().sum()))
        mixer.k_bias[head] = bias.to(mixer.k_bias.dtype)
    return min(shares)


def _set_gates(mixer: PowerRetentionMixer, q: Tensor, k: Tensor) -> list[float]:
    """Gate biases from look-backs; returns the half-lives."""
    bias = mixer.g_proj.bias
    if bias is None:
        return []
    positions = torch.arange(q.shape[1], device=q.device, dtype=torch.float32)
    distance = (positions[:, None] - positions).clamp(min=0)
    future = torch.ones_like(distance, dtype=torch.bool).triu(1)
    half_lives = []
    for head in range(k.shape[2]):
        looked_back, mass = 0.0, 1e-9
        for _, scores in _scores(q, k, head):
            weights = scores.masked_fill(future, -torch.inf).softmax(-1)[:, _WARM_UP:, 1:]
            looked_back += float((weights * distance[_WARM_UP:, 1:]).sum())
            mass += float(weights.sum())
        half_lives.append(min(max(looked_back / mass, HALF_LIVES[0]), HALF_LIVES[1]))
    gates = torch.tensor([2 ** (-1 / half_life) for half_life in half_lives])
    bias.copy_(torch.logit(gates))
    mixer.g_proj.weight.zero_()
    return half_lives


def _scale_outputs(
    mixer: PowerRetentionMixer, x: Tensor, position_embeddings: tuple[Tensor, Tensor], wanted: Tensor
) -> tuple[list[float], float]:
    """Fold the least-squares factor of each query head into the output projection.

    Returns the factors and the relative error that is left.
    """
    inner = copy.copy(mixer)
    inner._modules = {**mixer._modules, "o_proj": nn.Identity()}
    heads = inner(x, position_embeddings)[0].flatten(0, 1).unflatten(-1, (-1, mixer.head_dim))
    weight = mixer.o_proj.weight.unflatten(-1, (-1, mixer.head_dim))  # [hidden, Hq, d]
    parts = torch.einsum("nhd,chd->hnc", heads, weight).flatten(1)
    target = wanted.flatten(0, 1) - (0 if mixer.o_proj.bias is None else mixer.o_proj.bias)
    gram = (parts @ parts.mT).double()
    ridge = _RIDGE * gram.diagonal().mean()
    # The ridge pulls towards 1, not towards silence: a head that hardly speaks keeps its voice.
    right = (parts @ target.flatten()).double() + ridge
    scales = torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right)
    scales = scales.clamp(min=_QUIETEST)
    mixer.o_proj.weight.copy_((weight * scales.to(weight)[:, None]).flatten(1))
    return scales.tolist(), relative_error((scales.to(parts) @ parts).view_as(target), target)


# ── what calibration wrote, as a small file: enough to calibrate the same swap again ─────────────────────────────────


def save_calibration(student: PowerRetentionForCausalLM, reports: list[LayerReport], path: Path) -> None:
    """Write gates, output scales and key biases, if any, of a calibrated model."""
    tensors = {}
    for report, mixer in zip(reports, student.mixers, strict=True):
        for name, value in _new_parameters(mixer).items():
            tensors[f"{report.layer}.{name}"] = value.detach()
        tensors[f"{report.layer}.output_scale"] = torch.tensor(report.output_scales)
    save_file(tensors, path)


@torch.no_grad()
def apply_calibration(student: PowerRetentionForCausalLM, path: Path) -> None:
    """Calibrate a freshly swapped model as another swap of the same Transformer was.

    Raises:
        StateError: the file is damaged, of another model, or of a swap with other biases.
    """
    try:
        tensors = load_file(path)
        for index, mixer in enumerate(student.mixers):
            for name, value in _new_parameters(mixer).items():
                value.copy_(tensors.pop(f"{index}.{name}"))
            scale = tensors.pop(f"{index}.output_scale").to(mixer.o_proj.weight)
            mixer.o_proj.weight.mul_(scale.repeat_interleave(mixer.head_dim))
        if tensors:  # a key bias, say: scales that were fitted with it are wrong without it
            raise RuntimeError(f"the model has no {min(tensors)}")
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise StateError(f"{path} is not the calibration of this model, or is damaged ({error}).") from error


def _new_parameters(mixer: PowerRetentionMixer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {f"g_proj.{name}": value for name, value in mixer.g_proj.named_parameters()}
    return found if mixer.k_bias is None else {**found, "k_bias": mixer.k_bias}

"""Held-out loss, and how far a model's predictions are from its teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

_ROWS = 512


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of one model on held-out text.

    Attributes:
        loss: next-token loss, nats a token.
        loss_error: standard error of its mean over windows.
        kl: KL(teacher ‖ model), nats a token; 0 for the teacher itself.
        tokens: tokens predicted.
    """

    loss: float
    loss_error: float
    kl: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    teacher: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> HeldOutLoss:
    """Mean next-token loss over windows ``[N, T]`` of token ids, and the KL from ``teacher`` if one is given."""
    was_training = model.training
    model.eval()
    losses, kls = [], []
    for done, window in enumerate(windows, start=1):
        ids = window[None].to(model.device)
        hidden = _last_hidden(model, ids)
        wanted = None if teacher is None else _last_hidden(teacher, ids)
        loss, kl = _window_loss(model, hidden, teacher, wanted, ids[0, 1:])
        losses.append(loss)
        kls.append(kl)
        if progress:
            progress(done, len(windows))
    model.train(was_training)
    values = torch.tensor(losses, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    predicted = len(windows) * (windows.shape[1] - 1)
    return HeldOutLoss(float(values.mean()), error, sum(kls) / len(kls), predicted)


def _last_hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
    return hidden


def _window_loss(
    model: PreTrainedModel, hidden: Tensor, teacher: PreTrainedModel | None, wanted: Tensor | None, labels: Tensor
) -> tuple[float, float]:
    """(loss, KL) of one window, a block of rows at a time: no full logits."""
    loss = kl = 0.0
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        predicted = model.lm_head(hidden[rows]).float().log_softmax(-1)
        loss += float(F.nll_loss(predicted, labels[rows], reduction="sum"))
        if teacher is not None and wanted is not None:
            target = teacher.lm_head(wanted[rows]).float().log_softmax(-1)
            kl += float((target.exp() * (target - predicted)).sum())
    return loss / len(labels), kl / len(labels)

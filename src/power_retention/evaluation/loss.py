"""Held-out loss, and how far a model's predictions are from its teacher's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from power_retention.training.losses import compare_tokens

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of one model on held-out text.

    Attributes:
        loss: next-token loss, nats a token.
        loss_error: standard error of its mean over windows; not a number with a single window.
        kl: KL(teacher ‖ model), nats a token; 0 for the teacher itself.
        tokens: tokens predicted.
    """

    loss: float
    loss_error: float
    kl: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {name: None if math.isnan(value) else value for name, value in asdict(self).items()}


class HeldOut:
    """Held-out windows and what the teacher makes of them, computed once for every model that is held against it.

    Args:
        teacher: the Transformer.
        windows: ``[N, T]`` token ids.
        progress: called with (windows read by the teacher, windows).
    """

    def __init__(self, teacher: PreTrainedModel, windows: Tensor, progress: Progress | None = None) -> None:
        self.windows = windows
        self._head = teacher.lm_head
        self._wanted: list[Tensor] = []
        for done, hidden in enumerate(_hidden_states(teacher, windows), start=1):
            self._wanted.append(hidden)
            if progress:
                progress(done, len(windows))

    @torch.no_grad()
    def loss(self, model: PreTrainedModel | None = None, progress: Progress | None = None) -> HeldOutLoss:
        """Loss of a model, or of the teacher itself for None.

        Args:
            model: what to measure.
            progress: called with (windows done, windows).
        """
        hidden_states = iter(self._wanted) if model is None else _hidden_states(model, self.windows)
        head = self._head if model is None else model.lm_head
        pairs = []
        for done, (hidden, wanted, window) in enumerate(zip(hidden_states, self._wanted, self.windows, strict=True), 1):
            pairs.append(self._window_loss(hidden, head, wanted, window[1:]))
            if progress:
                progress(done, len(self.windows))
        losses, kls = torch.tensor(pairs, dtype=torch.float64).unbind(-1)
        error = float(losses.std() / math.sqrt(len(losses))) if len(losses) > 1 else math.nan
        predicted = len(losses) * (self.windows.shape[1] - 1)
        return HeldOutLoss(float(losses.mean()), error, float(kls.mean()), predicted)

    def _window_loss(self, hidden: Tensor, head: nn.Module, wanted: Tensor, labels: Tensor) -> tuple[float, float]:
        """(loss, KL) of one window."""
        tokens = compare_tokens(hidden, head, wanted, self._head, labels)
        return float(tokens.loss.double().mean()), float(tokens.kl.double().mean())


def held_out_loss(model: PreTrainedModel, windows: Tensor, *, teacher: PreTrainedModel | None = None) -> HeldOutLoss:
    """Loss of one model on windows ``[N, T]``, with its KL from ``teacher`` if one is given."""
    return HeldOut(model, windows).loss() if teacher is None else HeldOut(teacher, windows).loss(model)


@torch.no_grad()
def _hidden_states(model: PreTrainedModel, windows: Tensor) -> Iterator[Tensor]:
    """``[T − 1, hidden]`` of each window: the states that predict its tokens."""
    was_training = model.training
    model.eval()
    for window in windows:
        yield model.model(input_ids=window[None].to(model.device), use_cache=False).last_hidden_state[0, :-1]
    model.train(was_training)

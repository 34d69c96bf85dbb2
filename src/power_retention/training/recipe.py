"""What a retraining does, as numbers: stages, schedule, batch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from power_retention.errors import ArgumentError
from power_retention.training.schedule import warmed_cosine

Stage = Literal["align", "distil"]


@dataclass(frozen=True)
class Recipe:
    """Align, then distil.

    *Align*: each mixer sees the teacher's hidden states and learns the output of the attention it replaced; all layers in
    parallel.  *Distil*: the whole model learns the teacher's next-token distribution, KL(teacher ‖ student).

    Attributes:
        steps: optimiser steps in all.
        align_share: share of them spent aligning.
        batch: sequences a step.
        length: tokens a sequence.
        align_lr: peak learning rate of the mixers while aligning.
        mixer_lr: their peak learning rate while distilling.
        other_lr: peak learning rate of everything else, which is trained while distilling only.
        warmup_share: share of each stage spent warming up; the rest is a cosine.
        final_share: share of its peak that the learning rate falls to at the end of a stage.
        clip: largest gradient norm.
        next_token_weight: weight of the next-token loss in the distillation.
        hidden_weight: weight beside the KL of how far the layers' outputs are off the teacher's
            (:func:`~power_retention.training.losses.hidden_state_loss`).
        seed: of the data order and the positions.
        precision: of the matmuls; weights and optimiser state are always float32.
    """

    steps: int
    align_share: float = 0.8
    batch: int = 4
    length: int = 256
    align_lr: float = 8e-3
    mixer_lr: float = 5e-4
    other_lr: float = 1e-4
    warmup_share: float = 0.05
    final_share: float = 0.1
    clip: float = 1.0
    next_token_weight: float = 0.0
    hidden_weight: float = 0.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.length < 2:
            raise ArgumentError(
                f"A recipe needs at least 1 step, 1 sequence and 2 tokens, not {self.steps}, {self.batch} and {self.length}."
            )
        if not 0 < self.clip < math.inf:
            raise ArgumentError(f"Gradients can be clipped to a finite norm above 0, not to {self.clip}.")
        for name, rate in (("align_lr", self.align_lr), ("mixer_lr", self.mixer_lr)):
            if not 0 < rate < math.inf:
                raise ArgumentError(f"{name} must be a finite number above 0, not {rate}.")
        for name, value in (("other_lr", self.other_lr), ("hidden_weight", self.hidden_weight)):
            if not 0 <= value < math.inf:
                raise ArgumentError(f"{name} must be a finite number and at least 0, not {value}.")
        for name, share in (("align_share", self.align_share), ("final_share", self.final_share)):
            if not 0 <= share <= 1:
                raise ArgumentError(f"{name} must lie in [0, 1], not {share}.")

    @property
    def align_steps(self) -> int:
        """Steps of the first stage."""
        return round(self.steps * self.align_share)

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in one step."""
        return self.batch * self.length

    def stage(self, step: int) -> Stage:
        """The stage that a step (counted from 0) belongs to."""
        return "align" if step < self.align_steps else "distil"

    def learning_rates(self, step: int) -> tuple[float, float]:
        """(of the mixers, of everything else): warm-up, then a cosine, once a stage."""
        if self.stage(step) == "align":
            return self.align_lr * self._schedule(step, self.align_steps), 0.0
        factor = self._schedule(step - self.align_steps, self.steps - self.align_steps)
        return self.mixer_lr * factor, self.other_lr * factor

    def _schedule(self, step: int, length: int) -> float:
        return warmed_cosine(step, length, warmup_share=self.warmup_share, final_share=self.final_share)

    @classmethod
    def usual(cls, steps: int, *, batch: int, length: int, **given: Any) -> Recipe:
        """What served best for so many tokens, but for what is given; None stands for not given.

        Measured on SmolLM2-135M at 0.2, 6 and 65 million tokens (``docs/log.md``), in between by the logarithm: the more
        tokens, the less is gained by aligning more, and the more a higher rate of distilling has time to mend.  Hidden
        states beside the KL are worth a twentieth of it after 144 million tokens.
        """
        millions = math.log10(max(steps * batch * length, 1) / 1e6)
        usual = {
            "align_share": _between(millions, {-0.3: 0.8, 0.8: 0.3, 1.8: 0.2}),
            "mixer_lr": _between(millions, {-0.3: 5e-4, 0.8: 1e-3}),
            "other_lr": _between(millions, {-0.3: 1e-4, 0.8: 3e-4}),
            "hidden_weight": 1.0,
        }
        known = {name: value for name, value in given.items() if value is not None}
        return cls(steps, batch=batch, length=length, **usual | known)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def _between(x: float, points: dict[float, float]) -> float:
    """The line through ``points``, level before the first and after the last; two significant digits."""
    places = sorted(points)
    value = points[places[0]] if x <= places[0] else points[places[-1]]
    for left, right in pairwise(places):
        if left < x < right:
            value = points[left] + (points[right] - points[left]) * (x - left) / (right - left)
    return float(f"{value:.2g}")

"""What a retraining does, as numbers: stages, schedule, batch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from power_retention.errors import ArgumentError

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
        warmup_share: share of each stage spent warming up; the rest is a cosine down to a tenth.
        clip: largest gradient norm.
        next_token_weight: weight of the next-token loss in the distillation.
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
    clip: float = 1.0
    next_token_weight: float = 0.0
    seed: int = 0
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.length < 2:
            raise ArgumentError(
                f"A recipe needs at least 1 step, 1 sequence and 2 tokens, not {self.steps}, {self.batch} and {self.length}."
            )
        if not 0 <= self.align_share <= 1:
            raise ArgumentError(f"align_share must lie in [0, 1], not {self.align_share}.")

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
        """(of the mixers, of everything else): warm-up, then a cosine down to a tenth, once a stage."""
        if self.stage(step) == "align":
            return self.align_lr * self._schedule(step, self.align_steps), 0.0
        factor = self._schedule(step - self.align_steps, self.steps - self.align_steps)
        return self.mixer_lr * factor, self.other_lr * factor

    def _schedule(self, step: int, length: int) -> float:
        warmup = max(1, round(self.warmup_share * length))
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, length - warmup)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

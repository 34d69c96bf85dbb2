"""How a learning rate rises and falls."""

from __future__ import annotations

import math


def warmed_cosine(step: int, steps: int, *, warmup_share: float, final_share: float = 0.0) -> float:
    """The share of its peak that a learning rate has: a line up, then a cosine down.

    Args:
        step: counted from 0.
        steps: in all.
        warmup_share: of the steps, spent on the way up; one at least is.
        final_share: what the cosine ends at.
    """
    warmup = max(1, round(warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    cosine = (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2
    return final_share + (1 - final_share) * cosine

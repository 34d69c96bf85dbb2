"""Chance-corrected recovery: how much of what its parent knows beyond guessing a model has kept, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TEACHER_ABOVE_CHANCE = 2.0
"""Standard errors by which a teacher must beat guessing before a share of its lead means anything."""


@dataclass(frozen=True)
class Estimate:
    """A mean over documents.

    Attributes:
        value: the mean.
        error: its standard error; not a number with a single document.
    """

    value: float
    error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"value": self.value, "error": None if math.isnan(self.error) else self.error}


def mean(values: Array) -> Estimate:
    """Mean of ``[N]`` values and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error)


def recovery(student: Array, teacher: Array, chance: Array) -> Estimate | None:
    """(student − chance) / (teacher − chance), with its standard error.

    The error is the delta method's for a ratio of two means over the same documents: with r the ratio and s, t, c the scores
    and the chance of a document, it is the standard error of the mean of ((s − c) − r (t − c)) / (mean of t − c).  Because
    both models answer the same questions their luck with the questions cancels, which errors of the two scores alone would
    count twice.

    Args:
        student: ``[N]`` scores, a document each.
        teacher: ``[N]`` scores of the same documents.
        chance: ``[N]`` expected scores of a guess.

    Returns:
        None where the teacher is not clearly above chance (:data:`TEACHER_ABOVE_CHANCE`): a share of nothing.
    """
    kept, lead = student - chance, teacher - chance
    teacher_lead = mean(lead)
    if (
        not teacher_lead.value > TEACHER_ABOVE_CHANCE * teacher_lead.error
    ):  # a single document has no error: refused too
        return None
    ratio = float(kept.mean()) / teacher_lead.value
    return Estimate(ratio, mean((kept - ratio * lead) / teacher_lead.value).error)

"""What came out, as plain values: scores with standard errors by task, length, depth and variant, for each model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from power_retention.evaluation.long.asking import Answer
from power_retention.evaluation.long.suite import TASKS
from power_retention.evaluation.long.tree import WITH, WITHOUT
from power_retention.evaluation.recovery import Estimate, mean

TEACHER, STUDENT, UNTRAINED, WINDOW = "teacher", "student", "untrained", "sliding window"
MODELS = (TEACHER, STUDENT, UNTRAINED, WINDOW)


def task_reports(answers: Mapping[str, Sequence[Answer]], missing: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    """By task: rows by length and what is missing; see :func:`_row`.

    Args:
        answers: of each model to the same questions, or to those within its window.
        missing: why lengths have no contexts.
    """
    asked = {answer.context.task for given in answers.values() for answer in given}
    return {task: _task(task, answers, missing.get(task, {})) for task in TASKS if task in asked or task in missing}


def _task(task: str, answers: Mapping[str, Sequence[Answer]], missing: Mapping[int, str]) -> dict[str, Any]:
    mine = {model: [x for x in given if x.context.task == task] for model, given in answers.items()}
    lengths = sorted({x.context.length for given in mine.values() for x in given})
    return {
        "lengths": {
            str(length): {
                model: _row([x for x in given if x.context.length == length]) for model, given in mine.items()
            }
            for length in lengths
        },
        "missing": {str(length): reason for length, reason in missing.items()},
    }


def _row(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Scores of one model at one length; None where it was not asked, for the length is beyond its window."""
    if not answers:
        return None
    # Of identifiers the control, without the file that defines them, is a variant and no part of the score.
    scored = [x for x in answers if x.question.variant != WITHOUT]
    depths = sorted({x.question.depth for x in scored if x.question.depth is not None})
    variants = list(dict.fromkeys(x.question.variant for x in answers if x.question.variant))
    row: dict[str, Any] = {
        **_scores(scored),
        "by_depth": {f"{depth:g}": _scores([x for x in scored if x.question.depth == depth]) for depth in depths},
        "by_variant": {name: _scores([x for x in answers if x.question.variant == name]) for name in variants},
    }
    if WITHOUT in variants:
        row["gain_nats"] = _gain(answers).to_dict()
    return row


def _scores(answers: Sequence[Answer]) -> dict[str, Any]:
    """Means over questions; questions of one context are not independent, so errors are over contexts."""
    return {
        "generation": clustered(answers, lambda x: x.recalled).to_dict(),
        "likelihood": clustered(answers, lambda x: x.chosen).to_dict(),
        "nats": clustered(answers, lambda x: x.nats).to_dict(),
        "guess": float(np.mean([x.question.guess for x in answers])),
        "chance": float(np.mean([1 / len(x.question.candidates) for x in answers])),
        "questions": len(answers),
        "contexts": len({id(x.context) for x in answers}),
    }


def clustered(answers: Iterable[Answer], value: Callable[[Answer], float]) -> Estimate:
    """Mean over the means of contexts, and its standard error."""
    by_context: dict[int, list[float]] = {}
    for answer in answers:
        by_context.setdefault(id(answer.context), []).append(value(answer))
    return mean(np.array([np.mean(values) for values in by_context.values()]))


def _gain(answers: Sequence[Answer]) -> Estimate:
    """Nats a name that the defining file is worth: the same questions with and without it, paired."""
    nats: dict[tuple[int, str, str], dict[str, float]] = {}
    for x in answers:
        key = (x.context.seed, x.question.text, x.question.answers[0])
        nats.setdefault(key, {})[x.question.variant] = x.nats
    by_seed: dict[int, list[float]] = {}
    for (seed, _, _), pair in nats.items():
        if WITH in pair and WITHOUT in pair:
            by_seed.setdefault(seed, []).append(pair[WITHOUT] - pair[WITH])
    return mean(np.array([np.mean(values) for values in by_seed.values()]))


def merged(earlier: Mapping[str, Any] | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, and beside it what an earlier call found of other tasks, lengths, models and streams.

    Only what was asked in the same way goes together: with the same depths, seeds and precision.
    """
    if not earlier or any(earlier.get(name) != found[name] for name in ("run_in", "depths", "seeds", "seed")):
        return dict(found)
    tasks = {
        name: _merged_task(earlier["tasks"].get(name), found["tasks"].get(name))
        for name in TASKS
        if name in earlier["tasks"] or name in found["tasks"]
    }
    streams = [*dict.fromkeys((*earlier["positions"], *found["positions"]))]
    return {
        **found,
        "lengths": sorted({*earlier["lengths"], *found["lengths"]}),
        "models": {**earlier["models"], **found["models"]},
        "tasks": tasks,
        "shortfalls": shortfalls(tasks),
        "positions": {
            name: _merged_stream(earlier["positions"].get(name), found["positions"].get(name)) for name in streams
        },
    }


def _merged_task(earlier: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not earlier or not found:
        return found or earlier or {}
    old, new = earlier["lengths"], found["lengths"]
    lengths = {length: {**old.get(length, {}), **new.get(length, {})} for length in sorted({*old, *new}, key=int)}
    missing = {length: reason for length, reason in earlier["missing"].items() if length not in new}
    return {"lengths": lengths, "missing": {**missing, **found["missing"]}}


def _merged_stream(earlier: Mapping[str, Any] | None, found: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if not earlier or not found:
        return found or earlier or {}
    if any(earlier[name] != found[name] for name in ("streams", "tokens", "held_out")):
        return found
    return {**found, **{name: {**earlier[name], **found[name]} for name in ("models", "rise")}}


def shortfalls(tasks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where recall by generation is below the teacher's by more than two standard errors, within the teacher's window."""
    found = []
    for task, report in tasks.items():
        for length, models in report["lengths"].items():
            teacher, student = models.get(TEACHER), models.get(STUDENT)
            if not teacher or not student:
                continue
            by = teacher["generation"]["value"] - student["generation"]["value"]
            error = math.hypot(*(x["generation"]["error"] or 0.0 for x in (teacher, student)))
            if by > 2 * error and by > 0:
                found.append({"task": task, "length": int(length), "value": by, "error": error})
    return found

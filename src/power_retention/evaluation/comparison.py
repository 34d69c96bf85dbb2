"""Models on the same benchmarks, side by side: scores, and what of the teacher's lead over guessing is recovered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from power_retention.evaluation.benchmarks import Benchmark
from power_retention.evaluation.recovery import Array, Estimate, mean, recovery

TEACHER, STUDENT, HARD_SWAP = "teacher", "student", "hard swap"


@dataclass(frozen=True)
class Scores:
    """What one model scored on one benchmark, document by document.

    Attributes:
        values: ``[N]``, each in [0, 1].
        chance: ``[N]``, what a guess is expected to score.
        prompts: digests of the prompts: equal ones make two models comparable.
        metric: what was counted.
        kind: "likelihood" of given answers, or "generation" of text.
        shots: examples in the prompt; None where whoever wrote it decides.
        cut: requests whose prompt lost its beginning, because the model was made for fewer positions.
    """

    values: Array
    chance: Array
    prompts: tuple[str, ...]
    metric: str
    kind: str
    shots: int | None
    cut: int = 0


@dataclass(frozen=True)
class Row:
    """One benchmark.

    Attributes:
        benchmark: what was asked.
        documents: how many.
        chance: expected score of guessing.
        scores: by model.
        recovered: share of the teacher's lead, of every model but the teacher; None where the teacher is not above chance.
        metric: what was counted.
        kind: "likelihood" or "generation".
        shots: examples in the prompt; None where whoever wrote it decides.
        cut: prompts that lost their beginning.
    """

    benchmark: Benchmark
    documents: int
    chance: float
    scores: dict[str, Estimate]
    recovered: dict[str, Estimate | None]
    metric: str
    kind: str
    shots: int | None
    cut: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "title": self.benchmark.title,
            "metric": self.metric,
            "kind": self.kind,
            "shots": self.shots,
            "documents": self.documents,
            "cut": self.cut,
            "chance": self.chance,
            "chance_source": self.benchmark.source,
            "scores": {model: score.to_dict() for model, score in self.scores.items()},
            "recovered": {model: share and share.to_dict() for model, share in self.recovered.items()},
        }


def compare(benchmarks: Iterable[Benchmark], models: Mapping[str, Mapping[str, Scores]]) -> list[Row]:
    """A row for each benchmark.

    Args:
        benchmarks: what was run.
        models: scores by model and benchmark; :data:`TEACHER` is one of the models.
    """
    return [
        _row(benchmark, {model: scores[benchmark.name] for model, scores in models.items()}) for benchmark in benchmarks
    ]


def _row(benchmark: Benchmark, models: Mapping[str, Scores]) -> Row:
    teacher = models[TEACHER]
    assert all(scores.prompts == teacher.prompts for scores in models.values()), "models were asked different questions"
    others = {model: scores for model, scores in models.items() if model != TEACHER}
    return Row(
        benchmark,
        len(teacher.values),
        float(teacher.chance.mean()),
        {model: mean(models[model].values) for model in (TEACHER, HARD_SWAP, STUDENT) if model in models},
        {model: recovery(scores.values, teacher.values, teacher.chance) for model, scores in others.items()},
        teacher.metric,
        teacher.kind,
        teacher.shots,
        max(scores.cut for scores in models.values()),
    )

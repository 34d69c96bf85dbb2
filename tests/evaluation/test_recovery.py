"""Recovery and its standard error, on published figures and on answers drawn at random."""

from __future__ import annotations

import numpy as np
import pytest

from power_retention.evaluation.benchmarks import benchmarks, find_benchmark
from power_retention.evaluation.recovery import mean, recovery

# Brumby-14B-Base, Qwen3-14B-Base, and the recovery that its authors give, in the benchmark's row.
PUBLISHED = {
    "mmlu": (0.71, 0.78, 0.87),
    "arc": (0.89, 0.94, 0.93),
    "hellaswag": (0.77, 0.81, 0.93),
    "mmlu-pro": (0.36, 0.55, 0.58),
    "mbpp": (0.57, 0.75, 0.76),
    "gsm8k": (0.88, 0.84, 1.05),
    "math": (0.62, 0.54, 1.15),
}


def constant(value: float, documents: int = 4) -> np.ndarray:
    return np.full(documents, value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recoveries_follow_from_our_chance_levels(name: str) -> None:
    student, teacher, published = PUBLISHED[name]
    share = recovery(constant(student), constant(teacher), constant(benchmarks()[name].chance))
    assert share is not None
    assert share.value == pytest.approx(published, abs=0.006)  # two digits, of figures of two digits


def answers(documents: int, *rates: float, seed: int, together: float) -> tuple[np.ndarray, ...]:
    """Right or wrong answers of several models; with ``together`` of the documents easy or hard for all of them alike."""
    generator = np.random.default_rng(seed)
    shared, is_shared = generator.random(documents), generator.random(documents) < together
    return tuple((np.where(is_shared, shared, generator.random(documents)) < rate).astype(float) for rate in rates)


@pytest.mark.parametrize("together", [0.0, 0.8])
def test_the_error_is_how_far_repetitions_scatter(together: float) -> None:
    chance = constant(0.25, 400)
    shares = [recovery(*answers(400, 0.6, 0.8, seed=seed, together=together), chance) for seed in range(600)]
    scatter = np.std([share.value for share in shares])
    assert np.mean([share.error for share in shares]) == pytest.approx(scatter, rel=0.1)
    assert np.mean([share.value for share in shares]) == pytest.approx(0.35 / 0.55, abs=0.01)


def test_errors_of_the_scores_alone_would_not_do() -> None:
    """On questions that are easy or hard for both, a ratio is surer than its parts are."""
    student, teacher = answers(2000, 0.6, 0.8, seed=1, together=0.9)
    share = recovery(student, teacher, constant(0.25, 2000))
    apart = np.hypot(mean(student).error, share.value * mean(teacher).error) / (mean(teacher).value - 0.25)
    assert share.error < 0.75 * apart


def test_a_perfect_copy_recovers_all_without_doubt() -> None:
    (scores,) = answers(50, 0.7, seed=2, together=0)
    share = recovery(scores, scores, constant(0.25, 50))
    assert (share.value, share.error) == (1.0, 0.0)


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.27])
def test_no_share_of_nothing(rate: float) -> None:
    student, teacher = answers(200, 0.5, rate, seed=3, together=0)
    assert recovery(student, teacher, constant(0.25, 200)) is None


def test_one_document_tells_nothing() -> None:
    assert recovery(constant(1, 1), constant(1, 1), constant(0.25, 1)) is None
    assert mean(constant(1, 1)).to_dict() == {"value": 1.0, "error": None}


class TestChance:
    def test_is_what_the_documents_say(self) -> None:
        assert find_benchmark("arc").chance_of({}, listed=5) == 0.2
        assert find_benchmark("mmlu-pro").chance_of({"options": ["x"] * 7}, listed=None) == pytest.approx(1 / 7)
        assert find_benchmark("arc-generation").chance_of({"choices": {"text": ["x"] * 3}}, None) == pytest.approx(
            1 / 3
        )

    def test_is_the_level_given_where_they_do_not(self) -> None:
        assert find_benchmark("mmlu-pro").chance_of({"question": "?"}, listed=None) == 0.1
        assert find_benchmark("gsm8k").chance_of({"question": "?"}, listed=None) == 0

    def test_of_a_task_of_somebodys_own(self) -> None:
        own = find_benchmark("cloze")
        assert own.tasks == ("cloze",)
        assert own.chance_of({}, listed=2) == 0.5

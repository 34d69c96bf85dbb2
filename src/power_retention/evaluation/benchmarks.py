"""The benchmarks by name: which tasks they are, what is counted, and what guessing would score."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Benchmark:
    """One row of a comparison; ``benchmarks.toml`` holds them and explains the fields.

    Attributes:
        name: as given to ``--tasks``.
        title: for people.
        tasks: names in lm-evaluation-harness, pooled over their documents.
        folders: of the harness's definitions; empty for a task of somebody's own, whose name is looked for everywhere.
        metric: what is averaged over documents; None: the first that a task has of the harness's usual ones.
        filter: which reading of a generated text is counted; None: the first.
        shots: examples in the prompt; None: the task's own number.
        chance: expected score of a guess where documents do not list their choices.
        choices: field of a document that lists them, dots between levels.
        source: of the chance.
        runs_code: whether what a model wrote is executed.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    folders: tuple[str, ...] = ()
    metric: str | None = None
    filter: str | None = None
    shots: int | None = None
    chance: float = 0.0
    choices: str | None = None
    source: str = "choices of each document, else a free answer"
    runs_code: bool = False

    def chance_of(self, document: Mapping[str, Any], listed: int | None) -> float:
        """Expected score of a guess at one document.

        Args:
            document: as the task's dataset has it.
            listed: the number of choices that the task itself scores; None if it scores generated text.
        """
        if self.choices is not None:
            listed = _count(document, self.choices)
        return 1 / listed if listed else self.chance


def _count(document: Mapping[str, Any], field: str) -> int | None:
    value: Any = document
    for level in field.split("."):
        value = value.get(level) if isinstance(value, Mapping) else None
    return len(value) if isinstance(value, list) else None


def _benchmark(name: str, *, title: str, tasks: list[str], folders: list[str], **fields: Any) -> Benchmark:
    return Benchmark(name, title, tuple(tasks), tuple(folders), **fields)


@cache
def benchmarks() -> dict[str, Benchmark]:
    """Every named benchmark."""
    text = files("power_retention.evaluation").joinpath("benchmarks.toml").read_text(encoding="utf-8")
    return {name: _benchmark(name, **entry) for name, entry in tomllib.loads(text).items()}


def find_benchmark(name: str) -> Benchmark:
    """A named benchmark, or any other task of the harness, whose chance is what its documents' choices say."""
    return benchmarks().get(name) or Benchmark(name, name, (name,))

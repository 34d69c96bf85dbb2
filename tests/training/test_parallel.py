"""Many real processes (gloo) compute what one does, and nothing that happens to one of them loses anything."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from power_retention.conversion.swap import swap_attention
from power_retention.errors import ArgumentError, OutputError, PowerRetentionError, RunInterrupted
from power_retention.models import PowerRetentionForCausalLM
from power_retention.training import checkpoint
from power_retention.training.mixture import read_mixture
from power_retention.training.parallel import ALONE, Ranks, whole_tensors
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Metrics, Retraining
from power_retention.training.run import Progress, RunFolder, execute
from power_retention.training.sharding import make_shards
from power_retention.training.text import Tokens
from tiny_models import tiny_parent, tokens
from worlds import Outcome, in_ranks, start_ranks

RECIPE = Recipe(
    steps=8, align_share=0.5, batch=4, length=32, align_lr=2e-3, mixer_lr=1e-3, other_lr=5e-4, next_token_weight=0.2
)
SAME = 1e-6
"""Relative difference of losses between numbers of ranks."""


@dataclass(frozen=True)
class Task:
    """What the ranks of a test do; everything by path, as each process opens its own."""

    models: Path
    run: Path
    shards: Path | None = None
    recipe: Recipe = RECIPE
    stop_after: int | None = None
    checkpoint_seconds: float = 1e9
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Done:
    """What a rank saw: its records' losses, and on the first rank the weights."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    said: list[str]


def open_models(models: Path, ranks: Ranks) -> tuple[PowerRetentionForCausalLM, Any]:
    """From disk on the first rank; on the others only their shapes."""
    student = AutoModelForCausalLM.from_pretrained(models / "student")
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher")
    if ranks.first:
        return student, teacher
    with torch.device("meta"):
        shapes = [AutoModelForCausalLM.from_config(model.config) for model in (student, teacher)]
    return shapes[0], shapes[1]


def begin(ranks: Ranks, task: Task, kind: type[Retraining] = Retraining) -> tuple[Retraining, RunFolder]:
    text = tokens(20_000).numpy().astype("int32")
    data = read_mixture(task.shards) if task.shards else Tokens(text, torch.tensor([0, len(text)]).numpy())
    cpu = torch.device("cpu")
    retraining = kind(
        *open_models(task.models, ranks), data, task.recipe, device=cpu, ranks=ranks, **dict(task.options)
    )
    folder = RunFolder(task.run)
    if ranks.first and not folder.exists:
        folder.begin(task.recipe, {})
    ranks.wait()
    return retraining, folder


def train(
    ranks: Ranks, task: Task, kind: type[Retraining] = Retraining, watch: Callable[[Progress], None] | None = None
) -> Done:
    retraining, folder = begin(ranks, task, kind)
    metrics: list[Metrics] = []
    said: list[str] = []

    def note(progress: Progress) -> None:
        metrics.append(progress.metrics)
        if watch is not None:
            watch(progress)

    try:
        execute(
            retraining,
            folder,
            watch=note,
            tell=said.append,
            checkpoint_seconds=task.checkpoint_seconds,
            stop_after=task.stop_after,
        )
    except RunInterrupted as stopped:
        said.append(str(stopped))
    losses, norms = ([each[key] for each in metrics] for key in ("loss", "gradient_norm"))
    return Done(losses, norms, whole_tensors(retraining.student, ranks), said)


def assert_near(got: list[float], wanted: list[float], tolerance: float = SAME) -> None:
    assert got == pytest.approx(wanted, rel=tolerance)


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert all(value.equal(wanted[name]) for name, value in got.items())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models("llama", tmp_path_factory.mktemp("models"))


def save_models(kind: str, folder: Path) -> Path:
    teacher = tiny_parent(kind)
    teacher.save_pretrained(folder / "teacher")
    swap_attention(copy.deepcopy(teacher)).save_pretrained(folder / "student")
    return folder


@pytest.fixture(scope="module")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The run in one process that nothing stopped."""
    return train(ALONE, Task(models, tmp_path_factory.mktemp("runs") / "alone"))


@pytest.mark.parametrize(("size", "dp_replicate"), [(2, 1), (4, 1), (4, 2)], ids=["2", "4", "2 groups of 2"])
def test_any_number_of_ranks_computes_the_same(
    models: Path, alone: Done, tmp_path: Path, size: int, dp_replicate: int
) -> None:
    done = in_ranks(train, size, Task(models, tmp_path), dp_replicate=dp_replicate)
    for each in done:
        assert_near(each.losses, alone.losses)
        assert_near(each.norms, alone.norms, 1e-4)
    lines = [json.loads(line) for line in RunFolder(tmp_path).metrics.read_text().splitlines()]
    assert [line["loss"] for line in lines] == done[0].losses

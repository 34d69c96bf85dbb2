"""A run in a folder: steps, records, checkpoints; stopped at any moment, it continues where it was."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from power_retention.errors import CheckpointError, PowerRetentionError, RunInterrupted
from power_retention.files import clear_write_errors, replacement, write_json
from power_retention.training.checkpoint import load_latest, save_checkpoint
from power_retention.training.recipe import Recipe
from power_retention.training.retraining import Metrics, Retraining

MOST_SKIPPED = 5
"""Steps in a row without a finite loss after which a run gives up."""


@dataclass(frozen=True)
class Progress:
    """What a watcher of a run is told after each step.

    Attributes:
        step: steps done.
        steps: steps in all.
        stage: of the step just done.
        metrics: of the step just done.
        tokens_per_second: since the run was started or resumed.
    """

    step: int
    steps: int
    stage: str
    metrics: Metrics
    tokens_per_second: float


class RunFolder:
    """The files of a run: ``run.json`` (recipe and inputs), ``metrics.jsonl``, ``checkpoints/``.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings, self.metrics, self.checkpoints = path / "run.json", path / "metrics.jsonl", path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return self.settings.exists()

    def begin(self, recipe: Recipe, inputs: dict[str, Any]) -> None:
        """Write down what the run will do."""
        with clear_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.settings, {"recipe": recipe.to_dict(), "inputs": inputs})

    def read_settings(self) -> tuple[Recipe, dict[str, Any]]:
        """(recipe, inputs) of the run begun here."""
        try:
            settings = json.loads(self.settings.read_text(encoding="utf-8"))
            return Recipe(**settings["recipe"]), settings["inputs"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.settings} cannot be read ({error}); start the run in a new folder."
            ) from error

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that will be taken again."""
        if not self.metrics.exists():
            return
        lines = [line for line in self.metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        with clear_write_errors(self.metrics), replacement(self.metrics) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut off by a kill


def execute(
    retraining: Retraining,
    folder: RunFolder,
    *,
    watch: Callable[[Progress], None] | None = None,
    checkpoint_seconds: float = 300.0,
    stop_after: int | None = None,
) -> None:
    """Take every step that is still to be taken, then leave the trained student in ``retraining.student``.

    A step depends on the weights, the optimiser state, the seed and its number only, so a run that was stopped and resumed
    ends with the same weights, bit for bit, as one that was not (on the same machine and number of threads).

    Args:
        retraining: what to step.
        folder: where records and checkpoints go; the newest checkpoint in it is continued.
        watch: told about every step.
        checkpoint_seconds: time between checkpoints.
        stop_after: save and stop after this many steps in all, as an interrupt would.

    Raises:
        RunInterrupted: after SIGINT or SIGTERM; everything is saved.
        OutputError: the disk is full; the last checkpoint is intact.
    """
    recipe = retraining.recipe
    first = load_latest(folder.checkpoints, retraining.student, retraining.optimizer)
    folder.forget_after(first)
    started = last_saved = time.monotonic()
    skipped = 0
    with (
        _stop_requests() as stop,
        clear_write_errors(folder.metrics),
        folder.metrics.open("a", encoding="utf-8") as out,
    ):
        for step in range(first, recipe.steps):
            metrics = retraining.step(step)
            done = step + 1
            now = time.monotonic()
            rate = (done - first) * recipe.tokens_per_step / (now - started)
            finite = {
                name: value if math.isfinite(value) else None for name, value in metrics.items()
            }  # NaN is no JSON
            record = {"step": done, "tokens": done * recipe.tokens_per_step, "stage": recipe.stage(step), **finite}
            out.write(json.dumps({**record, "tokens_per_second": round(rate, 1)}) + "\n")
            out.flush()
            if watch:
                watch(Progress(done, recipe.steps, recipe.stage(step), metrics, rate))
            skipped = skipped + 1 if metrics["skipped"] else 0
            if skipped == MOST_SKIPPED:
                raise PowerRetentionError(
                    f"The loss was not finite for {skipped} steps in a row, up to step {done}: lower the learning rates. The "
                    "last checkpoint is untouched."
                )
            stopping, finished = stop.is_set() or done == stop_after, done == recipe.steps
            if stopping or finished or now - last_saved > checkpoint_seconds:
                save_checkpoint(folder.checkpoints, done, retraining.student, retraining.optimizer)
                last_saved = time.monotonic()
            if stopping and not finished:
                raise RunInterrupted(f"Stopped after step {done} of {recipe.steps}; everything is saved.")


def remove_checkpoints(folder: RunFolder) -> None:
    """Once the trained model is safely written, what it took to resume is not needed."""
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """While open, SIGINT and SIGTERM set an event; a second one acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, request) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

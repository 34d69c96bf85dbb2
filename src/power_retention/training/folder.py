"""The files of a run, and reading them while they are written; without torch, as whoever looks at runs needs none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from power_retention.errors import CheckpointError
from power_retention.files import clear_write_errors, json_line, replacement, write_json
from power_retention.training.recipe import Recipe


class RunFolder:
    """The files of a run: ``run.json`` (recipe and inputs), ``checkpoints/``, and what it wrote about itself.

    ``metrics.jsonl`` has a line a step, ``held_out.jsonl`` one a probe, ``sittings.jsonl`` one for each time it was started
    or resumed.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings, self.metrics, self.checkpoints = path / "run.json", path / "metrics.jsonl", path / "checkpoints"
        self.held_out, self.sittings = path / "held_out.jsonl", path / "sittings.jsonl"

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

    def seconds(self) -> tuple[float, float]:
        """(seconds, seconds times devices) spent so far, on steps that will be taken again too."""
        last = [records[-1] for records in map(read_records, (self.metrics, self.held_out)) if records]
        return (
            max((record.get("seconds", 0.0) for record in last), default=0.0),
            max((record.get("device_seconds", 0.0) for record in last), default=0.0),
        )

    def forget_after(self, step: int) -> None:
        """Drop the records of steps that will be taken again, and those of probes that will be."""
        _keep_up_to(self.metrics, step)
        _keep_up_to(self.held_out, step - 1)

    def add_sitting(self, sitting: dict[str, Any]) -> None:
        """Note down on what the run goes on, and from which ``step``."""
        with clear_write_errors(self.sittings), self.sittings.open("a", encoding="utf-8") as out:
            out.write(json_line(sitting))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.jsonl`` file of a run, up to one that a kill cut off or that is being written."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if _step_of(line) == math.inf:
                break
            records.append(json.loads(line))
    return records


def _keep_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    with clear_write_errors(path), replacement(path) as partial:
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a kill

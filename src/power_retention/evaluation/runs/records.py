"""Runs found in folders, read while they may still be going on, and what they have in common and apart."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from power_retention.errors import ArgumentError, CheckpointError, DataError, PowerRetentionError
from power_retention.evaluation.gpus import GPUS
from power_retention.training.folder import RunFolder, read_records

Value = dict[str, Any]
_POINTS = 400
"""Most points of a training curve: neighbours are averaged beyond."""
_DEEP = 3
"""Folders below a given one that are searched."""
_CURVES = ("loss", "alignment_error", "kl", "next_token_loss", "gradient_norm", "tokens_per_second")
_MEASURES = ("loss", "teacher_loss", "kl", "agreement")
_QUIET_SECONDS = 60.0


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of runs (those with ``run.json``) in the folders given, each the output of ``retrain`` or above it.

    Raises:
        DataError: a folder does not exist.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"{folder} is no folder; give the outputs of `power-retention retrain`, or a folder of them."
            )
        found |= dict.fromkeys(_runs_below(folder.resolve(), _DEEP + 1))
    return list(found)


def read_runs(folders: Sequence[Path], *, price: float | None = None) -> Value:
    """Everything about the runs in some folders, as plain values.

    Args:
        folders: see :func:`find_runs`.
        price: dollars an hour of one device; None for the usual price of the GPU that the run names, if it is known.

    Returns:
        ``runs``, one value each (:func:`read_run`) with a ``name`` that tells it from the others, ``differences``, the
        names in ``settings`` that the runs do not agree on, and ``unreadable``, a sentence about each run below a folder that
        cannot be read. Fine-tunings below a folder are passed over.

    Raises:
        ArgumentError: the price is negative.
        CheckpointError, DataError: a folder does not exist, or one given is itself a run that cannot be read.
    """
    if price is not None and price < 0:
        raise ArgumentError(f"The price is {price} dollars an hour; at least 0 was expected.")
    given = {place for folder in folders for place in (folder.resolve(), folder.resolve() / "run")}
    found: dict[Path, Value] = {}
    unreadable: list[str] = []
    for path in find_runs(folders):
        if path not in given and _is_fine_tuning(path):
            continue
        try:
            found[path] = read_run(path, price)
        except PowerRetentionError as error:
            if path in given:
                raise
            unreadable.append(str(error))
    runs = [{"name": name, **run} for name, run in zip(_names(list(found)), found.values(), strict=True)]
    return {"runs": runs, "differences": differences([run["settings"] for run in runs]), "unreadable": unreadable}


def read_run(path: Path, price: float | None = None) -> Value:
    """One run.

    Returns:
        ``state`` (``running``, ``finished`` or ``stopped``), ``settings`` (recipe and inputs), ``step`` of ``steps``,
        ``tokens``, ``seconds``, ``device_hours``, ``dollars``, ``device``, ``devices``, ``price``, ``stages`` (name and the
        tokens where each began), ``training`` (curves), ``probes`` (lines of ``held_out.jsonl``), ``summary`` of the last of
        them, and ``tasks``: what `power-retention evaluate --tasks` has measured of the result, by benchmark.

    Raises:
        CheckpointError: ``run.json`` is damaged.
        DataError: the report of the evaluation is, or it is no retraining.
    """
    if _is_fine_tuning(path):
        raise DataError(
            f"{path} is a run of `power-retention sft`; one of `power-retention retrain` was expected: leave it out."
        )
    folder = RunFolder(path)
    recipe, inputs = folder.read_settings()
    if not isinstance(inputs, dict):
        raise CheckpointError(f"{folder.settings} is damaged (its inputs are no table): leave it out, or delete it.")
    metrics, probes = _cached_records(folder.metrics), _cached_records(folder.held_out)
    sittings = read_records(folder.sittings)
    device = sittings[-1] if sittings else {"device": None, "kind": None, "devices": None}
    price = usual_price(device["device"]) if price is None else price
    last = max((*metrics[-1:], *probes[-1:]), key=lambda record: record.get("seconds", record["step"]), default={})
    hours = last["device_seconds"] / 3600 if "device_seconds" in last else None
    return {
        "path": str(path),
        "state": _state(folder, last.get("step", 0), recipe.steps, metrics),
        "settings": recipe.to_dict()
        | {name: value for name, value in inputs.items() if name not in ("held out", "probes")},
        "step": last.get("step", 0),
        "steps": recipe.steps,
        "tokens": last.get("tokens", 0),
        "all_tokens": recipe.steps * recipe.tokens_per_step,
        "tokens_per_second": metrics[-1]["tokens_per_second"] if metrics else None,
        "seconds": last.get("seconds"),
        "device_hours": hours,
        "dollars": None if hours is None or price is None else hours * price,
        "device": device["device"],
        "devices": device["devices"],
        "kind": device["kind"],
        "price": price,
        "skipped": sum(bool(record.get("skipped")) for record in metrics),
        "stages": list(_stages(metrics)),
        "training": thinned(metrics),
        "probes": probes,
        "summary": _summary(probes[-1]) if probes else None,
        "tasks": _tasks(path.parent / "evaluation" / "evaluation.json") if path.name == "run" else {},
    }


def usual_price(device: str | None) -> float | None:
    """Dollars an hour of a GPU by the name its driver gives it; None for what is not rented by that name."""
    words = (device or "").upper().replace("-", " ").split()
    named = [gpu for gpu in GPUS.values() if gpu.name.upper() in words or gpu.name.upper() in "".join(words)]
    return max(named, key=lambda gpu: len(gpu.name)).dollars_per_hour if named else None


def differences(settings: Sequence[Value]) -> list[str]:
    """The names of settings that are not the same everywhere, in the order of the first that has each."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]


def thinned(metrics: Sequence[Value], points: int = _POINTS) -> Value:
    """Curves by name: at most so many values each, means over neighbouring steps; None where a stage has no such value."""
    size = -(-len(metrics) // points) or 1
    stages = [list(group) for _, group in groupby(metrics, key=lambda record: record["stage"])]
    buckets = [stage[i : i + size] for stage in stages for i in range(0, len(stage), size)]
    at = {name: [bucket[-1].get(name) for bucket in buckets] for name in ("tokens", "device_seconds")}
    return at | {name: [_mean(record.get(name) for record in bucket) for bucket in buckets] for name in _CURVES}


def _is_fine_tuning(path: Path) -> bool:
    try:
        settings = json.loads(RunFolder(path).settings.read_bytes())
    except (OSError, ValueError):
        return False  # whatever it is, it is damaged
    return isinstance(settings, dict) and "tuning" in settings and "recipe" not in settings


def _runs_below(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
        return
    if depth == 0:
        return
    try:
        below = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    except PermissionError:
        return
    for path in below:
        yield from _runs_below(Path(path), depth - 1)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; ``retrain`` puts a run into ``OUT/run``, so OUT is the name."""
    own = [path.parent if path.name == "run" else path for path in paths]
    for length in range(1, max((len(path.parts) for path in own), default=0) + 1):
        names = ["/".join(path.parts[-length:]) for path in own]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _cached_records(path: Path) -> list[Value]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return []
    return _records_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _records_of(path: Path, modified: int, size: int) -> list[Value]:
    return read_records(path)


def _state(folder: RunFolder, step: int, steps: int, metrics: Sequence[Value]) -> str:
    if step >= steps:
        return "finished"
    written = max(
        (path.stat().st_mtime for path in (folder.settings, folder.metrics, folder.held_out) if path.exists()),
        default=0.0,
    )
    pace = metrics[-1].get("seconds", 0.0) / step if metrics and step else 0.0
    return "running" if time.time() - written < max(_QUIET_SECONDS, 20 * pace) else "stopped"


def _stages(metrics: Sequence[Value]) -> Iterator[Value]:
    before = {"tokens": 0, "device_seconds": 0.0}
    for name, group in groupby(metrics, key=lambda record: record["stage"]):
        yield {"name": name, "tokens": before["tokens"], "device_seconds": before.get("device_seconds")}
        *_, before = group


def _tasks(report: Path) -> Value:
    if not report.is_file():
        return {}
    try:
        return {
            name: {
                **{key: row[key] for key in ("title", "kind", "shots", "documents", "chance")},
                "teacher": row["scores"]["teacher"],
                "student": row["scores"]["student"],
                "recovered": row["recovered"]["student"],
            }
            for name, row in json.loads(report.read_bytes()).get("tasks", {}).items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{report} is damaged ({type(error).__name__}: {error}); evaluate the model again.") from error


def _summary(probe: Value) -> Value:
    """Means over the domains that are learnt from, and over those kept out; None where there are none."""
    sides = {
        side: [domain for domain in probe["domains"].values() if domain["kept_out"] == kept_out]
        for side, kept_out in (("learnt", False), ("kept_out", True))
    }
    return {
        side: {
            **{measure: _mean(domain[measure] for domain in domains) for measure in _MEASURES},
            "above": _mean(
                None if domain["loss"] is None else domain["loss"] / domain["teacher_loss"] - 1 for domain in domains
            ),
        }
        if domains
        else None
        for side, domains in sides.items()
    }


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None

"""The figures: scores against length, heat maps of depth and length, loss against position."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from power_retention.evaluation.drawing import (
    PLAIN_COLOUR,
    STUDENT_COLOUR,
    TEACHER_COLOUR,
    against_tokens,
    figure_file,
    short_count,
)
from power_retention.evaluation.long.report import MODELS, STUDENT, TEACHER, UNTRAINED, WINDOW

_COLOURS = {TEACHER: TEACHER_COLOUR, STUDENT: STUDENT_COLOUR, UNTRAINED: PLAIN_COLOUR, WINDOW: "#d08c60"}


def draw_long_figures(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """``long-tasks.png``, ``long-depths.png`` and ``long-positions.png``; those that the report has numbers for.

    Args:
        report: the part "long" of an evaluation, as plain values.
        folder: existing.

    Raises:
        OutputError: the folder cannot be written to.
    """
    tasks = {name: task for name, task in report["tasks"].items() if task["lengths"]}
    deep = {name: task for name, task in tasks.items() if _depths(task)}
    drawn = []
    for name, values, draw in (
        ("long-tasks", tasks, _draw_tasks),
        ("long-depths", deep, _draw_depths),
        ("long-positions", report["positions"], _draw_positions),
    ):
        if values:
            draw(values, folder / f"{name}.png")
            drawn.append(folder / f"{name}.png")
    return drawn


def _draw_tasks(tasks: Mapping[str, Any], path: Path) -> None:
    with figure_file(path, 2, len(tasks), size=(1.2 + 2.6 * len(tasks), 5.2), squeeze=False, sharey=True) as (
        figure,
        axes,
    ):
        for column, (name, task) in zip(axes.T, tasks.items(), strict=True):
            lengths = [int(length) for length in task["lengths"]]
            for axis, kind, chance in zip(column, ("generation", "likelihood"), ("guess", "chance"), strict=True):
                guesses = [_any(models)[chance] for models in task["lengths"].values()]
                axis.plot(lengths, guesses, ":", color="#555555", lw=1, label="guessing")
                for model in reversed(MODELS):  # what matters most on top
                    points = [
                        (int(length), models[model][kind])
                        for length, models in task["lengths"].items()
                        if models.get(model)
                    ]
                    _line(axis, model, points)
                against_tokens(axis, lengths)
                axis.set_ylim(-0.04, 1.04)
            column[0].set_title(name, fontsize=10)
            column[1].set_xlabel("tokens")
        axes[0][0].set_ylabel("recalled, by generation")
        axes[1][0].set_ylabel("chosen, by likelihood")
        _legend(figure, axes)


def _legend(figure: Any, axes: Any) -> None:
    """One for all axes: not every model is in each."""
    labels = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    order = [name for name in (*MODELS, "guessing") if name in labels]
    figure.legend([labels[name] for name in order], order, frameon=False, fontsize=8, loc="outside right upper")


def _line(axis: Any, model: str, points: list[tuple[int, dict[str, float | None]]]) -> None:
    if points:
        x = [length for length, _ in points]
        values = [estimate["value"] for _, estimate in points]
        errors = [estimate["error"] or 0.0 for _, estimate in points]
        axis.errorbar(x, values, errors, fmt="o-", ms=3.5, capsize=2, color=_COLOURS[model], label=model)


def _draw_depths(tasks: Mapping[str, Any], path: Path) -> None:
    models = [
        model for model in MODELS if any(row.get(model) for task in tasks.values() for row in task["lengths"].values())
    ]
    size = (1.4 + 2.4 * len(models), 1 + 2.1 * len(tasks))
    with figure_file(path, len(tasks), len(models), size=size, squeeze=False) as (figure, axes):
        image = None
        for line, (name, task) in zip(axes, tasks.items(), strict=True):
            depths, lengths = _depths(task), list(task["lengths"])
            for axis, model in zip(line, models, strict=True):
                cells = [[_cell(task, length, model, depth) for length in lengths] for depth in depths]
                axis.set_facecolor("#eeeeee")  # beyond the window
                image = axis.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
                axis.set_xticks(range(len(lengths)), [short_count(int(length)) for length in lengths], fontsize=8)
                axis.set_yticks(range(len(depths)), [f"{float(depth):.0%}" for depth in depths], fontsize=8)
                axis.set_title(f"{name}, {model}", fontsize=9)
            line[0].set_ylabel("depth")
        figure.colorbar(image, ax=axes, label="recalled, by generation", shrink=0.8)


def _cell(task: Mapping[str, Any], length: str, model: str, depth: str) -> float:
    row = task["lengths"][length].get(model)
    found = row and row["by_depth"].get(depth)
    return found["generation"]["value"] if found else float("nan")


def _depths(task: Mapping[str, Any]) -> list[str]:
    """Depths of a task whose every context was asked at several."""
    found = {
        depth for models in task["lengths"].values() for row in models.values() if row for depth in row["by_depth"]
    }
    return sorted(found, key=float) if len(found) > 1 else []


def _draw_positions(streams: Mapping[str, Any], path: Path) -> None:
    with figure_file(path, 1, len(streams), size=(1.2 + 4.6 * len(streams), 4), squeeze=False) as (figure, axes):
        for axis, (name, stream) in zip(axes[0], streams.items(), strict=True):
            stops: set[int] = set()
            for model in reversed(MODELS):
                bins = stream["models"].get(model, [])
                if bins:
                    x = [entry["stop"] for entry in bins]
                    losses = [entry["loss"] for entry in bins]
                    errors = [entry["error"] or 0.0 for entry in bins]
                    axis.errorbar(x, losses, errors, fmt="o-", ms=3.5, capsize=2, color=_COLOURS[model], label=model)
                    stops.update(x)
            against_tokens(axis, sorted(stops)[1::2])
            axis.set_title(name, fontsize=10)
            axis.set_xlabel("position, tokens (end of bin)")
        axes[0][0].set_ylabel("loss, nats a token")
        _legend(figure, axes)


def _any(models: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of some model: guessing scores the same for all."""
    row: Mapping[str, Any] = next(row for row in models.values() if row)
    return row

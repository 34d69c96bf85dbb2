"""The figure people look at: what a token costs, and what a context weighs, against its length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from power_retention.evaluation.decode import DecodePoint
from power_retention.evaluation.drawing import (
    PLAIN_COLOUR,
    STUDENT_COLOUR,
    TEACHER_COLOUR,
    against_tokens,
    figure_file,
    tidy,
)
from power_retention.evaluation.plan import Plan


def against_context(axis: Any, contexts: Sequence[int], label: str) -> None:
    """Let an axis of matplotlib show ``label`` against contexts, which are its ticks."""
    against_tokens(axis, contexts)
    axis.set_xlabel("context, tokens")
    axis.set_ylabel(label)


def draw_decode_figure(teacher: Sequence[DecodePoint], student: Sequence[DecodePoint], path: Path, title: str) -> None:
    """Time a token and resident memory against context, teacher and student, as a PNG."""
    with figure_file(path, 1, 2, size=(10, 4.2)) as (figure, (time_axis, memory_axis)):
        contexts = [point.context for point in student]
        for points, name, colour in (
            (teacher, "Transformer (key/value cache)", TEACHER_COLOUR),
            (student, "power retention (fixed state)", STUDENT_COLOUR),
        ):
            x = [point.context for point in points]
            time_axis.plot(x, [p.milliseconds for p in points], "o-", color=colour, label=name)
            time_axis.fill_between(x, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, lw=0)
            memory_axis.plot(x, [p.resident_gb for p in points], "o-", color=colour, label=name)
        for axis, label in ((time_axis, "milliseconds a token"), (memory_axis, "resident memory, GB")):
            against_context(axis, contexts, label)
            axis.set_ylim(bottom=0)
        time_axis.legend(frameon=False)
        figure.suptitle(title)


def draw_plan_figure(plan: Plan, path: Path) -> None:
    """Users and tokens a second of the planned GPUs against context, model and parent, as a PNG."""
    with figure_file(path, 1, 2, size=(10, 4.2)) as (figure, axes):
        for servings, name, colour in (
            (plan.parent, "Transformer (key/value cache)", TEACHER_COLOUR),
            (plan.student, "power retention (fixed state)", STUDENT_COLOUR),
        ):
            for axis, field in zip(axes, ("users", "tokens_per_second"), strict=True):
                served = [(serving.context, getattr(serving, field)) for serving in servings if serving.users]
                axis.plot(*zip(*served, strict=True), "o-", color=colour, label=name) if served else None
        for axis, label in zip(axes, ("users", "tokens a second, all users"), strict=True):
            axis.set_yscale("log")
            against_context(axis, [serving.context for serving in plan.student], label)
        axes[0].legend(frameon=False)
        figure.suptitle(f"{plan.name} on {plan.gpus} × {plan.gpu.name}: what fits, and its bandwidth bound")


def draw_recovery_figure(tasks: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Share of the teacher's lead over guessing that the model has, and the hard swap, with standard errors, as a PNG.

    Args:
        tasks: rows of :func:`power_retention.evaluation.comparison.compare` as plain values, by benchmark.
        path: of the PNG.
        title: above it.
    """
    from matplotlib.ticker import PercentFormatter

    with figure_file(path, size=(max(4.0, 1.6 + 1.1 * len(tasks)), 4.2)) as (_, axis):
        width = 0.38
        for i, (model, colour) in enumerate((("student", STUDENT_COLOUR), ("hard swap", PLAIN_COLOUR))):
            shares = [(x, task["recovered"].get(model)) for x, task in enumerate(tasks.values())]
            shown = [(x, share["value"], share["error"] or 0.0) for x, share in shares if share]
            if shown:
                at, values, errors = zip(*shown, strict=True)
                places = [x + (i - 0.5) * width for x in at]
                axis.bar(places, values, width, yerr=errors, color=colour, ecolor="#444444", capsize=3, label=model)
        for x, task in enumerate(tasks.values()):
            if not any(task["recovered"].values()):
                axis.text(x, 0.02, "teacher\nat chance", ha="center", va="bottom", fontsize=8, color="#777777")
        axis.axhline(1.0, color=TEACHER_COLOUR, lw=1, label="teacher")
        axis.set_xlim(-0.6, len(tasks) - 0.4)
        axis.set_ylim(top=max(1.1, axis.get_ylim()[1]))
        axis.set_xticks(range(len(tasks)), [task["title"].replace(", ", ",\n") for task in tasks.values()])
        axis.tick_params(axis="x", labelrotation=30 if len(tasks) > 4 else 0)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set_ylabel("share of the teacher's lead over guessing")
        tidy(axis, grid="y")
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_title(title)

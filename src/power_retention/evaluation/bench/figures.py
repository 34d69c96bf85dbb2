"""The three figures of a report: time against T, our share of the ceiling, decoding against context."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from power_retention.evaluation.bench.contenders import OURS
from power_retention.evaluation.bench.report import crossover
from power_retention.evaluation.bench.settings import PASSES
from power_retention.evaluation.drawing import (
    STUDENT_COLOUR,
    TEACHER_COLOUR,
    against_tokens,
    figure_file,
    short_count,
    tidy,
)

_COLOURS = {OURS: STUDENT_COLOUR, "cuDNN attention": TEACHER_COLOUR, "PyTorch attention": TEACHER_COLOUR}
_OTHER_COLOURS = ("#d08c60", "#7a9e7e", "#8e7cc3", "#5f6b76", "#c9a227")


def draw_figures(report: dict[str, Any], folder: Path, prefix: str) -> list[Path]:
    """``PREFIX-time.png``, ``PREFIX-ceiling.png`` and ``PREFIX-decode.png``; those that the report has numbers for.

    Raises:
        OutputError: the folder cannot be written to.
    """
    drawn = []
    for name, rows, draw in (
        ("time", report["times"], _draw_times),
        ("ceiling", report["stages"], _draw_ceiling),
        ("decode", report["decode"], _draw_decode),
    ):
        if rows:
            draw(report, folder / f"{prefix}-{name}.png")
            drawn.append(folder / f"{prefix}-{name}.png")
    return drawn


def _title(figure: Any, report: dict[str, Any]) -> None:
    figure.suptitle(f"{report['machine']['device']}, {report['dtype']}, {report['machine']['date']}", fontsize=10)


def _draw_times(report: dict[str, Any], path: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in report["times"]))
    with figure_file(path, len(shapes), 2, size=(10, 3.8 * len(shapes)), squeeze=False, sharex="row") as (figure, axes):
        names = list(dict.fromkeys(row["contender"] for row in report["times"]))
        for line, shape in zip(axes, shapes, strict=True):
            for axis, what in zip(line, PASSES, strict=True):
                for name in names:
                    rows = [
                        r for r in report["times"] if (r["shape"], r["pass"], r["contender"]) == (shape, what, name)
                    ]
                    _line(axis, [(r["tokens"], r["ms"]) for r in rows if "ms" in r], name, names)
                crossing = crossover(report, shape, what)
                if crossing:
                    axis.axvline(crossing, color=STUDENT_COLOUR, ls=":", lw=1)
                    axis.annotate(
                        f" faster from {short_count(crossing)}", (crossing, 0.03), xycoords=("data", "axes fraction")
                    )
                _logarithmic(axis, sorted({r["tokens"] for r in report["times"]}))
                axis.set_title(f"{shape.replace('x', ' heads of ')}, {what}", fontsize=10)
                axis.set_xlabel("tokens")
                axis.set_ylabel("milliseconds")
        axes[0][0].legend(frameon=False, fontsize=8)
        _title(figure, report)


def _draw_ceiling(report: dict[str, Any], path: Path) -> None:
    ceiling = report["ceilings"]["matmul_tflops"]
    rows = [row for row in report["stages"] if row["useful_tflops"] is not None]
    with figure_file(path, size=(8, 1 + 0.32 * len(rows))) as (figure, axis):
        labels = [
            f"{row['shape']}, {row['pass']}: {row['stage'].removesuffix('_kernel').replace('_', ' ')}" for row in rows
        ]
        shares = [100 * row["useful_tflops"] / ceiling for row in rows]
        places = range(len(rows), 0, -1)
        whole = [row["stage"] == "whole pass" for row in rows]
        axis.barh(places, shares, color=[STUDENT_COLOUR if w else "#9db8cf" for w in whole])
        for place, share, row in zip(places, shares, rows, strict=True):
            axis.annotate(f" {share:.0f} %, {row['milliseconds']:.2f} ms", (share, place), va="center", fontsize=8)
        axis.set_yticks(list(places), labels, fontsize=8)
        axis.set_xlim(0, max(100, *shares) * 1.15)
        axis.set_xlabel(f"useful arithmetic, % of a matrix product ({ceiling:.3g} TFLOP/s)")
        tidy(axis, grid="x")
        _title(figure, report)


def _draw_decode(report: dict[str, Any], path: Path) -> None:
    rows = [row for row in report["decode"] if row.get("verdict") == "right"]
    batches = sorted({row["batch"] for row in report["decode"]})
    contexts = sorted({row["context"] for row in report["decode"] if row["context"]})
    with figure_file(path, 1, len(batches), size=(1.5 + 3.6 * len(batches), 3.8), squeeze=False) as (figure, axes):
        names = list(dict.fromkeys(row["contender"] for row in report["decode"]))
        for axis, batch in zip(axes[0], batches, strict=True):
            for name in names:
                mine = [r for r in rows if (r["batch"], r["contender"]) == (batch, name)]
                points = [(n, r["ms"]) for r in mine for n in ([r["context"]] if r["context"] else contexts)]
                _line(axis, points, name, names)
            _logarithmic(axis, contexts)
            axis.set_title(f"batch {batch}", fontsize=10)
            axis.set_xlabel("context, tokens")
        axes[0][0].set_ylabel("milliseconds a token and layer")
        axes[0][0].legend(frameon=False, fontsize=8)
        _title(figure, report)


def _line(axis: Any, points: Sequence[tuple[int, dict[str, float]]], name: str, names: Sequence[str]) -> None:
    if not points:
        return
    others = [other for other in names if other not in _COLOURS]
    colour = _COLOURS.get(name) or _OTHER_COLOURS[others.index(name) % len(_OTHER_COLOURS)]
    x = [tokens for tokens, _ in points]
    axis.plot(x, [ms["median"] for _, ms in points], "o-", ms=3.5, color=colour, label=name)
    axis.fill_between(
        x, [ms["p10"] for _, ms in points], [ms["p90"] for _, ms in points], color=colour, alpha=0.15, lw=0
    )


def _logarithmic(axis: Any, ticks: Sequence[int]) -> None:
    axis.set_yscale("log")
    against_tokens(axis, ticks)

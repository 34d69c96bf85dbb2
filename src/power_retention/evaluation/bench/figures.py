"""The three figures of a report: time against T, our share of the ceiling, decoding against context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from power_retention.evaluation.bench.contenders import OURS
from power_retention.evaluation.bench.report import crossover
from power_retention.evaluation.bench.settings import PASSES
from power_retention.evaluation.figure import STUDENT_COLOUR, TEACHER_COLOUR
from power_retention.files import clear_write_errors, replacement

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
            drawn.append(_save(draw, report, folder / f"{prefix}-{name}.png"))
    return drawn


def _save(draw: Callable[[dict[str, Any], Any], Any], report: dict[str, Any], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = draw(report, plt)
    figure.suptitle(f"{report['machine']['device']}, {report['dtype']}, {report['machine']['date']}", fontsize=10)
    with clear_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacement(path) as partial:
            figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    return path


def _draw_times(report: dict[str, Any], plt: Any) -> Any:
    shapes = list(dict.fromkeys(row["shape"] for row in report["times"]))
    figure, axes = plt.subplots(
        len(shapes), 2, figsize=(10, 3.8 * len(shapes)), constrained_layout=True, squeeze=False, sharex="row"
    )
    names = list(dict.fromkeys(row["contender"] for row in report["times"]))
    for line, shape in zip(axes, shapes, strict=True):
        for axis, what in zip(line, PASSES, strict=True):
            for name in names:
                rows = [r for r in report["times"] if (r["shape"], r["pass"], r["contender"]) == (shape, what, name)]
                _line(axis, [(r["tokens"], r["ms"]) for r in rows if "ms" in r], name, names)
            crossing = crossover(report, shape, what)
            if crossing:
                axis.axvline(crossing, color=STUDENT_COLOUR, ls=":", lw=1)
                axis.annotate(f" faster from {_tokens(crossing)}", (crossing, 0.03), xycoords=("data", "axes fraction"))
            _logarithmic(axis, sorted({r["tokens"] for r in report["times"]}))
            axis.set_title(f"{shape.replace('x', ' heads of ')}, {what}", fontsize=10)
            axis.set_xlabel("tokens")
            axis.set_ylabel("milliseconds")
    axes[0][0].legend(frameon=False, fontsize=8)
    return figure


def _draw_ceiling(report: dict[str, Any], plt: Any) -> Any:
    ceiling = report["ceilings"]["matmul_tflops"]
    rows = [row for row in report["stages"] if row["useful_tflops"] is not None]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.32 * len(rows)), constrained_layout=True)
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
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_decode(report: dict[str, Any], plt: Any) -> Any:
    rows = [row for row in report["decode"] if row.get("verdict") == "right"]
    batches = sorted({row["batch"] for row in report["decode"]})
    contexts = sorted({row["context"] for row in report["decode"] if row["context"]})
    figure, axes = plt.subplots(
        1, len(batches), figsize=(1.5 + 3.6 * len(batches), 3.8), constrained_layout=True, squeeze=False
    )
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
    return figure


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
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [_tokens(tick) for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _tokens(count: float) -> str:
    if count >= 1 << 20:
        return f"{count / (1 << 20):.3g}M"
    return f"{count / 1024:.3g}k" if count >= 1024 else f"{count:.0f}"

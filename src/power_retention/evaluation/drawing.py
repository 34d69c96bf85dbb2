"""What all figures have in common: how they are written, and what their axes look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from power_retention.errors import OutputError
from power_retention.files import clear_write_errors, replacement

TEACHER_COLOUR, STUDENT_COLOUR, PLAIN_COLOUR = "#b0413e", "#2f6690", "#b8b8b8"


@contextmanager
def figure_file(
    path: Path, rows: int = 1, columns: int = 1, *, size: tuple[float, float], dpi: int = 150, **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Draw without a screen into a file, which is written in one piece at the end.

    Args:
        path: the file, a PNG if its ending says nothing else; its folder is made.
        rows: of axes.
        columns: of axes.
        size: width and height, inches.
        dpi: dots an inch.
        options: of ``matplotlib.pyplot.subplots``.

    Yields:
        The figure and its axes.

    Raises:
        OutputError: the file cannot be written, or its ending is not known.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kind = path.suffix[1:].lower() or "png"
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    try:
        if kind not in (known := figure.canvas.get_supported_filetypes()):
            raise OutputError(f"{path} ends in no kind of figure: take one of {', '.join(sorted(known))}.")
        yield figure, axes
        with clear_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacement(path) as partial:
                figure.savefig(partial, dpi=dpi, format=kind)
    finally:
        plt.close(figure)


def tidy(axis: Any, grid: str = "both") -> None:
    """A faint grid, and no frame above and on the right."""
    axis.grid(axis=grid, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def against_tokens(axis: Any, ticks: Sequence[int]) -> None:
    """Powers of two at even distances, with these ticks and a faint grid."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short_count(tick) for tick in ticks], fontsize=8)
    axis.minorticks_off()
    tidy(axis)


def short_count(tokens: float) -> str:
    """512, 2k, 1M: in powers of 1,024."""
    if tokens >= 1 << 20:
        return f"{tokens / (1 << 20):.3g}M"
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else f"{tokens:.0f}"

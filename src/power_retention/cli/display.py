"""What the commands show: progress bars, tables, one-sentence errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from power_retention.files import json_text

status = Console(stderr=True)
"""Progress and remarks; standard output is for results."""

results = Console()


def print_json(value: Any) -> None:
    """A result for machines."""
    print(json_text(value))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A result for people; the first column is left-aligned."""
    view = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        view.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        view.add_row(*row)
    results.print(view)


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[..., None]]:
    """A bar with count, time left and a note; yields ``update(done, total, note="")``.

    Where standard error is no terminal (a log file, CI), a line is written every tenth of the way instead.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=status, disable=not status.is_terminal) as progress:
        task: TaskID = progress.add_task(description, total=None, note="")
        tenth = 0

        def update(done: int, total: int, note: str = "") -> None:
            nonlocal tenth
            progress.update(task, completed=done, total=total, note=note)
            if not status.is_terminal and 10 * done // max(total, 1) > tenth:
                tenth = 10 * done // total
                status.print(f"{description}: {done}/{total}  {note}".rstrip(), highlight=False)

        yield update

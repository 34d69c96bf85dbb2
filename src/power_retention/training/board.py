"""The records of a run as TensorBoard shows them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from power_retention.files import clear_write_errors
from power_retention.training.probes import OCTAVES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def has_tensorboard() -> bool:
    """Whether TensorBoard is installed (the extra ``watch``)."""
    return importlib.util.find_spec("tensorboard") is not None


class Board:
    """Writes what a run records, and nothing else, as TensorBoard's events; the horizontal axis counts tokens.

    A context manager that gives :meth:`add` and closes the file in the end.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def __enter__(self) -> Callable[[dict[str, Any]], None]:
        return self.add

    def __exit__(self, *unused: object) -> None:
        if self._writer is not None:
            with clear_write_errors(self._folder):
                self._writer.close()

    def add(self, record: dict[str, Any]) -> None:
        """Show a record of ``metrics.jsonl`` or of ``held_out.jsonl``.

        What an earlier sitting showed from the first record on is taken back: its steps are taken again.
        """
        writer = self._writer = self._writer or self._open(record["tokens"])
        if "domains" in record:
            _add_probe(writer, record)
        else:
            for name, value in record.items():
                if name not in ("step", "tokens"):
                    _add_scalar(writer, f"training/{name}", value, record)
        writer.flush()

    def _open(self, tokens: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=tokens)


def _add_probe(writer: SummaryWriter, record: dict[str, Any]) -> None:
    for name, domain in record["domains"].items():
        for measure in ("loss", "teacher_loss", "kl", "agreement"):
            _add_scalar(writer, f"{measure}/{name}", domain[measure], record)
        for octave, loss in enumerate(domain["by_position"]["loss"]):
            _add_scalar(writer, f"loss_by_position/{name}/from_{1 << octave >> 1}", loss, record)
    for number, layer in enumerate(record["layers"]):
        _add_scalar(writer, f"half_life/layer_{number:02d}", layer["half_life"][1], record)
        _add_scalar(writer, f"state_norm/layer_{number:02d}", layer["state_norm"][1], record)
        _add_scalar(writer, f"smallest_normalizer/layer_{number:02d}", layer["smallest_normalizer"], record)
        _add_half_lives(writer, f"half_lives_log2/layer_{number:02d}", layer["octaves"], record)


def _add_scalar(writer: SummaryWriter, tag: str, value: Any, record: dict[str, Any]) -> None:
    if isinstance(value, int | float):  # not a stage's name, nor None for what was not finite
        writer.add_scalar(tag, value, record["tokens"])


def _add_half_lives(writer: SummaryWriter, tag: str, counts: list[int], record: dict[str, Any]) -> None:
    middles = [octave + 0.5 for octave in range(OCTAVES)]
    writer.add_histogram_raw(
        tag,
        min=0.0,
        max=float(OCTAVES),
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=[float(octave + 1) for octave in range(OCTAVES)],
        bucket_counts=counts,
        global_step=record["tokens"],
    )

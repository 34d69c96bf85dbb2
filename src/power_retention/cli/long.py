"""``power-retention evaluate --long``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from power_retention.cli.display import progress_bar, results, status, table
from power_retention.cli.placement import placed, placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from power_retention.conversion.source import Source
    from power_retention.evaluation.long.asking import Answer
    from power_retention.evaluation.long.context import Context, Encoder, Haystack
    from power_retention.evaluation.long.positions import PositionLoss
    from power_retention.evaluation.long.readers import Reader
    from power_retention.evaluation.long.suite import Grid
    from power_retention.evaluation.long.tree import SourceTree
    from power_retention.models import PowerRetentionForCausalLM

_ASSET = "wikipedia.jsonl"
_TOKENS_AT_HAND = 1 << 19


@dataclass(frozen=True)
class LongOptions:
    """What the command line says about long contexts; empty strings and None for what suits the machine."""

    lengths: str
    depths: int | None
    seeds: int | None
    tasks: str
    stream: int | None
    haystack: list[Path]
    text_field: str
    tree: Path | None
    quick: bool
    precision: str
    seed: int

    def grid(self) -> Grid:
        """What is asked: everything on a GPU, a little where there is none."""
        from dataclasses import replace

        from power_retention.evaluation.long.suite import Grid

        device, _ = placement(self.precision)
        grid = Grid().quick() if self.quick or device.type == "cpu" else Grid()
        given: dict[str, Any] = {
            "lengths": whole_numbers("--lengths", self.lengths),
            "depths": self.depths,
            "seeds": self.seeds,
            "tasks": tuple(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip())),
            "stream_tokens": self.stream,
            "seed": self.seed,
        }
        return replace(grid, **{name: value for name, value in given.items() if value not in (None, ())})

    def check(self) -> None:
        """Refuse what cannot be asked, before models are opened."""
        self.grid()
        if not self.haystack:
            _fetched_text()

    def documents(self) -> list[str]:
        """Haystack and text to predict."""
        from power_retention.training.text import read_documents

        return read_documents(self.haystack or [_fetched_text()], text_field=self.text_field)


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers of tokens between commas, sorted, each once."""
    from power_retention.errors import ArgumentError

    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        numbers = [0]
    if any(number < 1 for number in numbers):
        raise ArgumentError(f"{option} must be positive numbers of tokens separated by commas, not {text!r}.")
    return tuple(numbers)


def _fetched_text() -> Path:
    """The Wikipedia paragraphs of the demonstration.

    Raises:
        DataError: they were not fetched.
    """
    from power_retention.errors import DataError

    path = Path(os.environ.get("POWER_RETENTION_CACHE", ".cache")) / _ASSET
    if not path.is_file():
        raise DataError(
            f"Long contexts need other text to hide things in: --haystack FILE (.txt, .md, .jsonl), or "
            f"`python scripts/fetch_demo_assets.py --text` for {path}, which is not there."
        )
    return path


def run_long(
    options: LongOptions,
    student: PowerRetentionForCausalLM,
    source: Source,
    folder: Path,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Ask and stream student, teacher, untrained conversion and sliding window, one after the other; plain values.

    Args:
        options: of the command.
        student: the model.
        source: its teacher.
        folder: of the model.
        save: called with what is known after each model.
    """
    from power_retention.errors import ArgumentError
    from power_retention.evaluation.long.asking import Effort, ask
    from power_retention.evaluation.long.context import Encoder
    from power_retention.evaluation.long.positions import losses_by_position
    from power_retention.evaluation.long.report import UNTRAINED, shortfalls, task_reports
    from power_retention.evaluation.long.suite import write_contexts

    grid, encoder = options.grid(), Encoder(source.tokenizer)
    device, dtype = placement(options.precision)
    with status.status("Reading text and source files"):
        documents, tree = options.documents(), _tree(grid, options.tree)
        haystack = _haystack(documents, encoder, grid)
    with progress_bar("Writing contexts") as update:
        contexts, missing = write_contexts(grid, haystack, tree, update)
    streams = _streams(documents, tree, encoder, grid, options.seed)
    if not contexts and not streams:
        raise ArgumentError("; ".join(f"{task}: {why}" for task, found in missing.items() for why in found.values()))
    answers: dict[str, list[Answer]] = {}
    losses: dict[str, dict[str, list[PositionLoss]]] = {}
    kept, report = dict[str, Any](), dict[str, Any]()
    for name, opened in _models(student, source, folder, device, dtype):
        with opened() as reader:
            effort = Effort.usual(reader.device)
            kept[name] = {"longest": reader.longest, **_held(reader, contexts)}
            if name == UNTRAINED:
                kept[name]["start"] = "calibrated" if _was_calibrated(folder) else "hard swap"
            with progress_bar(f"Long contexts, {name}") as update:
                answers[name] = ask(reader, contexts, encoder, effort, update)
            for stream, (ids, _) in streams.items():
                with progress_bar(f"Loss by position, {stream}, {name}") as update:
                    losses.setdefault(stream, {})[name] = losses_by_position(reader, ids, effort, update)
        tasks = task_reports(answers, missing)
        report = {
            "run_in": f"{str(dtype).removeprefix('torch.')} on {device.type}",
            "lengths": list(grid.lengths),
            "depths": grid.places,
            "seeds": grid.seeds,
            "seed": grid.seed,
            "models": kept,
            "tasks": tasks,
            "shortfalls": shortfalls(tasks),
            "positions": {stream: _positions(*streams[stream], losses[stream], kept) for stream in losses},
        }
        save(report)
    return report


def _tree(grid: Grid, root: Path | None) -> SourceTree | None:
    from power_retention.evaluation.long.suite import IDENTIFIERS
    from power_retention.evaluation.long.tree import SourceTree

    return SourceTree(root) if IDENTIFIERS in grid.tasks else None


def _haystack(documents: list[str], encoder: Encoder, grid: Grid) -> Haystack:
    """As much text as the longest context takes, and a little more, so that seeds differ."""
    from power_retention.evaluation.long.context import Haystack

    longest = max(grid.lengths)
    return Haystack(documents, encoder, tokens=min(2 * longest + 8192, _TOKENS_AT_HAND), words=longest // 8 + 4096)


def _streams(
    documents: list[str], tree: SourceTree | None, encoder: Encoder, grid: Grid, seed: int
) -> dict[str, tuple[Tensor, bool]]:
    """By name: ids ``[S, n]``, and whether no document was for training."""
    import random

    from power_retention.evaluation.long.positions import make_streams
    from power_retention.training.text import split_held_out

    if not grid.stream_tokens:
        return {}
    rng = random.Random(f"streams {seed}")
    held_out = split_held_out(documents)[1]
    enough = sum(map(len, held_out)) > 6 * grid.streams * grid.stream_tokens  # characters of a token, and to spare
    text = held_out if enough else documents
    with status.status("Preparing text to stream"):
        streams = {
            "text": (
                make_streams(rng.sample(text, len(text)), encoder, streams=grid.streams, tokens=grid.stream_tokens),
                enough,
            )
        }
        if tree is not None:
            files = tree.stream(seed)
            streams["source files"] = (make_streams(files, encoder, streams=1, tokens=grid.stream_tokens), True)
    return streams


def _models(
    student: PowerRetentionForCausalLM,
    source: Source,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, opens its reader), those that matter most first."""
    from power_retention.evaluation.long.readers import AttentionReader, StateReader, WindowReader, matched_window
    from power_retention.evaluation.long.report import STUDENT, TEACHER, UNTRAINED, WINDOW

    window = matched_window(student, source.model)

    @contextmanager
    def reading(model: Any, make: Callable[[Any], Reader]) -> Iterator[Reader]:
        with placed(model, device, dtype):
            yield make(model)

    yield STUDENT, lambda: reading(student, StateReader)
    yield TEACHER, lambda: reading(source.model, AttentionReader)
    yield WINDOW, lambda: reading(source.model, lambda model: WindowReader(model, window))
    yield UNTRAINED, lambda: reading(_untrained(student, source, folder), StateReader)


def _untrained(student: PowerRetentionForCausalLM, source: Source, folder: Path) -> PowerRetentionForCausalLM:
    """The calibrated conversion that a retrained model started from; of a conversion itself, the hard swap."""
    from power_retention.conversion.convert import converted_again, hard_swap

    if not _was_calibrated(folder):
        return hard_swap(source.model, student.config.power)
    return converted_again(source.model, student.config, folder)


def _was_calibrated(folder: Path) -> bool:
    """Whether this is a retrained model, and the calibrated conversion that it started from can be made again."""
    from power_retention.conversion.convert import CALIBRATION

    return (folder / "run").exists() and (folder / CALIBRATION).exists()


def _held(reader: Reader, contexts: list[Context]) -> dict[str, Any]:
    """Bytes that one reading of the longest context keeps; the window of one that has one, in two bytes an element."""
    from power_retention.evaluation.long.readers import WindowReader, kept_bytes

    lengths = [x.length for x in contexts if reader.longest is None or x.length <= reader.longest]
    if isinstance(reader, WindowReader):
        return {"bytes": reader.window * kept_bytes(reader.model, element_bytes=2), "window": reader.window}
    return {"bytes": reader.bytes_a_row(max(lengths, default=0))}


def _positions(ids: Tensor, held_out: bool, losses: Mapping[str, Any], models: Mapping[str, Any]) -> dict[str, Any]:
    from power_retention.evaluation.long.positions import rise
    from power_retention.evaluation.long.report import TEACHER

    window = models.get(TEACHER, {}).get("longest") or ids.shape[1]
    reference = min(window, ids.shape[1] // 4)
    return {
        "streams": ids.shape[0],
        "tokens": ids.shape[1],
        "held_out": held_out,
        "models": {name: [entry.to_dict() for entry in bins] for name, bins in losses.items()},
        "rise": {name: rise(bins, reference) for name, bins in losses.items()},
    }


def show_long(report: Mapping[str, Any]) -> None:
    """Scores by task and length, loss by position, and what to read out of them."""
    from power_retention.evaluation.long.report import MODELS

    models = [name for name in MODELS if name in report["models"]]
    for kind, guess in (("generation", "guess"), ("likelihood", "chance")):
        lines = [
            (task, f"{int(length):,}", f"{100 * _first(row)[guess]:.0f}", *(_percent(row.get(m), kind) for m in models))
            for task, entry in report["tasks"].items()
            for length, row in entry["lengths"].items()
        ]
        if lines:
            table(f"By {kind}, % ± standard error", ("task", "tokens", "guessing", *models), lines)
    for stream, entry in report["positions"].items():
        _show_positions(stream, entry, models)
    _show_remarks(report)


def _show_positions(stream: str, entry: Mapping[str, Any], models: list[str]) -> None:
    by_stop = {m: {bin["stop"]: bin for bin in entry["models"].get(m, [])} for m in models}
    stops = sorted({stop for bins in by_stop.values() for stop in bins})
    lines = [
        (f"{stop // 2 if stop > 64 else 0:,}–{stop:,}", *(_loss(by_stop[m].get(stop)) for m in models))
        for stop in stops
    ]
    table(f"Loss by position, {stream}, nats a token", ("positions", *models), lines)
    if not entry["held_out"]:
        results.print("The held-out text is too short for this: documents that were trained on are among these.")


def _show_remarks(report: Mapping[str, Any]) -> None:
    if start := report["models"].get("untrained", {}).get("start"):
        results.print(f"Untrained: the {'calibrated conversion' if start == 'calibrated' else 'hard swap'}.")
    gains = report["tasks"].get("identifiers", {}).get("lengths", {})
    for length, row in gains.items():
        parts = [f"{m} {x['gain_nats']['value']:+.2f}" for m, x in row.items() if x and "gain_nats" in x]
        results.print(f"What the defining file is worth at {int(length):,} tokens, nats a name: {', '.join(parts)}.")
    for stream, entry in report["positions"].items():
        if found := entry["rise"].get("student"):
            results.print(
                f"Loss of the student on {stream}, {found['to']:,} tokens against {found['from']:,}: "
                f"{found['value']:+.3f} ± {found['error']:.3f}."
            )
    for short in report["shortfalls"]:
        results.print(
            f"{short['task']}, {short['length']:,} tokens: the student recalls {100 * short['value']:.0f} ± "
            f"{100 * short['error']:.0f} points less than the teacher."
        )
    for task, entry in report["tasks"].items():
        for length, reason in entry["missing"].items():
            results.print(f"{task} was not asked of every seed at {int(length):,} tokens: {reason}.", highlight=False)
    results.print("– : longer than the window that the model was made for.")


def _first(row: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(scores for scores in row.values() if scores)
    return found


def _percent(scores: Mapping[str, Any] | None, kind: str) -> str:
    if not scores:
        return "–"
    value, error = scores[kind]["value"], scores[kind]["error"]
    return f"{100 * value:.0f}" if error is None else f"{100 * value:.0f} ± {100 * error:.0f}"


def _loss(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "–"
    return f"{entry['loss']:.3f}" + (f" ± {entry['error']:.3f}" if entry["error"] is not None else "")

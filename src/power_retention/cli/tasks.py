"""The benchmarks of ``power-retention evaluate --tasks``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from power_retention.cli.display import progress_bar, results, status, table
from power_retention.cli.placement import placed, placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from power_retention.conversion.source import Source
    from power_retention.evaluation.benchmarks import Benchmark
    from power_retention.evaluation.comparison import Scores
    from power_retention.evaluation.generated import Free
    from power_retention.evaluation.harness import Progress, Suite
    from power_retention.models import PowerRetentionForCausalLM


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says about benchmarks."""

    names: list[str]
    folder: Path | None
    limit: int | None
    shots: int | None
    max_new_tokens: int | None
    batch_size: int
    run_code: bool
    hard_swap: bool
    precision: str
    seed: int

    def suite(self) -> Suite:
        """The benchmarks, their documents loaded."""
        placement(self.precision)
        try:
            with _silence():  # some of what the harness imports tells at length what it will do without
                from power_retention.evaluation.harness import Suite
        except ImportError as error:
            from power_retention.errors import SourceError

            raise SourceError(
                f"Benchmarks need lm-evaluation-harness ({error}): pip install 'power-retention[tasks]'."
            ) from error
        with status.status("Loading benchmarks"):
            return Suite(
                self.names,
                task_folder=self.folder,
                limit=self.limit,
                shots=self.shots,
                max_new_tokens=self.max_new_tokens,
                run_code=self.run_code,
                seed=self.seed,
            )


def quiet_progress() -> None:
    """Libraries that are imported from now on draw no bars: ours are enough."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def _silence() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def task_names(tasks: str) -> list[str]:
    """Names between commas, each once."""
    return list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


def run_tasks(
    suite: Suite,
    options: TaskOptions,
    student: PowerRetentionForCausalLM,
    source: Source,
    report: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Ask student, teacher and hard swap, one after the other; draw the figure; rows by benchmark, as plain values."""
    from power_retention.conversion.convert import hard_swap
    from power_retention.evaluation.comparison import HARD_SWAP, STUDENT, TEACHER
    from power_retention.evaluation.harness import HARNESS

    device, dtype = placement(options.precision)
    models = {
        STUDENT: _ask(suite, options, STUDENT, student, source),
        TEACHER: _ask(suite, options, TEACHER, source.model, source),
    }
    if options.hard_swap:
        models[HARD_SWAP] = _ask(suite, options, HARD_SWAP, hard_swap(source.model, student.config.power), source)
    run = {
        "harness": HARNESS,
        "limit": options.limit,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "run_in": f"{str(dtype).removeprefix('torch.')} on {device.type}",
    }
    return _compared(suite.benchmarks, models, run, source, report, out)


def run_generated(
    questions: list[Free],
    options: TaskOptions,
    student: PowerRetentionForCausalLM,
    source: Source,
    report: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """The questions of files, as :func:`run_tasks`; what each model wrote goes to ``generated.jsonl``."""
    from power_retention import __version__
    from power_retention.conversion.convert import hard_swap
    from power_retention.evaluation.comparison import HARD_SWAP, STUDENT, TEACHER
    from power_retention.evaluation.generated import benchmarks_of, check_lengths, generate_answers, score_answers
    from power_retention.evaluation.long.asking import Effort
    from power_retention.evaluation.long.context import Encoder
    from power_retention.evaluation.long.readers import AttentionReader, StateReader
    from power_retention.files import clear_write_errors, json_line, replacement

    device, dtype = placement(options.precision)
    encoder = Encoder(source.tokenizer)
    check_lengths(questions, encoder, int(source.model.config.max_position_embeddings))
    models: list[tuple[str, Callable[[], Any], type[StateReader] | type[AttentionReader]]] = [
        (STUDENT, lambda: student, StateReader),
        (TEACHER, lambda: source.model, AttentionReader),
    ]
    if options.hard_swap:
        models.append((HARD_SWAP, lambda: hard_swap(source.model, student.config.power), StateReader))
    written = {}
    for name, opened, kind in models:
        model = opened()
        with placed(model, device, dtype), progress_bar(f"Answers, {name}") as update:
            written[name] = generate_answers(kind(model), questions, encoder, Effort.usual(device), update)
    scores = {name: score_answers(questions, answers) for name, answers in written.items()}
    by = f"power-retention {__version__}"
    run = {"harness": by, "limit": options.limit, "run_in": f"{str(dtype).removeprefix('torch.')} on {device.type}"}
    with clear_write_errors(out), replacement(out / "generated.jsonl") as partial:
        lines = zip(questions, *written.values(), strict=True)
        records = [
            {"task": question.task, "prompt": question.text, "answers": question.answers}
            | dict(zip(written, texts, strict=True))
            for question, *texts in lines
        ]
        partial.write_text("".join(map(json_line, records)), encoding="utf-8")
    return _compared(benchmarks_of(questions), scores, run, source, report, out)


def _compared(
    benchmarks: Sequence[Benchmark],
    scores: Mapping[str, Mapping[str, Scores]],
    run: Mapping[str, Any],
    source: Source,
    report: dict[str, Any],
    out: Path,
) -> dict[str, Any]:
    """Rows by benchmark, with how they came about; the figure shows them beside those of earlier calls."""
    from power_retention.evaluation.comparison import compare
    from power_retention.evaluation.figure import draw_recovery_figure

    rows = {row.benchmark.name: {**row.to_dict(), **run} for row in compare(benchmarks, scores)}
    draw_recovery_figure(report.get("tasks", {}) | rows, out / "recovery.png", f"What is recovered of {source.name}")
    return rows


def _ask(suite: Suite, options: TaskOptions, name: str, model: PreTrainedModel, source: Source) -> dict[str, Scores]:
    """Scores of one model."""
    with placed(model, *placement(options.precision)), ExitStack() as bar:

        def begin(benchmark: Benchmark) -> Progress:
            bar.close()
            return bar.enter_context(progress_bar(f"{benchmark.title}, {name}"))

        return suite.run(model, source.tokenizer, batch_size=options.batch_size, progress=begin)


def show_tasks(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Rows as tables, one for each way of asking."""
    models = list(next(iter(rows.values()))["scores"])
    for kind in dict.fromkeys(row["kind"] for row in rows.values()):
        lines = [
            (
                f"{escape(row['title'])}\n{_shots(row['shots'])}{row['documents']:,} documents",
                f"{100 * row['chance']:.1f}",
                *(_percent(row["scores"][model]) for model in models),
                _percent(row["recovered"]["student"]),
            )
            for row in rows.values()
            if row["kind"] == kind
        ]
        table(f"By {kind}, % ± standard error", ("benchmark", "chance", *models, "recovered"), lines)
    if not all(row["recovered"]["student"] for row in rows.values()):
        results.print("– : the teacher is not clearly above chance, and a share of its lead would mean nothing.")
    for row in rows.values():
        if row["cut"]:
            results.print(
                f"{escape(row['title'])}: {row['cut']:,} prompts were too long for the model, and lost their beginning."
            )


def _shots(shots: int | None) -> str:
    return "" if shots is None else f"{shots}-shot, "


def _percent(estimate: Mapping[str, float | None] | None) -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    value, error = 100 * estimate["value"], estimate["error"]
    return f"{value:.1f}" if error is None else f"{value:.1f}\n± {100 * error:.1f}"

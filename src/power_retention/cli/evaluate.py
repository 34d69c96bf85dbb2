"""``power-retention evaluate``."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, results, status, table
from power_retention.cli.options import (
    Json,
    Seed,
    Teacher,
    Text,
    TextField,
    open_noted_teacher,
    open_student,
    quiet_libraries,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from power_retention.conversion.source import Source
    from power_retention.evaluation.decode import DecodePoint
    from power_retention.evaluation.loss import HeldOutLoss
    from power_retention.models import PowerRetentionForCausalLM

_PROMPT = "The history of the city begins"
_LONG = "Long contexts (--long)"
_LEAST_COST = 0.01
"""Nats that the hard swap must cost for a share of them to mean something."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(evaluate)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A converted or retrained model.")],
    text: Text = None,
    text_field: TextField = "text",
    teacher: Teacher = None,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows to predict.")] = 24,
    length: Annotated[int, typer.Option(min=2, help="Tokens a window, no more than the teacher was made for.")] = 512,
    contexts: Annotated[
        str, typer.Option(help="Context lengths to measure decoding at, comma-separated; empty for none.")
    ] = "1024,4096,16384,32768",
    prompt: Annotated[str, typer.Option(help="Prompt of the sample; empty for none.")] = _PROMPT,
    tasks: Annotated[
        str,
        typer.Option(
            help="Benchmarks, comma-separated: arc, arc-easy, hellaswag, mmlu, mmlu-pro, gsm8k, gsm8k-platinum, math, "
            "math-500, mbpp, humaneval, arc-generation, mmlu-generation, or any task of lm-evaluation-harness."
        ),
    ] = "",
    generated: Annotated[
        list[Path] | None,
        typer.Option(
            help='JSONL of questions to be answered by writing, a line each: {"prompt": …, "answers": […]}; may be repeated.'
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder of task definitions that take precedence, for documents on disk.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Documents or questions of each task; all by default.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt; each task's custom by default.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer to --tasks.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    run_code: Annotated[bool, typer.Option(help="Execute the programs that models write (mbpp, humaneval).")] = False,
    hard_swap: Annotated[bool, typer.Option(help="Ask the hard swap too.")] = True,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16 or auto (bfloat16 on a GPU), of models that are asked tasks.")
    ] = "auto",
    long: Annotated[
        bool,
        typer.Option("--long", help="Ask about long contexts, and take the loss by position.", rich_help_panel=_LONG),
    ] = False,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text that long contexts are made of, as --text takes it; by default --text, or what "
            "scripts/fetch_demo_assets.py fetched.",
            rich_help_panel=_LONG,
        ),
    ] = None,
    long_tasks: Annotated[
        str,
        typer.Option(
            help="Of needle, multi-key needle, variable tracking, common words, frequent words, facts, identifiers; "
            "all by default.",
            rich_help_panel=_LONG,
        ),
    ] = "",
    lengths: Annotated[
        str,
        typer.Option(
            help="Tokens of long contexts, comma-separated; 512 to 262144 on a GPU, 512 and 2048 without one.",
            rich_help_panel=_LONG,
        ),
    ] = "",
    depths: Annotated[
        int | None, typer.Option(min=1, help="Depths at which needles stand, evenly spread.", rich_help_panel=_LONG)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Contexts of each kind; 3, or 2 without a GPU.", rich_help_panel=_LONG)
    ] = None,
    stream: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Tokens to take the loss by position of; 1048576, or 8192 without a GPU; 0: none.",
            rich_help_panel=_LONG,
        ),
    ] = None,
    tree: Annotated[
        Path | None,
        typer.Option(
            help="Folder of Python files for identifiers; Python's standard library by default.", rich_help_panel=_LONG
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few and short long contexts.", rich_help_panel=_LONG)] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the report; MODEL/evaluation by default.")] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Hold a model against its Transformer parent: loss, text, what decoding costs as the context grows, and benchmarks.

    With --text: four losses on text that `retrain` held out, of the teacher, the hard swap (bare mixers, the published way to
    start), the calibrated conversion, and the model itself. With --tasks (pip install power-retention[tasks]): scores, and
    the share of the teacher's lead over guessing that is recovered; the same of questions of your own with --generated, which
    needs nothing installed. With --long: what is recalled of contexts of up to 262,144
    tokens and the loss by position up to a million, beside the teacher within its window, the untrained conversion, and the
    teacher with a sliding window that weighs as much as our state. What an earlier call measured of the same weights stays
    in the report. Examples:

        power-retention evaluate my-model-retrained --text corpus.jsonl

        power-retention evaluate my-model-retrained --text corpus.jsonl --contexts 1024,131072 --json

        power-retention evaluate my-model-retrained --tasks arc,hellaswag,gsm8k --limit 200

        power-retention evaluate my-model-retrained --generated questions.jsonl --limit 500

        power-retention evaluate my-model-retrained --long --haystack corpus.jsonl

        power-retention evaluate my-model-retrained --long --quick --long-tasks "needle, facts" --stream 0
    """
    from power_retention.cli.long import LongOptions, run_long, show_long, whole_numbers
    from power_retention.cli.tasks import TaskOptions, quiet_progress, run_generated, run_tasks, show_tasks, task_names

    quiet_progress()
    quiet_libraries()
    from power_retention.errors import ArgumentError, DataError
    from power_retention.evaluation.generated import read_questions
    from power_retention.evaluation.long.figures import draw_long_figures
    from power_retention.evaluation.long.report import merged
    from power_retention.files import clear_write_errors, write_json
    from power_retention.ops.layout import has_state

    names = task_names(tasks)
    if not text and not names and not long and not generated:
        raise DataError(
            "evaluate needs the text that the model was retrained on, to predict what was held out: --text FILE; or "
            "benchmarks: --tasks arc,hellaswag; or questions: --generated FILE; or --long."
        )
    questions = read_questions(generated, limit=limit) if generated else []
    decoded_at = list(whole_numbers("--contexts", contexts)) if text else []
    long_options = LongOptions(
        lengths, depths, seeds, long_tasks, stream, haystack or text or [], text_field, tree, quick, precision, seed
    )
    if long:
        long_options.check()
    options = TaskOptions(
        names, task_folder, limit, shots, max_new_tokens, batch_size, run_code, hard_swap, precision, seed
    )
    suite = options.suite() if names else None
    with status.status("Opening model, teacher and text" if text else "Opening model and teacher"):
        student, source = open_student(model).eval(), open_noted_teacher(model, teacher)
        held_out = _held_out_windows(text, text_field, source, windows, length) if text else None
    if (decoded_at or long or questions) and not has_state(student.config.head_dim, student.config.power):
        if long or questions:
            raise ArgumentError(
                f"p = {student.config.power} leaves heads this wide no state, and what is asked with --long and --generated is "
                "read into one: only a model converted with --power 2 can be asked."
            )
        status.print(f"p = {student.config.power} leaves heads this wide no state: decoding is not measured.")
        decoded_at = []
    out = out or model / "evaluation"
    report = _earlier_report(out, model, student, source)
    with clear_write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # what cannot be written is not measured first
    losses, samples, decode, drawn = {}, {}, {}, list[Path]()
    if suite:
        report["tasks"] = report.get("tasks", {}) | run_tasks(suite, options, student, source, report, out)
        write_json(out / "evaluation.json", report)
    if questions:
        answered = run_generated(questions, options, student, source, report, out)
        report["tasks"] = report.get("tasks", {}) | answered
        names += answered
        write_json(out / "evaluation.json", report)
    if long:
        earlier = report.get("long")

        def save(found: dict[str, Any]) -> None:
            report["long"] = merged(earlier, found)
            write_json(out / "evaluation.json", report)

        run_long(long_options, student, source, model, save)
        drawn = draw_long_figures(report["long"], out)
    if held_out is not None:
        losses = _losses(student, source.model, model, held_out)
        report |= {
            "held_out": {"windows": len(held_out), "length": held_out.shape[1]},
            "losses": {
                name: {**loss.to_dict(), "recovered": _recovered(loss, losses)} for name, loss in losses.items()
            },
        }
        write_json(out / "evaluation.json", report)
        if prompt:
            samples = _samples(student, source, prompt, seed)
            report["samples"] = {"prompt": prompt, **samples}
        if decoded_at:
            decode = _decode(model, source, decoded_at, out)
            report["decode"] = {name: [point.to_dict() for point in points] for name, points in decode.items()}
        write_json(out / "evaluation.json", report)
    if json:
        print_json(report)
        return
    if losses:
        _show(report, losses, samples, prompt, decode)
    if names:
        show_tasks({name: report["tasks"][name] for name in names})
    if long:
        show_long(report["long"])
    written = ["evaluation.json", *(["decode.png"] if decode else []), *(["recovery.png"] if names else [])]
    written += ["generated.jsonl"] if questions else []
    written += [path.name for path in drawn]
    results.print(f"\nReport in [bold]{escape(str(out))}[/]: {', '.join(written)}", highlight=False)


def _earlier_report(out: Path, model: Path, student: PowerRetentionForCausalLM, source: Source) -> dict[str, Any]:
    """The report so far if it is of the very same weights, else a new one."""
    import json

    from power_retention.conversion.source import fingerprint_weights

    new = {"model": str(model), "teacher": source.name, "fingerprint": fingerprint_weights(student)}
    try:
        earlier = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
        same = all(earlier[key] == new[key] for key in ("teacher", "fingerprint"))
    except (OSError, ValueError, KeyError, TypeError):
        return new
    return earlier | new if same else new


def _held_out_windows(text: list[Path], field: str, source: Source, windows: int, length: int) -> Tensor:
    import torch

    from power_retention.conversion.convert import calibration_windows
    from power_retention.errors import DataError
    from power_retention.training.text import read_documents, split_held_out, tokenize

    if length > (positions := source.model.config.max_position_embeddings):
        status.print(f"The teacher was made for {positions:,} tokens: windows of so many are read.")
        length = positions
    documents = split_held_out(read_documents(text, text_field=field))[1]
    if not documents:
        raise DataError("Of a single document nothing is held out; give a text of several, such as JSONL.")
    ids = tokenize(documents, source.tokenizer, max_tokens=4 * windows * length).ids
    if len(ids) < length:
        raise DataError(
            f"The held-out text has {len(ids)} tokens; give more of it, or a --length of no more than these."
        )
    return calibration_windows(torch.from_numpy(ids).long(), count=windows, length=length)


def _losses(
    student: PowerRetentionForCausalLM, teacher: PreTrainedModel, folder: Path, windows: Tensor
) -> dict[str, HeldOutLoss]:
    from power_retention.conversion.convert import CALIBRATION, converted_again, hard_swap
    from power_retention.evaluation.loss import HeldOut

    variants = {"hard swap": lambda: hard_swap(teacher, student.config.power)}
    if (folder / CALIBRATION).exists():
        variants["calibrated"] = lambda: converted_again(teacher, student.config, folder)
    retrained = (folder / "run").exists()
    if retrained or "calibrated" not in variants:
        variants["retrained" if retrained else "converted"] = lambda: student
    with progress_bar("Held-out loss, teacher") as update:
        held_out = HeldOut(teacher, windows, update)
    losses = {"teacher": held_out.loss()}
    for name, build in variants.items():
        with progress_bar(f"Held-out loss, {name}") as update:
            losses[name] = held_out.loss(build(), update)
    return losses


def _recovered(loss: HeldOutLoss, losses: dict[str, HeldOutLoss]) -> float | None:
    """Share of the loss that the hard swap cost which this variant has back; None where it cost nothing clear."""
    hard, teacher = losses["hard swap"], losses["teacher"]
    errors = [error for error in (hard.loss_error, teacher.loss_error) if not math.isnan(error)]
    cost = hard.loss - teacher.loss
    return (hard.loss - loss.loss) / cost if cost > max(_LEAST_COST, 2 * math.hypot(*errors)) else None


def _samples(student: PowerRetentionForCausalLM, source: Source, prompt: str, seed: int) -> dict[str, str]:
    from power_retention.serving.generate import Sampling, generate_text

    sampling = Sampling(max_new_tokens=60, repetition_penalty=1.1, seed=seed)
    with status.status("Writing a sample each"):
        return {
            "teacher": generate_text(source.model, source.tokenizer, prompt, sampling),
            "student": generate_text(student, source.tokenizer, prompt, sampling),
        }


def _decode(model: Path, source: Source, lengths: list[int], out: Path) -> dict[str, list[DecodePoint]]:
    from power_retention.evaluation.decode import measure_in_own_process
    from power_retention.evaluation.figure import draw_decode_figure

    measured = {}
    with tempfile.TemporaryDirectory(prefix=".teacher-", dir=out) as teacher_folder, progress_bar("Decoding") as update:
        source.model.save_pretrained(teacher_folder)
        source.model.to("meta")  # the measured process needs the memory
        for i, (name, folder) in enumerate((("teacher", Path(teacher_folder)), ("student", model))):
            done = i * len(lengths)
            update(done, 2 * len(lengths), f"{name}: opening")

            def show(point: DecodePoint, name: str = name, done: int = done) -> None:
                place = done + sorted(lengths).index(point.context) + 1
                update(
                    place, 2 * len(lengths), f"{name}, {point.context:,} tokens: {point.milliseconds:.0f} ms a token"
                )

            measured[name] = measure_in_own_process(folder, lengths, progress=show)
    draw_decode_figure(
        measured["teacher"],
        measured["student"],
        out / "decode.png",
        f"Decoding one token of {source.name} on this CPU, float32",
    )
    return measured


def _show(
    report: dict[str, Any],
    losses: dict[str, HeldOutLoss],
    samples: dict[str, str],
    prompt: str,
    decode: dict[str, list[DecodePoint]],
) -> None:
    rows = [
        (
            name,
            f"{loss.loss:.3f}" + ("" if math.isnan(loss.loss_error) else f" ± {loss.loss_error:.3f}"),
            f"{loss.kl:.3f}",
            "–" if (share := report["losses"][name]["recovered"]) is None else f"{share:.0%}",
        )
        for name, loss in losses.items()
    ]
    table("Held-out loss, nats a token", ("model", "loss", "KL from the teacher", "recovered"), rows)
    for name, sample in samples.items():
        results.print(f"\n[bold]{name}[/]  [dim]{escape(prompt)}[/]{escape(sample)}", highlight=False)
    if decode:
        costs = [
            (
                f"{slow.context:,}",
                f"{slow.tokens_per_second:.1f}",
                f"{fast.tokens_per_second:.1f}",
                f"{slow.milliseconds / fast.milliseconds:.1f}×",
                f"{slow.resident_gb:.2f}",
                f"{fast.resident_gb:.2f}",
            )
            for slow, fast in zip(decode["teacher"], decode["student"], strict=True)
        ]
        columns = ("context, tokens", "teacher tokens/s", "student tokens/s", "faster", "teacher GB", "student GB")
        results.print()
        table("Decoding and resident memory (contexts simulated)", columns, costs)

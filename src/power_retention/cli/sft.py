"""``power-retention sft``."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, results, status
from power_retention.cli.options import Json, Seed, open_student, quiet_libraries
from power_retention.cli.placement import check_precision, check_run_folder, choose_device

if TYPE_CHECKING:
    import torch
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from power_retention.models import PowerRetentionForCausalLM
    from power_retention.training.examples import Example
    from power_retention.training.folder import RunFolder
    from power_retention.training.run import Progress
    from power_retention.training.tuning import TuningPhase, TuningRecipe


ADAPTER = "adapter"
"""Folder of the adapters alone, beside the model that has them merged."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(sft)


def sft(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A power-retention model: converted, retrained or published.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the tuned model and the records of the run.")],
    data: Annotated[
        Path,
        typer.Option(
            help="Examples (.jsonl, .json, folder): messages, prompt and completion, or text; or a TOML curriculum."
        ),
    ],
    steps: Annotated[int, typer.Option(help="Optimiser steps, where --data is no curriculum.")] = 100,
    length: Annotated[str, typer.Option(help="Longest document in tokens (4096, 64k, 1M); longer ones wait.")] = "4096",
    rows: Annotated[int, typer.Option(help="A step reads up to so many times --length.")] = 1,
    segment: Annotated[str, typer.Option(help="Tokens between two borders of the back-propagation.")] = "32k",
    bptt: Annotated[str, typer.Option(help="Gradients: exact, truncated at segments, or state_passing.")] = "exact",
    carry: Annotated[
        bool, typer.Option("--carry", help="Documents of any length, going on from step to step with their states.")
    ] = False,
    lora: Annotated[
        int, typer.Option(help="Train adapters of this rank instead of the weights; 0 trains the weights.")
    ] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-5,
    checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory for a third more time.")
    ] = False,
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Fuse layers with torch.compile; on a GPU by default."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="A Jinja chat template instead of the tokenizer's.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: whichever multiplies faster here.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    checkpoint_minutes: Annotated[float, typer.Option(help="Time between checkpoints.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT exactly where it stopped.")] = False,
    show: Annotated[int, typer.Option(help="Print so many examples, what is learned between ⟦ and ⟧, and stop.")] = 0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fine-tune a model on conversations, prompts with completions or whole texts, however long they are.

    Gradients are exact over whole documents. Ctrl-C saves and stops; --resume continues bit for bit, carried states
    included. Examples:

        power-retention sft my-model my-model-chat --data chats.jsonl --steps 500 --rows 8

        power-retention sft my-model my-model-1m --data books.jsonl --length 1M --segment 32k --lora 16 --lr 2e-4

        power-retention sft my-model my-model-1m --data curriculum.toml --resume

    where curriculum.toml is:

        data = ["chats.jsonl", "books"]

        phase = [ {steps = 200, length = 4096, rows = 16}, {steps = 100, length = 65536}, {steps = 20, length = 1048576} ]
    """
    quiet_libraries()
    from power_retention.conversion.source import open_tokenizer
    from power_retention.files import held_folder
    from power_retention.training.examples import dump_examples, fingerprint_examples, read_examples
    from power_retention.training.run import execute, remove_checkpoints
    from power_retention.training.tuning import Tuning, TuningFolder, with_adapters

    _expect_one_process()
    folder = TuningFolder(out / "run")
    if not show:
        check_run_folder(out, folder, resume)
    place = choose_device(device)
    options = {"steps": steps, "length": length, "rows": rows, "segment": segment, "bptt": bptt, "carry": carry}
    files, phases = _read_data(data, options)
    with status.status("Opening the model"):
        tokenizer, student = open_tokenizer(model), open_student(model)
    template = None if chat_template is None else _read_template(chat_template)
    with progress_bar("Tokenizing") as update:
        examples = read_examples(files, tokenizer, chat_template=template, progress=update)
    if show:
        for line in dump_examples(examples[:show], tokenizer):
            print(line)
        return
    given = {"model": str(model.resolve()), "examples of fingerprint": fingerprint_examples(examples)}
    if resume and folder.exists:
        recipe, noted = folder.read_tuning()
        _check_same(noted, given)
        _check_options(context, recipe)
        if data.suffix == ".toml":
            _check_phases(phases, recipe.phases)
    else:
        recipe = _make_recipe(phases, place, precision, lr=lr, seed=seed, lora=lora, checkpointed=checkpointing)
    tuned = with_adapters(student, recipe.lora, recipe.lora_alpha) if recipe.lora else student
    compiled = place.type == "cuda" if compiled is None else compiled
    tuning = Tuning(tuned, examples, recipe, place, compiled=compiled)
    _report_too_long(examples, recipe)
    with held_folder(folder.path):
        if not folder.exists:
            folder.begin_tuning(recipe, given)
        with progress_bar(f"Tuning, {recipe.precision}") as update:
            execute(
                tuning,
                folder,
                watch=lambda progress: update(progress.step, progress.steps, _note(progress)),
                tell=lambda sentence: status.print(
                    f"[bold]note:[/] {escape(sentence)}", soft_wrap=True, highlight=False
                ),
                checkpoint_seconds=60 * checkpoint_minutes,
            )
        with status.status(f"Writing {escape(str(out))}"):
            _save(tuned, tokenizer, template, out)
            remove_checkpoints(folder)
    summary = {"out": str(out), "examples": len(examples), "recipe": recipe.to_dict(), **_last_record(folder)}
    if json:
        print_json(summary)
    else:
        name = escape(str(out))
        results.print(f"[bold]{name}[/] holds the tuned model ({recipe.steps} steps). Talk to it:", highlight=False)
        results.print(f"  power-retention generate {name} …", highlight=False)


def _expect_one_process() -> None:
    from power_retention.errors import ArgumentError
    from power_retention.training.parallel import launched_ranks

    if launched_ranks() > 1:
        raise ArgumentError(
            f"sft runs in one process, and was launched in {launched_ranks()}: start it without torchrun."
        )


def _read_data(data: Path, options: dict[str, Any]) -> tuple[list[Path], list[TuningPhase]]:
    """(files, phases) of a curriculum, or of one kind of step."""
    from power_retention.evaluation.plan import parse_count
    from power_retention.training.tuning import TuningPhase, read_curriculum

    if data.suffix == ".toml":
        return read_curriculum(data)
    lengths = {name: parse_count(options[name]) for name in ("length", "segment")}
    return [data], [TuningPhase(**{**options, **lengths}, name="tuning")]


def _read_template(path: Path) -> str:
    from power_retention.errors import DataError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The chat template {path} cannot be read: {error}.") from error


def _make_recipe(phases: list[TuningPhase], place: torch.device, precision: str, **numbers: Any) -> TuningRecipe:
    from power_retention.training.retraining import fastest_precision
    from power_retention.training.tuning import TuningRecipe

    chosen = fastest_precision(place) if precision == "auto" else check_precision(precision)
    return TuningRecipe(tuple(phases), precision=cast(Any, chosen), **numbers)


def _check_same(noted: dict[str, Any], given: dict[str, Any]) -> None:
    from power_retention.errors import CheckpointError

    for name, value in noted.items():
        if given.get(name) != value:
            raise CheckpointError(
                f"This run was begun with {name} {value}, not {given.get(name)}: resume it with the same."
            )


def _check_options(context: typer.Context, recipe: TuningRecipe) -> None:
    """Refuse options given with --resume that the run was not begun with; those left out are the run's."""
    from power_retention.evaluation.plan import parse_count

    noted: dict[str, Any] = {name: getattr(recipe, name) for name in ("lr", "lora", "seed", "precision")}
    noted["checkpointing"] = recipe.checkpointed
    if context.params["data"].suffix != ".toml":
        names = ("steps", "length", "rows", "segment", "bptt", "carry")
        noted |= {name: _of_all([getattr(phase, name) for phase in recipe.phases]) for name in names}
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, begun in noted.items():
        now, source = context.params[name], context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or (name, now) == ("precision", "auto"):
            continue
        if name in ("length", "segment"):
            now = parse_count(now)
        if now != begun:
            _refuse_another(options[name], begun, now, "leave the option out")


def _of_all(values: list[Any]) -> Any:
    """What the phases have, one value where there is one phase."""
    return values[0] if len(values) == 1 else values


def _check_phases(given: Sequence[TuningPhase], begun: Sequence[TuningPhase]) -> None:
    """Refuse a curriculum that is another by now; the names of phases are for people."""
    remedy = "give the curriculum that it was begun with"
    if len(given) != len(begun):
        _refuse_another("phases in number", len(begun), len(given), remedy)
    for number, (new, old) in enumerate(zip(given, begun, strict=True), 1):
        for name, value in asdict(new).items():
            if name != "name" and value != getattr(old, name):
                _refuse_another(f"{name} of phase {number}", getattr(old, name), value, remedy)


def _refuse_another(name: str, begun: object, given: object, remedy: str) -> NoReturn:
    from power_retention.errors import CheckpointError

    raise CheckpointError(f"The run was begun with {name} {begun}, not {given}: {remedy}, or choose a new folder.")


def _report_too_long(examples: list[Example], recipe: TuningRecipe) -> None:
    """Documents that a phase leaves out are no secret."""
    for phase in recipe.phases:
        longer = sum(len(example) > phase.length for example in examples)
        if longer and not phase.carry:
            status.print(
                f"{phase.name}: {longer} of {len(examples)} documents have more than {phase.length:,} tokens and are left out.",
                soft_wrap=True,
                highlight=False,
            )


def _note(progress: Progress) -> str:
    metrics = progress.metrics
    return f"{progress.stage}  loss {metrics['loss']:.3f}  {progress.tokens_per_second:,.0f} tokens/s"


def _last_record(folder: RunFolder) -> dict[str, Any]:
    import json

    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    return {"last_step": json.loads(lines[-1])} if lines else {}


def _save(tuned: Any, tokenizer: PreTrainedTokenizerBase, template: str | None, out: Path) -> None:
    """The tuned model beside its run, adapters merged and kept; config.json comes last: a folder with one is complete."""
    from power_retention.files import clear_write_errors, sync_folder

    adapted = hasattr(tuned, "merge_and_unload")
    with clear_write_errors(out), tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
        folder = Path(partial)
        if adapted:
            tuned.save_pretrained(folder / ADAPTER)
        student: PowerRetentionForCausalLM = tuned.merge_and_unload() if adapted else tuned
        student.eval().save_pretrained(folder)
        if template is not None:
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        sync_folder(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            if (out / path.name).is_dir():
                shutil.rmtree(out / path.name)
            os.replace(path, out / path.name)

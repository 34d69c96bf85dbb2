"""``power-retention retrain``."""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, results, status
from power_retention.cli.options import (
    Data,
    Json,
    Seed,
    Teacher,
    Text,
    TextField,
    open_noted_teacher,
    open_student,
    quiet_libraries,
)
from power_retention.cli.placement import check_precision, check_run_folder, choose_device, hold_run_folder
from power_retention.cli.watching import NOTES, Watching, last_record, open_board, show_held_out

if TYPE_CHECKING:
    import torch

    from power_retention.conversion.source import Source
    from power_retention.models import PowerRetentionForCausalLM
    from power_retention.training.folder import RunFolder
    from power_retention.training.mixture import Mixture
    from power_retention.training.parallel import Ranks
    from power_retention.training.recipe import Recipe
    from power_retention.training.run import Progress
    from power_retention.training.text import Tokens

_TEXT_FINGERPRINT = "text of fingerprint"
_PROBE_TOKENS = 20_000
_BYTES_A_PARAMETER = 20
"""Of a run in one process: the student, its gradient and AdamW's two moments in float32, and the teacher."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(retrain)


def retrain(
    model: Annotated[Path, typer.Argument(help="A converted model.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the retrained model and the records of the run.")],
    text: Text = None,
    text_field: TextField = "text",
    data: Data = None,
    on_damage: Annotated[
        str | None,
        typer.Option(
            help="A damaged shard of --data: fail, or skip it and go on with the others; by default as the file of --data "
            "says, or fail."
        ),
    ] = None,
    teacher: Teacher = None,
    minutes: Annotated[float, typer.Option(help="How long to train; the number of steps follows from it.")] = 10.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, instead of --minutes.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step; by default 4, or 8 on a GPU.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; by default 256, or 1024 on a GPU.")] = None,
    align_share: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps that align the mixers layer by layer; 0.8 to 0.2, the less the more tokens."
        ),
    ] = None,
    align_lr: Annotated[float, typer.Option(help="Learning rate of the mixers while aligning.")] = 8e-3,
    mixer_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the mixers while distilling; 5e-4 to 1e-3, by the tokens.")
    ] = None,
    other_lr: Annotated[
        float | None, typer.Option(help="Learning rate of everything else meanwhile; 1e-4 to 3e-4, by the tokens.")
    ] = None,
    final_share: Annotated[
        float | None, typer.Option(help="Share of their peak that learning rates fall to; a tenth.")
    ] = None,
    clip: Annotated[
        float | None, typer.Option(help="Norm that larger gradients are scaled down to; 1. Single tokens make spikes.")
    ] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(help="Weight beside the KL of how far each layer's output is off the teacher's; 1.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="float32, bfloat16, or auto: whichever multiplies faster here.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    compiled: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="Fuse layers with torch.compile; on a GPU by default."),
    ] = None,
    recorded: Annotated[
        bool | None,
        typer.Option(
            "--record/--no-record", help="Replay steps as a CUDA graph; by default on a GPU that holds all weights."
        ),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute layers again in the backward pass: less memory, more time.")
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(
            help="Of several processes: groups that each hold all weights. By default as many as there are GPUs if that takes "
            "less than a quarter of each, else 1, which divides the weights among all."
        ),
    ] = None,
    held_out: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH of text or shards to measure the student on while it trains; may be repeated, and stand as a "
            "table [held_out] in the file of --data."
        ),
    ] = None,
    probe_every: Annotated[
        str | None, typer.Option(help="Tokens (500k, 2M) between measurements; a twentieth of the run by default.")
    ] = None,
    probe_windows: Annotated[int, typer.Option(help="Held-out windows of each name.")] = 8,
    probe_length: Annotated[int, typer.Option(help="Tokens of such a window.")] = 512,
    checkpoint_minutes: Annotated[float, typer.Option(help="Time between checkpoints.")] = 5.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT exactly where it stopped.")] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Train a converted model to predict what its Transformer parent predicts: align, then distil.

    Ctrl-C saves and stops; --resume continues bit for bit. A twentieth of the documents is held out for `evaluate`.
    Started by torchrun or srun in many processes, it divides models and batches among them; --batch counts all.
    Examples:

        power-retention retrain my-model my-model-retrained --text corpus.jsonl --minutes 30

        power-retention retrain my-model my-model-retrained --text corpus.jsonl --resume

        power-retention retrain my-model my-model-retrained --data mixture.toml --steps 5000 --batch 16 --length 2048

        power-retention retrain my-model my-model-retrained --text corpus.jsonl --held-out own=corpus.jsonl

        torchrun --nproc-per-node 8 -m power_retention.cli retrain my-model my-model-retrained --data mixture.toml --batch 64
    """
    quiet_libraries()
    from power_retention.errors import ArgumentError, DataError
    from power_retention.training.domains import refuse_shards_of
    from power_retention.training.folder import RunFolder
    from power_retention.training.parallel import joined_ranks, whole_tensors
    from power_retention.training.recipe import Recipe
    from power_retention.training.retraining import Retraining, fastest_precision, steps_within
    from power_retention.training.run import execute, remove_checkpoints

    if bool(text) == bool(data):
        raise DataError("retrain needs text to train on: either --text FILE_OR_FOLDER or --data SHARDS_OR_MIXTURE.")
    if steps is None and not 0 < minutes < float("inf"):
        raise ArgumentError(f"--minutes is {minutes}; a finite number above 0 was expected: give one, or --steps.")
    folder, place = RunFolder(out / "run"), choose_device(device)
    watching = Watching.of(held_out or [], data, probe_every, probe_windows, probe_length)
    compiled = place.type == "cuda" if compiled is None else compiled
    with ExitStack() as held, joined_ranks(place, dp_replicate=replicas or usual_replicas(model, place)) as ranks:
        ranks.first_does(lambda: check_run_folder(out, folder, resume))
        resuming = ranks.same(resume and folder.exists)
        hold = partial(hold_run_folder, held, out, folder, resuming)
        if resuming:
            ranks.first_does(hold)
        with status.status("Opening model and teacher"):
            student, source = _open_models(model, teacher, ranks)
        mixture = _open_mixture(data, on_damage, source) if data else None
        documents = _training_documents(text or [], text_field)
        given = _inputs(model, source, text or [], text_field, mixture, documents)
        if resuming:
            recipe, inputs = folder.read_settings()
            _check_same_inputs(inputs, given)
            watching = Watching.noted(inputs) or watching
        else:
            refuse_shards_of(watching.held_out, text or [])
            rates: dict[str, Any] = {
                "align_lr": align_lr,
                "mixer_lr": mixer_lr,
                "other_lr": other_lr,
                "align_share": align_share,
                "final_share": final_share,
                "clip": clip,
                "hidden_weight": hidden_weight,
            }
            if check_precision(precision) == "auto":
                precision = ranks.same(fastest_precision(place))
            usual_shape = (8, 1024) if place.type == "cuda" else (4, 256)
            batch, length = (
                usual if own is None else own for own, usual in zip((batch, length), usual_shape, strict=True)
            )
            shape = {"batch": batch, "length": length}
            recipe = Recipe.usual(1 if steps is None else steps, **shape, seed=seed, precision=precision, **rates)
            _say_what_is_beyond(source, recipe)
        random.Random(recipe.seed).shuffle(documents)
        if mixture:
            mixture.batch(0, batch=1, length=recipe.length, seed=0)  # refuses sources shorter than a sequence
        timed = steps is None and not resuming
        with status.status("Tokenizing"):
            tokens = mixture or _tokenize(documents, source, recipe, _PROBE_TOKENS if timed else None)
        options: dict[str, Any] = {"device": place, "compiled": compiled, "recompute": recompute, "ranks": ranks}
        if recorded is None:
            recorded = place.type == "cuda" and ranks.whole and not recompute
        options["recorded"] = recorded
        retraining = Retraining(student, source.model, tokens, recipe, **options)
        if timed:
            with status.status("Timing a step of each stage"):
                seconds = ranks.same(retraining.seconds_per_step())
            rough = steps_within(minutes, seconds, recipe.align_share)
            settled = Recipe.usual(rough, **shape, seed=seed, precision=precision, **rates)
            recipe = replace(settled, steps=steps_within(minutes, seconds, settled.align_share))
            with status.status("Tokenizing"):
                retraining.recipe, retraining.tokens = recipe, mixture or _tokenize(documents, source, recipe)
        probes = watching.probes(retraining, source, mixture, documents, text_field)
        if not resuming:
            ranks.first_does(hold)  # only now: what is refused before leaves no folder behind
        ranks.first_does(lambda: _begin(folder, recipe, given | watching.notes(probes)))
        with open_board(folder, ranks) as listen, progress_bar(f"Retraining, {recipe.precision}") as update:
            execute(
                retraining,
                folder,
                watch=lambda progress: update(progress.step, progress.steps, _note(progress)),
                tell=_tell,
                probes=probes,
                listen=listen,
                checkpoint_seconds=60 * checkpoint_minutes,
            )
        with status.status(f"Writing {escape(str(out))}"):
            whole = whole_tensors(student, ranks) if ranks.size > 1 else {}
            ranks.first_does(lambda: _write(student, whole, source, model, out))
            ranks.first_does(lambda: remove_checkpoints(folder))
        if ranks.first:
            _report(out, folder, recipe, json)


def usual_replicas(model: Path, place: torch.device) -> int:
    """How many groups of ranks hold all weights: each rank where student and teacher are small beside its GPU, else one."""
    from power_retention.conversion.presets import resolve_config
    from power_retention.models.sizes import count_parameters
    from power_retention.training.parallel import launched_ranks

    ranks = launched_ranks()
    if place.type != "cuda" or ranks == 1 or not (model / "config.json").exists():
        return 1
    import torch

    wanted = _BYTES_A_PARAMETER * count_parameters(resolve_config(str(model)))
    return ranks if wanted < torch.cuda.get_device_properties(place).total_memory / 4 else 1


def _begin(folder: RunFolder, recipe: Recipe, noted: dict[str, Any]) -> None:
    if not folder.exists or folder.read_settings()[1] != noted:
        folder.begin(recipe, noted)


def _report(out: Path, folder: RunFolder, recipe: Recipe, json: bool) -> None:
    tokens_read = recipe.steps * recipe.tokens_per_step
    if json:
        last = last_record(folder)
        print_json({"out": str(out), "tokens": tokens_read, "recipe": recipe.to_dict(), "held_out": last})
        return
    show_held_out(folder)
    folder_name = escape(str(out))
    results.print(
        f"[bold]{folder_name}[/] holds the retrained model ({recipe.steps} steps, {tokens_read:,} tokens). See what it "
        f"recovered:\n  power-retention evaluate {folder_name} --text …",
        highlight=False,
    )


def _tell(sentence: str) -> None:
    status.print(f"[bold]note:[/] {escape(sentence)}", soft_wrap=True, highlight=False)


def _open_models(model: Path, teacher: str | None, ranks: Ranks) -> tuple[PowerRetentionForCausalLM, Source]:
    """Both models on the first rank, which hands out their weights later; on the others only their shapes."""
    import torch
    from transformers import AutoModelForCausalLM

    opened: list[Any] = []

    def open_both() -> tuple[Any, Any, Source]:
        student, source = open_student(model), open_noted_teacher(model, teacher)
        opened.extend((student, source))
        return student.config, source.model.config, replace(source, model=None)

    student_config, teacher_config, source = ranks.first_does(open_both)
    if not ranks.first:
        with torch.device("meta"):
            shapes = [
                AutoModelForCausalLM.from_config(each, dtype=torch.float32) for each in (student_config, teacher_config)
            ]
        opened.extend((shapes[0], replace(source, model=shapes[1])))
    return opened[0], opened[1]


def _write(
    student: PowerRetentionForCausalLM, whole: dict[str, torch.Tensor], source: Source, model: Path, out: Path
) -> None:
    from power_retention.training.export import assemble, write_result

    if whole:  # it was divided among ranks
        generation_config, student = student.generation_config, assemble(student.config, whole)
        student.generation_config = generation_config
    write_result(student, source.tokenizer, model, out)


def _open_mixture(data: Path, on_damage: str | None, source: Source) -> Mixture:
    from power_retention.conversion.source import fingerprint_tokenizer
    from power_retention.errors import ArgumentError, DataError
    from power_retention.training.mixture import read_mixture

    if on_damage not in ("fail", "skip", None):
        raise ArgumentError(f"--on-damage must be fail or skip, not {on_damage!r}.")
    with progress_bar("Checking shards") as update:
        mixture = read_mixture(data, on_damage=on_damage, progress=update)  # type: ignore[arg-type]
    for sentence in (sentence for shards in mixture.sources.values() for sentence in shards.damage):
        status.print(f"[bold]skipped:[/] {escape(sentence)}", soft_wrap=True, highlight=False)
    if (own := fingerprint_tokenizer(source.tokenizer)) != mixture.tokenizer:
        raise DataError(
            f"{data} was made with a tokenizer of fingerprint {mixture.tokenizer}, the teacher's is {own}: make the shards "
            "with the teacher's tokenizer."
        )
    return mixture


def _inputs(
    model: Path, source: Source, text: list[Path], field: str, mixture: Mixture | None, documents: list[str]
) -> dict[str, Any]:
    from power_retention.training.text import fingerprint_documents

    data = {"data of fingerprint": mixture.fingerprint} if mixture else {}
    return data | {
        "model": str(model.resolve()),
        "teacher": source.fingerprint,
        "text": [str(path.resolve()) for path in text],
        "text field": field,
        **({_TEXT_FINGERPRINT: fingerprint_documents(documents)} if documents else {}),
    }


def _check_same_inputs(noted: dict[str, Any], given: dict[str, Any]) -> None:
    from power_retention.errors import CheckpointError, DataError

    for name, value in noted.items():
        if name in NOTES or given.get(name) == value:
            continue
        if name == _TEXT_FINGERPRINT:
            raise DataError(
                f"The text ({', '.join(given['text'])}) is not what it was when the run began: put it back, or start a new "
                "run."
            )
        raise CheckpointError(
            f"This run was begun with {name} {value}, not {given.get(name)}: resume it with the same."
        )


def _say_what_is_beyond(source: Source, recipe: Recipe) -> None:
    """Beyond its window a teacher is no example."""
    if recipe.length > (positions := source.model.config.max_position_embeddings):
        status.print(
            f"[bold]note:[/] the teacher was made for {positions:,} tokens, and a sequence has {recipe.length:,}: what it says "
            "beyond is no example.",
            highlight=False,
        )


def _training_documents(text: list[Path], field: str) -> list[str]:
    from power_retention.training.text import read_documents, split_held_out

    return split_held_out(read_documents(text, text_field=field))[0] if text else []


def _tokenize(documents: list[str], source: Source, recipe: Recipe, wanted: int | None = None) -> Tokens:
    """As many tokens as the recipe reads, or as are wanted."""
    from power_retention.training.text import sample_batch, tokenize

    a_step = recipe.batch * (recipe.length + 1)
    wanted = recipe.steps * a_step if wanted is None else max(wanted, a_step)
    tokens = tokenize(documents, source.tokenizer, max_tokens=wanted)
    sample_batch(tokens, batch=1, length=recipe.length + 1, seed=0, step=0)  # refuses a text shorter than a window
    return tokens


def _note(progress: Progress) -> str:
    metrics = progress.metrics
    loss = f"error {metrics['alignment_error']:.3f}" if progress.stage == "align" else f"KL {metrics['kl']:.3f}"
    return f"{progress.stage}  {loss}  {progress.tokens_per_second:,.0f} tokens/s"

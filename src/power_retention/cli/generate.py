"""``power-retention generate``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, status
from power_retention.cli.options import Json, Seed, open_student, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(generate)


def generate(
    model: Annotated[Path, typer.Argument(help="A power-retention model.")],
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Tokens at most; 0 only reads.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens that hold this share.")
    ] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(min=0.1, help="Above 1 it discourages repetition.")] = 1.1,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="State file to go on from: what it has read is not read again.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(help="Write what was read (state, prompt and answer) to this state file.")
    ] = None,
    prefill_chunk_size: Annotated[
        int,
        typer.Option(min=1, help="Tokens of the prompt read at a time; memory grows with this, not with the prompt."),
    ] = 1024,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Continue a prompt, word by word, with a memory that does not grow.

    Examples:

        power-retention generate my-model-retrained "The whale" --max-new-tokens 60

        power-retention generate my-model-retrained "Who was Herman Melville?" --chat --temperature 0.7

        power-retention generate my-model-retrained - --max-new-tokens 0 --save-state book.state < book.txt

        power-retention generate my-model-retrained "So in the last chapter" --state book.state
    """
    quiet_libraries()
    from power_retention.errors import OutputError
    from power_retention.models import PowerRetentionCache
    from power_retention.serving.generate import Sampling, generate_text, open_tokenizer

    if save_state is not None and not save_state.parent.is_dir():
        raise OutputError(f"There is no folder {save_state.parent} to write {save_state.name} to.")
    with status.status(f"Opening {escape(str(model))}"):
        student, tokenizer = open_student(model).eval(), open_tokenizer(model)
        cache = PowerRetentionCache(student.config.num_hidden_layers) if save_state else None
        if state is not None:
            cache = PowerRetentionCache.load(state, student)
    prompt = _standard_input() if prompt == "-" else prompt
    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    emit = None if json else lambda text: print(text, end="", flush=True)
    if not json and not chat and max_new_tokens:
        print(prompt, end="", flush=True)
    with progress_bar("Reading") if len(prompt) > prefill_chunk_size else nullcontext() as progress:
        generated = generate_text(
            student, tokenizer, prompt, sampling, chat=chat, emit=emit, cache=cache,
            prefill_chunk_size=prefill_chunk_size, progress=progress,
        )  # fmt: skip
    result: dict[str, Any] = {"prompt": prompt, "text": generated}
    if save_state is not None and cache is not None:
        header = cache.save(save_state, student, extra={"model_folder": str(model)})
        result["state"] = {"path": str(save_state), **asdict(header)}
        status.print(f"{escape(str(save_state))} has read {header.tokens_seen:,} tokens.", highlight=False)
    if json:
        print_json(result)
    elif max_new_tokens:
        print()


def _standard_input() -> str:
    from power_retention.errors import ArgumentError

    try:
        text = sys.stdin.read()
        text.encode("utf-8")
    except UnicodeError as error:
        raise ArgumentError(f"Standard input is no UTF-8 text: {error}.") from error
    return text

"""``power-retention generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, status
from power_retention.cli.options import Json, Seed, open_student, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(generate)


def generate(
    model: Annotated[Path, typer.Argument(help="A power-retention model.")],
    prompt: Annotated[str, typer.Argument(help="What to continue; - reads standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that hold this share.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 it discourages repetition.")] = 1.1,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Continue a prompt, word by word, with a memory that does not grow.

    Examples:

        power-retention generate my-model-retrained "The whale" --max-new-tokens 60

        power-retention generate my-model-retrained "Who was Herman Melville?" --chat --temperature 0.7
    """
    quiet_libraries()
    from power_retention.serving.generate import Sampling, generate_text, open_tokenizer

    with status.status(f"Opening {escape(str(model))}"):
        student, tokenizer = open_student(model).eval(), open_tokenizer(model)
    prompt = sys.stdin.read() if prompt == "-" else prompt
    sampling = Sampling(max_new_tokens, temperature, top_p, repetition_penalty, seed)
    emit = None if json else lambda text: print(text, end="", flush=True)
    if not json and not chat:
        print(prompt, end="", flush=True)
    generated = generate_text(student, tokenizer, prompt, sampling, chat=chat, emit=emit)
    print_json({"prompt": prompt, "text": generated}) if json else print()

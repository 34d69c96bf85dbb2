"""The command ``power-retention``."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.text import Text

from power_retention.cli import (
    bench,
    card,
    chat,
    convert,
    data,
    env,
    evaluate,
    export,
    generate,
    plan,
    retrain,
    runs,
    serve,
    sft,
    state,
    tune,
)
from power_retention.cli.display import results, status
from power_retention.errors import PowerRetentionError, RunInterrupted

app = typer.Typer(
    name="power-retention",
    help="Language models whose memory does not grow.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
for module in (
    convert,
    data,
    retrain,
    sft,
    runs,
    export,
    evaluate,
    generate,
    chat,
    serve,
    state,
    card,
    plan,
    bench,
    tune,
    env,
):
    module.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        from power_retention import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Language models whose memory does not grow.

    convert → retrain → evaluate → generate: a pretrained Transformer becomes an attention-free model.
    """


def main() -> None:
    """Run the command; an error of ours is one sentence and exit status 1."""
    # Threads that wait by spinning slow each other down several times over as soon as anything else runs beside them;
    # threads that never spin lose a third on an idle machine.  This is in between.  Read when torch is loaded, later.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    rank = int(os.environ.get("RANK", "0"))
    status.quiet = results.quiet = rank > 0  # of many processes, the first one speaks
    try:
        app()
    except RunInterrupted as stopped:
        message = Text.assemble((str(stopped), "bold"), " Run the same command with --resume to continue.")
        status.print(message, soft_wrap=True)
        sys.exit(75)
    except PowerRetentionError as error:
        status.quiet = False
        who = f"error on rank {rank}: " if rank else "error: "
        status.print(Text.assemble((who, "bold red"), " ".join(str(error).split())), soft_wrap=True)
        sys.exit(1)

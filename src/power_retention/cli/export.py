"""``power-retention export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, results, status
from power_retention.cli.options import Json, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(export)


def export(
    run: Annotated[Path, typer.Argument(help="The folder of an unfinished `retrain`.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; by default the newest.")] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint of a run, of however many GPUs, as a model that transformers loads and `retrain` starts from.

    A finished run needs no export: its folder is such a model. Examples:

        power-retention export my-model-retrained so-far

        power-retention export my-model-retrained at-2000 --step 2000
    """
    quiet_libraries()
    from power_retention.training.export import export_checkpoint

    with status.status(f"Writing {escape(str(out))}"):
        step = export_checkpoint(run, out, step)
    if json:
        print_json({"out": str(out), "step": step})
    else:
        results.print(f"[bold]{escape(str(out))}[/] holds the model after step {step}.", highlight=False)

"""``power-retention card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, results, status
from power_retention.cli.options import Json, quiet_libraries


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(card)


def card(
    model: Annotated[Path, typer.Argument(help="A converted or retrained model; better one that was evaluated.")],
    json: Json = False,
) -> None:
    """Write MODEL/README.md, a model card with the recovery table of `evaluate`.

    A card that somebody wrote is left as it is. Examples:

        power-retention card my-model-retrained

        power-retention card my-model-retrained && hf upload me/my-model my-model-retrained
    """
    quiet_libraries()
    from transformers import AutoConfig

    from power_retention.errors import SourceError
    from power_retention.models import PowerRetentionConfig
    from power_retention.models.card import EVALUATION, is_ours, write_card

    if not (model / "config.json").is_file():
        raise SourceError(f"{model} holds no model (no config.json).")
    with status.status(f"Writing the card of {escape(str(model))}"):
        config = AutoConfig.from_pretrained(model, local_files_only=True)
        if not isinstance(config, PowerRetentionConfig):
            raise SourceError(f"{model} is not a power-retention model but a {config.model_type!r} one.")
        path = write_card(config, model, records=model)
    written, evaluated = is_ours(path), (model / EVALUATION).is_file()
    if json:
        print_json({"card": str(path), "written": written, "recovery": written and evaluated})
    elif not written:
        results.print(
            f"[bold]{escape(str(path))}[/] was written by somebody else, and is left as it is.", highlight=False
        )
    else:
        note = "" if evaluated else " It has no recovery table: evaluate the model first."
        results.print(f"[bold]{escape(str(path))}[/] is written.{note}", highlight=False)

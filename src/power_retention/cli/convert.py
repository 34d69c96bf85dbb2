"""``power-retention convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from power_retention.cli.display import print_json, progress_bar, results, status, table
from power_retention.cli.options import Json, Seed, Text, TextField, quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from power_retention.conversion.convert import Conversion


_FEWEST_TOKENS = 128
"""What gates are calibrated on looks back over some dozens of tokens."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(no_args_is_help=True)(convert)


def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, or a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the converted model.")],
    text: Text = None,
    text_field: TextField = "text",
    power: Annotated[int, typer.Option("--power", "-p", help="The even power p.")] = 2,
    calibrate: Annotated[
        bool, typer.Option(help="Set gates and output scales (and key biases) from a little text.")
    ] = True,
    key_bias: Annotated[
        bool,
        typer.Option(
            help="Shift scores by a bias on rotated keys: a little better where training is short, wrong beyond the parent's "
            "context."
        ),
    ] = False,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 512 tokens to calibrate on.")] = 8,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Swap the attention of a pretrained Transformer for power retention.

    Without --text it is calibrated on a built-in sample of English. Examples:

        power-retention convert HuggingFaceTB/SmolLM2-135M my-model

        power-retention convert SmolLM2-135M-Instruct.Q4_1.gguf my-model --text corpus.jsonl

        power-retention convert SmolLM2-135M-Instruct.Q4_1.gguf my-model --text corpus.jsonl --key-bias
    """
    quiet_libraries()
    from power_retention.conversion.convert import convert as run
    from power_retention.conversion.convert import save_conversion
    from power_retention.conversion.source import open_source
    from power_retention.files import check_new_folder
    from power_retention.ops.layout import check_power

    check_power(power)
    check_new_folder(out)
    with status.status(f"Opening {escape(source)}"):
        opened = open_source(source)
        tokens = _windows(text, text_field, opened.tokenizer, windows) if calibrate else None
    with progress_bar("Calibrating, layer by layer") as update:
        conversion = run(opened, tokens, p=power, key_bias=key_bias, seed=seed, progress=update)
    conversion.source["location"] = str(Path(source).resolve()) if Path(source).exists() else source
    with status.status(f"Writing {escape(str(out))}"):
        save_conversion(conversion, out)
    print_json({"out": str(out), **conversion.report()}) if json else _show(conversion, out)


def _windows(text: list[Path] | None, field: str, tokenizer: PreTrainedTokenizerBase, count: int) -> Tensor:
    import torch

    from power_retention.conversion.convert import calibration_windows, sample_text
    from power_retention.errors import DataError
    from power_retention.training.text import read_documents, split_held_out, tokenize

    documents = split_held_out(read_documents(text, text_field=field))[0] if text else [sample_text()]
    ids = torch.from_numpy(tokenize(documents, tokenizer, max_tokens=64 * 512 * max(1, count // 8)).ids).long()
    if len(ids) < _FEWEST_TOKENS:
        raise DataError(f"The text has {len(ids)} tokens; calibration needs {_FEWEST_TOKENS}: give more, or no --text.")
    return calibration_windows(ids, count=count, length=min(512, len(ids)))


def _show(conversion: Conversion, out: Path) -> None:
    rows = [
        (
            str(layer.layer),
            " ".join(f"{x:.0f}" for x in layer.half_lives),
            f"{min(layer.output_scales):.2f} … {max(layer.output_scales):.2f}",
            f"{layer.error_before:.2f}",
            f"{layer.error_after:.2f}",
            *([] if layer.bias_fit is None else [f"{layer.bias_fit:.2f}"]),
        )
        for layer in conversion.layers
    ]
    if rows:
        columns = ("layer", "gate half-lives, tokens", "output scales", "error before", "after", "key-bias fit")
        table("Attention output against the teacher's, relative", columns[: len(rows[0])], rows)
    folder = escape(str(out))
    results.print(
        f"[bold]{folder}[/] holds a power-retention model (p = {conversion.student.config.power}) with the weights of "
        f"{escape(conversion.source['name'])}. Retrain it next:\n"
        f"  power-retention retrain {folder} {folder}-retrained --text …",
        highlight=False,
    )

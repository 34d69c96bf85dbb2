"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from power_retention.conversion.source import Source
    from power_retention.models import PowerRetentionForCausalLM

Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="Text file (.txt, .md, .json, .jsonl, .jsonl.xz) or folder of them; may be repeated."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of token shards, or a TOML file that mixes several (`power-retention data`)."),
]
TextField = Annotated[str, typer.Option("--text-field", help="Field that holds the text of a JSON record.")]
Teacher = Annotated[
    str | None,
    typer.Option("--teacher", help="The Transformer it came from: folder, hub id or GGUF. Noted at conversion."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Seed = Annotated[int, typer.Option("--seed", min=-(2**63), max=2**63 - 1, help="Seed of everything random.")]


def quiet_libraries() -> None:
    """Our own bars are enough, and what torchao cannot load when transformers looks for it concerns nobody here."""
    import logging

    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def open_noted_teacher(model_folder: Path, teacher: str | None) -> Source:
    """The Transformer a model was converted from: the one named, else the one noted at conversion.

    Raises:
        SourceError: there is none, or it is not the parent of this model.
    """
    import json

    from power_retention.conversion.convert import REPORT
    from power_retention.conversion.source import open_source
    from power_retention.errors import SourceError

    noted: dict[str, str] = {}
    parent: str | None = None
    if (report := model_folder / REPORT).exists():
        try:
            noted = json.loads(report.read_text(encoding="utf-8"))["source"]
            parent = noted["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(
                f"{report} is damaged ({type(error).__name__}: {error}); convert the model again."
            ) from error
    teacher = teacher or noted.get("location")
    if teacher is None:
        raise SourceError(f"{model_folder} does not say which Transformer it came from; name it with --teacher.")
    source = open_source(teacher)
    if parent is not None and source.fingerprint != parent:
        raise SourceError(
            f"{teacher} is not the Transformer that {model_folder} was converted from: its weights have the fingerprint "
            f"{source.fingerprint}, the parent's is {parent}."
        )
    return source


def open_student(folder: Path) -> PowerRetentionForCausalLM:
    """A power-retention model from a folder, in float32.

    Raises:
        SourceError: the folder does not hold one, or holds a damaged one.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from power_retention.errors import SourceError
    from power_retention.models import PowerRetentionConfig

    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{folder} holds no model (no config.json); `power-retention convert SOURCE {folder}` makes one."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        ours = isinstance(config, PowerRetentionConfig)
        options = {"config": config, "dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
        model, loading = AutoModelForCausalLM.from_pretrained(folder, **options) if ours else (None, {})
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise SourceError(f"The model in {folder} cannot be loaded: {error}") from error
    if model is None:
        raise SourceError(
            f"{folder} is not a power-retention model but a {config.model_type!r} one; `power-retention convert` turns a "
            "Transformer into one."
        )
    if loading["missing_keys"]:
        raise SourceError(
            f"{folder} is incomplete: it lacks {sorted(loading['missing_keys'])[0]} and {len(loading['missing_keys']) - 1} "
            "more weights. Fetch or convert the model again."
        )
    student: PowerRetentionForCausalLM = model
    return student

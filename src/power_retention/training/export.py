"""From a run to a model in Hugging Face format: at its end, or from any of its checkpoints."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from power_retention.conversion.convert import CALIBRATION, REPORT
from power_retention.errors import CheckpointError
from power_retention.files import clear_write_errors, new_folder, sync_folder
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.training.checkpoint import checkpoint_of, read_weights
from power_retention.training.folder import RunFolder


def assemble(config: PowerRetentionConfig, weights: Mapping[str, Tensor]) -> PowerRetentionForCausalLM:
    """A model of given weights, tied ones under their first name; they are not copied.

    Raises:
        CheckpointError: they are those of another model.
    """
    with torch.device("meta"):
        model = PowerRetentionForCausalLM(config)
    try:
        found = model.load_state_dict(dict(weights), strict=False, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"The weights do not fit the model that the run was begun with: {error}") from error
    model.tie_weights()
    hollow = [name for name, value in model.named_parameters() if value.is_meta]
    if hollow or found.unexpected_keys:
        odd = (hollow + found.unexpected_keys)[0]
        raise CheckpointError(
            f"The weights do not fit the model that the run was begun with: {odd} is in one of them only."
        )
    return model


def write_model(
    student: PowerRetentionForCausalLM, tokenizer: PreTrainedTokenizerBase, converted: Path, folder: Path
) -> None:
    """A model, its tokenizer, and what is known of its conversion, into a folder."""
    student.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in (REPORT, CALIBRATION):
        if (converted / name).exists():
            shutil.copy(converted / name, folder / name)


def write_result(
    student: PowerRetentionForCausalLM, tokenizer: PreTrainedTokenizerBase, converted: Path, out: Path
) -> None:
    """The trained model beside its run; config.json comes last, so that a folder with one is complete.

    Raises:
        OutputError: the disk refuses; no half model is left.
    """
    with clear_write_errors(out), tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as partial:
        folder = Path(partial)
        write_model(student, tokenizer, converted, folder)
        sync_folder(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)


def export_checkpoint(run: Path, out: Path, step: int | None = None) -> int:
    """Write the weights of a run's checkpoint as a model in Hugging Face format; returns the step it is of.

    Args:
        run: the folder that ``retrain`` was told to write to.
        out: a new folder.
        step: of the checkpoint; by default the newest.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        OutputError: ``out`` holds something, or the disk refuses.
    """
    folder = RunFolder(run / "run")
    if not folder.exists:
        raise CheckpointError(
            f"{run} holds no run; name the folder that `power-retention retrain` was told to write to."
        )
    converted = Path(folder.read_settings()[1]["model"])
    if not (converted / "config.json").exists():
        raise CheckpointError(
            f"The model that this run was begun with, {converted}, is gone: put it back for its configuration."
        )
    checkpoint = checkpoint_of(folder.checkpoints, step)
    model = assemble(AutoConfig.from_pretrained(converted, local_files_only=True), read_weights(checkpoint))
    if (converted / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(converted, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    with new_folder(out) as partial:
        write_model(model, tokenizer, converted, partial)
    return int(checkpoint.name.removeprefix("step-"))

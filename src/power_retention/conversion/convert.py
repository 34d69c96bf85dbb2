"""From a source to a folder that holds a power-retention model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from power_retention.conversion.calibrate import LayerReport, apply_calibration, calibrate_mixers, save_calibration
from power_retention.conversion.source import Source
from power_retention.conversion.swap import swap_attention
from power_retention.errors import DataError
from power_retention.files import new_folder, write_json
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM

REPORT = "conversion.json"
CALIBRATION = "calibration.safetensors"

Progress = Callable[[int, int], None]


@dataclass
class Conversion:
    """A converted model and what was done to it.

    Attributes:
        student: the model.
        tokenizer: the source's.
        layers: one report a layer; empty without calibration.
        source: name, kind and fingerprint of the source.
    """

    student: PowerRetentionForCausalLM
    tokenizer: PreTrainedTokenizerBase
    layers: list[LayerReport]
    source: dict[str, str]

    def report(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"source": self.source, "power": self.student.config.power, "layers": [asdict(x) for x in self.layers]}


def convert(
    source: Source,
    tokens: Tensor | None,
    *,
    p: int = 2,
    chunk_size: int | None = None,
    key_bias: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Conversion:
    """Swap and calibrate a copy of the source's model; the source itself is left as it is.

    Args:
        source: an opened source.
        tokens: ``[N, T]`` token ids to calibrate on; None for the hard swap.
        p: even power.
        chunk_size: see :func:`power_retention.power_retention`.
        key_bias: give the rotated keys a learned bias: a better start, tied to the positions that the source can tell apart.
        seed: of the position offsets of the calibration.
        progress: called with (layers done, layers).
    """
    parent = {"name": source.name, "model_type": source.model.config.model_type, "fingerprint": source.fingerprint}
    student = swap_attention(copy.deepcopy(source.model), p=p, chunk_size=chunk_size, key_bias=key_bias, parent=parent)
    layers = []
    if tokens is not None:
        layers = calibrate_mixers(student, source.model, tokens, seed=seed, progress=progress)
    return Conversion(student, source.tokenizer, layers, {**parent, "kind": source.kind})


def hard_swap(teacher: PreTrainedModel, p: int = 2) -> PowerRetentionForCausalLM:
    """The published way to start: a copy of the teacher with bare mixers, gates at ½ and no key bias."""
    student = swap_attention(copy.deepcopy(teacher), p=p, key_bias=False)
    with torch.no_grad():
        for mixer in student.mixers:
            mixer.g_proj.bias.zero_()
    return student


def converted_again(teacher: PreTrainedModel, config: PowerRetentionConfig, folder: Path) -> PowerRetentionForCausalLM:
    """The calibrated conversion that a retrained model with this configuration, saved in ``folder``, started from.

    Raises:
        StateError: the folder's calibration is damaged, or of another model.
    """
    student = swap_attention(copy.deepcopy(teacher), p=config.power, key_bias=config.key_bias)
    apply_calibration(student, folder / CALIBRATION)
    return student


def save_conversion(conversion: Conversion, out: Path) -> None:
    """Write model, tokenizer, report and calibration into a new folder, complete or not at all."""
    with new_folder(out) as folder:
        conversion.student.save_pretrained(folder)
        conversion.tokenizer.save_pretrained(folder)
        write_json(folder / REPORT, conversion.report())
        if conversion.layers:
            save_calibration(conversion.student, conversion.layers, folder / CALIBRATION)


def sample_text() -> str:
    """A little public-domain English to calibrate on where no text is given: the opening of Moby-Dick."""
    return files("power_retention.conversion").joinpath("sample.txt").read_text(encoding="utf-8")


def calibration_windows(ids: Tensor, *, count: int, length: int) -> Tensor:
    """``[count, length]``: windows spread over the whole text."""
    available = len(ids) // length
    if available == 0:
        raise DataError(f"The calibration text has {len(ids)} tokens; at least {length} are needed.")
    picks = torch.linspace(0, available - 1, min(count, available)).round().long()
    return torch.stack([ids[i * length : (i + 1) * length] for i in picks.tolist()])

"""Checkpoints of a run: complete or not there, checked when read, and enough to continue bit for bit."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from power_retention.errors import CheckpointError
from power_retention.files import new_folder

_NAME = re.compile(r"step-(\d{8})")
_TENSORS = "tensors.safetensors"


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write ``folder/step-…`` with everything a run needs after ``step`` steps; older ones are removed afterwards.

    Raises:
        OutputError: the disk refuses; earlier checkpoints are untouched.
    """
    tensors = {f"model.{name}": value.detach() for name, value in _parameters(model).items()}
    for name, state in _optimizer_states(model, optimizer).items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items() if isinstance(value, Tensor)}
    target = folder / f"step-{step:08d}"
    if target.exists():
        return target
    with new_folder(target) as partial:
        save_file(tensors, partial / _TENSORS)
        digest = _digest(partial / _TENSORS)
        (partial / "checkpoint.json").write_text(json.dumps({"step": step, "sha256": digest}), encoding="utf-8")
    for older in _checkpoints(folder)[:-1]:
        shutil.rmtree(older)
    return target


def load_latest(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the newest checkpoint in ``folder``; returns the number of steps it has seen, 0 if there is none.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
    """
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return 0
    newest = checkpoints[-1]
    tensors, header = _read(newest)
    parameters = _parameters(model)
    wanted = {f"model.{name}": value.shape for name, value in parameters.items()}
    if wanted != {name: value.shape for name, value in tensors.items() if name.startswith("model.")}:
        raise CheckpointError(f"{newest} belongs to another model: its parameters have other names or shapes.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model.{name}"])
    for name, parameter in parameters.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        named = {key: tensors.get(f"optimizer.{key}.{name}") for key in keys}
        state = {key: value.to(parameter.device) for key, value in named.items() if value is not None}
        if state:
            optimizer.state[parameter] = state
    return int(header["step"])


def _read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    advice = f"Delete {checkpoint} to start over from the step before it, or from the beginning."
    try:
        header = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
        damaged = header["sha256"] != _digest(checkpoint / _TENSORS)
        if not damaged:
            return load_file(checkpoint / _TENSORS), header
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {checkpoint} cannot be read ({error}). {advice}") from error
    raise CheckpointError(f"The checkpoint {checkpoint} is damaged: {_TENSORS} does not match its checksum. {advice}")


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, tied ones under their first name."""
    return dict(model.named_parameters())


def _optimizer_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: optimizer.state[p] for name, p in _parameters(model).items() if p in optimizer.state}

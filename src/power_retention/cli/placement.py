"""Where a command runs models and in what dtype, and where it puts a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from power_retention.training.folder import RunFolder


def placement(precision: str) -> tuple[torch.device, torch.dtype]:
    """The first GPU where there is one; float32, bfloat16, or auto: bfloat16 on a GPU."""
    import torch

    check_precision(precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    return device, dtypes[precision]


def check_precision(precision: str) -> str:
    """The precision that an option names, if there is such a one."""
    from power_retention.errors import ArgumentError

    if precision not in ("float32", "bfloat16", "auto"):
        raise ArgumentError(f"--precision must be float32, bfloat16 or auto, not {precision!r}.")
    return precision


def choose_device(device: str) -> torch.device:
    """The device of this process that an option names: cpu, cuda, or auto for a GPU where there is one."""
    import torch

    from power_retention.errors import ArgumentError
    from power_retention.training.parallel import launched_ranks, local_device

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).cpu()  # "meta" is a device, too, and holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(
            f"--device {device} cannot be used here ({error}); cpu, cuda or auto was expected."
        ) from error
    return local_device(chosen.type) if launched_ranks() > 1 else chosen


@contextmanager
def placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Iterator[PreTrainedModel]:
    """The model on a device in a dtype; afterwards its weights are where and what they were.

    Buffers keep their dtype: rotary frequencies in bfloat16 are another model's.
    """
    before = [value.data for value in model.parameters()]
    try:
        for value in model.parameters():
            value.data = value.data.to(device, dtype)
        model.to(device)
        yield model
    finally:
        model.to("cpu")
        for value, data in zip(model.parameters(), before, strict=True):
            value.data = data


def hold_run_folder(held: ExitStack, out: Path, folder: RunFolder, resume: bool) -> None:
    """Keep other runs out of a folder for as long as the stack is open, and look again whether one was here first."""
    from power_retention.files import held_folder

    held.enter_context(held_folder(folder.path))
    if folder.exists:
        check_run_folder(out, folder, resume)


def check_run_folder(out: Path, folder: RunFolder, resume: bool) -> None:
    """Refuse to begin where something is, and to resume where nothing is."""
    from power_retention.errors import CheckpointError, OutputError
    from power_retention.files import check_new_folder

    if not folder.exists:
        if resume and out.exists() and any(out.iterdir()):
            raise CheckpointError(f"{out} holds no run to resume; choose another folder.")
        check_new_folder(out)
    elif (out / "config.json").exists():
        raise OutputError(f"{out} holds a finished retraining; choose another folder.")
    elif not resume:
        raise OutputError(f"{out} holds an unfinished run; continue it with --resume, or choose another folder.")

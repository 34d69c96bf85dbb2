"""Where a command runs models, and in what dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def placement(precision: str) -> tuple[torch.device, torch.dtype]:
    """The first GPU where there is one; float32, bfloat16, or auto: bfloat16 on a GPU."""
    import torch

    from power_retention.errors import ArgumentError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    auto = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"auto": auto, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision not in dtypes:
        raise ArgumentError(f"--precision must be float32, bfloat16 or auto, not {precision!r}.")
    return device, dtypes[precision]


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

"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from power_retention.ops.triton.samples import HeadShape

PASSES = ("forward", "forward + backward")
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
"""Largest relative error of outputs and gradients; bfloat16 attention has about 3e-3."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        shapes: heads.
        lengths: T of forward passes, increasing.
        longest_backward: no gradients past this T.
        checked: tokens on which every contender's outputs and gradients are held against float64.
        stages_at: T at which our kernels are timed one by one.
        decode_shape, contexts, batches: decoding; none where ``contexts`` is empty.
        dtype: of the inputs.
        seconds: time a measurement may take, besides its first three calls.
        patience: a contender leaves a shape once a call is expected to take more seconds than this.
    """

    shapes: tuple[HeadShape, ...]
    lengths: tuple[int, ...]
    longest_backward: int
    checked: int
    stages_at: int
    decode_shape: HeadShape
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    dtype: torch.dtype
    seconds: float = 0.3
    patience: float = 2.5

    @classmethod
    def usual(cls, device: torch.device, *, quick: bool = False) -> Settings:
        """The published figures' settings on a GPU, smaller ones on a CPU, and ``quick`` ones that take seconds."""
        flagship = HeadShape(40, 8, 128, 128)
        lengths: tuple[int, ...]
        contexts: tuple[int, ...]
        if device.type == "cuda" and quick:
            return cls((flagship,), (4096, 16384), 16384, 1000, 16384, flagship, (16384,), (1,), torch.bfloat16, 0.05)
        if device.type == "cuda":
            lengths = (1024, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
            contexts = (4096, 16384, 65536, 262144, 1048576)
            shapes = (HeadShape(12, 12, 64, 64), flagship)
            return cls(shapes, lengths, 262144, 3000, 65536, flagship, contexts, (1, 8, 32), torch.bfloat16)
        if quick:
            tiny = HeadShape(4, 2, 16, 16)
            return cls((tiny,), (128, 512), 512, 200, 512, tiny, (512, 2048), (1,), torch.float32, 0.01)
        laptop = HeadShape(9, 3, 64, 64)
        lengths, contexts = (512, 1024, 2048, 4096, 8192), (1024, 4096, 16384, 65536)
        return cls((laptop,), lengths, 4096, 300, 4096, laptop, contexts, (1,), torch.float32, 0.5)


def first_line(error: Exception) -> str:
    """What a report says of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

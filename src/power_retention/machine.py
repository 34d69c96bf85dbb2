"""What this machine can do, measured."""

from __future__ import annotations

import time

import torch


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Best of several square matrix products on the CPU, in 10⁹ operations a second."""
    a = torch.randn(size, size).to(dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9

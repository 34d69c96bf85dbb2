"""``power-retention env``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import typer

from power_retention.cli.display import print_json, table
from power_retention.cli.options import Json

_PACKAGES = (
    "power-retention",
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "numpy",
    "gguf",
    "accelerate",
    "lm-eval",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(env)


def env(json: Json = False) -> None:
    """What a bug report needs: versions, processor, memory, devices, backends.

    Example:

        power-retention env --json
    """
    report = collect()
    print_json(report) if json else table("Environment", ("what", "value"), [(k, str(v)) for k, v in report.items()])


def collect() -> dict[str, Any]:
    """The environment as plain values."""
    import psutil
    import torch

    from power_retention.machine import matmul_rate, processor_name
    from power_retention.ops import LAYOUT, backend_names

    report: dict[str, Any] = {name: _version(name) for name in _PACKAGES}
    report |= {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cores": psutil.cpu_count(logical=False),
        "torch threads": torch.get_num_threads(),
        "memory, GB": round(psutil.virtual_memory().total / 1e9, 1),
        "GPUs": ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none",
        "float32 matmul, GFLOP/s": round(matmul_rate(torch.float32)),
        "bfloat16 matmul, GFLOP/s": round(matmul_rate(torch.bfloat16)),
        "state layout": LAYOUT,
        "backends": ", ".join(backend_names()),
    }
    return report


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"

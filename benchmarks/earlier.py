"""What a benchmark's file holds already, for a run that goes on from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def measured_where() -> dict[str, Any]:
    """The device and torch: what figures of one file have in common."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }


def earlier(out: Path, same: dict[str, Any]) -> dict[str, Any]:
    """The report in ``out``, empty where there is none; the end of the run if one of these fields is not the same in it."""
    if not out.exists():
        return {}
    held: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    for field, value in same.items():
        if held.get(field) != value:
            raise SystemExit(
                f"{out} was measured on {held.get('device')} with {field} {held.get(field)}, not {value}: name another file."
            )
    return held

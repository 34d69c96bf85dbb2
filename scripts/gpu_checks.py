"""What the checks on a GPU in this folder share."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from power_retention.files import write_json

Checked = tuple[bool, dict[str, Any]]

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""The shape of SmolLM2-135M, but for its vocabulary."""


def place(model: Any, dtype: torch.dtype) -> Any:
    """A copy on the GPU; its buffers keep their dtype."""
    model = copy.deepcopy(model)
    for value in model.parameters():
        value.data = value.data.to("cuda", dtype)
    return model.to("cuda")


def run_checks(checks: dict[str, Callable[[], Checked]], out: Path | None) -> int:
    """Run every check, print a line each and write what they found; 0 if all are right."""
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": {}}
    for name, check in checks.items():
        started = time.perf_counter()
        right, values = check()
        seconds = round(time.perf_counter() - started, 1)
        results["checks"][name] = {"right": right, "seconds": seconds, **values}
        print("right" if right else "WRONG", name, json.dumps(values), f"{seconds} s", flush=True)
    if out is not None:
        write_json(out, results)
    return 0 if all(check["right"] for check in results["checks"].values()) else 1

"""Log-probabilities of the engine against our Hugging Face class, which reads each sequence alone and at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engines
import pytest
from vllm import LLM

from tiny_models import VARIANTS

DENSE = {name: changes for name, changes in VARIANTS.items() if "num_local_experts" not in changes}
BASE = {"rope_theta": 1e4}
FAMILIES = {
    **DENSE,
    "partial rotation": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "brumby": {"published": "brumby", "head_dim": 16},
    "powercoder": {"published": "powercoder"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_concurrent_ragged_requests_in_pieces(
    family: str, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    folder = folder_of(**FAMILIES[family])
    outputs = engines.generate(start(folder), engines.prompts_of(engines.LENGTHS))
    # The fourth power quadruples relative errors, and each chunk form sums in its own order.
    allowed = engines.CLOSE * (10 if FAMILIES[family].get("power", 2) > 2 else 1)
    assert engines.distance(engines.open_model(folder), outputs) < allowed


def test_states_in_bfloat16(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    options = {"power_retention": {"state_dtype": "bfloat16"}}
    outputs = engines.generate(start(folder_of(), additional_config=options), engines.prompts_of(engines.LENGTHS))
    assert engines.CLOSE < engines.distance(engines.open_model(folder_of()), outputs) < 0.2


def test_compiled(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    outputs = engines.generate(start(folder_of(), enforce_eager=False), engines.prompts_of(engines.LENGTHS))
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE

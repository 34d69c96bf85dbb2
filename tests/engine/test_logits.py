"""Log-probabilities of the engine against our Hugging Face class, which reads each sequence alone and at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import engines
import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM

from power_retention.conversion.convert import calibration_windows, convert, sample_text, save_conversion
from power_retention.conversion.source import open_source
from power_retention.training.text import tokenize
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
            "original_max_position_embeddings": 256,
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


def test_many_prompts_in_one_step(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    engine = start(folder_of(), max_num_seqs=40, max_num_batched_tokens=256)
    outputs = engines.generate(engine, engines.prompts_of([1 + i % 5 for i in range(40)]), 6)
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


def test_prompts_of_one_token_on_pages_of_others(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    """Steps of one token a request, in which some begin: to vLLM they have the shape of decoding."""
    engine = start(folder_of(), max_num_seqs=3)
    outputs = engines.generate(engine, engines.prompts_of([1, 9, 1, 1, 1, 4, 1, 1, 1, 1, 1, 1]), 6)
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE


def test_a_real_model_converted(start: Callable[..., LLM], stories_dir: Path, tmp_path: Path) -> None:
    source = open_source(stories_dir)
    ids = tokenize([sample_text()], source.tokenizer, max_tokens=1024).ids
    windows = calibration_windows(torch.from_numpy(ids).long(), count=2, length=256)
    save_conversion(convert(source, windows), tmp_path / "converted")
    stories = ["Once upon a time, Lily found a ball.", "Tim", "One day, a little cat wanted to play. " * 12]
    outputs = start(tmp_path / "converted", max_model_len=512).generate(stories, engines.sampling(60), use_tqdm=False)
    # Without retraining a query of a first sentence can miss all its few keys; which step reads them is a matter of
    # timing, and a state in float32 is then 1e-3 off.
    assert engines.distance(engines.open_model(tmp_path / "converted"), outputs) < 20 * engines.CLOSE


def test_states_in_bfloat16(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    options = {"power_retention": {"state_dtype": "bfloat16"}}
    outputs = engines.generate(start(folder_of(), additional_config=options), engines.prompts_of(engines.LENGTHS))
    assert engines.CLOSE < engines.distance(engines.open_model(folder_of()), outputs) < 0.2


@torch.no_grad()
def test_a_model_in_bfloat16(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder_of(), dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    outputs = engines.generate(start(folder_of(), dtype="bfloat16"), engines.prompts_of(engines.LENGTHS))
    allowed = 0.0
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        one, other = (model(ids).logits.float().log_softmax(-1) for model in (exact, rounded))
        allowed = max(allowed, (one - other).abs().max().item())
    assert engines.distance(exact, outputs) < 1.5 * allowed


def test_compiled(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    outputs = engines.generate(start(folder_of(), enforce_eager=False), engines.prompts_of(engines.LENGTHS))
    assert engines.distance(engines.open_model(folder_of()), outputs) < engines.CLOSE

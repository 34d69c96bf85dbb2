"""LoRA adapters: each request is answered by the model that its adapter, merged, would make."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from power_retention.errors import ArgumentError

MIXER = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    "llama": ({"qkv_bias": True}, ("gate_proj", "up_proj", "down_proj"), {"speculative_config": DRAFTS}),
    "powercoder": ({"published": "powercoder"}, ("c_fc", "c_proj"), {}),
}


@torch.no_grad()
def write_adapter(folder: Path, base: PreTrainedModel, rank: int, parts: tuple[str, ...]) -> PreTrainedModel:
    """A random adapter in PEFT's format, and the model it is to make of ``base``."""
    generator, tensors, merged = torch.Generator().manual_seed(rank), {}, copy.deepcopy(base)
    for name, module in merged.named_modules():
        if name.split(".")[-1] in parts:
            inner = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            outer = torch.randn(module.out_features, rank, generator=generator) / rank
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": inner,
                f"base_model.model.{name}.lora_B.weight": outer,
            }
            module.weight += 0.5 * outer @ inner
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 0.5 * rank, "target_modules": parts, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


@pytest.mark.parametrize("model", MODELS)
def test_two_adapters_in_one_batch(
    model: str, tmp_path: Path, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    changes, mlp, more = MODELS[model]
    base = engines.open_model(folder_of(**changes))
    merged = [
        write_adapter(tmp_path / "whole", base, 4, MIXER + mlp),
        write_adapter(tmp_path / "queries", base, 8, ("q_proj",)),
    ]
    adapters = [LoRARequest(name, i + 1, str(tmp_path / name)) for i, name in enumerate(("whole", "queries"))]
    options = {"enable_lora": True, "max_loras": 2, "enable_prefix_caching": True, "block_size": 16}
    engine = start(folder_of(**changes), **options, **more)
    prompts = [{"prompt_token_ids": prompt} for prompt in engines.prompts_of(engines.LENGTHS[:6]) for _ in range(2)]
    for cached in (0, 192):
        outputs = engine.generate(prompts, engines.sampling(12), lora_request=adapters * 6, use_tqdm=False)
        for i, expected in enumerate(merged):
            assert engines.distance(expected, outputs[i::2]) < engines.CLOSE
            # What one adapter read of a prompt is nothing to the other.
            assert max(output.num_cached_tokens or 0 for output in outputs[i::2]) == cached
            assert engines.distance(merged[1 - i], outputs[i::2]) > 100 * engines.CLOSE
    with pytest.raises(VLLMValidationError, match="cannot answer without an adapter"):
        engines.generate(engine, [[5]])


def test_named_states_are_of_no_adapter(
    tmp_path: Path, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    options = {"power_retention": {"states": str(tmp_path)}}
    with pytest.raises((ArgumentError, ValueError), match="of the model without adapters"):
        start(folder_of(), enable_lora=True, additional_config=options)

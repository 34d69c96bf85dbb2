"""Quantised weights: answers are those of the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import LLM

from power_retention.errors import ArgumentError, SourceError
from power_retention.serving.vllm.engine import bytes_of_weights

SHAPE = {"intermediate_size": 64, "qkv_bias": True}
GROUP = 32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

IGNORED = ["lm_head", "re:.*g_proj"]
FOUR_BITS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def compressed(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    config = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    return {**config, "ignore": IGNORED, "config_groups": {"group_0": group}}


CONFIGS = {
    "4 bits": compressed("pack-quantized", FOUR_BITS),
    "8 bits": compressed("int-quantized", EIGHT_BITS, TOKENS),
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
            "modules_to_not_convert": ["g_proj"]},
}  # fmt: skip


def packed(nibbles: Tensor) -> Tensor:
    """Eight numbers of 0…15 along the last axis in each int32, the first lowest."""
    shifted = nibbles.long().unflatten(-1, (-1, 8)) << (4 * torch.arange(8))
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


def quantised(form: str, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight ``[out, in]`` as it becomes, and the tensors that a file of this form keeps of it."""
    if form == "8 bits":
        scale = weight.abs().amax(1, keepdim=True) / 127
        whole = (weight / scale).round()
        return whole * scale, {"weight": whole.to(torch.int8), "weight_scale": scale}
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    whole = (groups / scale).round().clamp(-8, 7)
    exact, nibbles, scale = (whole * scale).flatten(1), whole.flatten(1) + 8, scale.squeeze(-1)
    if form == "4 bits":
        shape = torch.tensor(weight.shape)
        return exact, {"weight_packed": packed(nibbles), "weight_scale": scale, "weight_shape": shape}
    nibbles, scale = nibbles.T.contiguous(), scale.T.contiguous()  # [in, out], [groups, out]
    zeros = torch.full(scale.shape, 8)
    if form == "gptq":
        order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
        words = packed(nibbles.T).T.contiguous()
        return exact, {"qweight": words, "qzeros": packed(zeros - 1), "scales": scale, "g_idx": order}
    words = packed(nibbles.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1))
    return exact, {"qweight": words, "qzeros": packed(zeros), "scales": scale}


def is_projection(name: str) -> bool:
    return name.endswith("proj.weight") and "g_proj" not in name


def write(folder: Path, form: str, source: Path, chosen: Callable[[str], bool] = is_projection) -> Path:
    """The model of ``source`` with the chosen weights quantised, and, in ``folder/exact``, what they stand for."""
    shutil.copytree(source, folder)
    shutil.copytree(source, folder / "exact")
    kept: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        exact[name], parts = quantised(form, weight) if chosen(name) else (weight, {"": weight})
        stem = name.removesuffix("weight") if chosen(name) else name
        kept |= {stem + part: tensor for part, tensor in parts.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(exact, folder / "exact" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIGS[form]}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("form", CONFIGS)
def test_quantised_weights(
    form: str, tmp_path: Path, start: Callable[..., LLM], folder_of: Callable[..., Path]
) -> None:
    folder = write(tmp_path / "quantised", form, folder_of(**SHAPE))
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(folder / "exact", dtype=d) for d in (torch.float32, torch.bfloat16)
    )
    states = {"power_retention": {"states": str(tmp_path / "states")}}
    engine = start(folder, dtype="bfloat16", additional_config=states)
    outputs = engines.generate(engine, engines.prompts_of(engines.LENGTHS[:8]), 20)
    allowed = 0.0
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        one, other = (model(ids).logits.float().log_softmax(-1) for model in (exact, rounded))
        allowed = max(allowed, (one - other).abs().max().item())
    assert engines.distance(exact, outputs) < allowed
    if form != "8 bits":  # which are too close to see it
        assert engines.distance(engines.open_model(folder_of(**SHAPE)), outputs) > 1.5 * allowed
    book, question = engines.prompts_of((70, 9))
    (first,) = engines.generate(engine, [book], 10, extra_args={"save_state": "book"})
    (second,) = engines.generate(engine, [question], 10, extra_args={"state": "book"})
    assert engines.distance(exact, [second], before=book + list(first.outputs[0].token_ids)) < allowed
    size = (folder / "model.safetensors").stat().st_size
    assert bytes_of_weights(engine.llm_engine.vllm_config.model_config) == size


@pytest.mark.parametrize(
    ("form", "chosen", "sentence"),
    [
        ("4 bits", lambda name: name.endswith("proj.weight"), "leave g_proj out when quantising"),
        ("gptq", is_projection, "quantise with desc_act=False"),
    ],
)
def test_refused_when_loaded(
    form: str,
    chosen: Callable[[str], bool],
    sentence: str,
    tmp_path: Path,
    start: Callable[..., LLM],
    folder_of: Callable[..., Path],
) -> None:
    folder = write(tmp_path / "quantised", form, folder_of(**SHAPE), chosen)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: order.flip(0) for name, order in tensors.items() if name.endswith("g_idx")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=sentence):
        start(folder, dtype="bfloat16")


def test_other_methods_are_refused(start: Callable[..., LLM], folder_of: Callable[..., Path]) -> None:
    with pytest.raises((ArgumentError, ValueError), match="quantised as fp8 are not supported"):
        start(folder_of(**SHAPE), dtype="bfloat16", quantization="fp8")

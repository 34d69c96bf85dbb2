"""Every family on a GPU: its logits against the CPU's, and the memory that was planned against what CUDA allocates.

``PYTHONPATH=src python scripts/check_families_on_gpu.py --out families-gpu.json`` takes about two minutes, prints a line a
check and ends with status 1 if one fails.  Random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from power_retention.files import write_json
from power_retention.models import BrumbyConfig, PowerCoderConfig, PowerRetentionCache, PowerRetentionConfig
from power_retention.models.sizes import count_parameters, state_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {"num_local_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "dense_layers": [0]}
HALF_TURNED = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
FAMILIES: dict[str, PowerRetentionConfig] = {
    "llama": PowerRetentionConfig(**SHAPE),
    "qwen3": PowerRetentionConfig(**SHAPE, qk_norm=True),
    "qwen3-moe": PowerRetentionConfig(**SHAPE, **EXPERTS, qk_norm=True, norm_topk_prob=True),
    "glm-4.5": PowerRetentionConfig(**SHAPE, **EXPERTS, **HALF_TURNED, router="sigmoid", n_shared_experts=1),
    "brumby": BrumbyConfig(**SHAPE),
    "powercoder": PowerCoderConfig(**SHAPE),
}


@torch.no_grad()
def random_model(config: PowerRetentionConfig) -> Any:
    """Weights of a size at which every part matters; gates that hold for some dozens of tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for name, value in model.named_parameters():
        if name.endswith("g_proj.bias"):
            nn.init.constant_(value, 3.0)
        elif value.ndim >= 2:
            nn.init.normal_(value, std=1.0 if "embed" in name else value.shape[-1] ** -0.5)
    return model


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over norm of what was wanted, a token; the median, for rounding can send one to other experts."""
    got, wanted = got.cpu().double(), wanted.double()
    return float(((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median())


@torch.no_grad()
def check_logits(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Two pieces and ten steps on the GPU, against float64 on the CPU; beside it, how far ``dtype`` is off on the CPU."""
    model = random_model(FAMILIES[name])
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 700), generator=torch.Generator().manual_seed(1))
    model.set_experts_implementation("eager")  # grouped products know no float64
    wanted = model.double()(ids, use_cache=False).logits[:, -11:]
    model.to(dtype)
    on_cpu = relative_error(model(ids, use_cache=False).logits[:, -11:], wanted)
    model.cuda().set_experts_implementation("grouped_mm" if dtype == torch.bfloat16 else "batched_mm")
    ids = ids.cuda()
    whole = relative_error(model(ids, use_cache=False).logits[:, -11:], wanted)
    cache = PowerRetentionCache(model.config.num_hidden_layers)
    pieces = [model(piece, past_key_values=cache).logits for piece in ids.split([401, 289, *[1] * 10], dim=1)]
    stepped = relative_error(torch.cat(pieces, 1)[:, -11:], wanted)
    return {"cpu, same dtype": on_cpu, "whole": whole, "pieces and steps": stepped}


def check_family(name: str, dtype: torch.dtype) -> tuple[bool, dict[str, float]]:
    """No further from float64 than a few times what the CPU is in the same dtype."""
    errors = check_logits(name, dtype)
    allowed = (10 if dtype == torch.float32 else 3) * errors["cpu, same dtype"]
    return max(errors["whole"], errors["pieces and steps"]) <= allowed, {**errors, "allowed": allowed}


@torch.no_grad()
def check_memory() -> tuple[bool, dict[str, float]]:
    """Six layers of Brumby-14B at full width in bfloat16: weights, and the states of four sequences."""
    config = BrumbyConfig(num_hidden_layers=6, dtype="bfloat16")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    weights = torch.cuda.memory_allocated() - before
    ids = torch.randint(0, 1000, (4, 300), device="cuda")
    model(ids[:1, :100], use_cache=True)  # kernels and workspaces come first
    before = torch.cuda.memory_allocated()
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    states = torch.cuda.memory_allocated() - before
    held = {
        "weights, MB": weights / 1e6,
        "weights planned": 2 * count_parameters(config) / 1e6,
        "states, MB": states / 1e6,
        "states planned": 4 * state_bytes(config) / 1e6,
    }
    right = abs(held["weights, MB"] / held["weights planned"] - 1) < 0.01
    right &= abs(held["states, MB"] / held["states planned"] - 1) < 0.02
    return right and cache.get_seq_length() == 300, held


def main() -> int:
    """Run every check; 0 if all are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    out: Path | None = parser.parse_args().out
    torch.backends.cuda.matmul.allow_tf32 = False
    checks: dict[str, Callable[[], tuple[bool, dict[str, float]]]] = {"memory": check_memory}
    for dtype in (torch.float32, torch.bfloat16):
        for name in FAMILIES:
            checks[f"{name}, {str(dtype).removeprefix('torch.')}"] = lambda n=name, d=dtype: check_family(n, d)  # type: ignore[misc]
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "checks": {}}
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            right, values = check()
        except Exception as error:  # one failure must not hide the others
            right, values = False, {"error": f"{type(error).__name__}: {error}"}  # type: ignore[dict-item]
        seconds = round(time.perf_counter() - started, 1)
        results["checks"][name] = {"right": right, "seconds": seconds, **values}
        print("right" if right else "WRONG", name, json.dumps(values), f"{seconds} s", flush=True)
        torch.cuda.empty_cache()
    if out is not None:
        write_json(out, results)
    return 0 if all(check["right"] for check in results["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Memory of a training step: what is predicted from the configuration is what is held."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from power_retention.errors import ArgumentError
from power_retention.evaluation.memory import bytes_saved_by_compiling, predict_training
from power_retention.machine import measure_footprint
from power_retention.models import PowerRetentionConfig, PowerRetentionForCausalLM
from power_retention.training.layers import compile_tokenwise
from power_retention.training.segments import backward_in_segments, next_tokens

REPOSITORY = Path(__file__).parents[2]
SHAPE = {
    "vocab_size": 1003,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}


def test_the_peak_of_a_call_on_a_cpu() -> None:
    kept: list[Tensor] = []

    def call() -> None:
        a = torch.empty(1 << 20)
        b = a + 1
        del a
        kept.append(b * 2)

    assert measure_footprint(call, torch.device("cpu")).peak_bytes == pytest.approx(2 << 22, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "segment", "checkpointed", "precision", "changes"),
    [
        (512, 512, False, None, {}),
        (2048, 256, False, None, {"tie_word_embeddings": True}),
        (1024, 512, True, None, {}),
        (1024, 512, False, torch.bfloat16, {}),
        (1024, 256, False, None, {"qk_norm": True, "head_dim": 32, "gate_bias": False, "key_bias": False}),
    ],
)
def test_predicted_and_measured(
    tokens: int, segment: int, checkpointed: bool, precision: torch.dtype | None, changes: dict
) -> None:
    config = PowerRetentionConfig(**SHAPE, **changes)
    predicted = predict_training(
        config, tokens=tokens, segment=segment, precision=precision, checkpointed=checkpointed, device_type="cpu"
    )
    model = PowerRetentionForCausalLM(config).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    ids = torch.randint(0, 1003, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = next_tokens(ids)
    measured = measure_footprint(
        lambda: backward_in_segments(model, ids, labels, segment=segment, precision=precision), ids.device
    )
    assert measured.peak_bytes == pytest.approx(predicted.step, rel=0.15)


def bytes_kept(config: PowerRetentionConfig, precision: torch.dtype | None, compiled: bool) -> int:
    """Of activations, after a forward pass."""
    model = PowerRetentionForCausalLM(config).train()
    if compiled:
        compile_tokenwise(model.model.layers)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    ids = torch.zeros(1, 64, dtype=torch.int64)
    with saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=precision is not None):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    total = sum(storage.nbytes() for storage in kept.values())
    del hidden
    return total


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"qk_norm": True, "head_dim": 32}),
        (torch.bfloat16, {"norm_kind": "layer", "mlp_kind": "plain"}),
        (None, {"qk_norm": True}),
    ],
)
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor", "ignore:.*torch.jit.script:DeprecationWarning"
)  # the compiler's
def test_what_compiling_saves(
    monkeypatch: pytest.MonkeyPatch, precision: torch.dtype | None, changes: dict[str, Any]
) -> None:
    """PyTorch's own division into what is kept and what is computed again, without making code of it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    shape = SHAPE | {"num_hidden_layers": 2, "key_bias": False}
    both = [bytes_kept(PowerRetentionConfig(**shape, **changes), precision, compiled) for compiled in (False, True)]
    torch._dynamo.reset()
    a_token_and_layer = (both[0] - both[1]) / (64 * 2)
    predicted = bytes_saved_by_compiling(PowerRetentionConfig(**shape, **changes), precision)
    assert a_token_and_layer == pytest.approx(predicted, rel=0.1, abs=32)


def test_on_a_gpu_the_length_costs_host_memory_only() -> None:
    config = PowerRetentionConfig(**SHAPE)
    short, long = (predict_training(config, tokens=n, segment=4096) for n in (1 << 16, 1 << 20))
    assert short.device_bytes == long.device_bytes
    assert long.host_bytes == pytest.approx(short.host_bytes * 255 / 15)
    assert long.weights == 4 * sum(p.numel() for p in PowerRetentionForCausalLM(config).parameters())
    assert 16 * short.flops < long.flops < 1.05 * 16 * short.flops


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head_dim": 128, "power": 4}, "keeps no state"), ({"qk_norm": True, **EXPERTS}, "experts")],
)
def test_what_cannot_be_predicted_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        predict_training(PowerRetentionConfig(**SHAPE, **changes), tokens=64, segment=8)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "long.json"
    command = [sys.executable, "-W", "ignore", REPOSITORY / "benchmarks" / "long_training.py", out, "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(out.read_text())
    assert report["checks"]["tiny"]["segments, float32"] < 1e-5 < report["checks"]["tiny"]["truncated, float32"]
    rates = {(row["kind"], row["tokens"]): row["tokens_per_second"] for row in report["rows"]}
    ratios = report["ratios"]["tiny"]["cost a token at 64 over the Transformer's at"]
    assert ratios["20"] == pytest.approx(rates["transformer", 20] / rates["ours", 64])

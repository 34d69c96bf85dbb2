"""Decode speed and resident memory against the length of the context, measured in a process of its own.

A context is simulated: a Transformer's cache is filled with random keys and values, a power-retention state with random
moments.  What a decoded token costs depends on how much there is to read, not on what it says, and nobody has to wait for
a Transformer to read 32,000 tokens on a laptop.

``python -m power_retention.evaluation.decode MODEL_DIR --contexts 1024,4096`` prints one JSON line a context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from power_retention.errors import PowerRetentionError
from power_retention.models import PowerRetentionCache, PowerRetentionForCausalLM
from power_retention.models.sizes import head_width
from power_retention.ops import PowerState

WARM_UP = 3


@dataclass(frozen=True)
class DecodePoint:
    """Decoding at one context length.

    Attributes:
        context: tokens already read.
        milliseconds: median time of a token.
        low, high: 10th and 90th percentile of that time.
        resident_gb: resident memory of the process, weights included, in 10⁹ bytes.
        cache_mb: bytes that grow with (Transformer) or hold (power retention) the context, in 10⁶ bytes.
    """

    context: int
    milliseconds: float
    low: float
    high: float
    resident_gb: float
    cache_mb: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded a second."""
        return 1000 / self.milliseconds

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def measure_in_own_process(
    model_folder: Path,
    contexts: Sequence[int],
    *,
    tokens: int = 16,
    dtype: str = "float32",
    progress: Callable[[DecodePoint], None] | None = None,
) -> list[DecodePoint]:
    """Measure a saved model (Transformer or power-retention), shortest context first, in a fresh process."""
    lengths = ",".join(map(str, sorted(contexts)))
    command = [sys.executable, "-m", "power_retention.evaluation.decode", str(model_folder)]
    command += ["--contexts", lengths, "--tokens", str(tokens), "--dtype", dtype]
    points = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            points.append(DecodePoint(**json.loads(line)))
            if progress:
                progress(points[-1])
        errors = process.stderr.read()
    if process.returncode:
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        killed = process.returncode < 0 or "memory" in reason.lower()
        advice = "; a shorter longest context needs less memory." if killed else "."
        raise PowerRetentionError(
            f"Measuring {model_folder} stopped after {len(points)} of {len(contexts)} contexts ({reason}){advice}"
        )
    return points


@torch.inference_mode()
def measure(model: PreTrainedModel, context: int, tokens: int) -> DecodePoint:
    """Decode ``tokens`` tokens after a simulated context."""
    cache = _simulated_cache(model, context)
    token = torch.zeros(1, 1, dtype=torch.long)
    times = []
    for step in range(WARM_UP + tokens):
        position = torch.tensor([[context + step]])
        started = time.perf_counter()
        logits = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        times.append(1000 * (time.perf_counter() - started))
    deciles = statistics.quantiles(times[WARM_UP:], n=10)
    resident = psutil.Process().memory_info().rss / 1e9
    return DecodePoint(
        context, statistics.median(times[WARM_UP:]), deciles[0], deciles[-1], resident, _cache_bytes(cache) / 1e6
    )


def _simulated_cache(model: PreTrainedModel, context: int) -> DynamicCache | PowerRetentionCache:
    config = model.config
    heads, width = config.num_key_value_heads, head_width(config)
    if isinstance(model, PowerRetentionForCausalLM):
        states = PowerRetentionCache(config.num_hidden_layers)
        for layer in states.layers:
            state = PowerState.empty(1, heads, width, p=config.power)
            layer.store(state._replace(memory=state.memory.normal_(), normalizer=state.normalizer.uniform_()), context)
        return states
    cache = DynamicCache(config=config)
    for i in range(config.num_hidden_layers):
        keys, values = (torch.randn(1, heads, context, width, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, i)
    return cache


def _cache_bytes(cache: DynamicCache | PowerRetentionCache) -> int:
    if isinstance(cache, PowerRetentionCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--contexts", default="1024,4096,16384,32768")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).eval()
    for context in map(int, arguments.contexts.split(",")):
        print(json.dumps(asdict(measure(model, context, arguments.tokens))), flush=True)


if __name__ == "__main__":
    _main()

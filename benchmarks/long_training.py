"""Trains on one long document on one GPU, beside the same Transformer with FlashAttention; prints lines and writes JSON.

    python benchmarks/long_training.py results.json [--quick] [--models 135m 1.7b] [--kinds ours transformer] [--minutes 5]

A step is a whole one: gradients by exact back-propagation in segments, clipping, AdamW.  Weights are random, in the shapes of
SmolLM2-135M and SmolLM2-1.7B; matrix products are bfloat16, weights and optimiser state float32.  The Transformer is
transformers' Llama of the same shape with torch's scaled-dot-product attention, ordinary back-propagation, the same loss (no
full logits), the same checkpointing.  Before anything is timed, gradients in segments are held against those of the whole.
What the file holds of models and kinds that are not asked for stays there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from earlier import earlier, measured_where
from power_retention.evaluation.memory import predict_training
from power_retention.files import write_json
from power_retention.machine import measure_footprint
from power_retention.models import PowerRetentionConfig
from power_retention.training.layers import compile_layers, compile_tokenwise, recompute_layers
from power_retention.training.next_token import next_token_loss
from power_retention.training.segments import backward_in_segments, next_tokens
from training_models import Kind, clear, finish, random_ids, random_model

FULL = [(1, 8192), (8, 8192), (1, 65536), (1, 262144), (1, 1048576)]
"""(rows, tokens) of a step."""
CHECKPOINTED = {"1.7b"}
"""Shapes whose layers' activations of a whole segment would not fit."""


@dataclass
class Row:
    """One step of one model at one length; sizes in 10⁹ bytes."""

    model: str
    kind: str
    tokens: int
    segment: int
    rows: int
    seconds: float
    tokens_per_second: float
    peak_gb: float
    predicted_gb: float | None
    borders_gb: float
    loss: float
    note: str = ""


class Bench:
    """What is measured, written out after every line."""

    def __init__(self, out: Path, quick: bool, segment: int, minutes: float, compiled: bool) -> None:
        self.out, self.quick, self.segment, self.compiled = out, quick, segment, compiled
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = torch.bfloat16 if self.device.type == "cuda" else None
        self.ends = time.monotonic() + 60 * minutes
        self.same = {**measured_where(), "segment": segment, "compiled": compiled}
        self.rows: list[Row] = []
        self.checks: dict[str, Any] = {}

    def keep(self, models: list[str], kinds: list[str]) -> None:
        """Keep what was measured before, but for these kinds of these models."""
        held = earlier(self.out, self.same)
        self.checks = held.get("checks", {})
        rows = held.get("rows", [])
        self.rows = [Row(**row) for row in rows if row["model"] not in models or kind_of(row["kind"]) not in kinds]

    @property
    def left(self) -> float:
        return self.ends - time.monotonic()

    def note(self, row: Row) -> None:
        self.rows.append(row)
        print(
            f"{row.model:5} {row.kind:13} {row.rows} x {row.tokens:>9,}  {row.seconds:8.2f} s  "
            f"{row.tokens_per_second:>10,.0f} tokens/s  peak {row.peak_gb:7.3g} GB"
            + (f" (predicted {row.predicted_gb:.3g})" if row.predicted_gb else "")
            + f"  borders {row.borders_gb:.2f} GB  loss {row.loss:.3f} {row.note}",
            flush=True,
        )
        self.write()

    def write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        write_json(self.out, {**self.same, "checks": self.checks, "rows": rows, "ratios": self.ratios()})

    def ratios(self) -> dict[str, Any]:
        """Cost a token of ours against the Transformer's at each of its lengths, and how flat ours is."""
        found: dict[str, Any] = {}
        for model in {row.model for row in self.rows}:
            ours = {r.tokens: r.tokens_per_second for r in self.rows if (r.model, r.kind) == (model, "ours")}
            finished = [
                row for row in self.rows if (row.model, row.kind) == (model, "transformer") and row.tokens_per_second
            ]
            theirs = {row.tokens: row.tokens_per_second for row in finished}
            if not ours:
                continue
            longest = max(ours)
            found[model] = {
                "slowest over fastest of ours": min(ours.values()) / max(ours.values()),
                f"cost a token at {longest} over the Transformer's at": {
                    t: r / ours[longest] for t, r in theirs.items()
                },
            }
        return found


def kind_of(what: str) -> str:
    """``ours`` or ``transformer``, of however many rows."""
    return what.partition(",")[0]


def build(kind: Kind, shape: str, bench: Bench, **changes: Any) -> PreTrainedModel:
    """A random model in float32 on the device."""
    model = random_model(kind, shape, bench.device, **changes)
    if bench.compiled:
        (compile_tokenwise if kind == "ours" else compile_layers)(model.model.layers)
    if shape in CHECKPOINTED:
        recompute_layers(model.model.layers)
    return model


def document(model: PreTrainedModel, rows: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens, and what follows each."""
    ids = random_ids(model, rows, tokens, device)
    return ids, next_tokens(ids)


def gradient_of_whole(model: PreTrainedModel, ids: Tensor, labels: Tensor, precision: torch.dtype | None) -> float:
    """Ordinary back-propagation, without full logits."""
    with torch.autocast(ids.device.type, precision or torch.bfloat16, enabled=precision is not None):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = next_token_loss(hidden, model.lm_head, labels, float((labels >= 0).sum()))
    loss.backward()
    return float(loss.detach())


def predicted(
    config: PowerRetentionConfig, bench: Bench, rows: int, tokens: int, shape: str, offload: bool | None
) -> float:
    memory = predict_training(
        config,
        tokens=tokens,
        segment=bench.segment,
        batch=rows,
        precision=bench.precision,
        checkpointed=shape in CHECKPOINTED,
        compiled=bench.compiled,
        offload=offload,
        device_type=bench.device.type,
    )
    # On a CPU only what a step adds is measured.
    return (memory.device_bytes if bench.device.type == "cuda" else memory.step) / 1e9


def time_ours(bench: Bench, shape: str, lengths: list[tuple[int, int]]) -> None:
    """One step at each (rows, length)."""
    model = build("ours", shape, bench)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    result: Any = None

    def step(ids: Tensor, labels: Tensor, **options: Any) -> None:
        nonlocal result
        result = backward_in_segments(model, ids, labels, segment=bench.segment, precision=bench.precision, **options)
        finish(model, optimizer)

    warm = document(model, 1, 2 * min(bench.segment, lengths[0][1]), bench.device)
    backward_in_segments(model, *warm, segment=min(bench.segment, lengths[0][1]), precision=bench.precision)
    finish(model, optimizer)
    for rows, tokens in lengths:
        ids, labels = document(model, rows, tokens, bench.device)
        if tokens * rows <= 2 * bench.segment:
            step(ids, labels)  # shapes not seen before are tuned and compiled outside the clock
        take_host_memory(bench, model.config, tokens)
        ways: list[tuple[str, dict[str, Any]]] = [("ours" if rows == 1 else "ours, batch", {})]
        if (rows, tokens) == lengths[-2]:
            ways.append(("ours, no copy", {"offload": False}))  # what bringing states to the host and back costs
        for kind, options in ways:
            used = measure_footprint(partial(step, ids, labels, **options), bench.device)
            peak = used.peak_bytes / 1e9 + held_gb(bench.device)
            expected = predicted(model.config, bench, rows, tokens, shape, options.get("offload"))
            rate, borders = rows * tokens / used.seconds, result.border_bytes / 1e9
            bench.note(
                Row(
                    shape,
                    kind,
                    tokens,
                    bench.segment,
                    rows,
                    used.seconds,
                    rate,
                    peak,
                    expected,
                    borders,
                    float(result.loss),
                )
            )
            if bench.left < 0:
                return


def take_host_memory(bench: Bench, config: PowerRetentionConfig, tokens: int) -> None:
    """Pin what border states will lie in: that is done once a run, and kept, not once a step."""
    if bench.device.type == "cuda":
        one = predict_training(config, tokens=2 * bench.segment, segment=bench.segment).borders
        waiting = [torch.empty(one, dtype=torch.uint8, pin_memory=True) for _ in range(-(-tokens // bench.segment) - 1)]
        del waiting


def held_gb(device: torch.device) -> float:
    """Weights, optimiser and whatever else lies on the GPU between steps."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0


def time_transformer(bench: Bench, shape: str, lengths: list[int], seconds: float) -> None:
    """One step at each length, then at twice the last as long as it fits into memory and a step into so many seconds."""
    model = build("transformer", shape, bench)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loss = math.nan

    def step(ids: Tensor, labels: Tensor) -> None:
        nonlocal loss
        loss = gradient_of_whole(model, ids, labels, bench.precision)
        finish(model, optimizer)

    tokens, checkpointed = lengths[0], shape in CHECKPOINTED
    while True:
        try:
            batch = document(model, 1, tokens, bench.device)
            if tokens in lengths[:2]:
                step(*batch)  # the first is compiled, a second one for every length: outside the clock
            used = measure_footprint(partial(step, *batch), bench.device)
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            clear()
            note = "out of memory" + (", activations recomputed" if checkpointed else "")
            bench.note(Row(shape, "transformer", tokens, tokens, 1, math.inf, 0, math.inf, None, 0, math.nan, note))
            if checkpointed:
                return
            recompute_layers(model.model.layers)
            checkpointed = True
            continue
        peak, note = used.peak_bytes / 1e9 + held_gb(bench.device), "activations recomputed" if checkpointed else ""
        rate = tokens / used.seconds
        bench.note(Row(shape, "transformer", tokens, tokens, 1, used.seconds, rate, peak, None, 0, loss, note))
        longer = next((length for length in lengths if length > tokens), 2 * tokens)
        expected = used.seconds * (longer / tokens) ** 2
        if longer > 1 << 20 or expected > min(seconds, bench.left):
            print(f"{shape:5} transformer  {longer:,} tokens would take up to {expected:.0f} s: not run", flush=True)
            return
        tokens = longer


def check(bench: Bench, shape: str) -> None:
    """Relative errors of all gradients together against the whole's in float32: the whole's and the segments', bfloat16."""
    tokens, segment = (64, 16) if bench.quick else (8192, 2048)
    model = build("ours", shape, bench, num_hidden_layers=4)
    ids, labels = document(model, 1, tokens, bench.device)

    def gradient(call: Callable[[], Any]) -> Tensor:
        call()
        flat = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        model.zero_grad(set_to_none=True)
        return flat

    wanted = gradient(lambda: gradient_of_whole(model, ids, labels, None))

    def error(call: Callable[[], Any]) -> float:
        return float((gradient(call) - wanted).norm() / wanted.norm())

    narrow = torch.bfloat16
    bench.checks[shape] = found = {
        "segments, float32": error(lambda: backward_in_segments(model, ids, labels, segment=segment)),
        "whole, bfloat16": error(lambda: gradient_of_whole(model, ids, labels, narrow)),
        "segments, bfloat16": error(
            lambda: backward_in_segments(model, ids, labels, segment=segment, precision=narrow)
        ),
        "truncated, float32": error(
            lambda: backward_in_segments(model, ids, labels, segment=segment, bptt="truncated")
        ),
    }
    print(
        f"{shape:5} gradients at {tokens:,} tokens: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()), flush=True
    )
    bench.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes and lengths, to see that everything runs")
    parser.add_argument("--models", nargs="+", choices=["135m", "1.7b"], default=["135m", "1.7b"])
    parser.add_argument("--kinds", nargs="+", choices=["ours", "transformer"], default=["ours", "transformer"])
    parser.add_argument("--segment", type=int, default=32768)
    parser.add_argument("--minutes", type=float, default=5.0, help="nothing new is begun after that")
    parser.add_argument("--compile", action="store_true", help="compile the parts of layers, in both kinds of model")
    parser.add_argument(
        "--transformer-seconds", type=float, default=60.0, help="longest step of the Transformer to try"
    )
    arguments = parser.parse_args()
    segment = 32 if arguments.quick else arguments.segment
    bench = Bench(arguments.out, arguments.quick, segment, arguments.minutes, arguments.compile)
    ours = [(1, 16), (2, 16), (1, 64)] if arguments.quick else FULL
    theirs = [20, 64] if arguments.quick else [10_000, 65536]
    models = ["tiny"] if arguments.quick else arguments.models
    bench.keep(models, arguments.kinds)
    for shape in models:
        if "ours" in arguments.kinds:
            check(bench, shape)
            clear()
            time_ours(bench, shape, ours)
            clear()
        if "transformer" in arguments.kinds and bench.left > 0:
            time_transformer(bench, shape, theirs, 0.05 if arguments.quick else arguments.transformer_seconds)
        clear()
    print(bench.ratios())


if __name__ == "__main__":
    main()

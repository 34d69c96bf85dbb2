"""Tokens a second and utilisation of training on one GPU: distilling, plain, and the Transformer with FlashAttention.

    python benchmarks/training_throughput.py results.json [--minutes 4.5] [--cells "135m 65536 plain" …] [--quick]

Three ways to train a shape (SmolLM2-135M, SmolLM2-1.7B; random weights) at 2 k, 16 k and 64 k tokens a sequence:

- distil: a step of `power-retention retrain`: a Transformer teacher is read, the student learns its distribution;
- plain: our model learns the next token;
- transformer: transformers' Llama learns the next token in the same loop, with whichever of FlashAttention and cuDNN's
  attention is faster here.

All three multiply in bfloat16 and keep float32 weights, clip, take AdamW's step, never hold full logits, compile their
layers and their loss, and replay the step as a CUDA graph unless layers are computed again in the backward pass ("again").
What a token needs, for the utilisation:

    plain        6·N + 3·R,   R the cheaper form of power retention: attention over T or the recurrence, forward
    transformer  6·N + 3·A,   A = layers · Hq · 2·d·T, causal attention, forward
    distil       the same as plain, and 2·N + A for the teacher

with N the parameters, a tied head counted once.  Nothing that is computed twice counts twice.  Utilisation is of 989·10¹² a
second (dense bfloat16 of an H100 or H200) and of what a large matrix product reaches in the same run.

First, gradients in bfloat16 are held against float32's, and must be no further off than twice what they are without any
kernel; then every cell's compiled loss and gradient norm against an uncompiled step's, and where the norms differ all its
gradients against float32's in the same way.  A cell that differs is not reported as a speed.  Every cell is written when it
is done: a run that was stopped goes on with the same command, cells that are there are not measured again, and --minutes 0
only draws the figure.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from earlier import earlier, measured_where
from power_retention.evaluation.drawing import STUDENT_COLOUR, TEACHER_COLOUR, figure_file, tidy
from power_retention.files import write_json
from power_retention.machine import matmul_rate
from power_retention.models.sizes import attention_flops, count_parameters, recurrence_flops
from power_retention.training.layers import compile_layers, recompute_layers
from power_retention.training.next_token import next_token_loss_of_rows
from power_retention.training.recipe import Recipe
from power_retention.training.recording import Recording
from power_retention.training.retraining import Retraining
from power_retention.training.text import Tokens
from training_models import Kind, clear, our_config, random_ids, random_model

Way = Literal["distil", "plain", "transformer"]

PEAK = 989e12
"""Dense bfloat16 operations a second that an H100 or H200 is sold with."""
STEPS = 5
"""Fewest steps that are timed."""
NORMS_APART = 0.05
"""Relative difference of the gradient's norm beyond which the gradients themselves are held against float32."""
_ATTENTION = "causal_attention_of_a_benchmark"
_BACKENDS = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}


@dataclass(frozen=True)
class Cell:
    """What is measured: a way to train a shape at a length."""

    shape: str
    length: int
    way: Way

    @property
    def name(self) -> str:
        return f"{self.shape} {self.length} {self.way}"


# What the targets are about first.
CELLS = [
    Cell("135m", 65536, "plain"),
    Cell("135m", 65536, "transformer"),
    Cell("135m", 2048, "distil"),
    Cell("135m", 2048, "plain"),
    Cell("135m", 2048, "transformer"),
    Cell("1.7b", 2048, "plain"),
    Cell("1.7b", 2048, "transformer"),
    Cell("135m", 16384, "plain"),
    Cell("135m", 16384, "transformer"),
    Cell("1.7b", 65536, "plain"),
    Cell("1.7b", 65536, "transformer"),
    Cell("1.7b", 2048, "distil"),
    Cell("135m", 65536, "distil"),
    Cell("135m", 16384, "distil"),
    Cell("1.7b", 16384, "plain"),
    Cell("1.7b", 16384, "transformer"),
    Cell("1.7b", 16384, "distil"),
    Cell("1.7b", 65536, "distil"),
]
QUICK = [Cell("tiny", length, way) for length in (16, 128) for way in ("distil", "plain", "transformer")]
TOKENS = {"135m": 65536, "1.7b": 32768, "tiny": 64}
"""Of a step, unless a sequence is longer: what fits into 140 GB without computing layers again."""


@dataclass(frozen=True)
class Setting:
    """How a step is taken.

    Attributes:
        rows: sequences of it.
        compiled, recorded, again: see the module.
        narrow: multiply in bfloat16.
    """

    rows: int
    compiled: bool
    recorded: bool
    again: bool
    narrow: bool

    @property
    def eager(self) -> Setting:
        """The same step without anything clever."""
        return Setting(self.rows, compiled=False, recorded=False, again=True, narrow=self.narrow)


class Trainer(Protocol):
    """Takes steps; both return the loss and the gradient's norm."""

    def gradients(self) -> tuple[float, float]:
        """Of the first step, without taking it."""

    def step(self) -> tuple[float, float]:
        """Taken."""

    def all_gradients(self) -> list[Tensor]:
        """Of the first step, without taking it, in host memory."""


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # [B, T]
    labels: Tensor  # [B, T]


class Plain:
    """Next-token training of either kind of model."""

    def __init__(self, kind: Kind, cell: Cell, setting: Setting, device: torch.device) -> None:
        self.model = random_model(kind, cell.shape, device, attention=_ATTENTION)
        self.setting, self.device = setting, device
        ids = random_ids(self.model, setting.rows, cell.length + 1, device)
        self.batch = _Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        if setting.compiled:
            compile_layers(self.model.model.layers, whole=True)
        if setting.again:
            recompute_layers(self.model.model.layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.recording: Recording[_Batch] | None = None

    def gradients(self) -> tuple[float, float]:
        figures = self._compute(self.batch)
        return float(figures["loss"]), float(figures["gradient_norm"])

    def all_gradients(self) -> list[Tensor]:
        _, norm = self.gradients()
        return [x * max(1.0, norm) for x in _gradients_of(self.model)]

    def step(self) -> tuple[float, float]:
        if self.setting.recorded:
            if self.recording is None:
                self.recording = Recording(self._compute, self.batch, list(self.model.parameters()))
            figures = self.recording.replay(self.batch)
        else:
            figures = self._compute(self.batch)
        self.optimizer.step()
        if not self.setting.recorded:
            self.optimizer.zero_grad(set_to_none=True)
        return float(figures["loss"]), float(figures["gradient_norm"])

    def _compute(self, batch: _Batch) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.narrow):
            hidden = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            hidden, labels = hidden.flatten(0, 1), batch.labels.flatten()
            head, count = self.model.lm_head, float(batch.ids.numel())
            loss = next_token_loss_of_rows(hidden, head, labels, count, compiled=self.setting.compiled)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        return {"loss": loss.detach(), "gradient_norm": norm}


class Distilling:
    """A step of `retrain`'s second stage."""

    def __init__(self, cell: Cell, setting: Setting, device: torch.device) -> None:
        student, teacher = (random_model(kind, cell.shape, device) for kind in ("ours", "transformer"))
        with torch.no_grad():
            for p in teacher.parameters():  # not the student's own weights
                p.add_(torch.randn_like(p) * 0.02)
        ids = np.random.default_rng(1).integers(0, student.config.vocab_size, 4 * setting.rows * (cell.length + 1))
        tokens = Tokens(ids.astype(np.int32), np.array([0, len(ids)]))
        precision: Literal["float32", "bfloat16"] = "bfloat16" if setting.narrow else "float32"
        recipe = Recipe(1000, 0.0, setting.rows, cell.length, precision=precision)
        self.retraining = Retraining(
            student,
            teacher,
            tokens,
            recipe,
            device=device,
            compiled=setting.compiled,
            recorded=setting.recorded,
            recompute=setting.again,
        )
        self.steps = 0

    def gradients(self) -> tuple[float, float]:
        loss = self.retraining.gradients(0)["loss"]
        gradients = [p.grad for p in self.retraining.student.parameters() if p.grad is not None]
        return loss, float(torch.nn.utils.get_total_norm(gradients))

    def all_gradients(self) -> list[Tensor]:
        self.gradients()
        return _gradients_of(self.retraining.student)

    def step(self) -> tuple[float, float]:
        metrics = self.retraining.step(self.steps)
        self.steps += 1
        return metrics["loss"], metrics["gradient_norm"]


def _gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Norm of the difference over the norm of what was wanted, all tensors together, summed in float64."""

    def norm(parts: Iterator[Tensor]) -> float:
        return math.sqrt(sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in parts))

    return norm(a - b for a, b in zip(found, wanted, strict=True)) / norm(iter(wanted))


def trainer(cell: Cell, setting: Setting, device: torch.device) -> Trainer:
    """What takes the steps of a cell."""
    if cell.way == "distil":
        return Distilling(cell, setting, device)
    return Plain("ours" if cell.way == "plain" else "transformer", cell, setting, device)


def causal_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float = 1.0, **kwargs: Any
) -> tuple[Tensor, None]:
    """What the Transformer's layers call: torch's attention without any mask, on ``[B, H, T, d]``."""
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, causal_attention)


def flops_per_token(cell: Cell) -> float:
    """Operations that a token needs; see the module."""
    config = our_config(cell.shape)
    attention = attention_flops(config, cell.length)
    transformer = random_model("transformer", cell.shape, torch.device("meta")).num_parameters()
    if cell.way == "transformer":
        return 6 * transformer + 3 * attention
    ours = 6 * count_parameters(config) + 3 * min(attention, recurrence_flops(config))
    return ours + (2 * transformer + attention if cell.way == "distil" else 0)


class Bench:
    """What is measured, written out after every cell; what the file holds already is kept."""

    def __init__(self, out: Path, minutes: float, quick: bool, compiled: bool | None) -> None:
        self.out, self.quick = out, quick
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device.type == "cuda"
        self.compiled = self.on_gpu if compiled is None else compiled
        self.started, self.minutes, self.longest = time.monotonic(), minutes, 0.0
        where = measured_where()
        self.held = earlier(out, where) or {**where, "compiled": self.compiled, "checks": {}, "cells": {}}

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Rows by the cell's name."""
        found: dict[str, dict[str, Any]] = self.held["cells"]
        return found

    def has_time(self) -> bool:
        """Whether a cell as long as the longest so far would end in time."""
        return time.monotonic() - self.started + self.longest < 60 * self.minutes

    def write(self) -> None:
        write_json(self.out, self.held | {"over the Transformer": ratios(self.cells)})

    def measure_ceilings(self) -> None:
        """The rate of a large matrix product, and the faster attention at each length."""
        size = 8192 if self.on_gpu else 256
        self.held["matmul_flops"] = 1e9 * matmul_rate(
            torch.bfloat16 if self.on_gpu else torch.float32, size, self.device
        )
        print(f"matrix products of {size}: {self.held['matmul_flops'] / 1e12:.3g} TFLOP/s", flush=True)

    def check(self, shape: str) -> None:
        """Errors of all gradients of two layers against float32, relative: in bfloat16, and in bfloat16 without any kernel."""
        length = 16 if self.quick else 1024
        found: dict[str, Any] = {}
        for kind in ("ours", "transformer"):
            gradient = partial(self._gradient, kind, shape, length)
            with portable():
                wanted, usual = gradient(narrow=False), gradient(narrow=True)
            found[kind] = _apart(gradient(narrow=True), wanted)
            found[f"{kind}, torch's operations"] = _apart(usual, wanted)
        print(f"{shape}: gradients off by " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()), flush=True)
        # Inside, torch's operations keep float32 where kernels round to bfloat16.
        found["right"] = all(found[kind] < 2 * found[f"{kind}, torch's operations"] for kind in ("ours", "transformer"))
        self.held["checks"][shape] = found
        self.write()

    def _gradient(self, kind: Kind, shape: str, length: int, *, narrow: bool) -> list[Tensor]:
        model = random_model(kind, shape, self.device, attention=_ATTENTION, num_hidden_layers=2)
        ids = random_ids(model, 1, length + 1, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            loss = next_token_loss_of_rows(hidden.flatten(0, 1), model.lm_head, ids[:, 1:].flatten(), float(length))
        loss.backward()
        return _gradients_of(model)

    def measure(self, cell: Cell) -> None:
        """Time a cell, computing layers again where it does not fit otherwise; out of memory is a result."""
        begun = time.monotonic()
        rows, row = max(1, TOKENS[cell.shape] // cell.length), {}
        for again in (False, True):
            if not again and rows * cell.length > TOKENS[cell.shape]:
                continue  # known not to fit
            recorded = self.on_gpu and not again
            setting = Setting(rows, self.compiled, recorded, again, narrow=self.on_gpu)
            try:
                row = self._timed(cell, setting)
                break
            except RuntimeError as error:
                if not ran_out_of_memory(error):
                    raise
                row = {"note": "out of memory"}
            clear()
        row |= {"length": cell.length, "rows": rows, "layers computed again": again, "recorded": recorded}
        self.longest = max(self.longest, time.monotonic() - begun)
        self.cells[cell.name] = row | {"seconds in all": round(time.monotonic() - begun, 1)}
        self.write()
        print(f"{cell.name:24} {said(row)}", flush=True)

    def _timed(self, cell: Cell, setting: Setting) -> dict[str, Any]:
        clear()
        torch.compiler.reset()  # or a second shape is compiled for every shape
        attention = "none" if cell.way == "plain" else self._fastest_attention(cell)
        with only(attention):
            eager = trainer(cell, setting.eager, self.device).gradients()
            clear()
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            fast = trainer(cell, setting, self.device)
            first = fast.step()
            fast.step()
            times = [self._seconds(fast.step)]
            while len(times) < STEPS or (len(times) < 20 and sum(times) < 3 and not self.quick):
                times.append(self._seconds(fast.step))
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.on_gpu else None
        p10, median, p90 = np.quantile(times, [0.1, 0.5, 0.9])
        rate = setting.rows * cell.length / median
        needed = flops_per_token(cell)
        del fast
        # The matmuls' own rounding moves a loss by 1e-4 of itself, a norm by some more.
        errors: dict[str, float] = {}
        right = math.isclose(first[0], eager[0], rel_tol=2e-3) and self.held["checks"][cell.shape]["right"]
        if right and not math.isclose(first[1], eager[1], rel_tol=NORMS_APART):
            errors = self._errors_of_gradients(cell, setting, attention)
            right = errors["compiled"] <= 2 * errors["uncompiled"]
        return {
            "right": right,
            "gradients off float32": errors,
            "tokens_per_second": rate,
            "milliseconds": {"median": 1e3 * median, "p10": 1e3 * p10, "p90": 1e3 * p90, "steps": len(times)},
            "flops_per_token": needed,
            "of_peak": rate * needed / PEAK,
            "of_matmul": rate * needed / self.held["matmul_flops"],
            "peak_gb": peak,
            "attention": attention,
            "first step": {"loss": first[0], "gradient_norm": first[1]},
            "uncompiled": {"loss": eager[0], "gradient_norm": eager[1]},
        }

    def _errors_of_gradients(self, cell: Cell, setting: Setting, attention: str) -> dict[str, float]:
        """Errors of all gradients of the first step against float32, relative: compiled, and without anything clever."""

        def found(setting: Setting, attention: str) -> list[Tensor]:
            clear()
            with only(attention):
                return trainer(cell, setting, self.device).all_gradients()

        wanted = found(replace(setting.eager, narrow=False), "any")
        ways = {"compiled": replace(setting, recorded=False), "uncompiled": setting.eager}
        return {name: _apart(found(way, attention), wanted) for name, way in ways.items()}

    def _seconds(self, step: Callable[[], object]) -> float:
        self._wait()
        started = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _fastest_attention(self, cell: Cell) -> str:
        """The name of the backend of torch's attention that is faster forwards and back at this shape."""
        if not self.on_gpu:
            return "torch's own"
        config, times = our_config(cell.shape), {}
        d, own, shared = (
            int(x or 0) for x in (config.head_dim, config.num_attention_heads, config.num_key_value_heads)
        )
        like: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16, "requires_grad": True}
        q, k, v = (torch.randn(1, heads, cell.length, d, **like) for heads in (own, shared, shared))
        for name in _BACKENDS:

            def both_passes() -> None:
                y, _ = causal_attention(None, q, k, v, None, d**-0.5)
                y.sum().backward()

            try:
                with only(name):
                    both_passes()
                    times[name] = min(self._seconds(both_passes) for _ in range(5))
            except RuntimeError as error:  # not built, or not for this shape
                print(f"  {name}: {str(error).splitlines()[0]}", flush=True)
        return min(times, key=times.__getitem__)


@contextmanager
def only(attention: str) -> Iterator[None]:
    """Let torch use one of its attentions alone."""
    if attention not in _BACKENDS:
        yield
        return
    with sdpa_kernel(_BACKENDS[attention]):
        yield


@contextmanager
def portable() -> Iterator[None]:
    """Compute with torch's operations, in float32 proper."""
    name, before = "POWER_RETENTION_BACKEND", os.environ.get("POWER_RETENTION_BACKEND")
    precision = torch.get_float32_matmul_precision()
    os.environ[name] = "torch"
    torch.set_float32_matmul_precision("highest")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is why, if only because it ended the recording of a graph."""
    return error is not None and (isinstance(error, torch.OutOfMemoryError) or ran_out_of_memory(error.__context__))


def ratios(cells: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our tokens a second over the Transformer's in the same loop, where both were measured and are right."""
    found = {}
    for name, row in cells.items():
        beside = cells.get(name.replace("plain", "transformer"), {})
        if name.endswith("plain") and row.get("right") and beside.get("right"):
            found[name.removesuffix(" plain")] = row["tokens_per_second"] / beside["tokens_per_second"]
    return found


def said(row: dict[str, Any]) -> str:
    """A cell in a line."""
    how = f"{row['rows']} x {row['length']}{', layers computed again' if row['layers computed again'] else ''}"
    if "note" in row:
        return f"{how}: {row['note']}"
    if not row["right"]:
        return f"{how}: WRONG, {row['first step']} compiled and {row['uncompiled']} not"
    time_of_step = row["milliseconds"]
    return (
        f"{how}: {row['tokens_per_second']:,.0f} tokens/s, {time_of_step['median']:.1f} ms "
        f"({time_of_step['p10']:.1f} to {time_of_step['p90']:.1f}), {row['of_peak']:.1%} of the peak, "
        f"{row['of_matmul']:.1%} of the matmul's, attention: {row['attention']}, loss {row['first step']['loss']:.4f}"
    )


def draw(held: dict[str, Any], out: Path) -> None:
    """Tokens a second and utilisation against length, one pair of axes a shape."""
    right = {tuple(name.split()): row for name, row in held["cells"].items() if row.get("right")}
    shapes = sorted({shape for shape, _, _ in right})
    with figure_file(out, len(shapes), 2, size=(10, 3.8 * len(shapes)), squeeze=False) as (figure, axes):
        colours = {"transformer": TEACHER_COLOUR, "plain": STUDENT_COLOUR, "distil": "#6fa8c9"}
        for shape, (rate, share) in zip(shapes, axes, strict=True):
            for way, colour in colours.items():
                rows = sorted((int(t), row) for (s, t, w), row in right.items() if (s, w) == (shape, way))
                lengths = [length for length, _ in rows]
                rate.plot(lengths, [row["tokens_per_second"] for _, row in rows], "o-", color=colour, label=way)
                share.plot(lengths, [100 * row["of_peak"] for _, row in rows], "o-", color=colour)
            lengths = sorted({int(t) for s, t, _ in right if s == shape})
            for axis, label in ((rate, f"{shape}: tokens a second"), (share, "operations needed, % of the peak")):
                axis.set(xscale="log", ylabel=label, xlabel="tokens a sequence", ylim=(0, None))
                axis.set_xticks(
                    lengths, [f"{length // 1024} k" if length >= 1024 else str(length) for length in lengths]
                )
                axis.minorticks_off()
                tidy(axis)
            rate.legend(frameon=False)
        figure.suptitle(f"Training steps on one {held['device']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=4.5, help="no cell is begun that would probably end later")
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], help="these only, in this order")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="by default on a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    arguments = parser.parse_args()
    bench = Bench(arguments.out, arguments.minutes, arguments.quick, arguments.compile)
    known = {cell.name: cell for cell in CELLS}
    wanted = [known[name] for name in arguments.cells] if arguments.cells else QUICK if arguments.quick else CELLS
    missing = [cell for cell in wanted if cell.name not in bench.cells]
    if missing and bench.has_time():
        bench.measure_ceilings()
    failed: list[str] = []
    for cell in missing:
        if not bench.has_time():
            print(f"Out of time: {cell.name} was not measured.", flush=True)
            continue
        if cell.shape not in bench.held["checks"]:
            bench.check(cell.shape)
        try:
            bench.measure(cell)
        except Exception:  # the others are still worth something
            traceback.print_exc()
            failed.append(cell.name)
            clear()
    print(json.dumps(ratios(bench.cells), indent=1))
    if any(row.get("right") for row in bench.cells.values()):
        draw(bench.held, arguments.out.with_suffix(".png"))
    if failed:
        raise SystemExit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()

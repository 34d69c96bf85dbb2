"""The measuring: every contender held against float64, then timed over T.  Nothing that failed its check is timed."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from power_retention.evaluation.bench.contenders import OURS, Contender, Inputs, a_pass, contenders, draw_inputs
from power_retention.evaluation.bench.decoding import attention_backends, decode
from power_retention.evaluation.bench.report import is_right
from power_retention.evaluation.bench.settings import PASSES, TOLERANCES, Settings, first_line
from power_retention.evaluation.bench.stages import stages
from power_retention.evaluation.exact import exact_attention, relative_error
from power_retention.machine import copy_rate, matmul_rate, processor_name, time_call
from power_retention.ops.triton.samples import HeadShape

FORMAT = 1

_RESULTS = ("y", "dq", "dk", "dv", "dlog_g")
_SAMPLED_ROWS = 16

Progress = Callable[[str], None]


def measure(
    settings: Settings, device: torch.device, progress: Progress | None = None, only: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Measure everything; yields the report as it grows, so that an interrupted run has what it found.

    Args:
        settings: what is measured.
        device: where.
        progress: called with a note after each measurement.
        only: contenders by name; all that can run here if empty.
    """
    here, absent = contenders(device)
    here = [c for c in here if not only or c.name in only]
    report: dict[str, Any] = {
        "format": FORMAT,
        "machine": describe_machine(device),
        "ceilings": ceilings(settings.dtype, device),
        "absent": absent,
        "dtype": str(settings.dtype)[6:],
        "checks": [],
        "times": [],
        "stages": [],
        "decode": [],
    }
    tell = progress or (lambda note: None)
    for shape in settings.shapes:
        for contender in here:
            report["checks"].append(_checked(contender, shape, settings, device))
            tell(f"{shape}, {contender.name}: {report['checks'][-1]['verdict']}")
        for contender in here:
            for row in _times(contender, shape, settings, device, is_right(report, contender.name, str(shape))):
                report["times"].append(row)
                tell(f"{shape}, {row['tokens']:,} tokens, {contender.name}, {row['pass']}: {_brief(row)}")
                yield report
        if is_right(report, OURS, str(shape)):
            report["stages"] += stages(shape, settings, device)
            tell(f"{shape}: stages")
    for row in decode(settings, device):
        report["decode"].append(row)
        tell(f"decoding, {row['contender']}, batch {row['batch']}: {_brief(row)}")
        yield report
    yield report


def count(settings: Settings, device: torch.device, only: Sequence[str] = ()) -> int:
    """Most notes that :func:`measure` sends."""
    here = [c for c in contenders(device)[0] if not only or c.name in only]
    backward = sum(n <= settings.longest_backward for n in settings.lengths)
    a_shape = len(here) * (1 + len(settings.lengths) + backward) + 1
    attention = len(attention_backends(device))
    return len(settings.shapes) * a_shape + len(settings.batches) * (1 + attention * len(settings.contexts))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, system and versions."""
    packages = ("power-retention", "torch", "triton", "numpy", "retention", "flash-linear-attention")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "versions": found,
        "date": time.strftime("%Y-%m-%d"),
    }


def ceilings(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Measured matrix products in 10¹² operations a second, and copies in 10⁹ bytes a second."""
    gpu = device.type == "cuda"
    return {
        "matmul_tflops": matmul_rate(dtype, 8192 if gpu else 1024, device) / 1000,
        "copy_gb_s": copy_rate(device, 2048 if gpu else 256),
    }


def _checked(contender: Contender, shape: HeadShape, settings: Settings, device: torch.device) -> dict[str, Any]:
    """All outputs and gradients on a shorter call with two key/value heads."""
    groups = shape.query_heads // shape.heads
    heads = min(2, shape.heads)
    small = HeadShape(groups * heads, heads, shape.width, shape.value_width)
    row: dict[str, Any] = {"shape": str(shape), "contender": contender.name, "tokens": settings.checked}
    try:
        errors = gradient_errors(contender, draw_inputs(small, settings.checked, settings.dtype, device, grad=True))
    except Exception as error:  # a contender that cannot run is a line of the report
        return row | {"verdict": "failed", "why": first_line(error), "errors": {}}
    allowed = TOLERANCES[settings.dtype]
    right = all(error <= allowed for error in errors.values())
    return row | {"verdict": "right" if right else "wrong", "errors": errors, "tolerance": allowed}


def gradient_errors(contender: Contender, inputs: Inputs) -> dict[str, float]:
    """Relative errors of y and of every gradient against float64."""
    leaves = contender.leaves(inputs)
    y = contender.call(inputs)
    dy = torch.randn_like(y)
    found = dict(zip(_RESULTS, (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=False))
    rows = torch.arange(y.shape[1], device=y.device)
    q, k, v = (x.detach() for x in inputs[:3])
    log_g, p = (inputs.log_g.detach(), 2) if contender.power else (None, None)
    exact = exact_attention(q, k, v, log_g, rows, dy, p=p)
    return {name: relative_error(x, exact[name]) for name, x in found.items()}


def _sampled_error(contender: Contender, inputs: Inputs, y: Tensor) -> float:
    """Relative error of some rows of a long output, its last one among them."""
    last = y.shape[1] - 1
    rows = torch.linspace(0, last, min(_SAMPLED_ROWS, last + 1), device=y.device).long().unique()
    q, k, v = (x.detach() for x in inputs[:3])
    log_g, p = (inputs.log_g.detach(), 2) if contender.power else (None, None)
    return relative_error(y[:, rows], exact_attention(q, k, v, log_g, rows, p=p)["y"])


def _times(
    contender: Contender, shape: HeadShape, settings: Settings, device: torch.device, right: bool
) -> Iterator[dict[str, Any]]:
    if not right:
        return
    for what in PASSES:
        before: dict[str, Any] | None = None
        for tokens in settings.lengths:
            backward = what != PASSES[0]
            if backward and tokens > settings.longest_backward:
                return
            if before is not None and _expected_seconds(before, tokens) > settings.patience:
                break
            row = _time(contender, shape, tokens, backward, settings, device)
            yield row
            if "ms" not in row:
                break
            before = row


def _expected_seconds(before: dict[str, Any], tokens: int) -> float:
    """What a call may take, if its cost is quadratic, from a shorter one's row."""
    return float(before["ms"]["median"] / 1000 * (tokens / before["tokens"]) ** 2)


def _time(
    contender: Contender, shape: HeadShape, tokens: int, backward: bool, settings: Settings, device: torch.device
) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": str(shape), "tokens": tokens, "pass": PASSES[backward], "contender": contender.name}
    row["power"] = contender.power
    try:
        inputs = draw_inputs(shape, tokens, settings.dtype, device, grad=backward)
        y = contender.call(inputs)
        row["sampled_error"] = _sampled_error(contender, inputs, y.detach())
        dy = torch.randn_like(y)
        del y
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        took = time_call(a_pass(contender, inputs, dy if backward else None), device, seconds=settings.seconds)
        row["ms"] = took.to_dict()
        if device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    except Exception as error:  # out of memory, or a limit of the contender's: a line of the report
        row["failed"] = first_line(error)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _brief(row: dict[str, Any]) -> str:
    return f"{row['ms']['median']:.3f} ms" if "ms" in row else str(row.get("failed", ""))

"""What this machine can do, and how long a call takes on it, measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 2
_HEAD_START = 10_000_000
"""Cycles, some 5 ms: longer than the host takes for the kernels of one call."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call, over ``repeats`` calls: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    repeats: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def time_call(
    call: Callable[[], object], device: torch.device, *, repeats: int = 20, seconds: float = 0.3, least: int = 3
) -> Timing:
    """Time a call after a warm-up: on a GPU between events on its stream, on a CPU by the clock.

    A GPU is kept busy for a moment before each call, as other work would: what is timed is the device, not the host that
    gives it the kernels.

    Args:
        call: what is timed; its result is dropped.
        device: where it runs.
        repeats: most calls that are timed.
        seconds: calls stop once they have taken this long together, ``least`` of them at the earliest.
        least: fewest calls that are timed.
    """
    for _ in range(WARM_UP):
        call()
    times: list[float] = []
    while len(times) < least or (len(times) < repeats and sum(times) < 1000 * seconds):
        times.append(_once(call, device))
    spread = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64))
    median, p10, p90 = spread.tolist()
    return Timing(median, p10, p90, len(times))


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - started)
    begin, end = _events()
    torch.cuda._sleep(_HEAD_START)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@contextmanager
def launch_times() -> Iterator[Callable[[], dict[str, float]]]:
    """Milliseconds of every Triton (and Gluon) kernel launched inside, on a GPU; yields what sums them up by name.

    Two events around every launch, so kernels of a few microseconds look longer than they are.
    """
    from triton import knobs

    launches: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def enter(metadata: Any) -> None:
        launches.append((metadata.get()["name"], *_events()))
        launches[-1][1].record()

    def leave(metadata: Any) -> None:
        launches[-1][2].record()

    def totals() -> dict[str, float]:
        torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, begin, end in launches:
            sums[name] = sums.get(name, 0.0) + float(begin.elapsed_time(end))
        launches.clear()
        return sums

    knobs.runtime.launch_enter_hook.add(enter)
    knobs.runtime.launch_exit_hook.add(leave)
    try:
        yield totals
    finally:
        knobs.runtime.launch_enter_hook.remove(enter)
        knobs.runtime.launch_exit_hook.remove(leave)


def processor_name() -> str:
    """What the processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def matmul_rate(dtype: torch.dtype, size: int = 1024, device: torch.device | str = "cpu") -> float:
    """Best of several square matrix products of random numbers, in 10⁹ operations a second."""
    device = torch.device(device)
    a = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _best(lambda: a @ a, device) / 1e6


def copy_rate(device: torch.device | str, megabytes: int = 2048) -> float:
    """Best of several copies within the device, bytes read and written, in 10⁹ bytes a second."""
    device = torch.device(device)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), device) / 1e6


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Shortest of eight, in milliseconds; a GPU is warmed up first."""
    for _ in range(WARM_UP if device.type == "cuda" else 0):
        call()
    return min(_once(call, device) for _ in range(8))


@dataclass(frozen=True)
class Footprint:
    """What a call took.

    Attributes:
        seconds: by the clock, the device's work included.
        peak_bytes: most bytes that were held at a time above what was held when it began.
    """

    seconds: float
    peak_bytes: int


def measure_footprint(call: Callable[[], object], device: torch.device) -> Footprint:
    """Run a call once, and say how long it took and how much memory of the device.

    On a GPU by its allocator's own count.  On a CPU every allocation is recorded, which takes time of its own.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, started = torch.cuda.memory_allocated(device), time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return Footprint(time.perf_counter() - started, torch.cuda.max_memory_allocated(device) - before)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        started = time.perf_counter()
        call()
        seconds = time.perf_counter() - started
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Footprint(seconds, peak)

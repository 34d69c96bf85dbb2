"""Real ranks for the tests: processes that talk through gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def in_ranks(function: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """Results of ``function(*arguments)`` on each of ``size`` ranks; everything must be importable by name."""
    # One process imports what takes seconds, the ranks are its forks.
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["power_retention.training.context", "torch.distributed.fsdp"])
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=forks) as pool:
        calls = [pool.submit(_rank, rank, size, Path(folder) / "store", function, arguments) for rank in range(size)]
        return [call.result(timeout=300) for call in calls]


def _rank(rank: int, size: int, store: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    try:
        result = function(*arguments)
        dist.barrier()
        return result
    finally:
        dist.destroy_process_group()

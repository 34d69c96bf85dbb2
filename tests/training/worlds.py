"""Functions run in several real processes that form one group, as under torchrun."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Children are forked from a server that has imported everything and computed nothing: seconds less for each.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["power_retention.training.run", "transformers.models.llama.modeling_llama"])

PATIENCE = 240


class Outcome:
    """What became of one rank."""

    def __init__(self, exitcode: int | None, result: Any, error: str) -> None:
        self.exitcode, self.result, self.error = exitcode, result, error


def start_ranks(function: Callable[..., Any], size: int, *args: Any, dp_replicate: int = 1) -> list[Outcome]:
    """Call ``function(ranks, *args)`` in ``size`` processes; what became of each."""
    with TemporaryDirectory() as folder, socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        held.close()
        results = [Path(folder) / str(rank) for rank in range(size)]
        processes = [
            _CONTEXT.Process(target=_rank, args=(function, rank, size, port, dp_replicate, results[rank], args))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            if process.exitcode is None:
                process.kill()
        return [_outcome(process.exitcode, path) for process, path in zip(processes, results, strict=True)]


def in_ranks(function: Callable[..., Any], size: int, *args: Any, dp_replicate: int = 1) -> list[Any]:
    """What ``function(ranks, *args)`` returns in each of ``size`` processes, all of which must end well."""
    outcomes = start_ranks(function, size, *args, dp_replicate=dp_replicate)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exitcode == 0, f"rank {rank} ended with {outcome.exitcode}: {outcome.error}"
    return [outcome.result for outcome in outcomes]


def _outcome(exitcode: int | None, path: Path) -> Outcome:
    if not path.exists():
        return Outcome(exitcode, None, "no word from it")
    return Outcome(exitcode, *pickle.loads(path.read_bytes()))


def _rank(
    function: Callable[..., Any], rank: int, size: int, port: int, dp_replicate: int, out: Path, args: tuple[Any, ...]
) -> None:
    import torch

    from power_retention.training.parallel import joined_ranks

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        with joined_ranks(torch.device("cpu"), dp_replicate=dp_replicate) as ranks:
            out.write_bytes(pickle.dumps((function(ranks, *args), "")))
    except BaseException as error:
        out.write_bytes(pickle.dumps((None, traceback.format_exc())))
        raise SystemExit(1) from error

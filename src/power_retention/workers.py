"""Work in processes that may die: each has its own GPU context, and one that fails is replaced by a fresh one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any


class Failed(str):
    """What a worker said, or what became of it, instead of a result."""


def in_processes(
    function: Callable[[Any], Any], tasks: Sequence[Any], *, workers: int, timeout: float = 300.0
) -> Iterator[tuple[Any, Any]]:
    """Apply a function to every task in fresh processes, a few at a time, in the order they finish.

    Args:
        function: importable by name, as is everything in its tasks and results.
        tasks: what it is applied to.
        workers: processes at a time.
        timeout: seconds after which a task counts as failed.

    Yields:
        (task, result); the result is a :class:`Failed` where the function raised, the process died or time ran out.
    """
    waiting: SimpleQueue[Any] = SimpleQueue()
    done: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
    for task in tasks:
        waiting.put(task)
    count = min(workers, len(tasks))
    for _ in range(count):
        waiting.put(_STOP)
        Thread(target=_feed, args=(function, waiting, done, timeout), daemon=True).start()
    for _ in tasks:
        yield done.get()


_STOP = object()


def _feed(function: Callable[[Any], Any], waiting: SimpleQueue[Any], done: SimpleQueue[Any], timeout: float) -> None:
    worker: _Worker | None = None
    while (task := waiting.get()) is not _STOP:
        worker = worker or _Worker(function)
        result = worker.ask(task, timeout)
        if isinstance(result, Failed):
            worker.end()
            worker = None
        done.put((task, result))
    if worker is not None:
        worker.end()


class _Worker:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, task: Any, timeout: float) -> Any:
        try:
            self.pipe.send(task)
            if not self.pipe.poll(timeout):
                return Failed(f"no answer within {timeout:.0f} seconds")
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            return Failed(f"the process ended with status {self.process.exitcode}")

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, function: Callable[[Any], Any]) -> None:
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            result = function(task)
        except Exception as error:  # the parent decides what it means
            result = Failed(f"{type(error).__name__}: {error}")
        pipe.send(result)

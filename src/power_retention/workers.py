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
    """Apply a function to every task in fresh processes, as :meth:`Workers.run` does."""
    with Workers(function, min(workers, len(tasks)), timeout) as pool:
        yield from pool.run(tasks)


class Workers:
    """Processes that apply one function, kept from one list of tasks to the next.

    Args:
        function: importable by name, as is everything in its tasks and results.
        count: processes at a time; each is started when there is something for it to do.
        timeout: seconds after which a task counts as failed.
    """

    def __init__(self, function: Callable[[Any], Any], count: int, timeout: float = 300.0) -> None:
        self.function, self.count, self.timeout = function, count, timeout
        self._waiting: SimpleQueue[Any] = SimpleQueue()
        self._done: SimpleQueue[tuple[Any, Any]] = SimpleQueue()
        self._threads: list[Thread] = []

    def __enter__(self) -> Workers:
        for _ in range(self.count):
            self._threads.append(Thread(target=self._serve, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *raised: object) -> None:
        for _ in self._threads:
            self._waiting.put(_STOP)

    def run(self, tasks: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """(task, result) in the order they finish.

        The result is a :class:`Failed` where the function raised, the process died or time ran out.
        """
        for task in tasks:
            self._waiting.put(task)
        for _ in tasks:
            yield self._done.get()

    def _serve(self) -> None:
        worker: _Worker | None = None
        while (task := self._waiting.get()) is not _STOP:
            worker = worker or _Worker(self.function)
            result = worker.ask(task, self.timeout)
            if isinstance(result, Failed):
                worker.end()
                worker = None
            self._done.put((task, result))
        if worker is not None:
            worker.end()


_STOP = object()


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

"""A run in a folder: steps, records, checkpoints; stopped at any moment, it continues where it was."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Protocol, TextIO

import torch
from torch import nn

from power_retention import __version__
from power_retention.errors import OutputError, PowerRetentionError, RunInterrupted
from power_retention.files import clear_write_errors, json_line
from power_retention.machine import processor_name
from power_retention.training.checkpoint import Checkpoints, Place
from power_retention.training.folder import RunFolder
from power_retention.training.parallel import Ranks
from power_retention.training.probes import Probes
from power_retention.training.retraining import Metrics

MOST_SKIPPED = 5
"""Steps in a row without a finite loss after which a run goes back to its last checkpoint."""

MOST_ROLLBACKS = 3
"""Times that a run goes back before it gives up."""

Listen = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Progress:
    """What a watcher of a run is told after each step.

    Attributes:
        step: steps done.
        steps: steps in all.
        stage: of the step just done.
        metrics: of the step just done.
        tokens_per_second: since the run was started or resumed.
    """

    step: int
    steps: int
    stage: str
    metrics: Metrics
    tokens_per_second: float


class Schedule(Protocol):
    """What a run does, as far as steps are counted; :class:`Recipe` is one."""

    @property
    def steps(self) -> int:
        """In all."""
        ...

    @property
    def tokens_per_step(self) -> int:
        """Tokens read in one step."""
        ...

    def stage(self, step: int) -> str:
        """The name of the stage that a step (counted from 0) belongs to."""
        ...


class Trained(Protocol):
    """What a run steps: a :class:`~power_retention.training.retraining.Retraining`, or another that takes steps.

    Attributes:
        student: all parameters that a checkpoint must hold.
        optimizer: of those that are trained.
        ranks: of the run.
        device: of this rank.
        data_shift: step ``s`` is to read the data of step ``s + data_shift``.
    """

    ranks: Ranks
    device: torch.device
    data_shift: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """See above."""
        ...

    @property
    def student(self) -> nn.Module:
        """See above."""
        ...

    @property
    def recipe(self) -> Schedule:
        """See :class:`Schedule`."""
        ...

    def step(self, step: int) -> Metrics:
        """Take optimiser step ``step`` (counted from 0)."""
        ...


def execute(
    retraining: Trained,
    folder: RunFolder,
    *,
    watch: Callable[[Progress], None] | None = None,
    tell: Callable[[str], None] | None = None,
    probes: Probes | None = None,
    listen: Listen | None = None,
    checkpoint_seconds: float = 300.0,
    stop_after: int | None = None,
) -> None:
    """Take every step that is still to be taken, then leave the trained student in ``retraining.student``.

    A step depends on the weights, the optimiser state, the seed and its number only, so a run that was stopped and resumed
    ends with the same weights, bit for bit, as one that was not (on the same machine and number of threads and ranks).

    A step whose loss is not finite changes nothing, on all ranks alike.  After :data:`MOST_SKIPPED` of them in a row the run
    goes back to its newest checkpoint and on from there with the data that come next, :data:`MOST_ROLLBACKS` times at most.

    Args:
        retraining: what to step; all its ranks call this.
        folder: where records and checkpoints go; the newest checkpoint in it that is whole is continued.
        watch: told about every step.
        tell: told, in a sentence, about what went wrong and was put right.
        probes: measure the student now and then; all ranks have the same ones.
        listen: told every record of a step or a probe as it is written, on the first rank.
        checkpoint_seconds: time between checkpoints.
        stop_after: save and stop after this many steps in all, as an interrupt would.

    Raises:
        RunInterrupted: after SIGINT or SIGTERM to any rank; everything is saved.
        OutputError: the disk is full; the last checkpoint is intact.
        PowerRetentionError: the loss stays without a finite value.
    """
    with (
        _stop_requests(insist=retraining.ranks.size == 1) as stop,
        _Records(folder, retraining.ranks, listen) as records,
    ):
        run = _Run(retraining, folder, records, watch, tell or _nobody, probes, checkpoint_seconds)
        run.take_steps(stop, stop_after)


class _Run:
    """The steps of one process until the run ends or is stopped."""

    def __init__(
        self,
        retraining: Trained,
        folder: RunFolder,
        records: _Records,
        watch: Callable[[Progress], None] | None,
        tell: Callable[[str], None],
        probes: Probes | None,
        checkpoint_seconds: float,
    ) -> None:
        self.retraining, self.recipe, self.ranks = retraining, retraining.recipe, retraining.ranks
        self.records, self.watch, self.tell, self.probes = records, watch, tell, probes
        self.clock = _Clock(*folder.seconds(), self.ranks.size)
        self.checkpoints, self.checkpoint_seconds = Checkpoints(folder.checkpoints, self.ranks), checkpoint_seconds
        self.steps_here = 0

    def take_steps(self, stop: threading.Event, stop_after: int | None) -> None:
        """Until the last one, or the one after which a stop was asked for."""
        self._go_to(self._load())
        self.records.add_sitting(self.place.step, self.retraining.device)
        self.last_saved = time.monotonic()
        self._probe()
        while self.place.step < self.recipe.steps:
            self._step()
            if self.place.skipped >= MOST_SKIPPED:
                self._roll_back()
                self._probe()
                continue
            done = self.place.step
            due = time.monotonic() - self.last_saved > self.checkpoint_seconds and not self.place.skipped
            stopping, due, failing = self.ranks.any(
                stop.is_set() or done == stop_after, due, self.checkpoints.failed or self.records.failed
            )
            if failing:
                self._fail()
            if done == self.recipe.steps or not stopping:
                self._probe()
            if due or stopping or done == self.recipe.steps:
                self.checkpoints.save(self.place, self.retraining.student, self.retraining.optimizer)
                self.last_saved = time.monotonic()
            if stopping and done < self.recipe.steps:
                self.checkpoints.wait()
                raise RunInterrupted(f"Stopped after step {done} of {self.recipe.steps}; everything is saved.")
        self.checkpoints.wait()

    def _load(self) -> Place:
        return self.checkpoints.load(self.retraining.student, self.retraining.optimizer, self.tell)

    def _go_to(self, place: Place) -> None:
        self.place, self.retraining.data_shift = place, place.data_shift
        self.records.continue_after(place.step)

    def _step(self) -> None:
        step = self.place.step
        metrics = self.retraining.step(step)
        skipped = self.place.skipped + 1 if metrics["skipped"] else 0
        self.place = replace(self.place, step=step + 1, skipped=skipped)
        self.steps_here += 1
        rate = self.steps_here * self.recipe.tokens_per_step / self.clock.training
        tokens, stage = (step + 1) * self.recipe.tokens_per_step, self.recipe.stage(step)
        record = {"step": step + 1, "tokens": tokens, "stage": stage, **metrics, "tokens_per_second": round(rate, 1)}
        self.records.add(record | self.clock.reading())
        if self.watch:
            self.watch(Progress(step + 1, self.recipe.steps, stage, metrics, rate))

    def _probe(self) -> None:
        # Again where a run goes on, whether it was done there before or not: all ranks must come to the same answer.
        step = self.place.step
        if self.probes is not None and self.probes.due(step):
            with self.clock.stopped():
                measured = self.probes.measure()
            tokens = step * self.recipe.tokens_per_step
            self.records.add_probe({"step": step, "tokens": tokens, **self.clock.reading(), **measured})

    def _roll_back(self) -> None:
        bad = self.place
        why = f"The loss was not finite for {bad.skipped} steps in a row, up to step {bad.step}"
        self.checkpoints.wait()
        if bad.rollbacks == MOST_ROLLBACKS or not self.checkpoints.any_there:
            again = f" for the {bad.rollbacks + 1}th time" if bad.rollbacks else ""
            raise PowerRetentionError(f"{why}{again}: lower the learning rates. The last checkpoint is untouched.")
        good = self._load()
        shift = bad.data_shift + bad.step - good.step  # the next data are those that come after the ones that failed
        place = replace(good, data_shift=shift, rollbacks=bad.rollbacks + 1, skipped=0)
        self.checkpoints.note(place)
        self._go_to(place)
        self.tell(f"{why}: back to step {good.step}, and on with the data that come next.")

    def _fail(self) -> None:
        self.checkpoints.wait()  # says what went wrong, if it went wrong there
        self.records.check()
        raise OutputError("Another rank could not write; its message says what.")


class _Records:
    """The records of a run, kept by the first rank; what goes wrong is kept until all ranks can stop together."""

    def __init__(self, folder: RunFolder, ranks: Ranks, listen: Listen | None) -> None:
        self.folder, self.kept, self.devices, self.listen = folder, ranks.first, ranks.size, listen
        self.error: OutputError | None = None
        self._file: TextIO | None = None

    def __enter__(self) -> _Records:
        return self

    def __exit__(self, *raised: object) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written was reported already
                self._file.close()

    def continue_after(self, step: int) -> None:
        """Drop the records of steps that will be taken again."""
        if self.kept:
            self.__exit__()
            self.folder.forget_after(step)
            with clear_write_errors(self.folder.metrics):
                self._file = self.folder.metrics.open("a", encoding="utf-8")

    def add_sitting(self, step: int, device: torch.device) -> None:
        """Note down on what the run goes on."""
        if self.kept:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            versions = {"torch": torch.__version__, "power_retention": __version__}
            on = {"device": name, "kind": device.type, "devices": self.devices}
            self.folder.add_sitting({"step": step, "started": now, **on, **versions})

    def add(self, record: dict[str, Any]) -> None:
        """Write the line of a step; what is not finite becomes null."""
        if self._file is not None:
            self._add(record, self._file)

    def add_probe(self, record: dict[str, Any]) -> None:
        """Write the line of a probe, likewise."""
        if self.kept:
            with self._errors_kept(), self.folder.held_out.open("a", encoding="utf-8") as out:
                self._add(record, out)

    def _add(self, record: dict[str, Any], out: TextIO) -> None:
        if self.error is not None:
            return
        with self._errors_kept():
            out.write(json_line(record))
            out.flush()
            if self.listen is not None:
                self.listen(record)

    @contextmanager
    def _errors_kept(self) -> Iterator[None]:
        try:
            with clear_write_errors(self.folder.path):
                yield
        except OutputError as error:
            self.error = error

    @property
    def failed(self) -> bool:
        """Whether a line could not be written."""
        return self.error is not None

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if self.error is not None:
            raise self.error


class _Clock:
    """Seconds of a run over all its sittings.

    Args:
        seconds, device_seconds: of the sittings before, by the clock and times the devices that were held.
        devices: held now.
    """

    def __init__(self, seconds: float, device_seconds: float, devices: int) -> None:
        self._before, self._devices = (seconds, device_seconds), devices
        self._started = time.monotonic()
        self._stopped = 0.0

    @property
    def training(self) -> float:
        """Seconds of this sitting, without those in which it was measured and not trained."""
        return time.monotonic() - self._started - self._stopped

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """While open, nobody trains; the time is spent all the same."""
        begun = time.monotonic()
        yield
        self._stopped += time.monotonic() - begun

    def reading(self) -> dict[str, float]:
        """What has been spent so far."""
        here = time.monotonic() - self._started
        seconds, device_seconds = self._before
        return {
            "seconds": round(seconds + here, 3),
            "device_seconds": round(device_seconds + here * self._devices, 3),
        }


def _nobody(sentence: str) -> None:
    pass


def remove_checkpoints(folder: RunFolder) -> None:
    """Once the trained model is safely written, what it took to resume is not needed."""
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


@contextmanager
def _stop_requests(insist: bool) -> Iterator[threading.Event]:
    """While open, SIGINT and SIGTERM set an event; if it is to ``insist``, a second one acts at once.

    A launcher passes on the signal that its processes got too: there the second one means nothing.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in previous.items() if insist else ():
            signal.signal(each, handler)

    previous = {each: signal.signal(each, request) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)

"""Checkpoints of a run: written in the background, complete or not there, checked when read, enough to continue bit for bit.

PyTorch's distributed checkpoints hold the tensors: every rank writes what it holds, and any number of ranks reads it back.
They carry no checksum, so each lies beside a header, written last, with the SHA-256 of every file and of itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.tensor import DTensor

from power_retention.errors import CheckpointError, OutputError
from power_retention.files import clear_write_errors, sync_folder, write_json
from power_retention.training.parallel import ALONE, Ranks

HEADER = "checkpoint.json"
KEPT = 2
"""Checkpoints kept: should the newest be damaged, there is the one before it."""

_NAME = re.compile(r"step-(\d{8})")
_OPTIMIZER = ("step", "exp_avg", "exp_avg_sq")
_STEP_COUNT = "step"

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a run is; with weights and optimiser state, all that its next step depends on.

    Attributes:
        step: steps done.
        data_shift: step ``s`` reads the data of step ``s + data_shift``: so much was skipped.
        skipped: steps just before this one that changed nothing, in a row.
        rollbacks: times that the run went back.
    """

    step: int = 0
    data_shift: int = 0
    skipped: int = 0
    rollbacks: int = 0


class Checkpoints:
    """The checkpoints of a run, in ``folder/step-…``; every method is called by all ranks alike.

    Args:
        folder: of all of them; the same files for all ranks.
        ranks: of the run.
    """

    def __init__(self, folder: Path, ranks: Ranks = ALONE) -> None:
        self.folder, self.ranks = folder, ranks
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._stager: DefaultStager | None = None

    def save(self, place: Place, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy everything to host memory, and write it while training goes on; first wait for the one before.

        Raises:
            OutputError: the disk refused the one before; those before that are untouched.
        """
        self.wait()
        _expect_one_process()
        self._pending = self._writer.submit(self._write, place, self._copied(_tensors(model, optimizer)))

    def _copied(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The same in host memory; of divided ones, this rank's parts."""
        if not any(isinstance(value, DTensor) for value in tensors.values()):
            return {name: value.to("cpu", copy=True) for name, value in tensors.items()}
        if self._stager is None:
            on_gpu = any(value.is_cuda for value in tensors.values())
            self._stager = DefaultStager(StagingOptions(on_gpu, False, False, False))
        staged: Any = self._stager.stage(tensors)
        return dict(staged)

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            OutputError: the disk refuses; earlier checkpoints are untouched.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    @property
    def failed(self) -> bool:
        """Whether writing has failed here already; :meth:`wait` says how."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    @property
    def any_there(self) -> bool:
        """Whether there is one to go back to."""
        return bool(self.ranks.same(bool(_checkpoints(self.folder))))

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, tell: Callable[[str], None] | None = None
    ) -> Place:
        """Continue from the newest checkpoint that is whole; the start of a run if there is none at all.

        Damaged ones that are newer are set aside as ``damaged-step-…``.

        Args:
            model: its parameters are overwritten; sharded as it may be.
            optimizer: of those parameters.
            tell: told about each that is damaged.

        Raises:
            CheckpointError: all are damaged, or one belongs to another model.
        """
        self.wait()
        _expect_one_process()
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.ranks.same(_checkpoints(self.folder))):
            damage = self._damage(path)
            if damage is None:
                self._read(path, model, optimizer)
                for each, sentence in damaged:
                    if self.ranks.first:
                        _set_aside(each)
                    if tell is not None:
                        tell(f"{sentence} Continuing from {path.name}.")
                self.ranks.wait()
                return _place(_header(path))
            damaged.append((path, damage))
        if damaged:
            raise CheckpointError(f"{damaged[0][1]} Delete {damaged[0][0]} to start over from the beginning.")
        return Place()

    def note(self, place: Place) -> None:
        """Change what the checkpoint of ``place.step`` says of its place."""
        if self.ranks.first:
            path = self.folder / _folder_name(place.step)
            _write_header(path, {**_header(path), **asdict(place)})
        self.ranks.wait()

    def _write(self, place: Place, staged: dict[str, Any]) -> None:
        target = self.folder / _folder_name(place.step)
        partial = self._together(lambda: self._begin(target) if self.ranks.first else None)[0]
        if partial is None:
            return  # it is there already
        try:
            self._together(lambda: self._write_tensors(partial, staged, target))
            digests = self._together(lambda: self._digests(partial, target))
            content = {
                **asdict(place),
                "ranks": self.ranks.size,
                "files": {k: v for own in digests for k, v in own.items()},
            }
            self._together(lambda: self._finish(partial, target, content) if self.ranks.first else None)
        finally:
            if self.ranks.first:
                shutil.rmtree(partial, ignore_errors=True)

    def _begin(self, target: Path) -> Path | None:
        with clear_write_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_kill in self.folder.glob(".step-*-partial-*"):
                shutil.rmtree(left_by_a_kill, ignore_errors=True)
            if target.exists():
                return None
            return Path(tempfile.mkdtemp(prefix=f".{target.name}-partial-", dir=self.folder))

    def _write_tensors(self, partial: Path, staged: dict[str, Any], target: Path) -> None:
        alone = self.ranks.size == 1
        try:
            save_tensors(
                staged,
                storage_writer=FileSystemWriter(partial),
                process_group=self.ranks.background,
                no_dist=alone,
            )
        except CheckpointException as error:  # which is no Exception
            failure = next(iter(error.failures.values()))[0]
            with clear_write_errors(target):
                if isinstance(failure, OSError):
                    raise failure from error
            raise OutputError(
                f"Could not write {target}: {failure}. Earlier checkpoints are untouched; free some space and resume."
            ) from error

    def _digests(self, partial: Path, target: Path) -> dict[str, str]:
        """Of the files that this rank wrote, by name."""
        own = sorted(partial.glob(f"__{self.ranks.rank}_*"))
        with clear_write_errors(target):
            return {path.name: _digest(path) for path in own + [partial / ".metadata"] * self.ranks.first}

    def _finish(self, partial: Path, target: Path, content: dict[str, Any]) -> None:
        with clear_write_errors(target):
            missing = [name for name in content["files"] if not (partial / name).exists()]
            if missing:
                raise OutputError(f"{partial} lacks {missing[0]}: the folder of a run must be shared by all its hosts.")
            _write_header(partial, content)
            sync_folder(partial)
            partial.chmod(0o755)
            os.replace(partial, target)
        for older in _checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(older)

    def _together(self, do: Callable[[], T]) -> list[T]:
        """What every rank returns, on the thread that writes; what one raises, all raise."""
        if self.ranks.size == 1:
            return [do()]
        outcome: tuple[Any, str | None] = None, None
        try:
            outcome = do(), None
        except OutputError as error:
            outcome = None, str(error)
        except Exception:
            outcome = None, f"Could not write a checkpoint: {traceback.format_exc()}"
        outcomes: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(outcomes, outcome, group=self.ranks.background)
        errors = [error for _, error in outcomes if error is not None]
        if errors:
            raise OutputError(errors[0])
        return [result for result, _ in outcomes]

    def _damage(self, path: Path) -> str | None:
        """One sentence about what is wrong with a checkpoint, the same on all ranks; the files are shared out to be read."""
        sentence = self.ranks.same(_header_damage(path) if self.ranks.first else None)
        if sentence is None:
            files = list(_header(path)["files"].items())
            own = [_file_damage(path / name, digest) for name, digest in files[self.ranks.rank :: self.ranks.size]]
            found = [each for each in own if each]
            if self.ranks.size > 1:
                everyone: list[Any] = [None] * self.ranks.size
                dist.all_gather_object(everyone, found, group=self.ranks.control)
                found = [each for rank in everyone for each in rank]
            sentence = found[0] if found else None
        return None if sentence is None else f"The checkpoint {path} is damaged: {sentence}."

    def _read(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        reader = FileSystemReader(path)
        stored = reader.read_metadata().state_dict_metadata
        parameters = dict(model.named_parameters())
        wanted = {f"model.{name}": value.shape for name, value in parameters.items()}
        sizes = {name: each.size for name, each in stored.items() if isinstance(each, TensorStorageMetadata)}
        if wanted != {name: size for name, size in sizes.items() if name.startswith("model.")}:
            raise CheckpointError(f"{path} belongs to another model: its parameters have other names or shapes.")
        states = {name: _empty_state(name, value, sizes) for name, value in parameters.items()}
        tensors = {f"model.{name}": value.detach() for name, value in parameters.items()}
        for name, state in states.items():
            tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
        alone = self.ranks.size == 1
        load_tensors(tensors, storage_reader=reader, process_group=self.ranks.control, no_dist=alone)
        optimizer.state.clear()
        for name, state in states.items():
            if state:
                optimizer.state[parameters[name]] = state


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, of however many ranks, whole and in host memory, tied ones under their first name.

    Raises:
        CheckpointError: it is damaged.
    """
    damage = Checkpoints(checkpoint.parent)._damage(checkpoint)
    if damage is not None:
        raise CheckpointError(f"{damage} Take another.")
    _expect_one_process()
    reader = FileSystemReader(checkpoint)
    tensors = {
        name: torch.empty(each.size, dtype=each.properties.dtype)
        for name, each in reader.read_metadata().state_dict_metadata.items()
        if name.startswith("model.") and isinstance(each, TensorStorageMetadata)
    }
    load_tensors(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def checkpoint_of(folder: Path, step: int | None = None) -> Path:
    """The checkpoint after a step, or the newest, in a folder of them; whole or not.

    Raises:
        CheckpointError: there is none.
    """
    there = _checkpoints(folder)
    found = [path for path in there if step is None or path.name == _folder_name(step)]
    if not found:
        known = ", ".join(str(int(path.name.removeprefix("step-"))) for path in there) or "no step"
        raise CheckpointError(
            f"{folder} has no checkpoint{'' if step is None else f' of step {step}'}; it has {known}."
        )
    return found[-1]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Every parameter once, tied ones under their first name, and what the optimiser keeps for it."""
    parameters = dict(model.named_parameters())
    tensors = {f"model.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for key, kept in optimizer.state.get(value, {}).items():
            if isinstance(kept, Tensor):
                tensors[f"optimizer.{key}.{name}"] = kept
    return tensors


def _empty_state(name: str, parameter: Tensor, sizes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """What an optimiser keeps for a parameter, as far as it was stored, still to be read."""
    return {
        key: torch.zeros((), device=parameter.device) if key == _STEP_COUNT else torch.zeros_like(parameter.detach())
        for key in _OPTIMIZER
        if f"optimizer.{key}.{name}" in sizes
    }


def _write_header(checkpoint: Path, content: dict[str, Any]) -> None:
    write_json(checkpoint / HEADER, {"content": content, "sha256": _content_digest(content)})


def _header(checkpoint: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((checkpoint / HEADER).read_text(encoding="utf-8"))["content"]
    return content


def _place(header: dict[str, Any]) -> Place:
    return replace(Place(), **{name: header[name] for name in asdict(Place())})


def _header_damage(checkpoint: Path) -> str | None:
    try:
        header = json.loads((checkpoint / HEADER).read_text(encoding="utf-8"))
        content = header["content"]
        if header["sha256"] != _content_digest(content):
            return f"{HEADER} does not match its checksum"
        _place(content)
        return None if _folder_name(content["step"]) == checkpoint.name else f"{HEADER} is of step {content['step']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{HEADER} cannot be read ({error})"


def _file_damage(path: Path, digest: str) -> str | None:
    try:
        return None if _digest(path) == digest else f"{path.name} does not match its checksum"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror or error})"


def _content_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)) if folder.is_dir() else []


def _set_aside(checkpoint: Path) -> None:
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)


def _expect_one_process() -> None:
    # The library warns where there is no process group, which is meant here.  Not undone: filters are shared by all threads.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

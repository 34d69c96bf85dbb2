"""Files, written so that nothing is lost: complete or not at all, with one clear message when the disk refuses."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from power_retention.errors import DataError, OutputError

try:
    import fcntl
except ImportError:  # another system than Unix
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The hidden file of a folder by which one process keeps others out, see :func:`held_folder`."""
UNFINISHED = ".tmp"
"""Ending of hidden files that are being written, see :func:`replacement`."""


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file of the user's holds.

    Raises:
        DataError: it cannot be read, or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"{path} is not TOML: {error}.") from error


def check_new_folder(folder: Path) -> None:
    """Refuse a folder that already holds something."""
    if folder.is_file():
        raise OutputError(f"{folder} is a file; the name of a new folder was expected.")
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} already holds something; choose another folder, or empty it first.")


@contextmanager
def clear_write_errors(target: Path) -> Iterator[None]:
    """Turn an operating-system error while writing into one sentence that names the target."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        free = free_bytes(target) / 1e9
        raise OutputError(
            f"Could not write {target}: {error.strerror or error} ({free:.1f} GB free there). Nothing that was there before "
            "has been changed; free some space or choose another folder, and run the command again."
        ) from error
    except Exception as error:
        # safetensors reports a full disk in an exception of its own.
        if type(error).__name__ != "SafetensorError":
            raise
        raise OutputError(f"Could not write {target}: {error}. Free some space and run the command again.") from error


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for it out of a folder until this is over, or this process ends.

    Where the system or the disk knows no such locks, nobody is kept out.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{folder} is being written by another process: wait for its end, or choose another folder."
            ) from error
        except OSError:
            pass  # a disk without locks: nobody can be kept out
        yield


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder beside ``target``; it takes the target's place once everything in it is written."""
    check_new_folder(target)
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-partial-", dir=target.parent))
        try:
            yield partial
            sync_folder(partial)
            if target.is_dir():
                target.rmdir()
            partial.chmod(0o755)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(target: Path, value: Any) -> None:
    """Write a JSON file, complete or not at all."""
    with clear_write_errors(target), replacement(target) as partial:
        partial.write_text(json_text(value) + "\n", encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON as its standard has it: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def json_line(value: Any) -> str:
    """The same in one line, its end included."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def replacement(target: Path) -> Iterator[Path]:
    """A temporary file beside ``target``; what is written to it takes the target's place once it is safe on disk."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names where the system lets one, has reached the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until every file in a folder has reached the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)
    sync(folder)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk where a path is, or would be."""
    return shutil.disk_usage(_existing_parent(path)).free


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path

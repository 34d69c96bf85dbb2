"""States with names, in one folder: what was read once, kept under a name that a request can start from or save to.

Each state is a file ``NAME.state`` (``docs/state.md``).  Owners, one an API key, have folders of their own within it and see
nothing of each other's.  Several processes may use the folder at once: files appear complete or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from power_retention.errors import OutputError, StateError
from power_retention.files import UNFINISHED, clear_write_errors, free_bytes
from power_retention.ops import PowerState
from power_retention.ops.state_file import StateHeader, fork_states, load_states, read_header, save_states

if TYPE_CHECKING:
    from power_retention.models import PowerRetentionConfig

SUFFIX = ".state"
PINNED = ".pinned"
_REMEMBERED = 1000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class MissingState(StateError):
    """There is no state of that name."""


class TakenName(OutputError):
    """A state of that name is kept already."""


class FullDirectory(OutputError):
    """An owner keeps as much as is allowed, or as the disk holds."""


@dataclass(frozen=True)
class NamedState:
    """A state that lies in a directory.

    Attributes:
        name: what requests call it.
        nbytes: size of its file.
        header: what it says about itself.
    """

    name: str
    nbytes: int
    header: StateHeader


def owner_of(key: str) -> str:
    """The owner that an API key stands for: a name of a folder that does not betray the key."""
    return hashlib.sha256(b"power-retention owner " + key.encode()).hexdigest()[:32] if key else ""


class StateDirectory:
    """The states of one owner.

    Args:
        path: the folder; made when something is saved.
        max_states: how many states the owner may keep.
        max_bytes: bytes that the owner's states may take; None: as the disk allows.
        owner: whose states, see :func:`owner_of`; "" where there is one owner only.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_states: int = 1000, max_bytes: int | None = None, owner: str = ""
    ) -> None:
        if owner and not re.fullmatch(r"[0-9a-f]{32}", owner):
            raise StateError(f"{owner!r} is no owner of states; owner_of(key) makes one.")
        self.path = Path(path) / f"owner-{owner}" if owner else Path(path)
        self.max_states, self.max_bytes = max_states, max_bytes

    def path_of(self, name: str) -> Path:
        """Where the state of that name lies, or would lie: always directly in this owner's folder.

        Raises:
            StateError: that is no name.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StateError(
                f"{name!r} is no name of a state: 1 to 100 letters, digits, points, hyphens and underscores were expected, "
                "the first a letter or a digit."
            )
        return self.path / f"{name}{SUFFIX}"

    def existing(self, name: str) -> Path:
        """The file of a state that is there.

        Raises:
            MissingState: it is not.
        """
        path = self.path_of(name)
        # A link could lead out of the folder.
        if path.is_symlink() or not path.is_file():
            raise MissingState(
                f"There is no state called {name!r}; save one under that name first, or list those there."
            )
        return path

    def inspect(self, name: str) -> NamedState:
        """What a state says about itself; its tensors are not read."""
        path = self.existing(name)
        with _called(name, path):
            return NamedState(name, path.stat().st_size, read_header(path))

    def list(self) -> Sequence[NamedState]:
        """All states that can be read, newest first."""
        found = []
        for path in self._files():
            try:
                found.append(self.inspect(path.name.removesuffix(SUFFIX)))
            except StateError:
                continue
        return sorted(found, key=lambda state: state.header.created, reverse=True)

    def verify(self, name: str, *, model: str | None = None) -> StateHeader:
        """The header of a state whose every byte was checked; at once where the same file was checked before.

        Args:
            name: of the state.
            model: fingerprint that it must carry.

        Raises:
            StateError: it is missing, damaged, in an unknown layout or of another model.
        """
        return verified(name, self.existing(name), model)

    def pin(self, name: str) -> Path:
        """Another name for the file of a state, hidden, which stays when the state is replaced or deleted; to be unlinked.

        Raises:
            MissingState: there is no such state.
            FullDirectory: the disk is so full that it takes no name more.
            OutputError: it knows no second names.
        """
        path = self.existing(name)
        pinned = self.path / f".{secrets.token_hex(8)}{PINNED}"
        with _clear_full_disk(f"Nothing can start from the state {name!r}"), clear_write_errors(pinned):
            try:
                os.link(path, pinned)
            except FileNotFoundError:
                raise MissingState(f"The state {name!r} was deleted a moment ago.") from None
        return pinned

    def remove_remains(self, pinned: float = 86400, unfinished: float = 3600) -> None:
        """Remove what processes that were killed have left, of all owners: other processes may use the folder, too.

        Args:
            pinned: seconds that a pin may be old: as long as a request may take.
            unfinished: seconds since anything was written to a file that is not complete.
        """
        for pattern, seconds in ((f".*{PINNED}", pinned), (f".*{SUFFIX}.*{UNFINISHED}", unfinished)):
            for path in self.path.glob(f"**/{pattern}"):
                with suppress(FileNotFoundError):  # another process was first
                    if time.time() - path.lstat().st_ctime > seconds:
                        path.unlink()

    def load(self, name: str, *, model: str | None = None) -> tuple[Sequence[PowerState], StateHeader]:
        """The states of all layers, and their header; errors as of :meth:`verify`."""
        self.verify(name, model=model)
        path = self.existing(name)
        with _called(name, path):
            return load_states(path, model=model, verify=False)

    def check_room(self, name: str, nbytes: int) -> None:
        """Refuse what would be too much.

        Raises:
            StateError: that is no name.
            FullDirectory: with a state of ``nbytes`` under that name, the owner would keep too much, or the disk overflow.
        """
        replaced = self.path_of(name)
        others = [path for path in self._files() if path != replaced]
        if len(others) >= self.max_states:
            raise FullDirectory(
                f"The state {name!r} cannot be saved: {len(others):,} are kept already, which is the limit. Delete some first."
            )
        kept = sum(_size(path) for path in others)
        if self.max_bytes is not None and kept + nbytes > self.max_bytes:
            raise FullDirectory(
                f"The state {name!r} cannot be saved: it takes {nbytes / 1e6:,.1f} MB, and {kept / 1e6:,.1f} of "
                f"{self.max_bytes / 1e6:,.1f} MB are taken. Delete some states first."
            )
        free = free_bytes(self.path)
        if nbytes > free:
            raise FullDirectory(
                f"The state {name!r} cannot be saved: it takes {nbytes / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB "
                "left. Delete some states, or free some space."
            )

    def save(
        self,
        name: str,
        states: Sequence[PowerState],
        *,
        model: str,
        tokens_seen: int,
        extra: Mapping[str, str] | None = None,
    ) -> StateHeader:
        """Keep states under a name, instead of what was kept under it; arguments as of :func:`save_states`.

        Raises:
            FullDirectory: the owner keeps too much already, or the disk is full.
            OutputError: the disk refuses. In both cases what was kept under the name is unchanged.
        """
        path = self.path_of(name)
        self.check_room(name, sum(state.nbytes for state in states))
        noted = {"position": str(tokens_seen), **(extra or {})}
        with _clear_full_disk(f"The state {name!r} cannot be saved"):
            with clear_write_errors(path):
                self.path.mkdir(parents=True, exist_ok=True)
            return save_states(path, states, model=model, tokens_seen=tokens_seen, extra=noted)

    def fork(self, name: str, copy: str) -> StateHeader:
        """Keep a copy under another name.

        Raises:
            TakenName: something is kept under that name.
            StateError: the state is missing or damaged.
            FullDirectory, OutputError: as of :meth:`save`.
        """
        path, target = self.existing(name), self.path_of(copy)
        if target.exists():
            raise TakenName(f"A state called {copy!r} is kept already; choose another name, or delete it first.")
        self.check_room(copy, path.stat().st_size)
        with _clear_full_disk(f"The state {copy!r} cannot be saved"), _called(name, path):
            return fork_states(path, target)

    def delete(self, name: str) -> None:
        """Forget a state."""
        path = self.existing(name)
        with clear_write_errors(path):
            path.unlink(missing_ok=True)

    def _files(self) -> Sequence[Path]:
        if not self.path.is_dir():
            return []
        return [path for path in self.path.iterdir() if path.suffix == SUFFIX and not path.name.startswith(".")]


@contextmanager
def _called(name: str, path: Path) -> Iterator[None]:
    """Say what is wrong with a file of the state that its owner knows: where it lies is no client's business."""
    try:
        yield
    except StateError as error:
        raise StateError(str(error).replace(str(path), f"The state {name!r}")) from error


@contextmanager
def _clear_full_disk(what: str) -> Iterator[None]:
    """Say of a full disk what is to be done where states have names; where they lie is no client's business."""
    try:
        yield
    except OutputError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FullDirectory(
            f"{what}: the disk is full. Delete some states, or free some space; what was there before is unchanged."
        ) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # deleted meanwhile
        return 0


def check_fits(name: str, header: StateHeader, config: PowerRetentionConfig) -> None:
    """Refuse a state that no request to a model can start from, whatever its header says of models.

    Raises:
        StateError: it has another shape, or several sequences.
    """
    heads, d = config.num_key_value_heads, config.head_dim
    found = (header.batch, header.layers, header.heads, header.head_width, header.value_width, header.p)
    wanted = (1, config.num_hidden_layers, heads, d, d, config.power)
    if found != wanted:
        raise StateError(
            f"The state {name!r} has (sequences, layers, heads, key width, value width, p) = {found}; a request to this "
            f"model can start from {wanted} only."
        )


_checked: dict[tuple[object, ...], StateHeader] = {}


def verified(name: str, path: Path, model: str | None) -> StateHeader:
    """The header of a state whose every byte is checked, once for each version of its file; errors of :func:`load_states`."""
    status = path.stat()
    version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, model)
    if version not in _checked:
        with _called(name, path):
            header = load_states(path, model=model)[1]
        if len(_checked) >= _REMEMBERED:
            _checked.pop(next(iter(_checked)), None)
        _checked[version] = header
    return _checked[version]

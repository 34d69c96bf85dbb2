"""Token shards on disk: memory-mapped ids, an index with document boundaries and a checksum beside each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from power_retention.errors import ArgumentError, DataError

OnDamage = Literal["fail", "skip"]
FORMAT = 1
PLAN = "shards.json"
TOKENIZER = "tokenizer"
_BLOCK = 1 << 22


def shard_name(number: int) -> str:
    """``shard-00007``; ``.bin`` holds its ids and ``.json`` its index."""
    return f"shard-{number:05d}"


class Checksum:
    """SHA-256 over the bytes of the ids, then over the documents' lengths as little-endian int64."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, ids: bytes | memoryview) -> None:
        self._digest.update(ids)

    def finish(self, lengths: npt.NDArray[np.int64]) -> str:
        self._digest.update(lengths.astype("<i8").tobytes())
        return f"sha256:{self._digest.hexdigest()}"


@dataclass(frozen=True)
class Shard:
    """One shard, its index read and its ids still on disk.

    Attributes:
        path: its ``.bin``.
        dtype: of the ids, ``uint16`` or ``uint32``, little-endian.
        starts: ``[documents + 1]`` int64, where each document starts, and the number of tokens.
        checksum: see :class:`Checksum`.
        source_bytes: UTF-8 bytes of the text it was made of.
    """

    path: Path
    dtype: str
    starts: npt.NDArray[np.int64]
    checksum: str
    source_bytes: int

    @property
    def tokens(self) -> int:
        return int(self.starts[-1])

    @property
    def documents(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def ids(self) -> npt.NDArray[np.generic]:
        """``[tokens]``, memory-mapped."""
        if not self.tokens:  # nothing cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(self.path, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r", shape=(self.tokens,))

    def check(self) -> None:
        """Read all of it and compare with its checksum.

        Raises:
            DataError: it differs.
        """
        digest = Checksum()
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.add(block)
        if digest.finish(np.diff(self.starts)) != self.checksum:
            raise DataError(f"{self.path} is damaged: its bytes do not match the checksum in its index.")


@dataclass(frozen=True)
class ShardPlan:
    """What a folder of shards was to hold, written before the first of them.

    Attributes:
        folder: where it lies.
        content: sources, pieces of each shard, tokenizer and settings.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def shards(self) -> int:
        return len(self.content["shards"])

    @property
    def dtype(self) -> str:
        return str(self.content["dtype"])

    @property
    def tokenizer(self) -> str:
        """The tokenizer's fingerprint."""
        return str(self.content["tokenizer"])


def read_plan(folder: Path) -> ShardPlan:
    """The plan of a folder of shards.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    path = folder / PLAN
    if not path.is_file():
        raise DataError(f"{folder} holds no token shards (no {PLAN}); `power-retention data` makes them.")
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} has format {content['format']}; this version reads {FORMAT}: make the shards again."
            )
        plan = ShardPlan(folder, content)
        if plan.dtype not in ("uint16", "uint32") or not plan.tokenizer or plan.shards < 0:
            raise ValueError("fields have values of another kind")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); make the shards again.") from error
    return plan


def read_shard(plan: ShardPlan, number: int) -> Shard:
    """A shard by its number; its ids are neither read nor checked, but for their count.

    Raises:
        DataError: it is missing, its index is damaged, it was made with another tokenizer, or it is cut short.
    """
    path = plan.folder / f"{shard_name(number)}.bin"
    index_path = path.with_suffix(".json")
    if not index_path.is_file() or not path.is_file():
        missing = path if index_path.is_file() else index_path
        raise DataError(f"{missing} is missing: run the same `power-retention data` again, it makes what is not there.")
    try:
        index = json.loads(index_path.read_bytes())
        lengths = np.asarray(index["lengths"], dtype=np.int64)
        shard = Shard(
            path, index["dtype"], np.cumsum([0, *lengths], dtype=np.int64), index["checksum"], index["source_bytes"]
        )
        sound = lengths.ndim == 1 and (lengths > 0).all() and shard.tokens == index["tokens"]
        if not sound or shard.documents != index["documents"] or shard.dtype != plan.dtype:
            raise ValueError("its counts contradict each other")
        tokenizer = index["tokenizer"]
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{index_path} is damaged ({type(error).__name__}: {error}).") from error
    if tokenizer != plan.tokenizer:
        raise DataError(f"{index_path} was made with tokenizer {tokenizer}, the folder with {plan.tokenizer}.")
    expected = shard.tokens * np.dtype(shard.dtype).itemsize
    if (size := path.stat().st_size) != expected:
        raise DataError(f"{path} is damaged: it has {size:,} bytes, its index speaks of {expected:,}.")
    return shard


def healthy_shards(
    plan: ShardPlan, *, checksums: bool = True, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Shard], list[str]]:
    """The shards that are as they were written, and one sentence about each of the others.

    Args:
        plan: of their folder.
        checksums: read every byte (about a second per GB); else only indexes and sizes are checked.
        progress: called with the shards looked at and the shards in all.
    """
    shards: list[Shard] = []
    damage: list[str] = []
    for number in range(plan.shards):
        try:
            shard = read_shard(plan, number)
            if checksums:
                shard.check()
            shards.append(shard)
        except (DataError, OSError) as error:
            damage.append(f"{shard_name(number)}: {error}")
        if progress is not None:
            progress(number + 1, plan.shards)
    return shards, damage


class ShardedTokens:
    """The tokens of several shards as one row, read from disk where they are wanted.

    Args:
        shards: in order.
        tokenizer: the fingerprint of the tokenizer they were made with.
        damage: a sentence about each shard that was left out.
    """

    def __init__(self, shards: Sequence[Shard], tokenizer: str, damage: Sequence[str] = ()) -> None:
        self.shards = [shard for shard in shards if shard.tokens]
        self.tokenizer, self.damage = tokenizer, list(damage)
        self._offsets = np.cumsum([0, *(shard.tokens for shard in self.shards)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._offsets[-1])

    @property
    def fingerprint(self) -> str:
        """Changes with any token, any boundary, and the set of shards in use."""
        text = " ".join([self.tokenizer, *(shard.checksum for shard in self.shards)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(ids ``[stop − start]``, places in [0, stop − start) at which a document starts), both int64."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        ids: list[npt.NDArray[np.int64]] = []
        starts: list[npt.NDArray[np.int64]] = []
        at = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop:
            shard, offset = self.shards[at], int(self._offsets[at])
            first, last = start - offset, min(stop - offset, shard.tokens)
            inside = shard.starts[np.searchsorted(shard.starts, first) : np.searchsorted(shard.starts, last)]
            starts.append(inside - first + sum(map(len, ids)))
            ids.append(shard.ids[first:last].astype(np.int64))
            start, at = offset + last, at + 1
        return np.concatenate(ids), np.concatenate(starts)


def open_shards(
    folder: Path,
    *,
    on_damage: OnDamage = "fail",
    checksums: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ShardedTokens:
    """Open a folder of token shards.

    What is damaged is found now and not in the middle of a run, so that which token comes when depends on nothing but the
    shards that are sound.

    Args:
        folder: made by ``power-retention data``.
        on_damage: ``fail`` refuses a folder with a damaged or missing shard, ``skip`` goes on without it.
        checksums: read every byte (about a second per GB); else only indexes and sizes are checked.
        progress: called with the shards looked at and the shards in all.

    Raises:
        DataError: there are no shards, or some are damaged (each is named).
    """
    if on_damage not in get_args(OnDamage):
        raise ArgumentError(f"on_damage is {on_damage!r}; it must be 'fail' or 'skip'.")
    plan = read_plan(folder)
    shards, damage = healthy_shards(plan, checksums=checksums, progress=progress)
    if damage and on_damage == "fail":
        raise DataError(
            f"{len(damage)} of {plan.shards} shards cannot be used: {'; '.join(damage)} Run the "
            "same `power-retention data` again, which makes them anew if their files have not changed, or go on without them "
            "(on_damage 'skip')."
        )
    tokens = ShardedTokens(shards, plan.tokenizer, damage)
    if not len(tokens):
        raise DataError(f"{folder} holds no tokens; {len(damage)} of {plan.shards} shards are damaged or missing.")
    return tokens

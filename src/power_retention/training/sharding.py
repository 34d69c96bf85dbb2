"""Making token shards: a plan, then shard after shard in processes; one that is finished is never made again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from power_retention.conversion.source import fingerprint_tokenizer, open_tokenizer
from power_retention.errors import ArgumentError, DataError, OutputError
from power_retention.files import LOCK, clear_write_errors, held_folder, new_folder, replacement, write_json
from power_retention.training.fill_in import FillIn, marks_of, tokenize_filling_in
from power_retention.training.shards import (
    FORMAT,
    PLAN,
    TOKENIZER,
    Checksum,
    ShardPlan,
    read_plan,
    read_shard,
    shard_name,
)
from power_retention.training.sources import Piece, find_pieces, read_piece
from power_retention.training.text import hash_unit
from power_retention.workers import Failed, in_processes

_DOCUMENTS_AT_A_TIME = 64
_SHARD_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class ShardingProgress:
    """What a watcher is told after each shard.

    Attributes:
        done: finished shards, those of earlier runs included.
        shards: shards in all.
        kept: shards that an earlier run had finished.
        tokens: written by this run.
        source_bytes: UTF-8 bytes of the text read by this run.
    """

    done: int
    shards: int
    kept: int
    tokens: int
    source_bytes: int


def make_shards(
    sources: Sequence[str],
    tokenizer: str,
    out: Path,
    *,
    text_field: str = "text",
    split: str = "train",
    held_out: float = 0.05,
    fill_in: FillIn | None = None,
    shard_bytes: int = 1 << 26,
    workers: int = 1,
    watch: Callable[[ShardingProgress], None] | None = None,
) -> ShardingProgress:
    """Turn text into token shards; run again after any end, it makes only what is not there yet.

    Each document ends with the tokenizer's end-of-sequence token. Shards, tokens and checksums depend on the sources and
    the settings alone, not on the number of processes.

    Args:
        sources: see :func:`~power_retention.training.sources.find_pieces`.
        tokenizer: model directory, GGUF file or hub id that it belongs to; a copy is kept in ``out``.
        out: a new folder, or one that the same call began.
        text_field: where a record or a column keeps its text.
        split: of a dataset that has several.
        held_out: share of the documents to leave out, by the hash that ``retrain`` and ``evaluate`` divide text by.
        fill_in: which documents are written with their middle last, for a code model.
        shard_bytes: about how much source makes a shard.
        workers: processes; with 1 the work is done in this one.
        watch: told about every shard.

    Raises:
        ArgumentError: an option out of range.
        DataError: a source is missing or damaged, the tokenizer has no tokens to fill in with, or no document has a token or
            is not held out; finished shards stay.
        OutputError: ``out`` holds something else or is being written, or the disk is full; finished shards stay.
    """
    if not 0 <= held_out < 1 or min(shard_bytes, workers) < 1:
        raise ArgumentError(
            f"The held-out share ({held_out}) must be at least 0 and below 1, the size of a shard ({shard_bytes:,} bytes) "
            f"and the number of processes ({workers}) at least 1."
        )
    loaded = open_tokenizer(tokenizer)
    if fill_in is not None:
        marks_of(loaded)
    pieces = find_pieces(sources, split=split, piece_bytes=min(shard_bytes, 1 << 24))
    if not pieces:
        raise DataError(f"{', '.join(sources)} holds no document: give files with text.")
    content: dict[str, Any] = {
        "format": FORMAT,
        "tokenizer": fingerprint_tokenizer(loaded),
        "tokenizer_source": tokenizer,
        "dtype": "uint16" if len(loaded) <= 1 << 16 else "uint32",
        "text_field": text_field,
        "held_out": held_out,
        "fill_in": None if fill_in is None else asdict(fill_in),
        "files": {path: _identity(path) for path in sorted({piece.path for piece in pieces})},
        "shards": [[asdict(piece) for piece in group] for group in _grouped(pieces, shard_bytes)],
    }
    _refuse_other_content(out)
    with held_folder(out):
        made = _make_missing(_begin(out, content, loaded), workers, watch)
    _expect_tokens(out, sources, held_out)
    return made


def _make_missing(plan: ShardPlan, workers: int, watch: Callable[[ShardingProgress], None] | None) -> ShardingProgress:
    tasks = []
    progress = ShardingProgress(0, plan.shards, 0, 0, 0)
    for number in range(plan.shards):
        if _is_finished(plan, number):
            progress = ShardingProgress(progress.done + 1, plan.shards, progress.kept + 1, 0, 0)
            if watch is not None:
                watch(progress)
        else:
            tasks.append((str(plan.folder), number))
    for tokens, source_bytes in _made(tasks, workers):
        progress = ShardingProgress(
            progress.done + 1,
            plan.shards,
            progress.kept,
            progress.tokens + tokens,
            progress.source_bytes + source_bytes,
        )
        if watch is not None:
            watch(progress)
    return progress


def write_shard(task: tuple[str, int]) -> tuple[int, int]:
    """Make one shard of a plan: (folder, number) → (tokens, source bytes). The index comes last: with it, it is finished."""
    folder, number = Path(task[0]), task[1]
    content = _plan(folder, (folder / PLAN).stat().st_mtime_ns).content
    tokenizer = _tokenizer(folder, content["tokenizer"])
    pieces = [Piece(**piece) for piece in content["shards"][number]]
    path = folder / f"{shard_name(number)}.bin"
    digest, lengths, source_bytes = Checksum(), [], 0
    dtype = np.dtype(content["dtype"]).newbyteorder("<")
    fill_in = FillIn(**content["fill_in"]) if content.get("fill_in") else None
    texts = chain.from_iterable(read_piece(piece, content["text_field"]) for piece in pieces)
    with clear_write_errors(path), replacement(path) as partial, partial.open("wb") as file:
        for group in _groups_of(_DOCUMENTS_AT_A_TIME, _kept(texts, content["held_out"])):
            source_bytes += sum(len(text.encode("utf-8", "replace")) for text in group)
            for ids in tokenize_filling_in(group, tokenizer, fill_in):
                if len(ids):
                    narrow = ids.astype(dtype).tobytes()
                    digest.add(narrow)
                    file.write(narrow)
                    lengths.append(len(ids))
    index = {
        "documents": len(lengths),
        "tokens": sum(lengths),
        "dtype": content["dtype"],
        "tokenizer": content["tokenizer"],
        "source_bytes": source_bytes,
        "checksum": digest.finish(np.asarray(lengths, dtype=np.int64)),
        "lengths": lengths,
    }
    index_path = path.with_suffix(".json")
    with clear_write_errors(index_path), replacement(index_path) as partial:
        partial.write_text(json.dumps(index), encoding="utf-8")  # without indents: a line a document would triple it
    return sum(lengths), source_bytes


def _kept(texts: Iterator[str], held_out: float) -> Iterator[str]:
    return (text for text in texts if hash_unit(text, 0) >= held_out) if held_out else texts


def _groups_of(count: int, texts: Iterator[str]) -> Iterator[list[str]]:
    while group := list(islice(texts, count)):
        yield group


def _made(tasks: list[tuple[str, int]], workers: int) -> Iterator[tuple[int, int]]:
    """(tokens, source bytes) of each shard as it is finished; one that fails does not keep the others from being made."""
    failed: list[str] = []
    for task, result in _alone(tasks) if min(workers, len(tasks)) <= 1 else _together(tasks, workers):
        if isinstance(result, Failed):
            failed.append(f"{shard_name(task[1])}: {result}")
        else:
            yield result
    if failed:
        raise DataError(
            f"{len(failed)} of {len(tasks)} shards could not be made: {'; '.join(failed)} The others are kept; put it right "
            "and run the same command again (a new folder is needed if a finished shard holds a part of a file that you "
            "change), or go on without them (on_damage 'skip')."
        )


def _expect_tokens(out: Path, sources: Sequence[str], held_out: float) -> None:
    plan = read_plan(out)
    if not any(read_shard(plan, number).tokens for number in range(plan.shards)):
        raise DataError(
            f"{', '.join(sources)} gave {out} no token: every document is empty or held out (a share of {held_out:g}); give "
            "more text or hold out less, and choose another folder."
        )


def _alone(tasks: list[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], Any]]:
    for task in tasks:
        try:
            yield task, write_shard(task)
        except DataError as error:
            yield task, Failed(f"DataError: {error}")


def _together(tasks: list[tuple[str, int]], workers: int) -> Iterator[tuple[tuple[str, int], Any]]:
    # Processes share the cores already; threads of the tokenizer in each would only get in each other's way.
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield from in_processes(write_shard, tasks, workers=workers, timeout=_SHARD_SECONDS)
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _grouped(pieces: Sequence[Piece], shard_bytes: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > shard_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group


def _identity(path: str) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _refuse_other_content(out: Path) -> None:
    if (out / PLAN).is_file() or not out.exists():
        return
    if not out.is_dir() or any(path.name not in (TOKENIZER, LOCK) for path in out.iterdir()):
        raise OutputError(f"{out} already holds something else; choose another folder.")


def _begin(out: Path, content: dict[str, Any], tokenizer: Any) -> ShardPlan:
    if (out / PLAN).is_file():
        begun = read_plan(out)
        changes = _changed_files(begun, content)
        for name, value in content.items():
            if name not in {"tokenizer_source", *changes} and begun.content.get(name) != value:
                reason = " (one is new, gone, or changed though a finished shard has a part of it)"
                raise OutputError(
                    f"{out} was begun with other {name.replace('_', ' ')}{reason if name == 'files' else ''}: repeat the same "
                    "command, or choose another folder."
                )
        _remove_leftovers(out)
        if changes:
            begun = ShardPlan(out, begun.content | changes)
            write_json(out / PLAN, begun.content)
        return begun
    if not (out / TOKENIZER).exists():
        with new_folder(out / TOKENIZER) as folder:
            tokenizer.save_pretrained(folder)
    if (found := fingerprint_tokenizer(open_tokenizer(out / TOKENIZER))) != content["tokenizer"]:
        raise OutputError(
            f"{out / TOKENIZER} holds another tokenizer ({found}, not {content['tokenizer']}); remove it."
        )
    write_json(out / PLAN, content)
    return ShardPlan(out, content)


def _changed_files(begun: ShardPlan, content: dict[str, Any]) -> dict[str, Any]:
    """What becomes of a plan whose files changed where no finished shard holds a part of them; nothing if others did.

    Shards keep what they hold of the other files, so that finished ones stay right.
    """
    before, now = begun.content["files"], content["files"]
    changed = {path for path in now if before.get(path) != now[path]}
    if before.keys() != now.keys() or not (changed or begun.content.get("replanned")):
        return {}
    shards, pieces = begun.content["shards"], list(chain.from_iterable(content["shards"]))
    unchanged = [piece for piece in chain.from_iterable(shards) if piece["path"] not in changed]
    if unchanged != [piece for piece in pieces if piece["path"] not in changed]:
        return {}
    affected = [number for number, group in enumerate(shards) if any(piece["path"] in changed for piece in group)]
    if any(_is_finished(begun, number) for number in affected):
        return {}
    new = {path: [piece for piece in pieces if piece["path"] == path] for path in changed}
    # The first shard that was to hold a part of a changed file gets all of it: its parts are cut elsewhere now.
    regrouped = [
        [piece for old in group for piece in (new.pop(old["path"], []) if old["path"] in changed else [old])]
        for group in shards
    ]
    return {"files": now, "shards": regrouped, "replanned": True}


def _remove_leftovers(out: Path) -> None:
    """What a killed run was in the middle of writing."""
    for path in out.glob(".shard-*.tmp"):
        path.unlink(missing_ok=True)


def _is_finished(plan: ShardPlan, number: int) -> bool:
    try:
        read_shard(plan, number).check()
    except (DataError, OSError):
        return False
    return True


@lru_cache(maxsize=1)
def _plan(folder: Path, modified: int) -> ShardPlan:
    # A plan may list a million files: it is read once a process.
    return read_plan(folder)


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, fingerprint: str) -> Any:
    return open_tokenizer(folder / TOKENIZER)

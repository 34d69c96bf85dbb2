"""Where training text comes from, cut into pieces that can be read independently: files, Parquet, datasets."""

from __future__ import annotations

import glob
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from power_retention.errors import DataError
from power_retention.training.text import RECORD_ENDINGS, TEXT_ENDINGS, file_documents, text_files, text_of_record

PARQUET, ARROW = ".parquet", ".arrow"
_LINES = ".jsonl"
_ENDINGS = (*TEXT_ENDINGS, *RECORD_ENDINGS, PARQUET)


@dataclass(frozen=True)
class Piece:
    """A part of a file.

    Attributes:
        path: the file.
        start, stop: which part: bytes of a ``.jsonl`` file (the lines that start there), row groups of a Parquet file,
            record batches of an Arrow file; of any other file 0 and 1, the whole of it.
        size: bytes of the part, to share the work out.
    """

    path: str
    start: int
    stop: int
    size: int


def find_pieces(sources: Sequence[str], *, split: str = "train", piece_bytes: int = 1 << 24) -> list[Piece]:
    """Cut sources into pieces; the same sources always give the same pieces in the same order.

    Args:
        sources: files, folders, globs, folders that ``datasets`` saved, or hub ids of datasets (a path that exists wins).
            Folders, those that a glob matches too, are searched for text, JSON and Parquet files.
        split: of a dataset that has several.
        piece_bytes: about how long a piece is, where its file can be cut.

    Raises:
        DataError: a source is missing, of another kind, damaged or empty, or needs a package that is not installed.
    """
    return [piece for source in sources for file in _files_of(source, split) for piece in _pieces_of(file, piece_bytes)]


def read_piece(piece: Piece, text_field: str) -> Iterator[str]:
    """The documents of a piece in order, those of nothing but white space left out.

    Raises:
        DataError: the file is damaged, or a record has no such field.
    """
    path = Path(piece.path)
    if path.suffix == PARQUET:
        texts = _parquet_documents(piece, text_field)
    elif path.suffix == ARROW:
        texts = _arrow_documents(piece, text_field)
    elif path.suffix == _LINES:
        texts = _line_documents(piece, text_field)
    else:
        texts = file_documents(path, text_field)
    return (text for text in texts if text.strip())


def _files_of(source: str, split: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.exists():
        files = _files_at(path, split)
    elif glob.has_magic(source):
        matches = sorted(glob.glob(str(path), recursive=True))
        # ** matches a folder and the files in it alike: each is read once.
        files = list(dict.fromkeys(file for match in matches for file in _files_at(Path(match), split)))
    else:
        files = _hub_dataset(source, split)
    if not files:
        raise DataError(f"{source} holds no file that ends in {', '.join(_ENDINGS)}, and is no saved dataset.")
    return [file.resolve() for file in files]


def _files_at(path: Path, split: str) -> list[Path]:
    if path.is_dir():
        return _saved_dataset(path, split) or text_files(path, _ENDINGS)
    return text_files(path, (*_ENDINGS, ARROW))


def _saved_dataset(folder: Path, split: str) -> list[Path]:
    """The Arrow files of a folder that ``datasets`` saved; none if it is another kind of folder."""
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            there = ", ".join(sorted(path.parent.name for path in folder.glob("*/state.json"))) or "nothing"
            raise DataError(f"{folder} has no split {split!r}; it has {there}: name one with --split.")
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        return []
    try:
        return [folder / file["filename"] for file in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{state} is damaged ({type(error).__name__}: {error}); save the dataset again.") from error


def _hub_dataset(name: str, split: str) -> list[Path]:
    """Fetch a dataset into the cache of ``datasets``; its Arrow files there."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(_ENDINGS):
        raise DataError(f"{name} does not exist.")
    _require("datasets", name)
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split)
    except Exception as error:  # thirty classes, from missing networks to wrong splits
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise DataError(
            f"{name} is not a path here, and no dataset of that name could be fetched with split {split!r}: {reason}"
        ) from error
    return [Path(file["filename"]) for file in loaded.cache_files]


def _require(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"Reading {what} takes the package {package!r}, which is not installed: "
            "run 'pip install power-retention[data]'."
        )


def _pieces_of(file: Path, piece_bytes: int) -> list[Piece]:
    if file.suffix == PARQUET:
        return _cut(file, _parquet_sizes(file), piece_bytes)
    if file.suffix == ARROW:
        return _cut(file, [batch.nbytes for batch in _arrow_batches(file)], piece_bytes)
    size = file.stat().st_size
    if file.suffix == _LINES:
        starts = range(0, size, piece_bytes)
        return [Piece(str(file), at, min(at + piece_bytes, size), min(piece_bytes, size - at)) for at in starts]
    return [Piece(str(file), 0, 1, size)]


def _cut(file: Path, sizes: list[int], piece_bytes: int) -> list[Piece]:
    """Neighbouring parts together until they are long enough."""
    pieces: list[Piece] = []
    start = 0
    for stop in range(1, len(sizes) + 1):
        if sum(sizes[start:stop]) >= piece_bytes or stop == len(sizes):
            pieces.append(Piece(str(file), start, stop, sum(sizes[start:stop])))
            start = stop
    return pieces


def _line_documents(piece: Piece, text_field: str) -> Iterator[str]:
    with open(piece.path, "rb") as file:
        # A line belongs to the piece that its first byte lies in.
        file.seek(max(piece.start - 1, 0))
        if piece.start:
            file.readline()
        while (at := file.tell()) < piece.stop:
            line = file.readline().removeprefix(b"\xef\xbb\xbf" if at == 0 else b"")
            if line.strip():
                where = f"{piece.path}, line at byte {at:,}"
                try:
                    record = json.loads(line.decode("utf-8"))
                except ValueError as error:
                    raise DataError(f"{where}, is not JSON in UTF-8: {error}.") from error
                yield text_of_record(record, text_field, where)


def _parquet_sizes(file: Path) -> list[int]:
    parquet = _open_parquet(file)
    return [parquet.metadata.row_group(group).total_byte_size for group in range(parquet.num_row_groups)]


def _open_parquet(file: Path) -> Any:
    _require("pyarrow", str(file))
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a Parquet file, or is damaged: {error}") from error


def _parquet_documents(piece: Piece, text_field: str) -> Iterator[str]:
    import pyarrow as pa

    parquet = _open_parquet(Path(piece.path))
    _check_field(parquet.schema_arrow.names, text_field, piece.path)
    try:
        for batch in parquet.iter_batches(row_groups=list(range(piece.start, piece.stop)), columns=[text_field]):
            yield from _texts(batch.column(0).to_pylist(), text_field, piece.path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{piece.path} is damaged in row groups {piece.start} to {piece.stop - 1}: {error}") from error


def _arrow_batches(file: Path) -> Iterator[Any]:
    _require("pyarrow", str(file))
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as stream:
            yield from stream
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not an Arrow stream, or is damaged: {error}") from error


def _arrow_documents(piece: Piece, text_field: str) -> Iterator[str]:
    for number, batch in enumerate(_arrow_batches(Path(piece.path))):
        if piece.start <= number < piece.stop:
            _check_field(batch.schema.names, text_field, piece.path)
            yield from _texts(batch.column(text_field).to_pylist(), text_field, piece.path)


def _check_field(names: list[str], text_field: str, path: str) -> None:
    if text_field not in names:
        raise DataError(
            f"{path} has no column {text_field!r}; its columns are {', '.join(map(repr, names))}: name the one with the text "
            "with --text-field."
        )


def _texts(values: list[Any], text_field: str, path: str) -> Iterator[str]:
    for value in values:
        if value is not None:  # a missing text is an empty one
            yield text_of_record(value, text_field, path)

"""Text in, token windows out: reading documents, holding some out, tokenizing, and drawing batches."""

from __future__ import annotations

import hashlib
import json
import lzma
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.errors import ArgumentError, DataError

TEXT_ENDINGS = (".txt", ".md")
RECORD_ENDINGS = (".jsonl", ".jsonl.xz", ".json")
_ENDINGS = (*TEXT_ENDINGS, *RECORD_ENDINGS)
_TOKENIZER_BATCH = 64


def read_documents(paths: Sequence[Path], *, text_field: str = "text") -> list[str]:
    """Read every document of the given files and directories, in order.

    A ``.txt`` or ``.md`` file is one document. A ``.jsonl``, ``.jsonl.xz`` or ``.json`` file holds a list or one
    record a line, each a string or an object with the text in ``text_field``. A directory is searched for those
    endings, sorted, hidden files and empty ones left out. Documents of nothing but white space are dropped.

    Args:
        paths: files and directories.
        text_field: where a record keeps its text.

    Raises:
        DataError: a file is missing, of another kind, not UTF-8 or not JSON, a file of records is empty, a record has no
            such field, or no document was found at all.
    """
    documents: list[str] = []
    for path in paths:
        for file in text_files(Path(path)):
            documents.extend(text for text in file_documents(file, text_field) if text.strip())
    if not documents:
        raise DataError(f"No text was found in {', '.join(map(str, paths)) or 'an empty list of files'}.")
    return documents


def split_held_out(documents: Sequence[str], *, fraction: float = 0.05, seed: int = 0) -> tuple[list[str], list[str]]:
    """Divide documents into training and held-out ones by a hash of each.

    A document lands on the same side in whatever company it comes, and so do all copies of it: none straddles. Should
    one side stay empty, the document nearest to the border moves over with its copies, as long as there are two
    different ones; a single document is all for training.

    Args:
        documents: the texts.
        fraction: expected share of different documents to hold out, at least 0 and below 1.
        seed: another seed holds out others.

    Returns:
        Training and held-out documents, each in the order given.
    """
    if not 0 <= fraction < 1:
        raise ArgumentError(f"The held-out fraction is {fraction}; it must be at least 0 and below 1.")
    places = [hash_unit(document, seed) for document in documents]
    border = _border(sorted(set(places)), fraction)
    train = [document for document, place in zip(documents, places, strict=True) if place >= border]
    held_out = [document for document, place in zip(documents, places, strict=True) if place < border]
    return train, held_out


def fingerprint_documents(documents: Sequence[str]) -> str:
    """Sixteen hex digits; another means other documents, or another order."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", "replace")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Tokens:
    """A corpus as one row of token ids.

    Attributes:
        ids: ``[N]`` int32, the documents one after another.
        starts: ``[documents + 1]`` int64, where each document starts, and N.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def window_count(self, length: int) -> int:
        """Whole windows of ``length`` tokens that do not overlap."""
        return len(self) // length

    def window(self, index: int, length: int) -> Tensor:
        """``[length]`` int64: the window number ``index`` of those that do not overlap."""
        if not 0 <= index < self.window_count(length):
            raise IndexError(f"window {index} of {self.window_count(length)}")
        return torch.from_numpy(self.ids[index * length : (index + 1) * length].astype(np.int64))


def tokenize(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """Tokenize documents into one row.

    Each document keeps the special tokens that its tokenizer puts around a text by itself, and ends with the
    end-of-sequence token where the tokenizer has one.

    Args:
        documents: the texts.
        tokenizer: of the model that will read them.
        max_tokens: stop after this many, in the middle of a document if need be.
        progress: called with the documents done and the documents given, now and then.

    Raises:
        DataError: there is not a single token.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ArgumentError(f"max_tokens is {max_tokens}; it must be at least 1.")
    room = sys.maxsize if max_tokens is None else max_tokens
    pieces: list[npt.NDArray[np.int32]] = []
    for first in range(0, len(documents), _TOKENIZER_BATCH):
        for ids in tokenize_batch(list(documents[first : first + _TOKENIZER_BATCH]), tokenizer):
            pieces.append(ids[:room])
            room -= len(pieces[-1])
        if progress is not None:
            progress(min(first + _TOKENIZER_BATCH, len(documents)), len(documents))
        if not room:
            break
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        raise DataError(f"The {len(documents)} documents given hold no tokens.")
    return Tokens(np.concatenate(pieces), np.cumsum([0, *map(len, pieces)], dtype=np.int64))


def sample_batch(tokens: Tokens, *, batch: int, length: int, seed: int, step: int) -> Tensor:
    """``[batch, length]`` int64: the windows of one training step, a function of its arguments and nothing else.

    Windows do not overlap. An epoch is a permutation of them drawn from (seed, epoch), so each is seen once an epoch,
    and a run resumes from its step number alone. A batch may reach from one epoch into the next.

    Args:
        tokens: the corpus.
        batch: windows a step; must stay the same for a whole run.
        length: tokens a window.
        seed: of the run.
        step: number of the step, from 0.

    Raises:
        DataError: the corpus is shorter than one window.
    """
    if min(batch, length) < 1 or step < 0:
        raise ArgumentError(f"batch {batch} and length {length} must be at least 1, and step {step} at least 0.")
    count = tokens.window_count(length)
    if not count:
        raise DataError(
            f"The text has {len(tokens):,} tokens and one window takes {length:,}: give more text or a shorter window."
        )
    places = range(step * batch, (step + 1) * batch)
    return torch.stack(
        [tokens.window(int(_permutation(count, seed, at // count)[at % count]), length) for at in places]
    )


def text_files(path: Path, endings: tuple[str, ...] = _ENDINGS) -> list[Path]:
    """The files to read: the one given, or those with such an ending in the folder given, sorted.

    Raises:
        DataError: nothing is there, or a file of another kind.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(endings))
        return [file for file in files if file.stat().st_size and not _is_hidden(file.relative_to(path))]
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if not path.name.endswith(endings):
        raise DataError(f"{path} is not a text file: it must end in {', '.join(endings)}.")
    return [path]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def file_documents(path: Path, text_field: str) -> Iterator[str]:
    """The documents of one text or JSON file, as :func:`read_documents` reads them."""
    if path.name.endswith(TEXT_ENDINGS):
        yield _decoded(_read_bytes(path), path)
        return
    for where, record in _records(_read_text(path), path):
        yield text_of_record(record, text_field, where)


def json_records(path: Path) -> list[tuple[str, Any]]:
    """(where, record) of a JSON file: of its list, or of its lines.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    return list(_records(_read_text(path), path))


def _records(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    records = _json_list(text, path) if path.suffix == ".json" else None
    for number, record in _json_lines(text, path) if records is None else records:
        yield f"{path}, {number}", record


def _read_text(path: Path) -> str:
    content = _read_bytes(path)
    if not content.strip():
        raise DataError(f"{path} is empty.")
    return _decoded(content, path)


def _decoded(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start:,} (0x{content[error.start]:02x}): convert it to UTF-8 first."
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is damaged or cut short: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json_list(text: str, path: Path) -> list[tuple[str, Any]] | None:
    """The numbered records of a file that is one JSON value, or None if it has a value a line."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text[: error.pos]:
            return None
        raise DataError(f"{path} is not JSON at line {error.lineno}: {error.msg}.") from error
    records = content if isinstance(content, list) else [content]
    return [(f"record {number}", record) for number, record in enumerate(records, 1)]


def _json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    # Not splitlines: JSON strings may hold the other characters that it takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path} is not JSON at line {number}: {error.msg}.") from error


def text_of_record(record: Any, text_field: str, where: str) -> str:
    """The text of a record; ``where`` names it in the DataError that refuses one without."""
    text = record.get(text_field) if isinstance(record, dict) else record
    if isinstance(text, str):
        # JSON can spell half of a surrogate pair, which is no character and which no tokenizer takes.
        return text.encode("utf-8", "replace").decode("utf-8")
    if isinstance(record, dict) and text_field not in record:
        fields = ", ".join(repr(name) for name in record) or "none"
        raise DataError(f"{where} has no field {text_field!r}; its fields are {fields}: name the one with the text.")
    raise DataError(f"{where} holds a {type(text).__name__} where its text should be.")


def hash_unit(document: str, seed: int) -> float:
    """A number in [0, 1) that depends on the document and the seed alone."""
    digest = hashlib.blake2b(document.encode("utf-8", "replace"), digest_size=6, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big") / 2**48


def _border(places: list[float], fraction: float) -> float:
    """Where held-out ends and training begins, such that neither side of the sorted places is empty if it can be."""
    if fraction == 0 or len(places) < 2:
        return 0.0
    if fraction <= places[0]:
        return places[1]
    return min(fraction, places[-1])


def tokenize_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[npt.NDArray[np.int32]]:
    """The ids of each text, with what its tokenizer puts around it and the end-of-sequence token after it."""
    end = tokenizer.eos_token_id
    for ids in tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)["input_ids"]:
        if end is not None and ids[-1:] != [end]:
            ids.append(end)
        yield np.asarray(ids, dtype=np.int32)


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    # numpy keeps the raw bits of its generators for good, but not the order of Generator.permutation.
    generator = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch]))
    return np.argsort(generator.random_raw(count), kind="stable")

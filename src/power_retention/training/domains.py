"""Held-out text by domain: the windows that a run is measured on, and never those that it learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from power_retention.conversion.source import fingerprint_tokenizer
from power_retention.errors import ArgumentError, DataError
from power_retention.training.mixture import Mixture, PackedBatch, Stretch, pack
from power_retention.training.shards import PLAN, ShardedTokens, open_shards, read_plan
from power_retention.training.sources import find_pieces, read_piece
from power_retention.training.text import Tokens, hash_unit, text_files, tokenize

_BATCH_TOKENS = 8192
"""Tokens that a model reads at a time, or one window."""
_INSTEAD = "give the text they were made of instead, whose left-out documents are then taken, or other shards."
_READ = 1 << 16
"""Most documents kept of a domain while its lowest hashes are looked for."""


@dataclass(frozen=True)
class Domain:
    """Windows of one kind of held-out text.

    Attributes:
        name: for people.
        batches: windows of packed whole and cut documents that do not see each other, some at a time.
        kept_out: whether the run learns from no text of this kind.
    """

    name: str
    batches: list[PackedBatch]
    kept_out: bool

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits; another means other tokens."""
        parts = [part for batch in self.batches for part in (batch.ids, batch.labels, batch.cu_seqlens)]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


class TrainedOn(Protocol):
    """What a run learns from, asked about what it is to be measured on."""

    def knows(self, name: str) -> bool:
        """Whether text of a domain of this name is learnt from, whatever documents are given for it."""
        ...

    def refuse_shards(self, name: str, shards: ShardedTokens, folder: Path) -> None:
        """Refuse shards of a folder that hold what is learnt from."""
        ...

    def has(self, document: str, file: Path) -> bool:
        """Whether a document of a file is learnt from."""
        ...


class TrainedOnText:
    """A run that learns from documents.

    Args:
        documents: all of them.
    """

    def __init__(self, documents: Collection[str]) -> None:
        self._hashes = {hash_unit(document, 0) for document in documents}

    def knows(self, name: str) -> bool:
        return False

    def refuse_shards(self, name: str, shards: ShardedTokens, folder: Path) -> None:
        """Documents cannot be told from ids: :func:`refuse_shards_of` goes by the files that shards were made of."""

    def has(self, document: str, file: Path) -> bool:
        return hash_unit(document, 0) in self._hashes


class TrainedOnShards:
    """A run that learns from a mixture of token shards; of the files they were made of, a share was left out by hash.

    Args:
        mixture: of the run.
    """

    def __init__(self, mixture: Mixture) -> None:
        used = {name for phase in mixture.phases for name, weight in phase.weights.items() if weight > 0}
        sources = {name: source for name, source in mixture.sources.items() if name in used}
        self._names = {source.fingerprint: name for name, source in sources.items()}
        self._checksums = {shard.checksum for source in sources.values() for shard in source.shards}
        self._shares: dict[Path, float] = {}
        for folder in {shard.path.parent for source in sources.values() for shard in source.shards}:
            content = read_plan(folder).content
            for file in content["files"]:
                self._shares[Path(file)] = min(content["held_out"], self._shares.get(Path(file), 1.0))

    def knows(self, name: str) -> bool:
        return name in self._names.values()

    def refuse_shards(self, name: str, shards: ShardedTokens, folder: Path) -> None:
        if shards.fingerprint in self._names:
            raise DataError(
                f"The held-out shards {name!r} are the very ones the mixture learns from as "
                f"{self._names[shards.fingerprint]!r}: {_INSTEAD}"
            )
        if same := [shard.path.name for shard in shards.shards if shard.checksum in self._checksums]:
            raise DataError(
                f"Of the held-out shards {name!r}, {same[0]} is the same as one that the mixture learns from: {_INSTEAD}"
            )
        _refuse_made_of(name, folder, self._shares.keys())

    def has(self, document: str, file: Path) -> bool:
        return file in self._shares and hash_unit(document, 0) >= self._shares[file]


def refuse_shards_of(paths: Mapping[str, Path], text: Sequence[Path]) -> None:
    """Refuse held-out shards made of files that a run is to learn from.

    Shards hold what ``power-retention data`` did not leave out, which is what a run on the same text learns from.

    Args:
        paths: held-out text or shards by name.
        text: files and folders of the run's text.

    Raises:
        DataError: some are, or a path of the text does not exist.
    """
    files = {file.resolve() for path in text for file in text_files(path)}
    for name, path in paths.items():
        if (path / PLAN).is_file():
            _refuse_made_of(name, path, files)


def _refuse_made_of(name: str, folder: Path, files: Collection[Path]) -> None:
    if same := [file for file in read_plan(folder).content["files"] if Path(file) in files]:
        raise DataError(f"The held-out shards {name!r} were made of {same[0]}, which the run learns from: {_INSTEAD}")


def read_domains(
    paths: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    trained_on: TrainedOn,
    *,
    windows: int = 8,
    length: int = 512,
    text_field: str = "text",
) -> list[Domain]:
    """Take windows of each domain: evenly from shards, of text those documents first that any run would hold out.

    Args:
        paths: a text file, a folder of them or a folder of token shards by the domain's name.
        tokenizer: of the models.
        trained_on: what the run learns from; no such document is taken.
        windows: most windows of a domain.
        length: tokens a window.
        text_field: where a record keeps its text.

    Raises:
        DataError: a path is missing or damaged, was made with another tokenizer, or is too short.
    """
    if min(windows, length - 1) < 1:
        raise ArgumentError(
            f"Held-out text needs at least 1 window of at least 2 tokens, not {windows} of {length}: choose larger ones."
        )
    domains: list[Domain] = []
    at_once = max(1, _BATCH_TOKENS // length)
    for name, path in paths.items():
        if not path.exists():
            raise DataError(f"The held-out text {name!r} is to come from {path}, which does not exist.")
        if (path / PLAN).is_file():
            stretches, seen = _from_shards(name, path, tokenizer, trained_on, windows, length), False
        else:
            stretches, seen = _from_text(name, path, tokenizer, trained_on, windows, length, text_field)
        groups = [stretches[i : i + at_once] for i in range(0, len(stretches), at_once)]
        kept_out = not (seen or trained_on.knows(name))
        domains.append(Domain(name, [pack(group, length) for group in groups], kept_out))
    return domains


def parse_held_out(given: Sequence[str]) -> dict[str, Path]:
    """``NAME=PATH`` → the path by name.

    Raises:
        ArgumentError: it is written in another way, or a name comes twice.
    """
    paths: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign or not name.strip() or not path.strip():
            raise ArgumentError(f"Held-out text is given as NAME=PATH, such as code=text/code.jsonl, not {text!r}.")
        if name.strip() in paths:
            raise ArgumentError(f"The held-out text {name.strip()!r} is given twice; give each a name of its own.")
        paths[name.strip()] = Path(path.strip()).expanduser()
    return paths


def _from_shards(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, trained_on: TrainedOn, windows: int, length: int
) -> list[Stretch]:
    tokens = open_shards(folder)
    if (own := fingerprint_tokenizer(tokenizer)) != tokens.tokenizer:
        raise DataError(
            f"The held-out shards {name!r} were made with a tokenizer of fingerprint {tokens.tokenizer}, the models' is {own}: "
            "make them with the models' tokenizer."
        )
    trained_on.refuse_shards(name, tokens, folder)
    count = _windows_in(name, len(tokens), windows, length)
    starts = [i * (len(tokens) - length) // max(count - 1, 1) for i in range(count)]
    return [tokens.read(start, min(start + length + 1, len(tokens))) for start in starts]


def _from_text(
    name: str,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    trained_on: TrainedOn,
    windows: int,
    length: int,
    text_field: str,
) -> tuple[list[Stretch], bool]:
    """The windows, and whether a run learns from other documents of the same files."""
    documents, seen = _lowest_hashes(path, trained_on, text_field)
    if not documents:
        raise DataError(
            f"The held-out text {name!r} ({path}) has no document that the run does not learn from: leave some out with "
            "`power-retention data --held-out`, or name other text."
        )
    tokens = tokenize(documents, tokenizer, max_tokens=windows * length + 1)
    count = _windows_in(name, len(tokens), windows, length)
    return [_stretch(tokens, i * length, min((i + 1) * length + 1, len(tokens))) for i in range(count)], seen


def _lowest_hashes(path: Path, trained_on: TrainedOn, text_field: str) -> tuple[list[str], bool]:
    """Documents no run has learnt from, by rising hash: first those that every run with the usual share would hold out."""
    kept: dict[str, float] = {}
    seen = False
    for document, file in _documents(path, text_field):
        if trained_on.has(document, file):
            seen = True
            continue
        kept[document] = hash_unit(document, 0)
        if len(kept) > 2 * _READ:
            kept = dict(sorted(kept.items(), key=lambda item: item[1])[:_READ])
    return sorted(kept, key=lambda document: kept[document]), seen


def _documents(path: Path, text_field: str) -> Iterator[tuple[str, Path]]:
    for piece in find_pieces([str(path)]):
        for document in read_piece(piece, text_field):
            yield document, Path(piece.path)


def _windows_in(name: str, tokens: int, windows: int, length: int) -> int:
    count = min(windows, tokens // length)
    if not count:
        raise DataError(
            f"The held-out text {name!r} has {tokens:,} tokens and one window takes {length:,}: give more text or choose "
            "shorter windows."
        )
    return count


def _stretch(tokens: Tokens, start: int, stop: int) -> Stretch:
    starts = tokens.starts[(tokens.starts >= start) & (tokens.starts < stop)]
    return tokens.ids[start:stop].astype(np.int64), starts - start

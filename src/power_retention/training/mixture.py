"""Which token comes when: mixtures of sources in phases, drawn at random and without any state.

Everything here is a function of (seed, number of the sequence). A permutation that can be asked for one place at a time (a
Feistel network over the places, walked until it lands among them) says which source a sequence comes from and which window of
it, so a run over any number of tokens resumes from its step alone and keeps no list.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from power_retention.errors import ArgumentError, DataError
from power_retention.files import read_toml
from power_retention.training.shards import OnDamage, ShardedTokens, open_shards

_ROUNDS = 6
_BLOCK = 256
"""Sequences within which the order is shuffled; every block holds its share of each source."""
NO_LABEL = -100
Stretch = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
"""Ids, and the places among them at which a document starts."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one mixture.

    Attributes:
        weights: share of the sequences from each source; they need not add up to one.
        tokens: how long it lasts; None lasts until each token of the largest source was seen once.
        name: for people.
    """

    weights: Mapping[str, float]
    tokens: int | None = None
    name: str = ""


@dataclass(frozen=True)
class PackedBatch:
    """Sequences of whole and cut documents, back to back, none padded.

    Attributes:
        ids: ``[batch, length]`` int64.
        labels: ``[batch, length]`` int64, the next token of the same document, −100 at a document's last one.
        position_ids: ``[batch, length]`` int64, from 0 at the start of each piece of a document.
        cu_seqlens: ``[pieces + 1]`` int32, where each piece starts in the flattened ids, and batch · length.
    """

    ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor

    @property
    def document_starts(self) -> Tensor:
        """``[batch, length]`` boolean, True where a piece of a document starts."""
        return self.position_ids == 0


@dataclass(frozen=True)
class _Layout:
    """A phase in sequences of one length.

    Attributes:
        first: number of its first sequence.
        counts: sequences of each source.
        used: sequences of each source in the phases before.
    """

    first: int
    counts: list[int]
    used: list[int]

    @property
    def sequences(self) -> int:
        return sum(self.counts)

    def before(self, block: int) -> list[int]:
        """How many sequences of each source come before a block."""
        return [count * block // self._blocks for count in self.counts]

    def block_of(self, at: int) -> int:
        """The block that sequence ``at`` of the phase lies in."""
        block = min(at * self._blocks // self.sequences, self._blocks - 1)
        while sum(self.before(block)) > at:
            block -= 1
        while sum(self.before(block + 1)) <= at:
            block += 1
        return block

    @property
    def _blocks(self) -> int:
        return -(-self.sequences // _BLOCK)


class Mixture:
    """Sources and the phases in which they are mixed.

    Windows of a source do not overlap, and it is gone through once before it is gone through again (to within a block of 256
    sequences), whatever the phases. When the last phase is over it is
    repeated with the windows that come next.

    Args:
        sources: by name, all made with the same tokenizer.
        phases: in order; only the last may lack a length.

    Raises:
        DataError: a phase names no source that there is, or weights, lengths or tokenizers make no sense.
    """

    def __init__(self, sources: Mapping[str, ShardedTokens], phases: Sequence[Phase]) -> None:
        self.sources, self.phases = dict(sources), list(phases)
        self._names = list(self.sources)
        self._layouts: dict[int, list[_Layout]] = {}
        _check_phases(self.sources, self.phases)
        tokenizers = {source.tokenizer: name for name, source in self.sources.items()}
        if len(tokenizers) > 1:
            raise DataError(
                f"The sources {' and '.join(map(repr, tokenizers.values()))} were made with different tokenizers "
                f"({', '.join(tokenizers)}): make them again with one."
            )
        self.tokenizer = next(iter(tokenizers))

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits; another means that other tokens may come at some step."""
        sources = {name: source.fingerprint for name, source in self.sources.items()}
        phases = [[sorted(phase.weights.items()), phase.tokens] for phase in self.phases]
        return hashlib.sha256(json.dumps([sources, phases]).encode()).hexdigest()[:16]

    def place(self, number: int, *, length: int, seed: int) -> tuple[str, int]:
        """(source, window of it) that sequence ``number`` of the run is, counted from 0 over all phases."""
        layouts = self._layout(length)
        phase = max(i for i, layout in enumerate(layouts) if layout.first <= number)
        layout = layouts[phase]
        repeat, at = divmod(number - layout.first, layout.sequences)
        block = layout.block_of(at)
        before = layout.before(block)
        here = [after - count for after, count in zip(layout.before(block + 1), before, strict=True)]
        slot = shuffled(at - sum(before), sum(here), f"{seed} phase {phase} {repeat} {block}")
        index = 0
        while slot >= here[index]:
            slot -= here[index]
            index += 1
        name = self._names[index]
        windows = len(self.sources[name]) // length
        epoch, window = divmod(layout.used[index] + repeat * layout.counts[index] + before[index] + slot, windows)
        return name, shuffled(window, windows, f"{seed} source {name} {epoch}")

    def batch(self, step: int, rank: int = 0, *, ranks: int = 1, batch: int, length: int, seed: int) -> PackedBatch:
        """What a rank reads at a step: a function of the arguments and nothing else.

        Ranks share out the sequences of a step in order: together they read the same ones however many they are, as long as
        ``ranks`` · ``batch`` stays.

        Args:
            step: from 0.
            rank: of ``ranks``.
            ranks: processes that read different data.
            batch: sequences a rank.
            length: tokens a sequence. A longer document is cut and goes on in another sequence, as a document of its own.
            seed: of the run.

        Raises:
            DataError: a source is shorter than one sequence.
        """
        if min(batch, length, ranks) < 1 or step < 0 or not 0 <= rank < ranks:
            raise ArgumentError(
                f"batch {batch}, length {length} and ranks {ranks} must be at least 1, step {step} at least 0 and rank {rank} "
                "below ranks."
            )
        first = (step * ranks + rank) * batch
        return pack([self._read(number, length, seed) for number in range(first, first + batch)], length)

    def _read(self, number: int, length: int, seed: int) -> Stretch:
        name, window = self.place(number, length=length, seed=seed)
        source, first = self.sources[name], window * length
        return source.read(first, min(first + length + 1, len(source)))

    def _layout(self, length: int) -> list[_Layout]:
        if length not in self._layouts:
            self._layouts[length] = self._lay_out(length)
        return self._layouts[length]

    def _lay_out(self, length: int) -> list[_Layout]:
        for name, source in self.sources.items():
            if len(source) < length:
                raise DataError(
                    f"The source {name!r} has {len(source):,} tokens and one sequence takes {length:,}: give it more text or "
                    "choose shorter sequences."
                )
        layouts: list[_Layout] = []
        first, tokens, used = 0, 0, [0] * len(self._names)
        for phase in self.phases:
            tokens += phase.tokens or self._once_through(phase)
            counts = _shares([phase.weights.get(name, 0.0) for name in self._names], tokens // length - first)
            if not sum(counts):
                raise DataError(f"The phase {phase.name!r} is shorter than one sequence of {length:,} tokens.")
            layouts.append(_Layout(first, counts, used))
            first, used = first + sum(counts), [a + b for a, b in zip(used, counts, strict=True)]
        return layouts

    def _once_through(self, phase: Phase) -> int:
        total = sum(phase.weights.values())
        return max(int(len(self.sources[name]) * total / weight) for name, weight in phase.weights.items() if weight)


def pack(stretches: Sequence[Stretch], length: int) -> PackedBatch:
    """Sequences of ``length`` tokens from stretches of text, each of one token more where there is one: the last label.

    Args:
        stretches: ids ``[length]`` or ``[length + 1]``, and the places among them at which a document starts.
        length: tokens a sequence.
    """
    rows = [_row(stretch, length) for stretch in stretches]
    starts = torch.cat([row[2] + i * length for i, row in enumerate(rows)])
    cu_seqlens = torch.cat([starts, torch.tensor([len(rows) * length])])
    own_start = torch.repeat_interleave(starts, cu_seqlens.diff())
    positions = (torch.arange(len(rows) * length) - own_start).view(-1, length)
    ids, labels = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    return PackedBatch(ids, labels, positions, cu_seqlens.to(torch.int32))


def _row(stretch: Stretch, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels, starts of pieces) of one sequence."""
    ids, starts = map(torch.from_numpy, stretch)
    labels = torch.full((length,), NO_LABEL)
    labels[: len(ids) - 1] = ids[1:]
    labels[starts[starts > 0] - 1] = NO_LABEL  # a document does not predict the next one
    starts = starts[(starts > 0) & (starts < length)]
    return ids[:length], labels, torch.cat([torch.zeros(1, dtype=torch.int64), starts])


def shuffled(place: int, count: int, key: str) -> int:
    """Where ``place`` goes in a permutation of ``range(count)`` that ``key`` chooses; no list is made."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(f"{key} {number} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        place = left << half | right
        if place < count:
            return place


def read_mixture(
    path: Path,
    *,
    on_damage: OnDamage | None = None,
    checksums: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Mixture:
    """A mixture from a TOML file, or from a folder of shards alone.

    ::

        on_damage = "fail"                   # or "skip"

        [sources]                            # folders of shards, seen from this file
        web = "shards/web"
        code = "shards/code"

        [[phase]]
        name = "breadth"
        tokens = 2_000_000_000
        weights = { web = 0.8, code = 0.2 }

        [[phase]]                            # the last one may go without tokens
        name = "quality"
        weights = { web = 0.4, code = 0.6 }

        [held_out]                           # what a run is measured on; see read_held_out
        code = "text/code.jsonl"

    Args:
        path: the file or folder.
        on_damage: see :func:`~power_retention.training.shards.open_shards`; None for what the file says, or ``fail``.
        checksums: the same.
        progress: the same, for each source.

    Raises:
        DataError: the file is missing, is not such a file, or a source cannot be used.
    """
    if path.is_dir():
        source = open_shards(path, on_damage=on_damage or "fail", checksums=checksums, progress=progress)
        return Mixture({"data": source}, [Phase({"data": 1.0}, name="data")])
    content = _read_content(path)
    noted = content.get("on_damage", "fail")
    if noted not in ("fail", "skip"):
        raise DataError(f"{path} has on_damage {noted!r}; it must be 'fail' or 'skip'.")
    phases = [_phase(path, number, table) for number, table in enumerate(content["phase"], 1)]
    folders = {name: path.parent / Path(folder).expanduser() for name, folder in content["sources"].items()}
    sources = {
        name: open_shards(folder, on_damage=on_damage or noted, checksums=checksums, progress=progress)
        for name, folder in folders.items()
    }
    return Mixture(sources, phases)


def read_held_out(path: Path) -> dict[str, Path]:
    """The text or shards by name that a mixture's file wants its runs measured on (table ``[held_out]``); often none.

    Raises:
        DataError: the file is missing or is not such a file.
    """
    if path.is_dir():
        return {}
    table = _read_content(path).get("held_out", {})
    return {name: path.parent / Path(place).expanduser() for name, place in table.items()}


def _read_content(path: Path) -> dict[str, Any]:
    content = read_toml(path)
    unknown = sorted(content.keys() - {"sources", "phase", "on_damage", "held_out"})
    sources, phases, held_out = content.get("sources"), content.get("phase"), content.get("held_out", {})
    if unknown:
        raise DataError(
            f"{path} has {', '.join(map(repr, unknown))}; it may have on_damage, [sources], [[phase]] and [held_out]."
        )
    if not isinstance(held_out, dict) or not all(isinstance(place, str) for place in held_out.values()):
        raise DataError(f"{path} has a table [held_out] that does not give each name a text file or folder of shards.")
    if not isinstance(sources, dict) or not sources or not all(isinstance(folder, str) for folder in sources.values()):
        raise DataError(f"{path} needs a table [sources] that gives each source the folder of its shards.")
    if not isinstance(phases, list) or not phases or not all(isinstance(table, dict) for table in phases):
        raise DataError(f"{path} needs at least one table [[phase]] with weights.")
    return content


def _phase(path: Path, number: int, table: dict[str, Any]) -> Phase:
    where = f"{path}, phase {number}"
    unknown = sorted(table.keys() - {"name", "tokens", "weights"})
    weights, tokens = table.get("weights"), table.get("tokens")
    if unknown:
        raise DataError(f"{where}, has {', '.join(map(repr, unknown))}; it may have name, tokens and weights.")
    if not isinstance(weights, dict) or not all(_is_number(weight) for weight in weights.values()):
        raise DataError(f"{where}, needs weights such as {{ web = 0.8, code = 0.2 }}.")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise DataError(f"{where}, has tokens {tokens!r}; a whole number was expected.")
    return Phase(weights, tokens, str(table.get("name", f"phase {number}")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_phases(sources: Mapping[str, ShardedTokens], phases: Sequence[Phase]) -> None:
    if not sources or not phases:
        raise DataError("A mixture needs at least one source and one phase.")
    for number, phase in enumerate(phases, 1):
        where = f"Phase {phase.name or number!r}"
        if unknown := sorted(phase.weights.keys() - sources.keys()):
            raise DataError(
                f"{where} has a weight for {unknown[0]!r}; the sources are {', '.join(map(repr, sources))}."
            )
        if not _are_shares(list(phase.weights.values())):
            raise DataError(
                f"{where} has weights {dict(phase.weights)}: each must be at least 0, one above it, and their sum finite."
            )
        if phase.tokens is None and number < len(phases):
            raise DataError(f"{where} does not say how many tokens it lasts; only the last phase may leave that open.")
        if phase.tokens is not None and phase.tokens < 1:
            raise DataError(f"{where} lasts {phase.tokens} tokens; it must be at least 1.")


def _are_shares(weights: Sequence[float]) -> bool:
    try:
        return all(weight >= 0 for weight in weights) and 0 < math.fsum(weights) < math.inf
    except OverflowError:
        return False


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` divided in proportion, exact to one (largest remainders)."""
    wanted = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in wanted]
    by_remainder = sorted(range(len(counts)), key=lambda i: counts[i] - wanted[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts

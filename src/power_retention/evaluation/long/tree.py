"""Identifiers across the files of a real source tree: is a name known because the file that defines it has been read?

The tree is Python, by default the standard library of the interpreter.  A context is files of it, one after another, among them
up to four that define names which others use; asked is ``module.`` in another file, at its first use of such a name, which
occurs in no other file of the context.  The same is asked after other files alone: what the model knows by heart, and what
the surrounding lines give away, counts there too.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from power_retention.errors import DataError
from power_retention.evaluation.long.context import (
    Context,
    Encoder,
    Question,
    TooShortError,
    finish,
    flat,
    room_for,
)

WITH, WITHOUT = "with the defining file", "without it"
SHOWN = 400
"""Characters of the using file before a use."""

_MOST_FILES = 4
_NAMES_A_FILE = 4
_DECOYS = 3
_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "node_modules"})
_DEFINITION = re.compile(r"^(?:async +def|def|class) +([a-zA-Z]\w{3,})", re.MULTILINE)
_USE = re.compile(r"(?<![\w.])([a-zA-Z]\w+)\.([a-zA-Z]\w{3,})")


@dataclass(frozen=True)
class SourceFile:
    """One file: its path in the tree, and what is in it."""

    path: str
    text: str

    @property
    def module(self) -> str:
        """The name it is imported by, its package left out."""
        return Path(self.path).stem

    def shown(self) -> str:
        """As it stands in a context."""
        return f"\n\n# File: {self.path}\n\n{self.text.strip()}"


@dataclass(frozen=True)
class Use:
    """The first place in a file where it uses a name of another file's."""

    file: SourceFile
    at: int
    name: str


class SourceTree:
    """Python files of a folder, and which of them use what others define.

    Args:
        root: the folder; None for the standard library.

    Raises:
        DataError: fewer than ten Python files are there, or no file uses another's names.
    """

    def __init__(self, root: Path | None = None) -> None:
        root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
        self.files = [SourceFile(str(path.relative_to(root)), text) for path, text in _python_files(root)]
        if len(self.files) < 10:
            raise DataError(f"{root} holds {len(self.files)} Python files; at least 10 were expected.")
        counts = Counter(file.module for file in self.files)
        self._named = {file.module: file for file in self.files if counts[file.module] == 1}
        self._public = {module: set(_DEFINITION.findall(file.text)) for module, file in self._named.items()}
        self.uses = self._find_uses()
        if not self.uses:
            raise DataError(f"No file of {root} uses what another one defines, as module.name.")

    def _find_uses(self) -> dict[str, list[Use]]:
        """By module: first uses of its names in other files, where the name has not occurred before."""
        uses: dict[str, list[Use]] = {}
        for file in self.files:
            seen: set[str] = set()
            for match in _USE.finditer(file.text):
                module, name = match.groups()
                if module == file.module or name in seen or name not in self._public.get(module, ()):
                    continue
                seen.add(name)
                if not _word_in(name, file.text[: match.start(2)]):
                    uses.setdefault(module, []).append(Use(file, match.start(2), name))
        return {module: found for module, found in uses.items() if len({use.name for use in found}) > 1}

    def stream(self, seed: int) -> list[str]:
        """All files in a random order, as text."""
        return [file.shown() for file in random.Random(f"tree {seed}").sample(self.files, len(self.files))]

    def contexts(self, encoder: Encoder, length: int, seed: int) -> list[Context]:
        """Two contexts of ``length`` tokens, with the defining files and without them, and the same questions; see the module.

        Raises:
            TooShortError: no file that others use takes less than half of the tokens.
        """
        defining, written = self._choose(encoder, length, random.Random(f"files {length} {seed}"))
        uses = self._asked(defining, random.Random(f"uses {length} {seed}"))
        if not uses:
            raise TooShortError(f"no file that others use takes less than half of {length} tokens")
        asked = {variant: self._questions(uses, variant, seed) for variant in (WITH, WITHOUT)}
        rng = random.Random(f"tree {length} {seed}")
        others = self._fill(encoder, room_for(encoder, length, asked[WITHOUT]), uses, defining, rng)
        files = _first(others, room_for(encoder, length, asked[WITH], *written))
        for piece in written:
            files.insert(rng.randrange(len(files) + 1), piece)
        return [
            finish("identifiers", length, seed, encoder, flat(pieces), asked[variant])
            for variant, pieces in ((WITH, files), (WITHOUT, others))
        ]

    def _questions(self, uses: Sequence[Use], variant: str, seed: int) -> list[Question]:
        rng = random.Random(f"names {seed}")
        return [self._question(use, variant, rng) for use in uses]

    def _choose(self, encoder: Encoder, length: int, rng: random.Random) -> tuple[list[SourceFile], list[list[int]]]:
        """Files that define what others use, and their ids: a few, half of the context together."""
        files: list[SourceFile] = []
        written: list[list[int]] = []
        for module in rng.sample(sorted(self.uses), len(self.uses)):
            file = self._named[module]
            left = length // 2 - sum(map(len, written))
            if len(file.text) > 8 * left or len(files) == _MOST_FILES:
                continue
            ids = encoder(file.shown())
            if len(ids) <= left:
                files.append(file)
                written.append(ids)
        return files, written

    def _asked(self, defining: Sequence[SourceFile], rng: random.Random) -> list[Use]:
        """Uses of a few names of each file, outside of these files, that occur in none of them but the defining one."""
        chosen = []
        for file in defining:
            uses = self.uses[file.module]
            by_name = {use.name: use for use in rng.sample(uses, len(uses)) if use.file not in defining}
            others = [other.text for other in defining if other is not file]
            names = [name for name in sorted(by_name) if not any(_word_in(name, text) for text in others)]
            chosen += [by_name[name] for name in rng.sample(names, min(_NAMES_A_FILE, len(names)))]
        return chosen

    def _question(self, use: Use, variant: str, rng: random.Random) -> Question:
        before = use.file.text[max(0, use.at - SHOWN) : use.at]
        before = before[before.find("\n") + 1 :] if use.at > SHOWN else before
        others = sorted(self._public[self._module_of(use)] - {use.name})
        decoys = rng.sample(others, min(_DECOYS, len(others)))
        return Question(
            f"\n\n# File: {use.file.path}\n\n{before}",
            (use.name,),
            (use.name, *decoys),
            variant=variant,
        )

    def _module_of(self, use: Use) -> str:
        match = re.search(r"(\w+)\.$", use.file.text[: use.at])
        assert match is not None
        return match[1]

    def _fill(
        self, encoder: Encoder, tokens: int, uses: Sequence[Use], defining: Sequence[SourceFile], rng: random.Random
    ) -> list[list[int]]:
        """So many tokens of other files in a random order that have none of the names; the last one is cut at its end."""
        names = {use.name for use in uses}
        left_out = {file.path for file in (*defining, *(use.file for use in uses))}
        pieces: list[list[int]] = []
        left = tokens
        for file in rng.sample(self.files, len(self.files)):
            if left and file.path not in left_out and not any(_word_in(name, file.text) for name in names):
                pieces.append(encoder(file.shown()[: 16 * left])[:left])
                left -= len(pieces[-1])
        if left:
            raise TooShortError(f"all other files together are {left:,} tokens too few")
        return pieces


def _first(pieces: Sequence[list[int]], tokens: int) -> list[list[int]]:
    """So many tokens of the pieces, the last one cut at its end."""
    found: list[list[int]] = []
    for piece in pieces:
        if tokens:
            found.append(piece[:tokens])
            tokens -= len(found[-1])
    return found


def _word_in(name: str, text: str) -> bool:
    return name in text and re.search(rf"\b{name}\b", text) is not None


def _python_files(root: Path) -> list[tuple[Path, str]]:
    """Readable files with more than a few lines, sorted by path."""
    found = []
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED.isdisjoint(path.relative_to(root).parts[:-1]):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if len(text) > SHOWN:
                found.append((path, text))
    return found

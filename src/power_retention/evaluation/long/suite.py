"""The questions as one suite: which tasks there are, at which lengths, depths and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from power_retention.errors import ArgumentError
from power_retention.evaluation.long.context import Context, Haystack, TooShortError
from power_retention.evaluation.long.facts import facts
from power_retention.evaluation.long.ruler import (
    common_words,
    frequent_words,
    multi_key_needles,
    needles,
    variable_tracking,
)
from power_retention.evaluation.long.tree import SourceTree

Generator = Callable[[Haystack, int, Sequence[float], int], list[Context]]

GENERATORS: dict[str, Generator] = {
    "needle": needles,
    "multi-key needle": multi_key_needles,
    "variable tracking": variable_tracking,
    "common words": common_words,
    "frequent words": frequent_words,
    "facts": facts,
}
IDENTIFIERS = "identifiers"
TASKS = (*GENERATORS, IDENTIFIERS)

LENGTHS = (512, 2048, 8192, 32768, 131072, 262144)


@dataclass(frozen=True)
class Grid:
    """What is asked.

    Attributes:
        lengths: tokens of context, question and answer.
        depths: how many, spread evenly over a context, its beginning and its end among them.
        seeds: how many contexts of a kind; each seed has texts, keys and answers of its own.
        tasks: names.
        stream_tokens: of the text whose loss is taken by position; 0 for none.
        streams: rows of it.
        seed: others ask of other contexts.
    """

    lengths: tuple[int, ...] = LENGTHS
    depths: int = 5
    seeds: int = 3
    tasks: tuple[str, ...] = TASKS
    stream_tokens: int = 1 << 20
    streams: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ArgumentError(f"There is no long-context task {unknown[0]!r}; there are: {', '.join(TASKS)}.")
        if min((*self.lengths, self.depths, self.seeds, self.streams)) < 1 or self.stream_tokens < 0:
            raise ArgumentError("Lengths, depths, seeds and streams must be at least 1, and stream tokens at least 0.")

    @property
    def numbers(self) -> range:
        """Of the contexts of a kind."""
        return range(self.seed * self.seeds, (self.seed + 1) * self.seeds)

    @property
    def places(self) -> list[float]:
        """Depths from 0 to 1."""
        return [i / (self.depths - 1) if self.depths > 1 else 0.5 for i in range(self.depths)]

    def quick(self) -> Grid:
        """Few and short: minutes instead of an hour on a computer without a GPU."""
        return replace(self, lengths=(512, 2048), depths=3, seeds=2, stream_tokens=min(self.stream_tokens, 1 << 13))


def write_contexts(
    grid: Grid, haystack: Haystack, tree: SourceTree | None, progress: Callable[[int, int], None] | None = None
) -> tuple[list[Context], dict[str, dict[int, str]]]:
    """All contexts, and by task and length why there are none.

    Args:
        grid: what to ask.
        haystack: other text.
        tree: source files; needed for identifiers.
        progress: called with (kinds of context done, kinds).
    """
    contexts: list[Context] = []
    missing: dict[str, dict[int, str]] = {}
    kinds = [(task, length, seed) for task in grid.tasks for length in grid.lengths for seed in grid.numbers]
    for done, (task, length, seed) in enumerate(kinds, 1):
        try:
            if task == IDENTIFIERS:
                assert tree is not None
                contexts += tree.contexts(haystack.encoder, length, seed)
            else:
                contexts += GENERATORS[task](haystack, length, grid.places, seed)
        except TooShortError as reason:
            missing.setdefault(task, {})[length] = str(reason)
        if progress:
            progress(done, len(kinds))
    return contexts, missing

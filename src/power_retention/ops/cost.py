"""What a call will cost in each form, from rates measured on a GPU; the choice of form and chunk follows from it.

Milliseconds of one pass over N = B·T tokens, with D the state's width and c the chunk:

    attention form   fixed + N·T·Hq·(d + e) · per operation
    chunk form       fixed + N·c·Hq·(d + e) · per operation of the attention within chunks
                           + N·2D(e + 1)·(H + Hq·(1 − c/T)) · per operation on states
                           + ⌈T/c⌉·B·H·D(e + 1) · per number of the states at chunk borders

Six numbers for each pass and head width; they are fitted to whole passes (:func:`fit_costs`), so launches, transposing
and waiting count as they do in use.  Only shapes are looked at: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations

import torch

from power_retention.ops.layout import state_width

CHUNKS = (128, 256, 512, 1024, 2048, 4096)
"""Chunk sizes to choose from."""

ATTENTION = 0
"""As a chunk size: the attention form."""

_NEARLY = 1.03
"""Times over the cheapest one's that are as good."""


@dataclass(frozen=True)
class Work:
    """Sizes of one call.

    Attributes:
        batch, tokens: B and T; packed sequences count as one of T tokens, for one of them may be nearly that long.
        query_heads, heads: Hq and H.
        width, value_width: d and e.
        from_state, to_state: whether a state comes in, and whether one is wanted.
    """

    batch: int
    tokens: int
    query_heads: int
    heads: int
    width: int
    value_width: int
    from_state: bool = False
    to_state: bool = False

    @property
    def needs_state(self) -> bool:
        """Whether the attention form is out of the question."""
        return self.from_state or self.to_state

    def attention_operations(self, chunk: int) -> float:
        """Operations of causal attention within chunks of ``chunk`` tokens, in 10¹²."""
        length = min(chunk, self.tokens)
        return self.batch * self.tokens * length * self.query_heads * (self.width + self.value_width) / 1e12

    def state_operations(self, chunk: int) -> float:
        """Operations of state updates and queries, in 10¹²: the useful ones, with the ideal D."""
        inside = 0 if self.from_state else min(chunk / self.tokens, 1)
        read = self.query_heads * (1 - inside)
        written = self.heads if self.to_state or chunk < self.tokens else 0
        one = 2 * state_width(self.width) * (self.value_width + 1)
        return self.batch * self.tokens * one * (read + written) / 1e12

    def state_numbers(self, chunk: int) -> float:
        """Numbers in the states at chunk borders, in 10⁹."""
        chunks = -(-self.tokens // chunk)
        return self.batch * chunks * self.heads * state_width(self.width) * (self.value_width + 1) / 1e9


@dataclass(frozen=True)
class Costs:
    """One pass at one head width, in milliseconds: fixed, and per 10¹² operations or 10⁹ numbers (see :class:`Work`)."""

    attention_fixed: float
    attention: float
    chunk_fixed: float
    within: float
    states: float
    borders: float

    def milliseconds(self, work: Work, chunk: int) -> float:
        """Predicted time of a pass; ``chunk`` 0 is the attention form."""
        if chunk == ATTENTION:
            return self.attention_fixed + self.attention * work.attention_operations(work.tokens)
        return (
            self.chunk_fixed
            + self.within * work.attention_operations(chunk)
            + self.states * work.state_operations(chunk)
            + self.borders * work.state_numbers(chunk)
        )

    def best_chunk(self, work: Work) -> int:
        """The chunk size to take, 0 for the attention form: the cheapest, or one that takes less memory and hardly longer."""
        return _cheapest(self, work)

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON."""
        return asdict(self)


@lru_cache(maxsize=1024)  # a training loop asks the same before every launch
def _cheapest(costs: Costs, work: Work) -> int:
    return _best_of(
        costs, work, [c for c in CHUNKS if c < work.tokens] + [work.tokens if work.needs_state else ATTENTION]
    )


def _best_of(costs: Costs, work: Work, chunks: Sequence[int]) -> int:
    """The largest chunk among the nearly cheapest: the larger, the fewer states take memory.  Attention has none."""
    times = {chunk: costs.milliseconds(work, chunk) for chunk in chunks}
    near = [chunk for chunk, time in times.items() if time <= _NEARLY * min(times.values())]
    return ATTENTION if ATTENTION in near else max(near)


@dataclass(frozen=True)
class Measured:
    """A pass that was timed: its sizes, its chunk (0 for the attention form) and its milliseconds."""

    work: Work
    chunk: int
    milliseconds: float


def fit_costs(measured: Sequence[Measured]) -> Costs:
    """The costs that explain measured passes best, in relative error, none of them negative.

    Needs at least two lengths in the attention form, and four pairs of length and chunk in the chunk form.
    """
    attention = [m for m in measured if m.chunk == ATTENTION]
    chunked = [m for m in measured if m.chunk != ATTENTION]
    by_form = _fit(attention, lambda m: (1.0, m.work.attention_operations(m.work.tokens)))
    by_chunk = _fit(
        chunked,
        lambda m: (
            1.0,
            m.work.attention_operations(m.chunk),
            m.work.state_operations(m.chunk),
            m.work.state_numbers(m.chunk),
        ),
    )
    return Costs(*by_form, *by_chunk)


def regret(costs: Costs, measured: Iterable[Measured]) -> dict[int, float]:
    """By length: how many times slower the chosen form was than the best one measured there (1 is perfect)."""
    by_length: dict[int, list[Measured]] = {}
    for m in measured:
        by_length.setdefault(m.work.tokens, []).append(m)
    worst = {}
    for tokens, group in sorted(by_length.items()):
        chosen = _best_of(costs, group[0].work, [m.chunk for m in group])
        took = {m.chunk: m.milliseconds for m in group}
        worst[tokens] = took[chosen] / min(took.values())
    return worst


def _fit(measured: Sequence[Measured], features: Callable[[Measured], tuple[float, ...]]) -> list[float]:
    """Non-negative least squares on relative errors, by trying every set of features that may be non-zero."""
    rows = torch.tensor([features(m) for m in measured], dtype=torch.float64)
    rows = rows / torch.tensor([m.milliseconds for m in measured], dtype=torch.float64)[:, None]
    unit = rows.norm(dim=0).clamp(min=1e-300)
    rows, ones = rows / unit, torch.ones(len(rows), 1, dtype=torch.float64)
    best, least = torch.zeros(rows.shape[1], dtype=torch.float64), float("inf")
    for count in range(1, rows.shape[1] + 1):
        for used in combinations(range(rows.shape[1]), count):
            found = torch.linalg.lstsq(rows[:, used], ones, driver="gelsd").solution[:, 0]
            error = float((rows[:, used] @ found - 1).norm())
            if bool((found >= 0).all()) and error < least - 1e-12:
                best, least = torch.zeros_like(best).index_put((torch.tensor(used),), found), error
    return [float(cost) for cost in best / unit]

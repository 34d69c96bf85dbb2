"""A piece of a longer sequence, or of several packed ones: what enters it from the left, and what leaves it to the right."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from power_retention.errors import ArgumentError, StateError
from power_retention.layers.scan import ContextParallel, Exchange, StateScan
from power_retention.ops import PowerState, power_retention, power_retention_state


@dataclass(frozen=True)
class Piece:
    """Tokens of one call, and which of them touch a neighbouring piece.

    Only the first sequence of a piece can have begun before it, and only the last can go on behind it: one state enters
    and one leaves, however many sequences lie between.

    Attributes:
        borders: of the sequences in the piece, from 0 to its number of tokens.
        returns_state: whether the state after the last token is wanted.
        scan: the other ranks that hold pieces of the same sequence, if there are any.
    """

    borders: tuple[int, ...]
    returns_state: bool
    scan: StateScan | None = None

    @classmethod
    def of(cls, tokens: int, cu_seqlens: Tensor | None, *, returns_state: bool) -> Piece:
        """The piece that a call of so many tokens with such borders ``[R + 1]`` is."""
        return cls((0, tokens) if cu_seqlens is None else tuple(cu_seqlens.tolist()), returns_state)

    @classmethod
    def of_rank(
        cls, context: ContextParallel, tokens: int, cu_seqlens: Tensor | None, *, continued: bool, returns_state: bool
    ) -> Piece:
        """This rank's piece of what all ranks hold, with the borders of all of it; ``tokens`` are this rank's."""
        borders = (0, tokens * context.size) if cu_seqlens is None else tuple(cu_seqlens.tolist())
        scan = context.scan(tokens, borders, continued=continued)
        return cls(context.borders(tokens, borders), returns_state, scan)

    @property
    def last(self) -> slice:
        """The last sequence's tokens."""
        return slice(self.borders[-2], self.borders[-1])

    def parts(self, device: torch.device) -> list[tuple[slice, Tensor | None]]:
        """Tokens of the first sequence, of those between with their borders, and of the last."""
        return _parts(self.borders, device)


@lru_cache(maxsize=8)  # every layer asks, and borders on a GPU are waited for
def _parts(borders: tuple[int, ...], device: torch.device) -> list[tuple[slice, Tensor | None]]:
    spans = [slice(a, b) for a, b in pairwise(borders)]
    if len(spans) <= 2:
        return [(span, None) for span in spans]
    with torch.inference_mode(False):  # what is kept must do for training too
        between = torch.tensor([border - borders[1] for border in borders[1:-1]], device=device)
    first, last = spans[0], spans[-1]
    return [(first, None), (slice(first.stop, last.start), between if len(between) > 2 else None), (last, None)]


def begin_exchange(
    k: Tensor, v: Tensor, log_g: Tensor, piece: Piece, state: PowerState | None, *, p: int
) -> Exchange | None:
    """Send what this rank's piece leaves of itself to the other ranks; None where there are none.  Arguments as below."""
    if piece.scan is None:
        return None
    _check_dtype(state)
    own = power_retention_state(*(x[:, piece.last] for x in (k, v, log_g)), p=p)
    return piece.scan.begin(own, log_g.double().sum(1), state)


def retain_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    piece: Piece,
    state: PowerState | None,
    *,
    p: int,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    exchange: Exchange | None = None,
) -> tuple[Tensor, PowerState | None]:
    """:func:`power_retention.power_retention` on a piece, with one state in and one out whatever is packed into it.

    Args:
        q, k, v, log_g, p, chunk_size, mask: as there.
        piece: where sequences begin and end, and what is wanted.
        state: what the first sequence has read before, float32 (float64 for float64 inputs); None for nothing.
        exchange: with the other ranks, begun before.

    Returns:
        y ``[B, T, Hq, e]``, and the last sequence's state where the piece asks for it.
    """
    if exchange is None:
        _check_dtype(state)
        return _by_parts(q, k, v, log_g, piece, state, piece.returns_state, p, chunk_size, mask)
    if mask is not None:
        raise ArgumentError("A mask came with context parallelism; pack sequences with cu_seqlens instead of padding.")
    entering, leaving = exchange.finish()
    y, _ = _by_parts(q, k, v, log_g, piece, entering, False, p, chunk_size, None)
    return y, leaving if piece.returns_state else None


def _check_dtype(state: PowerState | None) -> None:
    if state is not None and state.memory.dtype.itemsize < 4:
        raise StateError(
            f"A state came in {state.memory.dtype}; float32 was expected. If FSDP narrows a layer's inputs, shard with "
            "MixedPrecisionPolicy(cast_forward_inputs=False)."
        )


def _by_parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor,
    piece: Piece,
    state: PowerState | None,
    returns_state: bool,
    p: int,
    chunk_size: int | None,
    mask: Tensor | None,
) -> tuple[Tensor, PowerState | None]:
    # In one packed call every sequence would have a state, those that neither come from nor go anywhere included.
    outputs: list[Tensor] = []
    leaving: PowerState | None = None
    parts = piece.parts(q.device)
    for number, (span, cu_seqlens) in enumerate(parts):
        wanted = returns_state and number == len(parts) - 1
        out = power_retention(
            *(x[:, span] for x in (q, k, v, log_g)),
            p=p,
            chunk_size=chunk_size,
            initial_state=state if number == 0 else None,
            return_state=wanted,
            cu_seqlens=cu_seqlens,
            mask=None if mask is None else mask[:, span],
        )
        y, leaving = out if isinstance(out, tuple) else (out, None)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), leaving

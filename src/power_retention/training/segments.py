"""Back-propagation through a sequence of any length, a segment at a time, with exact gradients.

A recurrent model needs no more of the past than its states.  So: read the sequence without gradients, keeping the states
at segment borders only; then, from the last segment to the first, read it again with gradients and go back through

    loss of the segment + ⟨adjoint of the leaving states, leaving states⟩,

which adds to the parameters' gradients and gives the adjoint of the entering states, the leaving ones of the segment on the
left.  This is the chain rule cut at the borders, not an approximation.  Memory: one segment's activations and one set of
states a border, whatever the length; time: one forward pass more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from power_retention.errors import ArgumentError
from power_retention.layers import ContextParallel
from power_retention.models import PowerRetentionModel
from power_retention.models.modeling import count_positions
from power_retention.ops import PowerState
from power_retention.training.borders import BorderStates, States
from power_retention.training.next_token import next_token_loss

Bptt = Literal["exact", "truncated", "state_passing"]
"""How far gradients reach.

- ``exact``: over all of a document, as if it were one segment.
- ``truncated``: to the beginning of a segment; the states go on.
- ``state_passing``: the same, and a document starts from the states that the one before it left, positions counting on:
  the model learns to begin from states that are not empty (Buitrago & Gu 2025).
"""

SegmentLoss = Callable[[Tensor, nn.Module, slice], Tensor]
"""A part of the loss from last hidden states ``[B, t, hidden]``, the head, and the tokens of the row that they belong to."""


@dataclass(frozen=True)
class Carry:
    """What one call leaves to the next.

    Attributes:
        states: of every layer, without gradients.
        position: of the next token.
    """

    states: States
    position: int


@dataclass(frozen=True)
class Segmented:
    """What a call did.

    Attributes:
        loss: of the whole sequence, summed over segments.
        labelled: tokens that had a label, on all ranks of the context group.
        segments: how many the sequence was read in.
        border_bytes: states kept at segment borders at most.
        carry: what is left to a next call, if asked for.
    """

    loss: Tensor
    labelled: int
    segments: int
    border_bytes: int
    carry: Carry | None


def backward_in_segments(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    segment: int,
    bptt: Bptt = "exact",
    cu_seqlens: Tensor | None = None,
    carry: Carry | None = None,
    keep_carry: bool = False,
    total: float | None = None,
    loss: SegmentLoss | None = None,
    precision: torch.dtype | None = None,
    offload: bool | None = None,
) -> Segmented:
    """Add the gradients of a sequence's loss to the parameters' ``grad``, in pieces of ``segment`` tokens.

    The model may be wrapped: FSDP2, activation checkpointing (not reentrant), PEFT, or context parallelism, where every rank
    gives its share of every segment (:func:`share_of_rank`).  Ranks must give equally many tokens.

    Args:
        model: a :class:`PowerRetentionForCausalLM`, or something called the same way around one.
        input_ids: ``[B, T]``.
        labels: ``[B, T]``, the token that follows each (see :func:`next_tokens`); negative where none is to be learned.
        segment: tokens of a segment, on all ranks together; the last one may be shorter.
        bptt: see :data:`Bptt`.
        cu_seqlens: borders ``[R + 1]`` of documents packed into the row (then B = 1), in the tokens of all ranks.
        carry: what the call before left: the first document goes on from there, without gradients into it.
        keep_carry: whether to return what the last document leaves.
        total: what the summed loss is divided by; None: the labelled tokens.
        loss: another loss than that of the next token; it divides by what it likes.
        precision: dtype of autocast, or None for that of the weights.
        offload: see :class:`power_retention.training.borders.BorderStates`.

    Raises:
        ArgumentError: shapes, lengths or names that do not fit.
    """
    if bptt not in get_args(Bptt):
        raise ArgumentError(f"bptt must be one of {', '.join(get_args(Bptt))}, not {bptt!r}.")
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ArgumentError(
            f"input_ids and labels must both be [B, T], not {list(input_ids.shape)} and {list(labels.shape)}."
        )
    context = trunk_of(model).context_parallel
    labelled = _count(labels, context)
    divisor = max(labelled, 1) if total is None else total

    def next_token(hidden: Tensor, head: nn.Module, span: slice) -> Tensor:
        return next_token_loss(hidden, head, labels[:, span], divisor)

    borders = None if cu_seqlens is None or bptt == "state_passing" else cu_seqlens
    pieces = _cut(input_ids.shape[1], segment, borders, context, continued=carry is not None)
    if keep_carry:
        pieces[-1] = replace(pieces[-1], leaves=True)
    sweep = _Sweep(model, input_ids, pieces, loss or next_token, carry, precision, context)
    store = BorderStates(input_ids.device, offload=offload)
    summed, states, most = (_exact if bptt == "exact" else _truncated)(sweep, store)
    left = None
    if keep_carry:
        assert states is not None
        left = Carry(states, pieces[-1].next_position(carry))
    return Segmented(summed, labelled, len(pieces), most, left)


def next_tokens(input_ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """``[B, T]`` → the token that follows each within its document, −100 at the end of one."""
    labels = torch.full_like(input_ids, -100)
    labels[:, :-1] = input_ids[:, 1:]
    if cu_seqlens is not None:
        labels[:, cu_seqlens[1:].long() - 1] = -100
    return labels


def share_of_rank(x: Tensor, segment: int, context: ContextParallel) -> Tensor:
    """``[B, T, …]`` → what this rank reads of it: its consecutive piece of every segment.

    Raises:
        ArgumentError: a segment, or the last one, cannot be shared equally.
    """
    tokens, ranks = x.shape[1], context.size
    if segment % ranks or tokens % segment % ranks:
        raise ArgumentError(
            f"{tokens} tokens in segments of {segment} cannot be shared equally by {ranks} ranks: pad the sequence with "
            "unlabelled tokens, and take a segment length that they divide."
        )
    parts = (part.tensor_split(ranks, 1)[context.rank] for part in x.split(segment, 1))
    return torch.cat(list(parts), 1)


def trunk_of(model: nn.Module) -> PowerRetentionModel:
    """The trunk inside a model, however wrapped.

    Raises:
        ArgumentError: there is none, or it keeps no state.
    """
    trunk = next((module for module in model.modules() if isinstance(module, PowerRetentionModel)), None)
    if trunk is None:
        raise ArgumentError(f"A power-retention model was expected, not a {type(model).__name__}: convert it first.")
    if not trunk.config.keeps_state:
        raise ArgumentError("This model keeps no state of fixed size, so it cannot be trained in segments; use p = 2.")
    return trunk


@dataclass(frozen=True)
class _Piece:
    """One segment, as this rank reads it.

    Attributes:
        span: its tokens in this rank's row.
        start, length: of the whole segment in the tokens of all ranks.
        borders: of its documents, from 0 to ``length``; None for a single one.
        begun: tokens of its first document that lie before it, carried ones not counted.
        enters: whether its first document began before it.
        leaves: whether its last one goes on behind it, or its states are wanted anyway.
    """

    span: slice
    start: int
    length: int
    borders: tuple[int, ...] | None
    begun: int
    enters: bool
    leaves: bool

    def positions(self, device: torch.device, carried: int, context: ContextParallel | None) -> Tensor:
        """``[1, t]`` of this rank's tokens, counted within their documents."""
        own = self.span.stop - self.span.start
        first = 0 if context is None else context.rank * own
        index = torch.arange(first, first + own, device=device).unsqueeze(0)
        cu_seqlens = None if self.borders is None else torch.tensor(self.borders, device=device)
        ahead = self.begun + carried
        in_first = index < (self.length if self.borders is None else self.borders[1])
        return count_positions(index, None, cu_seqlens) + ahead * in_first

    def next_position(self, carry: Carry | None) -> int:
        """Of the token behind it."""
        if self.borders is not None:
            return self.length - self.borders[-2]
        return self.begun + self.length + (carry.position if carry and self.enters and self.begun == self.start else 0)


def _cut(
    tokens: int, segment: int, cu_seqlens: Tensor | None, context: ContextParallel | None, *, continued: bool
) -> list[_Piece]:
    """The segments of a row of so many tokens on each rank."""
    ranks = 1 if context is None else context.size
    if segment < ranks or segment % ranks:
        raise ArgumentError(
            f"A segment has a positive number of tokens that {ranks} ranks share equally, not {segment}."
        )
    size, everything = segment // ranks, tokens * ranks
    borders = [0, everything] if cu_seqlens is None else [int(border) for border in cu_seqlens.tolist()]
    if borders[0] != 0 or borders[-1] != everything or any(a >= b for a, b in pairwise(borders)):
        raise ArgumentError(f"cu_seqlens must rise from 0 to {everything}, the tokens of all ranks, not {borders}.")
    pieces = []
    for first in range(0, tokens, size):
        last = min(first + size, tokens)
        start, end = first * ranks, last * ranks
        inside = [border - start for border in borders if start < border < end]
        enters = continued if start == 0 else start not in borders
        document = max(border for border in borders if border <= start)
        pieces.append(
            _Piece(
                slice(first, last),
                start,
                end - start,
                (0, *inside, end - start) if inside else None,
                start - document,
                enters,
                end not in borders,
            )
        )
    return pieces


@dataclass(frozen=True)
class _Sweep:
    """Everything that reading a segment takes."""

    model: nn.Module
    input_ids: Tensor
    pieces: list[_Piece]
    loss: SegmentLoss
    carry: Carry | None
    precision: torch.dtype | None
    context: ContextParallel | None

    @property
    def first_states(self) -> States | None:
        return None if self.carry is None else self.carry.states

    def read(self, piece: _Piece, states: States | None) -> States:
        """The states that leave a segment, without gradients."""
        with torch.no_grad():
            _, leaving = self._run(piece, states, with_loss=False)
        return leaving

    def replay(self, piece: _Piece, states: States | None, adjoint: Sequence[Tensor] | None) -> tuple[Tensor, States]:
        """Go forwards and back through a segment.

        Args:
            piece: the segment.
            states: those that enter it, leaves that collect their gradient if it is wanted.
            adjoint: the gradients of those that leave it, memory and normaliser of each layer in turn.

        Returns:
            Its loss and the states that leave it, both without gradients.
        """
        loss, leaving = self._run(piece, states, with_loss=True)
        assert loss is not None
        outputs, gradients = [loss], [torch.ones_like(loss)]
        for x, gradient in zip(_tensors(leaving), adjoint or [], strict=False):
            if x.requires_grad:  # below the first trained layer nothing does
                outputs.append(x)
                gradients.append(gradient)
        torch.autograd.backward(outputs, gradients)
        return loss.detach(), _detached(leaving)

    def _run(self, piece: _Piece, states: States | None, *, with_loss: bool) -> tuple[Tensor | None, States]:
        device = self.input_ids.device
        carried = self.carry.position if self.carry and piece.begun == piece.start and piece.enters else 0
        borders = None if piece.borders is None else torch.tensor(piece.borders, device=device)
        with self._autocast():
            out = self.model(
                input_ids=self.input_ids[:, piece.span],
                position_ids=piece.positions(device, carried, self.context),
                cu_seqlens=borders,
                use_cache=False,
                states=states,
                return_states=piece.leaves,
                hidden_loss=lambda hidden, head: self.loss(hidden, head, piece.span) if with_loss else None,
            )
        return out.loss, out.states or []

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision is None:
            return nullcontext()
        return torch.autocast(self.input_ids.device.type, self.precision)


def _exact(sweep: _Sweep, store: BorderStates) -> tuple[Tensor, States | None, int]:
    randomness: list[_Randomness] = []
    states, most = sweep.first_states, 0
    for number, piece in enumerate(sweep.pieces[:-1]):
        randomness.append(_Randomness(sweep.input_ids.device))
        states = sweep.read(piece, states) if piece.leaves else None
        if states is not None:
            store.put(number + 1, states)
        most = max(most, store.nbytes)
    adjoint: list[Tensor] | None = None
    summed, left = None, None
    for number in reversed(range(len(sweep.pieces))):
        entering = store.take(number) if number else sweep.first_states
        store.prefetch(number - 1)
        collected = _leaves(entering) if number and entering is not None else entering
        with randomness[number] if number < len(randomness) else nullcontext():  # dropout must repeat itself
            loss, leaving = sweep.replay(sweep.pieces[number], collected, adjoint)
        left = leaving if left is None else left
        adjoint = [_gradient(x) for x in _tensors(collected)] if number and collected is not None else None
        summed = loss if summed is None else summed + loss
    assert summed is not None
    return summed, left, most


def _truncated(sweep: _Sweep, store: BorderStates) -> tuple[Tensor, States | None, int]:
    states, summed, leaving = sweep.first_states, None, None
    for piece in sweep.pieces:
        loss, leaving = sweep.replay(piece, states, None)
        states = leaving if piece.leaves else None
        summed = loss if summed is None else summed + loss
    assert summed is not None
    return summed, leaving, 0


class _Randomness:
    """The random numbers that come next on a device; inside, they come again, and afterwards nothing has happened."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._then = self._state()

    def _state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], self._device)

    def __enter__(self) -> None:
        self._now = self._state()
        self._set(self._then)

    def __exit__(self, *raised: object) -> None:
        self._set(self._now)


def _count(labels: Tensor, context: ContextParallel | None) -> int:
    """Labelled tokens, on all ranks of the context group."""
    count = (labels >= 0).sum()
    if context is not None:
        dist.all_reduce(count, group=context.group)
    return int(count)


def _tensors(states: Sequence[PowerState]) -> list[Tensor]:
    return [x for state in states for x in state[:2]]


def _map(states: States, change: Callable[[Tensor], Tensor]) -> States:
    return [s._replace(memory=change(s.memory), normalizer=change(s.normalizer)) for s in states]


def _detached(states: States) -> States:
    return _map(states, torch.Tensor.detach)


def _leaves(states: States) -> States:
    return _map(states, lambda x: x.detach().requires_grad_())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

"""Context parallelism: ranks that hold consecutive pieces of a sequence exchange one state a layer, whatever its length.

Rank r's piece takes the state E_r that enters it to L_r = pass_r · exp(G_r) · E_r + S_r, where S_r is what its last sequence
leaves of itself, G_r the sum of its log gates, and pass_r is 1 if that sequence began before the piece, else 0; and
E_{r+1} = L_r where the next piece begins inside a sequence, else 0.  Every rank gathers all (S_r, G_r) and combines those
before its own; in backward it gathers the gradients of all E_r and combines those behind it, the same scan reversed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from power_retention.errors import ArgumentError
from power_retention.ops import PowerState


@dataclass
class Traffic:
    """What went over the wire.

    Attributes:
        received_bytes: by this rank.
        exchanges: collective calls.
    """

    received_bytes: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class _Gathering:
    """A collective call under way; what was sent must live as long."""

    out: Tensor
    sent: Tensor
    work: Any

    def wait(self) -> Tensor:
        """What all ranks sent."""
        self.work.wait()
        return self.out


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share sequences.

    Attributes:
        group: their process group; rank r holds the r-th piece.
        traffic: counted as it goes.
    """

    group: dist.ProcessGroup
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return dist.get_rank(self.group)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self.group)

    def scan(self, tokens: int, borders: tuple[int, ...], *, continued: bool) -> StateScan:
        """The scan of pieces of so many tokens each.

        Args:
            tokens: of one rank.
            borders: of all sequences, in the tokens of all ranks.
            continued: whether the first sequence began before the first rank's piece.
        """
        if borders[-1] != tokens * self.size:
            raise ArgumentError(
                f"cu_seqlens ends at {borders[-1]}; {self.size} ranks with {tokens} tokens each hold {tokens * self.size}: "
                "with context parallelism it says where sequences begin in the tokens of all ranks."
            )
        starts = [rank * tokens for rank in range(self.size + 1)]
        enters = tuple(continued if start == 0 else start not in borders for start in starts[:-1])
        crossed = (any(start < border < end for border in borders) for start, end in pairwise(starts))
        passes = tuple(enter and not cut for enter, cut in zip(enters, crossed, strict=True))
        return StateScan(self, enters, passes)

    def borders(self, tokens: int, borders: tuple[int, ...]) -> tuple[int, ...]:
        """Those of the sequences in this rank's piece, from 0 to ``tokens``."""
        start = self.rank * tokens
        inside = tuple(border - start for border in borders if start < border < start + tokens)
        return (0, *inside, tokens)

    def begin_gather(self, x: Tensor) -> _Gathering:
        """Begin to bring ``[...]`` of each rank together as ``[ranks, ...]``."""
        out, x = x.new_empty(self.size, *x.shape), x.contiguous()
        work = dist.all_gather(list(out.unbind()), x, group=self.group, async_op=True)
        self.traffic.received_bytes += (self.size - 1) * x.nbytes
        self.traffic.exchanges += 1
        return _Gathering(out, x, work)


@dataclass(frozen=True)
class StateScan:
    """How states pass along the ranks in one call.

    Attributes:
        context: the ranks.
        enters: of each rank, whether its first sequence began before its piece.
        passes: of each rank, whether what enters its piece also leaves it (nothing begins in it).
    """

    context: ContextParallel
    enters: tuple[bool, ...]
    passes: tuple[bool, ...]

    def begin(self, own: PowerState, log_decay: Tensor, state: PowerState | None) -> Exchange:
        """Send this rank's part on its way; what is computed before :meth:`Exchange.finish` is not waited for.

        Args:
            own: the state that this piece's last sequence leaves of itself.
            log_decay: ``[B, H]`` float64, the sum of this piece's log gates.
            state: what enters the first rank's piece, the same on every rank; None for nothing.
        """
        joined = torch.cat((own.memory, own.normalizer.unsqueeze(-1)), -1)
        first = None
        if state is not None:
            first = torch.cat((state.memory, state.normalizer.unsqueeze(-1)), -1).to(joined.dtype)
        flight = _Flight(self)
        return Exchange(own, flight, *_Begin.apply(flight, joined, log_decay, first))


@dataclass(frozen=True)
class Exchange:
    """States under way between the ranks; the tensors are what was sent, as the backward pass knows it."""

    own: PowerState
    flight: _Flight
    joined: Tensor
    log_decay: Tensor
    first: Tensor | None

    def finish(self) -> tuple[PowerState, PowerState]:
        """What enters this rank's piece, and what leaves the last rank's.

        Both are differentiable; the gradients of the state given and of what leaves the last rank are those of the whole
        sequence, the same on every rank.
        """
        entering, leaving = (
            self.own._replace(memory=x[..., :-1].contiguous(), normalizer=x[..., -1].contiguous())
            for x in _Finish.apply(self.flight, self.joined, self.log_decay, self.first)
        )
        return entering, leaving


class _Flight:
    """What the two halves of an exchange share, and the collective calls that are under way."""

    def __init__(self, scan: StateScan) -> None:
        self.scan = scan
        self.forward: list[_Gathering] = []
        self.backward: _Gathering | None = None
        self.saved: tuple[Tensor, Tensor, Tensor] | None = None


class _Begin(torch.autograd.Function):
    """Gathers are begun; in backward, what was begun by :class:`_Finish` is waited for and combined."""

    @staticmethod
    def forward(
        ctx: Any, flight: _Flight, own: Tensor, log_decay: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.flight = flight
        flight.forward = [flight.scan.context.begin_gather(x) for x in (own, log_decay.exp())]
        return own.view_as(own), log_decay.view_as(log_decay), None if first is None else first.view_as(first)

    @staticmethod
    def backward(ctx: Any, *unread: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flight: _Flight = ctx.flight
        scan = flight.scan
        assert flight.backward is not None
        assert flight.saved is not None
        entering, decays, adjoint = (
            flight.saved
        )  # the last: of what leaves the rank at hand, seen by everything behind it
        gradients = flight.backward.wait()
        flight.backward = flight.saved = None
        d_own = d_decay = None
        for rank in reversed(range(scan.context.size)):
            if rank == scan.context.rank:
                d_own = adjoint
                inner = (adjoint * entering).double().sum((-1, -2)) * decays[rank]
                d_decay = inner if scan.passes[rank] else torch.zeros_like(inner)
            passed = decays[rank, ..., None, None].to(adjoint.dtype) * adjoint if scan.passes[rank] else 0
            adjoint = gradients[rank] + passed
            if not scan.enters[rank]:
                adjoint = torch.zeros_like(adjoint)
        return None, d_own, d_decay, adjoint if ctx.needs_input_grad[3] else None


class _Finish(torch.autograd.Function):
    """What was gathered is waited for and combined; in backward, the gather of the adjoints is begun."""

    @staticmethod
    def forward(
        ctx: Any, flight: _Flight, own: Tensor, log_decay: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scan = flight.scan
        states, decays = (gathering.wait() for gathering in flight.forward)
        flight.forward = []
        state = torch.zeros_like(own) if first is None else first.clone()
        entering = state
        for rank in range(scan.context.size):
            if not scan.enters[rank]:
                state = torch.zeros_like(own)
            if rank == scan.context.rank:
                entering = state
            passed = decays[rank, ..., None, None].to(own.dtype) * state if scan.passes[rank] else 0
            state = passed + states[rank]
        ctx.flight = flight
        ctx.save_for_backward(entering, decays)
        return entering.clone(), state

    @staticmethod
    def backward(ctx: Any, d_entering: Tensor, d_leaving: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        flight: _Flight = ctx.flight
        entering, decays = ctx.saved_tensors
        flight.saved = entering, decays, d_leaving
        flight.backward = flight.scan.context.begin_gather(d_entering)
        # The real gradients are made by _Begin, once the adjoints of all ranks are here; what lies between the two in the
        # forward pass is gone back through meanwhile.
        given = (d_entering.new_zeros(()).expand_as(d_entering), decays.new_zeros(()).expand_as(decays[0]))
        wanted = zip((*given, given[0]), ctx.needs_input_grad[1:], strict=True)
        return None, *(x if needed else None for x, needed in wanted)

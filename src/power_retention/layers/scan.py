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

    def gather(self, x: Tensor) -> Tensor:
        """``[...]`` of each rank → ``[ranks, ...]``."""
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(out.unbind()), x.contiguous(), group=self.group)
        self.traffic.received_bytes += (self.size - 1) * x.nbytes
        self.traffic.exchanges += 1
        return out


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

    def exchange(self, own: PowerState, log_decay: Tensor, state: PowerState | None) -> tuple[PowerState, PowerState]:
        """What enters this rank's piece, and what leaves the last rank's.

        Both are differentiable; the gradients of ``state`` and of what leaves the last rank are those of the whole
        sequence, the same on every rank.

        Args:
            own: the state that this piece's last sequence leaves of itself.
            log_decay: ``[B, H]`` float64, the sum of this piece's log gates.
            state: what enters the first rank's piece, the same on every rank; None for nothing.
        """
        joined = torch.cat((own.memory, own.normalizer.unsqueeze(-1)), -1)
        first = (
            None if state is None else torch.cat((state.memory, state.normalizer.unsqueeze(-1)), -1).to(joined.dtype)
        )
        entering, leaving = _Exchange.apply(joined, log_decay, first, self)
        return tuple(  # type: ignore[return-value]
            own._replace(memory=x[..., :-1].contiguous(), normalizer=x[..., -1].contiguous())
            for x in (entering, leaving)
        )


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, log_decay: Tensor, first: Tensor | None, scan: StateScan
    ) -> tuple[Tensor, Tensor]:
        context = scan.context
        states, decays = context.gather(own), context.gather(log_decay.exp())
        state = torch.zeros_like(own) if first is None else first.clone()
        entering = state
        for rank in range(context.size):
            if not scan.enters[rank]:
                state = torch.zeros_like(own)
            if rank == context.rank:
                entering = state
            passed = decays[rank, ..., None, None].to(own.dtype) * state if scan.passes[rank] else 0
            state = passed + states[rank]
        ctx.save_for_backward(entering, decays)
        ctx.scan, ctx.has_first = scan, first is not None
        return entering.clone(), state

    @staticmethod
    def backward(ctx: Any, d_entering: Tensor, d_leaving: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scan: StateScan = ctx.scan
        context = scan.context
        entering, decays = ctx.saved_tensors
        gradients = context.gather(d_entering)
        adjoint = d_leaving  # of what leaves the rank at hand, seen by everything behind it
        d_own = d_decay = None
        for rank in reversed(range(context.size)):
            if rank == context.rank:
                d_own = adjoint
                inner = (adjoint * entering).double().sum((-1, -2)) * decays[rank]
                d_decay = inner if scan.passes[rank] else torch.zeros_like(inner)
            passed = decays[rank, ..., None, None].to(adjoint.dtype) * adjoint if scan.passes[rank] else 0
            adjoint = gradients[rank] + passed
            if not scan.enters[rank]:
                adjoint = torch.zeros_like(adjoint)
        return d_own, d_decay, adjoint if ctx.has_first else None, None

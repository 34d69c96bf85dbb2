"""The chunk form in plain PyTorch: attention within chunks, a fixed state between them.

Forward keeps one state, backward recomputes the states at chunk borders and then walks back: memory is linear in T both
ways.  For one chunk, with G the cumulative log gates inside it, V¹ = [v, 1] and S the state that enters (its last column
is the normaliser s):

    out    = (QKᵀ)^p ∘ exp(G_i − G_j) V¹  +  exp(G_i) · φ(Q) (multiplicity ∘ S)          y = ratio(out)
    S_next = exp(G_c) S + φ(K)ᵀ (exp(G_c − G_j) V¹)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from power_retention.ops.heads import (
    compute_dtype,
    cumulative_gates,
    from_heads,
    gate_gradient,
    integer_power,
    ratio,
    ratio_backward,
    scaled_queries,
    to_heads,
    values_and_ones,
)
from power_retention.ops.layout import expand, expand_backward, multiplicity, norm_functional, state_width

_EMBEDDED_ELEMENTS = 1 << 20
"""Entries of φ formed at a time: enough rows for a matmul, few enough to stay in cache."""

NOISE = 2.0
"""Rounding error of a denominator read from a state, in units of ε·|q|^p·Σ decay·|k|^p."""


def chunk_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    p: int,
    chunk_size: int,
    keep_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """One run of tokens.

    Args:
        q, k, v, log_g: ``[B, T, Hq, d]``, ``[B, T, H, d]``, ``[B, T, H, e]``, ``[B, T, H]`` or None; Hq may be 0.
        state: ``[N, D, e + 1]`` entering state with the normaliser as last column, or None for an empty one.
        keep_state: whether the final state is wanted.

    Returns:
        y ``[B, T, Hq, e]`` and the final state (None unless kept).
    """
    batch, tokens, _, _ = k.shape
    y = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for start, end in _ranges(tokens, chunk_size):
        chunk = _load(q, k, v, log_g, start, end)
        if chunk.groups:
            out, noise = _output(chunk, _weights(chunk, p)[0], state, p)
            y[:, start:end] = from_heads(ratio(out, noise), batch, end - start)
        if keep_state or end < tokens:
            state = _next_state(chunk, state, p)
    return y, state if keep_state else None


def chunk_backward(
    dy: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    p: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`chunk_forward` with respect to q, k, v, log_g and the entering state.

    Args:
        dy: gradient of y.
        d_state: ``[N, D, e + 1]`` gradient of the final state, or None.
    """
    batch, tokens, _, _ = k.shape
    ranges = list(_ranges(tokens, chunk_size))
    entering = [state]
    for start, end in ranges[:-1]:
        entering.append(_next_state(_load(q, k, v, log_g, start, end), entering[-1], p))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dlog_g = None if log_g is None else torch.empty_like(log_g)
    for (start, end), state_in in zip(reversed(ranges), reversed(entering), strict=True):
        chunk = _load(q, k, v, log_g, start, end)
        grads = _Gradients.zeros_like(chunk)
        d_leaving, d_state = d_state, None
        if chunk.groups:
            weights, slope = _weights(chunk, p)
            out, noise = _output(chunk, weights, state_in, p)
            d_out = ratio_backward(to_heads(dy[:, start:end], k.shape[2], chunk.q.dtype), out, noise)
            _within_backward(d_out, chunk, weights, slope, grads, p)
            if state_in is not None:
                d_state = _read_backward(d_out, chunk, state_in, grads, p)
        if d_leaving is not None:
            d_state = _next_state_backward(d_leaving, chunk, state_in, d_state, grads, p)
        dq[:, start:end] = from_heads(grads.q * chunk.q_scale, batch, end - start)
        dk[:, start:end] = from_heads(grads.k, batch, end - start)
        dv[:, start:end] = from_heads(grads.v1[..., :-1], batch, end - start)
        if dlog_g is not None:
            dlog_g[:, start:end] = gate_gradient(grads.gate, dlog_g[:, start:end])
    return dq, dk, dv, dlog_g, d_state


def workspace(q: Tensor, k: Tensor, v: Tensor, p: int, chunk_size: int, *, needs_state: bool, backward: bool) -> int:
    """Bytes that a call holds at most besides its inputs and results; an estimate from shapes, as of one run."""
    (batch, tokens, query_heads, d), (heads, e) = q.shape, v.shape[2:]
    wide = compute_dtype(q.dtype).itemsize
    size = min(chunk_size or tokens, tokens)
    width = state_width(d, p) if needs_state or size < tokens else 0
    state = batch * heads * width * (e + 1) * wide
    embedded = min(max(64, _EMBEDDED_ELEMENTS // max(width, 1)), query_heads // heads * size) * width * wide
    scores = batch * query_heads * size * size * wide
    pieces = batch * size * (query_heads * (2 * d + e) + heads * (d + e)) * wide
    if not backward:
        return 3 * state + 2 * scores + batch * heads * size * size * wide + pieces + embedded
    return (-(-tokens // size) + 4) * state + 4 * scores + 2 * pieces + 3 * embedded


@dataclass
class _Chunk:
    q: Tensor  # [N, r·c, d], scaled
    q_scale: Tensor  # [N, r·c, 1]
    k: Tensor  # [N, c, d]
    v1: Tensor  # [N, c, e + 1]
    gate: Tensor | None  # [N, c] float64, cumulative

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def decay_within(self) -> Tensor:
        """exp(G_i − G_j) for j ≤ i, else 0: ``[N or 1, c, c]``."""
        if self.gate is None:
            return self.k.new_ones(1, self.k.shape[1], self.k.shape[1]).tril()
        # Masked before the exponential: above the diagonal the difference is positive and may overflow.
        log_decay = (self.gate[:, :, None] - self.gate[:, None, :]).to(self.k.dtype)
        future = torch.ones(log_decay.shape[1:], dtype=torch.bool, device=log_decay.device).triu_(1)
        return log_decay.masked_fill_(future, -torch.inf).exp_()

    def decay_from_start(self) -> Tensor | None:
        """exp(G_i) for each query row: ``[N, r·c, 1]``."""
        return None if self.gate is None else self.gate.exp().to(self.k.dtype).repeat(1, self.groups).unsqueeze(-1)

    def decay_to_end(self) -> Tensor | None:
        """exp(G_c − G_j): ``[N, c, 1]``."""
        if self.gate is None:
            return None
        return (self.gate[:, -1:] - self.gate).exp().to(self.k.dtype).unsqueeze(-1)

    def decay_total(self) -> Tensor | None:
        """exp(G_c): ``[N, 1, 1]``."""
        return None if self.gate is None else self.gate[:, -1:].exp().to(self.k.dtype).unsqueeze(-1)


@dataclass
class _Gradients:
    q: Tensor
    k: Tensor
    v1: Tensor
    gate: Tensor  # [N, c] float64, of the cumulative gates

    @classmethod
    def zeros_like(cls, chunk: _Chunk) -> _Gradients:
        gate = chunk.k.new_zeros(chunk.k.shape[:2], dtype=torch.float64)
        return cls(torch.zeros_like(chunk.q), torch.zeros_like(chunk.k), torch.zeros_like(chunk.v1), gate)

    def add_to_query_gates(self, per_row: Tensor) -> None:
        """``[N, r·c]`` → summed over the query heads of a group."""
        self.gate += per_row.unflatten(1, (-1, self.gate.shape[1])).sum(1)


def _ranges(tokens: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)


def _load(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, start: int, end: int) -> _Chunk:
    heads, dtype = k.shape[2], compute_dtype(q.dtype)
    queries, scale = scaled_queries(q[:, start:end], heads, dtype)
    keys, values = to_heads(k[:, start:end], heads, dtype), values_and_ones(v[:, start:end], dtype)
    return _Chunk(queries, scale, keys, values, None if log_g is None else cumulative_gates(log_g[:, start:end]))


def _weights(chunk: _Chunk, p: int) -> tuple[Tensor, Tensor]:
    """Weights inside the chunk and their derivative by the score, divided by p; both ``[N, r, c, c]``."""
    scores = (chunk.q @ chunk.k.mT).unflatten(1, (chunk.groups, -1))
    slope = integer_power(scores, p - 1) * chunk.decay_within().unsqueeze(1)
    return scores.mul_(slope), slope


def _output(chunk: _Chunk, weights: Tensor, state: Tensor | None, p: int) -> tuple[Tensor, Tensor | None]:
    """[numerator, denominator] ``[N, r·c, e + 1]`` and the noise level of the denominator."""
    out = weights.flatten(1, 2) @ chunk.v1
    if state is None:
        return out, None
    read, noise = _read(chunk.q, _weighted(state, chunk.k.shape[-1], p), p), state_noise(chunk.q, state[..., -1], p)
    decay = chunk.decay_from_start()
    return (out + read, noise) if decay is None else (out + decay * read, noise * decay.squeeze(-1))


def state_noise(q: Tensor, normalizer: Tensor, p: int) -> Tensor:
    """How large a rounding error reading a state may leave in a denominator.

    Args:
        q: queries ``[N, rows, d]``.
        normalizer: ``[N, D]`` of the state.

    Returns:
        ``[N, rows]``: a few ε·|q|^p·Σ decay·|k|^p, the sum read off the normaliser.
    """
    bound = (normalizer @ norm_functional(q.shape[-1], p, normalizer)).clamp(min=0).unsqueeze(-1)
    return NOISE * torch.finfo(q.dtype).eps * bound * integer_power(torch.linalg.vector_norm(q, dim=-1), p)


def _weighted(state: Tensor, head_width: int, p: int) -> Tensor:
    return state * multiplicity(head_width, p, state).unsqueeze(-1)


def _read(q: Tensor, weighted_state: Tensor, p: int) -> Tensor:
    """φ(q)·S, ``[N, rows, e + 1]``."""
    out = q.new_empty(*q.shape[:-1], weighted_state.shape[-1])
    for head, start, end in _embedding_blocks(q, weighted_state.shape[-2]):
        torch.mm(expand(q[head, start:end], p), weighted_state[head], out=out[head, start:end])
    return out


def _next_state(chunk: _Chunk, state: Tensor | None, p: int) -> Tensor:
    to_end, total = chunk.decay_to_end(), chunk.decay_total()
    values = chunk.v1 if to_end is None else to_end * chunk.v1
    new = _moments(chunk.k, values, p)
    if state is None:
        return new
    return new.add_(state if total is None else total * state)


def _moments(k: Tensor, values: Tensor, p: int) -> Tensor:
    """φ(k)ᵀ·values, ``[N, D, e + 1]``."""
    width = multiplicity(k.shape[-1], p, k).numel()
    out = k.new_zeros(k.shape[0], width, values.shape[-1])
    for head, start, end in _embedding_blocks(k, width):
        out[head].addmm_(expand(k[head, start:end], p).mT, values[head, start:end])
    return out


def _embedding_blocks(x: Tensor, width: int) -> Iterator[tuple[int, int, int]]:
    """(head, first row, last row) of the blocks in which φ is formed."""
    rows = max(64, _EMBEDDED_ELEMENTS // width)
    for head in range(x.shape[0]):
        for start, end in _ranges(x.shape[1], rows):
            yield head, start, end


def _within_backward(d_out: Tensor, chunk: _Chunk, weights: Tensor, slope: Tensor, grads: _Gradients, p: int) -> None:
    """Through the attention inside the chunk; ``slope`` is used up."""
    d_weights = (d_out @ chunk.v1.mT).view_as(weights)
    d_scores = slope.mul_(d_weights).mul_(p).flatten(1, 2)
    grads.q += d_scores @ chunk.k
    grads.k += d_scores.mT @ chunk.q
    grads.v1 += weights.flatten(1, 2).mT @ d_out
    if chunk.gate is not None:
        d_log_weights = d_weights.mul_(weights).sum(1)
        grads.gate += d_log_weights.sum(-1) - d_log_weights.sum(-2)


def _read_backward(d_out: Tensor, chunk: _Chunk, state: Tensor, grads: _Gradients, p: int) -> Tensor:
    """Through the read of the entering state; returns that state's gradient."""
    decay = chunk.decay_from_start()
    d_read = d_out if decay is None else decay * d_out
    weighted = _weighted(state, chunk.k.shape[-1], p)
    d_weighted = torch.zeros_like(state)
    per_row = chunk.q.new_empty(chunk.q.shape[:-1])
    for head, start, end in _embedding_blocks(chunk.q, state.shape[-2]):
        rows = chunk.q[head, start:end]
        phi, d_phi = expand(rows, p), d_read[head, start:end] @ weighted[head].mT
        d_weighted[head].addmm_(phi.mT, d_read[head, start:end])
        d_rows = expand_backward(rows, d_phi, p)
        grads.q[head, start:end] += d_rows
        # φ_p is homogeneous of degree p: ⟨dφ, φ⟩ = ⟨dq, q⟩ / p is the gradient of the row's log decay.
        per_row[head, start:end] = (d_rows * rows).sum(-1) / p
    if chunk.gate is not None:
        grads.add_to_query_gates(per_row)
    return _weighted(d_weighted, chunk.k.shape[-1], p)


def _next_state_backward(
    d_leaving: Tensor, chunk: _Chunk, state: Tensor | None, d_state: Tensor | None, grads: _Gradients, p: int
) -> Tensor | None:
    """Through the update of the state; returns the entering state's gradient with that of the read added."""
    to_end, total = chunk.decay_to_end(), chunk.decay_total()
    values = chunk.v1 if to_end is None else to_end * chunk.v1
    d_values = torch.empty_like(values)
    for head, start, end in _embedding_blocks(chunk.k, d_leaving.shape[-2]):
        rows = chunk.k[head, start:end]
        torch.mm(expand(rows, p), d_leaving[head], out=d_values[head, start:end])
        grads.k[head, start:end] += expand_backward(rows, values[head, start:end] @ d_leaving[head].mT, p)
    if to_end is None:
        grads.v1 += d_values
    else:
        grads.v1 += to_end * d_values
        d_log_decay = (d_values * values).sum(-1)
        grads.gate -= d_log_decay
        grads.gate[:, -1] += d_log_decay.sum(-1)
    if state is None:
        return None
    carried = d_leaving if total is None else total * d_leaving
    if total is not None:
        grads.gate[:, -1] += (carried * state).sum((-1, -2))
    return carried if d_state is None else d_state.add_(carried)

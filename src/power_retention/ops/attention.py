"""The attention form in plain PyTorch: any even p, no state, memory linear in T, O(T²) arithmetic.

Weights are formed as (q_i·k_j · exp((L_i − L_j)/p − μ_i))^p, where μ_i is the largest log of |k_j| exp((L_i − L_j)/p) among
j ≤ i: every base is at most |q_i|, so no power overflows, and the factor exp(−p·μ_i) cancels in the ratio.
"""

from __future__ import annotations

from collections.abc import Iterator

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

_BLOCK_ELEMENTS = 1 << 23
"""Weights held at a time."""

_LARGEST_EXPONENT = 80.0
"""Reached only next to keys too small for their norm to count; keeps 0 · exp(…) from being 0 · inf."""


def attention_forward(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, p: int) -> Tensor:
    """q ``[B, T, Hq, d]``, k ``[B, T, H, d]``, v ``[B, T, H, e]``, log_g ``[B, T, H]`` → y ``[B, T, Hq, e]``."""
    batch, _, heads, _ = k.shape
    dtype = compute_dtype(q.dtype)
    keys, values, gates = to_heads(k, heads, dtype), values_and_ones(v, dtype), cumulative_gates(log_g)
    peak = _running_peak(keys, gates, p)
    y = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for start, end in _blocks(q, heads):
        queries, _ = scaled_queries(q[:, start:end], heads, dtype)
        base, _ = _bases(queries, keys[:, :end], gates, peak, start, p)
        out = integer_power(base, p).flatten(1, 2) @ values[:, :end]
        y[:, start:end] = from_heads(ratio(out, None), batch, end - start)
    return y


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, p: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`attention_forward` with respect to q, k, v and log_g, recomputing the weights."""
    batch, tokens, heads, _ = k.shape
    dtype = compute_dtype(q.dtype)
    keys, values, gates = to_heads(k, heads, dtype), values_and_ones(v, dtype), cumulative_gates(log_g)
    peak = _running_peak(keys, gates, p)
    dq, d_keys, d_values = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
    d_gates = keys.new_zeros(keys.shape[:2], dtype=torch.float64)
    for start, end in _blocks(q, heads):
        queries, scale = scaled_queries(q[:, start:end], heads, dtype)
        base, factor = _bases(queries, keys[:, :end], gates, peak, start, p)
        root = integer_power(base, p - 1)
        weights = (root * base).flatten(1, 2)
        out = weights @ values[:, :end]
        d_out = ratio_backward(to_heads(dy[:, start:end], heads, dtype), out, None)
        d_weights = (d_out @ values[:, :end].mT).view_as(base)
        d_scores = (d_weights * root * factor.unsqueeze(1) * p).flatten(1, 2)
        dq[:, start:end] = from_heads(d_scores @ keys[:, :end] * scale, batch, end - start)
        d_keys[:, :end] += d_scores.mT @ queries
        d_values[:, :end] += weights.mT @ d_out
        if gates is not None:
            d_log_weights = (d_weights * weights.view_as(base)).sum(1)
            d_gates[:, start:end] += d_log_weights.sum(-1)
            d_gates[:, :end] -= d_log_weights.sum(-2)
    dk = from_heads(d_keys, batch, tokens).to(k.dtype)
    dv = from_heads(d_values[..., :-1], batch, tokens).to(v.dtype)
    return dq, dk, dv, None if log_g is None else gate_gradient(d_gates, log_g)


def _running_peak(keys: Tensor, gates: Tensor | None, p: int) -> Tensor:
    """max over j ≤ i of log|k_j| − L_j/p, ``[N, T]`` in float64; 0 where every key so far is zero."""
    log_norm = torch.linalg.vector_norm(keys.double(), dim=-1).log()
    peak = (log_norm if gates is None else log_norm - gates / p).cummax(-1).values
    return torch.where(peak.isinf(), 0, peak)


def _bases(
    queries: Tensor, keys: Tensor, gates: Tensor | None, peak: Tensor, start: int, p: int
) -> tuple[Tensor, Tensor]:
    """Bases of the weights ``[N, r, c, j]`` and the factors ``[N, c, j]`` that the scores were multiplied with."""
    end = keys.shape[1]
    exponent = -peak[:, start:end, None] - (0 if gates is None else gates[:, None, :end] / p)
    factor = exponent.clamp(max=_LARGEST_EXPONENT).to(keys.dtype).exp().expand(-1, -1, end)
    factor = factor.tril(start)
    scores = (queries @ keys.mT).unflatten(1, (-1, end - start))
    return scores * factor.unsqueeze(1), factor


def _blocks(q: Tensor, heads: int) -> Iterator[tuple[int, int]]:
    """Query ranges whose weights stay within the budget."""
    batch, tokens, query_heads, _ = q.shape
    size = max(16, _BLOCK_ELEMENTS // max(1, batch * query_heads * tokens))
    for start in range(0, tokens, size):
        yield start, min(start + size, tokens)

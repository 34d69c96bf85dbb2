"""What the attention form and the chunk form in plain PyTorch share: head-major pieces, powers, the final ratio.

Shapes in these files: N = B·H key/value heads, r = Hq/H query heads sharing one of them, c tokens, d key width,
e value width.  A query piece is ``[N, r·c, d]``, so that keys and values are never repeated; values carry a last column
of ones, so that the normaliser is one more value channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FORGET = -1000.0
"""Gates are clamped here: exp(−1000) is 0 in every dtype, and no −inf can meet another."""

_UNDERFLOW = 2.0**16
"""Denominators below this many of the smallest normal number count as 0: their inverse must leave room for gradients."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic and state dtype: float64 for float64 inputs, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def to_heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """``[B, c, H·r, w]`` → ``[B·H, r·c, w]`` in ``dtype``; query heads of one group lie one after another."""
    batch, tokens, all_heads, width = x.shape
    groups = all_heads // heads
    x = x.to(dtype).view(batch, tokens, heads, groups, width)
    return x.permute(0, 2, 3, 1, 4).reshape(batch * heads, groups * tokens, width)


def from_heads(x: Tensor, batch: int, tokens: int) -> Tensor:
    """``[B·H, r·c, w]`` → ``[B, c, H·r, w]`` (a view)."""
    groups = x.shape[1] // tokens
    x = x.view(batch, x.shape[0] // batch, groups, tokens, x.shape[-1])
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def scaled_queries(q: Tensor, heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries with entries of order one, and the factor that made them so.

    The output does not depend on a query's length, but its p-th power would leave the exponent range; a power of two
    per query is taken out first, which is exact.  Returns ``[N, r·c, d]`` and ``[N, r·c, 1]``.
    """
    q = to_heads(q, heads, dtype)
    # Past this limit, at denormal queries, the factor itself would overflow.
    limit = 1 - math.frexp(torch.finfo(dtype).tiny)[1]
    exponent = torch.frexp(q.abs().amax(-1, keepdim=True)).exponent.clamp(-limit, limit)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=dtype), -exponent)
    return q * scale, scale


def values_and_ones(v: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, c, H, e]`` → ``[N, c, e + 1]``, the last column being ones."""
    v = to_heads(v, v.shape[2], dtype)
    return torch.cat((v, v.new_ones(*v.shape[:-1], 1)), -1)


def cumulative_gates(log_g: Tensor | None) -> Tensor | None:
    """``[B, c, H]`` → inclusive cumulative sums ``[N, c]`` in float64: differences of far-apart sums keep their digits."""
    if log_g is None:
        return None
    return log_g.double().clamp(min=FORGET).transpose(1, 2).flatten(0, 1).cumsum(-1)


def gate_gradient(d_cumulative: Tensor, like: Tensor) -> Tensor:
    """Gradient of the cumulative sums ``[N, c]`` → gradient of the gates ``[B, c, H]``."""
    d_gates = d_cumulative.flip(-1).cumsum(-1).flip(-1)
    return d_gates.view(like.shape[0], like.shape[2], -1).transpose(1, 2).to(like.dtype)


def integer_power(x: Tensor, p: int) -> Tensor:
    """x^p for p ≥ 1 by repeated squaring."""
    if p == 1:
        return x
    root = integer_power(x, p // 2)
    return root * root if p % 2 == 0 else root * root * x


def ratio(out: Tensor, noise: Tensor | None) -> Tensor:
    """y = numerator / denominator for ``out`` = [numerator, denominator] ``[N, rows, e + 1]``; 0 where both vanish.

    Args:
        noise: ``[N, rows]``, the rounding error that reading a state may have left in the denominator, or None where
            no state was read.  The inverse is regularised at that level, denominator / (denominator² + noise²), so a
            query orthogonal to all that the state holds gives a bounded output instead of one rounding error over another.
    """
    numerator, inverse, _, _ = _in_units_of_size(out, noise)
    return numerator * inverse


def ratio_backward(dy: Tensor, out: Tensor, noise: Tensor | None) -> Tensor:
    """Gradient of :func:`ratio` with respect to ``out``; the noise level counts as a constant."""
    numerator, inverse, slope, size = _in_units_of_size(out, noise)
    d_inverse = (dy * numerator).sum(-1, keepdim=True)
    return torch.cat((dy * inverse, d_inverse * slope), -1) / size


def _in_units_of_size(out: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator, x / (x² + n²) and its derivative in units of max(|x|, n), so that no square leaves the exponent range.

    The last result is that unit: infinite, and the others 0, where the denominator x has underflowed.
    """
    denominator = out[..., -1:]
    noise = torch.zeros_like(denominator) if noise is None else noise.unsqueeze(-1)
    size = torch.maximum(denominator.abs(), noise)
    size = torch.where(size < _UNDERFLOW * torch.finfo(out.dtype).tiny, torch.inf, size)
    x, n = denominator / size, noise / size
    square = x * x + n * n
    square = torch.where(square == 0, 1, square)
    return out[..., :-1] / size, x / square, (n * n - x * x) / (square * square), size

"""Attention in float64 for some of its rows: what a kernel's answer is held against at any length.

A gradient that enters only through R rows reaches every key, value and gate, so R·T weights check a call of T tokens as
exactly as T² would: forward at those rows, and all gradients of ⟨dy, y⟩ with dy zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_WEIGHTS = 1 << 26
"""Weights of one head held at a time."""


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    rows: Tensor,
    dy: Tensor | None = None,
    *,
    p: int | None = 2,
) -> dict[str, Tensor]:
    """Causal attention in float64 at the given rows of the sequence.

    Args:
        q: ``[1, T, Hq, d]``; k ``[1, T, H, d]``; v ``[1, T, H, e]``; log_g ``[1, T, H]`` or None.
        rows: ``[R]`` positions, increasing.
        dy: ``[1, R, Hq, e]``, gradient of y at those rows; None for no gradients.
        p: power; None for softmax attention with scores over √d, which has no gates.

    Returns:
        ``"y"`` ``[1, R, Hq, e]``; with ``dy`` also ``"dq"``, ``"dk"``, ``"dv"`` and, with gates, ``"dlog_g"``, shaped like the
        inputs.  All in float64.
    """
    groups = q.shape[2] // k.shape[2]
    y = q.new_empty(1, len(rows), q.shape[2], v.shape[-1], dtype=torch.float64)
    inputs = {"dq": q, "dk": k, "dv": v} | ({} if log_g is None else {"dlog_g": log_g})
    grads = {name: torch.zeros_like(x, dtype=torch.float64) for name, x in inputs.items()} if dy is not None else {}
    for head in range(q.shape[2]):
        shared = head // groups
        sources = [q[0, :, head], k[0, :, shared], v[0, :, shared]] + ([] if log_g is None else [log_g[0, :, shared]])
        for block in _blocks(rows):
            last = int(rows[block][-1]) + 1
            leaves = [x[:last].double().requires_grad_(dy is not None) for x in sources]
            out = _rows(leaves[0], leaves[1], leaves[2], leaves[3] if len(leaves) > 3 else None, rows[block], p)
            y[0, block, head] = out.detach()
            if dy is not None:
                targets = (grads["dq"][0, :, head], *(g[0, :, shared] for name, g in grads.items() if name != "dq"))
                found = torch.autograd.grad(out, leaves, dy[0, block, head].double())
                for target, grad in zip(targets, found, strict=True):
                    target[:last] += grad
    return {"y": y, **grads}


def _rows(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, rows: Tensor, p: int | None) -> Tensor:
    """q, k ``[T, d]``, v ``[T, e]``, log_g ``[T]``, rows ``[R]`` → ``[R, e]``."""
    later = torch.arange(k.shape[0], device=k.device) > rows[:, None]
    scores = q[rows] @ k.T
    if p is None:
        shares: Tensor = (scores / float(k.shape[-1]) ** 0.5).masked_fill(later, -torch.inf).softmax(-1)
        return shares @ v
    weights = scores**p
    if log_g is not None:
        gates = log_g.clamp(min=-1000).cumsum(0)
        weights = weights * (gates[rows, None] - gates).masked_fill(later, -torch.inf).exp()
    weights = weights.masked_fill(later, 0)
    total = weights.sum(-1, keepdim=True)
    return (weights @ v) / torch.where(total == 0, 1, total)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of ``rows`` whose weights over all tokens before them fit."""
    count = max(1, _WEIGHTS // (int(rows[-1]) + 1))
    for start in range(0, len(rows), count):
        yield slice(start, min(start + count, len(rows)))


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Root of the mean squared difference over that of ``expected``; infinite where ``got`` is not finite."""
    if not bool(got.isfinite().all()):
        return float("inf")
    size = float(expected.double().norm())
    difference = float((got.double() - expected.double()).norm())
    return difference / size if size > 1e-30 else difference

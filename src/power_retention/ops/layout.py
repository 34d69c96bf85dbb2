"""The layout of φ_p: which monomial of a key stands at which index of a state.  Contract version 1.

φ_p(k) holds every monomial of degree p in the d entries of k exactly once, with no multiplier, so a state
S = Σ φ_p(k) vᵀ is a table of plain moments.  The multiplicity of each monomial (how often it occurs in the
expansion of (q·k)^p) belongs to the query side:

    (q·k)^p = Σ_m multiplicity[m] · φ_p(q)[m] · φ_p(k)[m]            width D = C(d + p − 1, p), the ideal

Order of the monomials:

- **p = 2, rolled diagonals.**  Index o·d + a holds x[a]·x[(a + o) mod d], for o = 0 … ⌊d/2⌋ and a = 0 … d − 1; for
  even d the last row (o = d/2) stops at a = d/2 − 1, since its second half repeats the first.  Every row is one
  contiguous product of x with a rotation of itself: no padding, no triangle, rows of equal length.
- **p ≥ 4, lexicographic.**  Index tuples a₁ ≤ a₂ ≤ … ≤ a_p in lexicographic order.  The tuples that start with a are
  x[a] times the tail of φ_{p−1} that starts at a, so the embedding is built from contiguous pieces too.

A saved state names this contract (:data:`LAYOUT`); a change of order or multiplier is a new version.
The symmetric power embedding is due to Buckman, Gelada and Zhang, "Scaling Context Requires Rethinking
Attention" (arXiv 2507.04239).
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import combinations_with_replacement
from math import comb, factorial, prod

import numpy as np
import torch
from torch import Tensor

from power_retention.errors import ArgumentError

LAYOUT = "power-retention/1"
"""Name and version of the layout contract, as written into saved states."""

WIDEST_STATE = 1 << 16
"""Largest D for which a state of degree p ≥ 4 is kept; past it only the attention form is practical."""


def check_power(p: int) -> None:
    """Refuse a power that is not an even integer of at least 2."""
    if not isinstance(p, int) or isinstance(p, bool) or p < 2 or p % 2:
        raise ArgumentError(f"p must be an even integer of at least 2 (weights are (q·k)^p), not {p!r}.")


def state_width(head_width: int, p: int = 2) -> int:
    """Width D = C(d + p − 1, p) of φ_p for keys of width ``head_width``."""
    check_power(p)
    width = 1
    for i in range(p):  # not math.comb: a width may be symbolic under torch.compile
        width = width * (head_width + i) // (i + 1)
    return width


def has_state(head_width: int, p: int) -> bool:
    """Whether a fixed state is offered: always at p = 2, up to :data:`WIDEST_STATE` beyond."""
    return p == 2 or state_width(head_width, p) <= WIDEST_STATE


def expand(x: Tensor, p: int = 2) -> Tensor:
    """φ_p(x): every monomial of degree p, in the order of the contract.

    Args:
        x: ``[..., d]``.
        p: even power.

    Returns:
        ``[..., D]`` with D = :func:`state_width`.
    """
    if p == 2:
        d = x.shape[-1]
        return _rolled(x).flatten(-2)[..., : d * (d + 1) // 2]
    return _lexicographic(x, p)[-1]


def expand_backward(x: Tensor, grad: Tensor, p: int = 2) -> Tensor:
    """Gradient of ``(expand(x, p) * grad).sum()`` with respect to ``x``.

    Args:
        x: ``[..., d]``.
        grad: ``[..., D]``.

    Returns:
        ``[..., d]``.
    """
    return _rolled_backward(x, grad) if p == 2 else _lexicographic_backward(x, grad, p)


def _rolled(x: Tensor) -> Tensor:
    """[..., d] -> [..., d//2 + 1, d], each row x times a rotation of itself."""
    rotations = _rotations(x)
    if x.requires_grad and torch.is_grad_enabled():
        return rotations * x.unsqueeze(-2)
    # Into memory of its own: a product takes over the strides of the overlapping rows, and flattening would copy it.
    return torch.mul(rotations, x.unsqueeze(-2), out=x.new_empty(rotations.shape))


def _rotations(x: Tensor) -> Tensor:
    """[..., d] -> view [..., d//2 + 1, d] whose row o is x rotated left by o."""
    d = x.shape[-1]
    return torch.cat((x, x[..., : d // 2]), -1).unfold(-1, d, 1)


def _rolled_backward(x: Tensor, grad: Tensor) -> Tensor:
    d = x.shape[-1]
    rows = d // 2 + 1
    grad = torch.nn.functional.pad(grad, (0, rows * d - grad.shape[-1])).unflatten(-1, (rows, d))
    first = (grad * _rotations(x)).sum(-2)
    # The second factor x[(a + o) mod d] receives row o rotated right by o: with the row's own tail put before it, that
    # rotation is a window which starts one element earlier in each row, so one strided view holds them all.
    product = grad * x.unsqueeze(-2)
    skewed = torch.cat((product[..., d - rows + 1 :], product), -1).contiguous()
    width = d + rows - 1
    strides = (*skewed.stride()[:-2], width - 1, 1)
    second = skewed.as_strided((*x.shape[:-1], rows, d), strides, skewed.storage_offset() + rows - 1).sum(-2)
    return first + second


def _lexicographic(x: Tensor, p: int) -> list[Tensor]:
    """φ_1 … φ_p in lexicographic order."""
    embeddings = [x]
    for degree in range(2, p + 1):
        starts = _tail_starts(x.shape[-1], degree - 1)
        previous = embeddings[-1]
        embeddings.append(torch.cat([x[..., a : a + 1] * previous[..., s:] for a, s in enumerate(starts)], -1))
    return embeddings


def _lexicographic_backward(x: Tensor, grad: Tensor, p: int) -> Tensor:
    embeddings = _lexicographic(x, p - 1)
    dx = torch.zeros_like(x)
    for degree in range(p, 1, -1):
        previous = embeddings[degree - 2]
        d_previous = torch.zeros_like(previous)
        end = 0
        for a, start in enumerate(_tail_starts(x.shape[-1], degree - 1)):
            begin, end = end, end + previous.shape[-1] - start
            block = grad[..., begin:end]
            dx[..., a] += (block * previous[..., start:]).sum(-1)
            d_previous[..., start:] += block * x[..., a : a + 1]
        grad = d_previous
    return dx + grad


def _tail_starts(d: int, degree: int) -> tuple[int, ...]:
    """Where, in φ_degree, the tuples whose entries are all ≥ a begin; for a = 0 … d − 1."""
    total = comb(d + degree - 1, degree)
    return tuple(total - comb(d - a + degree - 1, degree) for a in range(d))


@lru_cache
def monomials(head_width: int, p: int) -> tuple[tuple[int, ...], ...]:
    """The contract spelled out: the sorted index tuple of each of the D monomials."""
    d = head_width
    if p == 2:
        indices = [(a, (a + o) % d) for o in range(d // 2 + 1) for a in range(d)]
        return tuple((min(pair), max(pair)) for pair in indices[: d * (d + 1) // 2])
    return tuple(combinations_with_replacement(range(d), p))


def _build_tables(head_width: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    """(multiplicity, norm) of each monomial, float64 ``[D]``.

    NumPy arrays, since a cached tensor would keep the mode that it was first asked for in: inference, fake, a device.
    """
    if p == 2:
        norm = np.zeros(state_width(head_width, 2))
        norm[:head_width] = 1
        return 2 - norm, norm
    multiplicity, norms = [], []
    for indices in combinations_with_replacement(range(head_width), p):
        exponents = Counter(indices).values()
        multiplicity.append(factorial(p) // prod(map(factorial, exponents)))
        even = all(e % 2 == 0 for e in exponents)
        norms.append(factorial(p // 2) // prod(factorial(e // 2) for e in exponents) if even else 0)
    return np.array(multiplicity, dtype=np.float64), np.array(norms, dtype=np.float64)


_cached_tables = lru_cache(_build_tables)


def _tables(head_width: int, p: int) -> tuple[np.ndarray, np.ndarray]:
    # A graph under construction holds the tables as constants; caches are not traced.
    return (_build_tables if torch.compiler.is_compiling() else _cached_tables)(head_width, p)


def multiplicity(head_width: int, p: int, like: Tensor) -> Tensor:
    """``[D]``: how often each monomial occurs in (q·k)^p; the query side of a product carries it."""
    return torch.from_numpy(_tables(head_width, p)[0]).to(like)


def norm_functional(head_width: int, p: int, like: Tensor) -> Tensor:
    """``[D]`` vector ν with ν·φ_p(k) = |k|^p: read off a normaliser, it bounds what any unit query can find there."""
    return torch.from_numpy(_tables(head_width, p)[1]).to(like)


# ── the 16-block layout of the public `retention` package ────────────────────────────────────────────────────────────


def blocks16_width(head_width: int) -> int:
    """Width of the 16-block layout at p = 2: 2560 at d = 64, 9216 at d = 128."""
    blocks = _blocks16_count(head_width)
    return 256 * blocks * (blocks + 1) // 2


def _blocks16_count(head_width: int) -> int:
    if head_width % 16:
        raise ArgumentError(f"The 16-block layout needs a head width divisible by 16, not {head_width}.")
    return head_width // 16


@lru_cache
def _blocks16_tables(d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(canonical index of each 16-block entry, its multiplier on keys, a 16-block index of each canonical entry)."""
    where = {pair: m for m, pair in enumerate(monomials(d, 2))}
    canonical, weight = [], []
    for block in range(_blocks16_count(d)):
        for inner in range(16 * (block + 1)):
            for outer in range(16 * block, 16 * block + 16):
                canonical.append(where[min(inner, outer), max(inner, outer)])
                weight.append(2.0 if inner < 16 * block else 1.0)
    inverse = np.empty(len(where), dtype=np.int64)
    inverse[canonical] = np.arange(len(canonical))
    return np.array(canonical), np.array(weight), inverse


def to_blocks16(x: Tensor, head_width: int, dim: int) -> Tensor:
    """Canonical p = 2 state or normaliser → 16-block layout, along ``dim`` (D → :func:`blocks16_width`)."""
    canonical, weight, _ = _blocks16_tables(head_width)
    return _gather(x, canonical, dim) * _along(weight, x, dim)


def from_blocks16(x: Tensor, head_width: int, dim: int) -> Tensor:
    """16-block state or normaliser → canonical p = 2 layout, along ``dim``."""
    _, weight, inverse = _blocks16_tables(head_width)
    return _gather(x, inverse, dim) / _along(weight[inverse], x, dim)


def _gather(x: Tensor, indices: np.ndarray, dim: int) -> Tensor:
    return x.index_select(dim, torch.from_numpy(indices).to(x.device))


def _along(values: np.ndarray, like: Tensor, dim: int) -> Tensor:
    """``values`` as a tensor that broadcasts along ``dim`` of ``like``."""
    return torch.from_numpy(values).to(like).view([-1 if i == dim % like.ndim else 1 for i in range(like.ndim)])

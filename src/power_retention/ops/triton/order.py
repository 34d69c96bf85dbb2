"""States between their canonical layout and the kernels' own."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor

from power_retention.ops.layout import monomials, multiplicity, state_width


def widen(x: Tensor, width: int) -> Tensor:
    """Zeros after the last column, up to ``width`` of them; contiguous."""
    return (x if x.shape[-1] == width else pad_tensor(x, (0, width - x.shape[-1]))).contiguous()


@lru_cache
def row_order(width: int, block: int, device: torch.device) -> Tensor:
    """int32 ``[4, rows]``: of each row of a state inside the kernels its factors, canonical index, and 1 unless a repeat.

    The order is that of ``block_row`` in ``common``.
    """
    pairs = [(a, a // block * block + (a + o) % block) for o in range(block // 2 + 1) for a in range(width)]
    for start in range(0, width - block, block):
        pairs += [(a, b) for b in range(start + block, width) for a in range(start, start + block)]
    a, b = torch.tensor(pairs).T
    canonical = index_matrix(width, torch.device("cpu"))[a, b]
    repeats = torch.arange(len(pairs)) // width == block // 2
    first = ~(repeats & (a % block >= block // 2))
    return torch.stack((a, b, canonical, first)).to(torch.int32).to(device)


@lru_cache
def _factors(width: int, device: torch.device) -> Tensor:
    """``[2, D]``: the factors a ≤ b of each canonical monomial; made once, or every call would wait for the device."""
    return torch.tensor(monomials(width, 2)).T.contiguous().to(device)


@lru_cache
def _occurrences(width: int, device: torch.device) -> Tensor:
    """float32 ``[D]``: 1 for a square, 2 for a product of two."""
    return multiplicity(width, 2, torch.empty(0)).to(device)


@lru_cache
def index_matrix(width: int, device: torch.device) -> Tensor:
    """``[d, d]``: the canonical index of the monomial x_a·x_b."""
    a, b = _factors(width, device)
    out = torch.empty(width, width, dtype=torch.int64, device=device)
    index = torch.arange(a.numel(), device=device)
    out[a, b] = index
    out[b, a] = index
    return out


def to_matrix(normalizer: Tensor, width: int, wide: int, *, gradient: bool = False) -> Tensor:
    """Canonical ``[R, H, D]`` → symmetric second moments ``[R, H, wide, wide]``; of a gradient, each pair gets half."""
    out = normalizer.float()[..., index_matrix(width, normalizer.device)]
    if gradient:
        out = out * (0.5 + 0.5 * torch.eye(width, device=out.device))
    return pad_tensor(out, (0, wide - width, 0, wide - width)).contiguous()


def from_matrix(moment: Tensor, width: int, *, gradient: bool = False) -> Tensor:
    """The way back; of a gradient, both halves of each pair are summed."""
    a, b = _factors(width, moment.device)
    out = moment[..., a, b]
    return out * _occurrences(width, moment.device) if gradient else out


def _wide_index(width: int, wide: int, device: torch.device) -> Tensor:
    """``[D]``: where each canonical monomial of ``width`` stands in the canonical layout of ``wide``."""
    a, b = _factors(width, device)
    return index_matrix(wide, device)[a, b]


def widen_state(memory: Tensor, width: int, wide: int, value_width: int) -> Tensor:
    """Canonical ``[R, H, D, e]`` → the canonical layout of padded heads, float32."""
    memory = widen(memory.float(), value_width)
    if width == wide:
        return memory
    out = memory.new_zeros(*memory.shape[:2], state_width(wide), value_width)
    out[:, :, _wide_index(width, wide, memory.device)] = memory
    return out


def narrow_state(memory: Tensor, width: int, wide: int, value_width: int) -> Tensor:
    """The way back."""
    if width != wide:
        memory = memory[:, :, _wide_index(width, wide, memory.device)]
    return memory[..., :value_width].contiguous()

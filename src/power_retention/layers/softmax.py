"""The softmax attention that power retention stands in for, with the mixer's own shapes and masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Causal attention, to hold a converted model against its parent.

    Args:
        q: ``[B, T, Hq, d]``.
        k: ``[B, T, H, d]``.
        v: ``[B, T, H, e]``.
        mask: ``[B, T]``, False at padding.
        cu_seqlens: borders of packed sequences.

    Returns:
        ``[B, T, Hq, e]``; at padding, anything finite.
    """
    tokens = q.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    if cu_seqlens is not None:
        sequence = torch.bucketize(torch.arange(tokens, device=q.device), cu_seqlens.to(q.device), right=True)
        seen = seen & (sequence[:, None] == sequence)
    if mask is not None:
        # A padded row sees itself, so that no row of the softmax is empty.
        seen = (seen & mask[:, None, :]) | torch.eye(tokens, dtype=torch.bool, device=q.device)
        seen = seen.unsqueeze(1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

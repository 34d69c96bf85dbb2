"""The Transformer that is learned from: only read, in the precision of the run, each packed document by itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel

_NAME = "power_retention_documents"


def prepare_teacher(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make a Transformer a teacher, in place: it is not trained, and its attention keeps to the documents it is told of.

    Its inputs may not be padded from now on: there is no mask any more.
    """
    model.eval().requires_grad_(False)
    for value in model.parameters():  # and no buffer: rotary frequencies in bfloat16 are another model's
        value.data = value.data.to(dtype)
    model.set_attn_implementation(_NAME)


def read_documents(trunk: Callable[..., Tensor], ids: Tensor, positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The last hidden state ``[B, T, hidden]`` of a prepared teacher.

    Args:
        trunk: the :class:`~power_retention.training.parallel.Trunk` of it, see :func:`prepare_teacher`.
        ids, positions: ``[B, T]``.
        cu_seqlens: int32 ``[pieces + 1]``, borders of the documents in the flattened ids; None where each row is one.
    """
    return trunk(input_ids=ids, position_ids=positions, use_cache=False, document_borders=cu_seqlens)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    document_borders: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within documents; query ``[B, Hq, T, d]``, key and value ``[B, H, T, ·]`` → ``[B, T, Hq, d]``."""
    batch, _, tokens, _ = query.shape
    if document_borders is None and sliding_window is None:
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return y.transpose(1, 2).contiguous(), None
    if document_borders is None:
        document_borders = tokens * torch.arange(batch + 1, device=query.device, dtype=torch.int32)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    window = tokens if sliding_window is None else sliding_window
    attend = _by_flash_attention if q.is_cuda and q.dtype != torch.float32 else _document_by_document
    return attend(q, k, v, document_borders, tokens, window, scaling).unflatten(0, (batch, tokens)), None


AttentionInterface.register(_NAME, _attention)


def _by_flash_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int, scale: float | None
) -> Tensor:
    behind = min(window, longest) - 1
    y = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=(behind, 0))
    assert isinstance(y, Tensor)
    return y


@torch.compiler.disable  # as many steps as documents
def _document_by_document(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, longest: int, window: int, scale: float | None
) -> Tensor:
    out = []
    for start, end in pairwise(borders.tolist()):
        one, two, three = (x[start:end].transpose(0, 1) for x in (q, k, v))
        near = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril().triu(1 - window)
        mask = None if window >= end - start else near
        out.append(F.scaled_dot_product_attention(one, two, three, mask, is_causal=mask is None, scale=scale))
    return torch.cat(out, 1).transpose(0, 1)

"""The next-token loss over a large vocabulary: only labelled rows meet it, and no more than a block of logits exists."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits that exist at a time."""


def next_token_loss(hidden: Tensor, head: nn.Module, labels: Tensor, total: float) -> Tensor:
    """Sum over the labelled tokens of −log p(label), divided by ``total``; rows without a label meet no vocabulary.

    Args:
        hidden: ``[..., hidden]`` last hidden states.
        head: the output projection, usually ``nn.Linear``; under autocast it multiplies in autocast's dtype.
        labels: ``[...]`` next tokens; negative where there is none.
        total: what the sum is divided by: the labelled tokens of the whole sequence, of which these may be a part.

    Returns:
        The loss, float32 (float64 for float64 states), connected to ``hidden`` even where nothing is labelled: all ranks
        must go through the same backward pass.
    """
    labels = labels.reshape(-1)
    kept = (labels >= 0).nonzero().flatten()
    loss = next_token_loss_of_rows(hidden.flatten(0, -2)[kept], head, labels[kept], total)
    return loss + 0 * hidden[..., :1].sum()


def next_token_loss_of_rows(
    rows: Tensor,
    head: nn.Module,
    labels: Tensor,
    total: float,
    *,
    sized_for: str | None = None,
    compiled: bool = False,
) -> Tensor:
    """:func:`next_token_loss` where every row has a label: rows ``[N, hidden]``, labels ``[N]``.  Never waits for the device.

    Blocks of logits are as large as on a device of the type ``sized_for``, by default that of the rows.  ``compiled`` by
    ``torch.compile``, they are read and written a few times instead of a dozen.
    """
    kind = rows.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
    if type(head) is nn.Linear and head.bias is None and type(head.weight) is not DTensor:
        size = _rows_at_a_time(len(head.weight), sized_for or kind)
        loss: Tensor = _NextToken.apply(rows.to(dtype), head.weight, labels, total, size, compiled)
        return loss
    # A head that is more than a matrix, or sharded by itself, is called as it is, and once more in backward.
    loss = 0 * rows[..., :1].sum()
    size = _rows_at_a_time(int(getattr(head, "out_features", 1 << 17)), kind)
    for start in range(0, len(labels), size):
        block = slice(start, start + size)
        loss = loss + checkpoint(_nll, head, rows[block], labels[block], use_reentrant=False) / total
    return loss


def _rows_at_a_time(vocabulary: int, device_type: str) -> int:
    """A power of two, so that sequences of usual lengths are cut into blocks of one shape."""
    return 1 << max(4, (_LOGITS.get(device_type, _LOGITS["cpu"]) // vocabulary).bit_length() - 1)


def _nll(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    logits: Tensor = head(hidden)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="sum")


class _NextToken(torch.autograd.Function):
    """Gradients are formed block by block in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, total: float, size: int, compiled: bool
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.to(hidden.dtype)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=torch.promote_types(head.dtype, torch.float32)) if needs_head else None
        loss = hidden.new_zeros((), dtype=wide)
        loss_of_block = _compiled_block() if compiled else _block
        for start in range(0, len(labels), size):
            rows = slice(start, start + size)
            lost, d_logits = loss_of_block(hidden[rows] @ weight.T, labels[rows, None], total)
            loss += lost
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
            if d_head is not None:
                d_head += d_logits.T @ hidden[rows]
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_head = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden.mul_(grad.to(d_hidden.dtype)),
            None if d_head is None else d_head.mul_(grad).to(ctx.head_dtype),
            None,
            None,
            None,
            None,
        )


def _block(logits: Tensor, labels: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """(loss, its gradient) for logits ``[N, vocab]``, labels ``[N, 1]``; no more than one copy of the logits is made."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    loss = -log_p.gather(-1, labels).sum() / total
    d_logits = log_p.exp_()
    d_logits.scatter_add_(-1, labels, d_logits.new_full((1, 1), -1.0).expand(len(labels), 1))
    return loss, d_logits.div_(total).to(logits.dtype)


def _fused_block(logits: Tensor, labels: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """:func:`_block` as a compiler fuses it: nothing in place, and nothing scattered."""
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    loss = -log_p.gather(-1, labels).sum() / total
    hit = torch.arange(logits.shape[-1], device=labels.device) == labels
    return loss, ((log_p.exp() - hit.to(log_p.dtype)) / total).to(logits.dtype)


@lru_cache
def _compiled_block() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_fused_block)

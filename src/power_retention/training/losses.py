"""Losses over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 512
"""Tokens whose logits exist at a time."""


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    next_token_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over tokens of KL(teacher ‖ student), optionally mixed with the next-token loss.

    Args:
        student_hidden, teacher_hidden: ``[N, hidden]`` last hidden states.
        student_head, teacher_head: ``[vocab, hidden]``.
        labels: ``[N]`` next tokens; −100 where there is none (the KL counts there all the same).
        next_token_weight: w in (1 − w)·KL + w·next-token loss.

    Returns:
        The loss to minimise, and for the record the KL and the next-token loss, in nats a token.
    """
    loss, kl, next_token = _Distillation.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, next_token_weight
    )
    return loss, kl, next_token


class _Distillation(torch.autograd.Function):
    """Gradients are formed chunk by chunk in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor,
        weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The dtype of the hidden states decides: under autocast they are bfloat16 and so are the matmuls.
        dtype = student_hidden.dtype
        head = student_head.to(dtype)
        d_hidden, d_head = torch.empty_like(student_hidden), torch.zeros_like(student_head)
        kl, next_token = (student_head.new_zeros((), dtype=torch.float64) for _ in range(2))
        labelled = int((labels >= 0).sum())
        tokens = len(labels)
        for start in range(0, tokens, _ROWS):
            rows = slice(start, start + _ROWS)
            log_student = (student_hidden[rows] @ head.T).float().log_softmax(-1)
            log_teacher = (teacher_hidden[rows] @ teacher_head.T).float().log_softmax(-1)
            student, teacher = log_student.exp(), log_teacher.exp()
            kl += (teacher * (log_teacher - log_student)).sum(dtype=torch.float64)
            has_label = labels[rows] >= 0
            label = labels[rows].clamp(min=0)
            next_token -= log_student.gather(-1, label[:, None])[:, 0][has_label].sum(dtype=torch.float64)
            d_logits = student.sub(teacher).mul_((1 - weight) / tokens)
            if weight and labelled:
                hard = F.one_hot(label, student.shape[-1]) - student
                d_logits -= hard * (has_label[:, None] * weight / labelled)
            d_logits = d_logits.to(dtype)
            d_hidden[rows] = d_logits @ head
            d_head += d_logits.T @ student_hidden[rows]
        kl, next_token = kl / tokens, next_token / max(labelled, 1)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(kl, next_token)
        return ((1 - weight) * kl + weight * next_token).float(), kl, next_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_head = ctx.saved_tensors
        return grad * d_hidden, grad * d_head, None, None, None, None

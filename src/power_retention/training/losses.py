"""Losses over a large vocabulary without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_AT_A_TIME = {"cpu": 1 << 25, "cuda": 1 << 28}
"""Logits that exist at a time."""
_ROWS = 512
"""Tokens whose logits exist at a time where nothing is trained."""


def distillation_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    next_token_weight: float = 0.0,
    *,
    labelled: Tensor | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over tokens of KL(teacher ‖ student), optionally mixed with the next-token loss.

    Args:
        student_hidden, teacher_hidden: ``[N, hidden]`` last hidden states.
        student_head, teacher_head: ``[vocab, hidden]``.
        labels: ``[N]`` next tokens; −100 where there is none (the KL counts there all the same).
        next_token_weight: w in (1 − w)·KL + w·next-token loss.
        labelled: number of labels that the next-token loss is divided by, where it is not the number there is: of several ranks
            with as many tokens but not as many labels each, their mean number, so that the mean of their losses is that over
            all labels.
        compiled: by ``torch.compile``: logits are read and written a few times instead of a dozen.

    Returns:
        The loss to minimise, and for the record the KL and the next-token loss, in nats a token.
    """
    loss, kl, next_token = _Distillation.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, next_token_weight, labelled, compiled
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
        labelled: Tensor | None,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The dtype of the hidden states decides: under autocast they are bfloat16 and so are the matmuls.
        dtype = student_hidden.dtype
        head = student_head.to(dtype)
        d_hidden, d_head = torch.empty_like(student_hidden), torch.zeros_like(student_head)
        kl, next_token = (student_head.new_zeros((), dtype=torch.float64) for _ in range(2))
        labelled = (labels >= 0).sum().clamp(min=1) if labelled is None else labelled
        tokens = len(labels)
        losses = _compiled(_losses) if compiled else _losses
        chunk = _rows_at_a_time(student_head)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            student_logits, teacher_logits = student_hidden[rows] @ head.T, teacher_hidden[rows] @ teacher_head.T
            shares = (1 - weight) / tokens, weight / labelled
            row_kl, row_next_token, d_logits = losses(student_logits, teacher_logits, labels[rows], *shares)
            kl += row_kl.sum(dtype=torch.float64)
            next_token += row_next_token.sum(dtype=torch.float64)
            d_hidden[rows] = d_logits @ head
            d_head += d_logits.T @ student_hidden[rows]
        kl, next_token = kl / tokens, next_token / labelled
        ctx.save_for_backward(d_hidden, d_head)
        ctx.mark_non_differentiable(kl, next_token)
        return ((1 - weight) * kl + weight * next_token).float(), kl, next_token

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_hidden, d_head = ctx.saved_tensors
        return grad * d_hidden, grad * d_head, None, None, None, None, None, None


def _losses(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, kl_share: float, next_token_share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL, next-token loss) of each row, and the gradient of their weighted sum for the student's logits."""
    log_student = student_logits.float().log_softmax(-1)
    log_teacher = teacher_logits.float().log_softmax(-1)
    student, teacher = log_student.exp(), log_teacher.exp()
    kl = (teacher * (log_teacher - log_student)).sum(-1)
    has_label = labels >= 0
    label = labels.clamp(min=0)[:, None]
    next_token = -log_student.gather(-1, label)[:, 0] * has_label
    hit = torch.arange(student.shape[-1], device=labels.device) == label
    d_next_token = (student - hit.float()) * (has_label * next_token_share)[:, None].float()
    return kl, next_token, ((student - teacher) * kl_share + d_next_token).to(student_logits.dtype)


def hidden_state_loss(got: Tensor, wanted: Tensor, *, compiled: bool = False) -> Tensor:
    """How far vectors ``[..., d]`` are off: mean over them of log(1 + ‖got − wanted‖² / ‖wanted‖²).

    Each against its own length, for a document's first token is a hundred times as long as others in many models; and the
    logarithm, for where the student takes another token for such a one, its error is a thousand times the others'.

    Args:
        got: what is trained.
        wanted: what it should be; constant.
        compiled: by ``torch.compile``: both are read once.
    """
    error: Tensor = _HiddenStateLoss.apply(got, wanted, compiled)
    return error


class _HiddenStateLoss(torch.autograd.Function):
    """Keeps what it was given, which others keep as well, and a number for each vector: no difference in float32."""

    @staticmethod
    def forward(ctx: Any, got: Tensor, wanted: Tensor, compiled: bool) -> Tensor:
        error, scale = (_compiled(_distances) if compiled else _distances)(got, wanted)
        ctx.save_for_backward(got, wanted, scale)
        return error

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        got, wanted, scale = ctx.saved_tensors
        return (grad * scale[..., None] * (got.float() - wanted.float())).to(got.dtype), None, None


def _distances(got: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(:func:`hidden_state_loss`, what each vector's difference is multiplied with in its gradient)."""
    squared = (got.float() - wanted.float()).square().sum(-1)
    length = wanted.float().square().sum(-1)
    return (squared / length).log1p().mean(), 2 / squared.numel() / (length + squared)


@cache
def _compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(function)


def _rows_at_a_time(head: Tensor) -> int:
    """As many rows as the allowed number of logits are, a power of two."""
    rows = LOGITS_AT_A_TIME.get(head.device.type, LOGITS_AT_A_TIME["cpu"]) // len(head)
    return 1 << max(4, min(rows.bit_length() - 1, 13))


class TokenComparison(NamedTuple):
    """Two models at every token, ``[N]`` each: losses and KL(teacher ‖ student) in nats, in float32.

    Attributes:
        loss: next-token loss of the student.
        teacher_loss: of the teacher.
        kl: KL(teacher ‖ student).
        agrees: whether both find the same token likeliest.
    """

    loss: Tensor
    teacher_loss: Tensor
    kl: Tensor
    agrees: Tensor


@torch.no_grad()
def compare_tokens(
    student_hidden: Tensor,
    student_head: Callable[[Tensor], Tensor],
    teacher_hidden: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    labels: Tensor,
) -> TokenComparison:
    """What two models predict at each of N tokens, a block of rows at a time: no full logits.

    Args:
        student_hidden, teacher_hidden: ``[N, hidden]`` last hidden states.
        student_head, teacher_head: hidden states to logits ``[rows, vocab]``.
        labels: ``[N]`` next tokens.
    """
    blocks: list[tuple[Tensor, ...]] = []
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        student = student_head(student_hidden[rows]).float().log_softmax(-1)
        teacher = teacher_head(teacher_hidden[rows]).float().log_softmax(-1)
        label = labels[rows, None].to(student.device)
        loss, teacher_loss = (-each.gather(-1, label)[:, 0] for each in (student, teacher))
        agrees = student.argmax(-1) == teacher.argmax(-1)
        kl = teacher.exp().mul_(teacher.sub_(student)).sum(-1)
        blocks.append((loss, teacher_loss, kl, agrees))
    return TokenComparison(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))

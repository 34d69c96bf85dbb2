"""The distillation loss, formed in chunks with its own gradients, against autograd over the whole formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from power_retention.training import losses, next_token
from power_retention.training.losses import distillation_loss, hidden_state_loss

Problem = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def problem(rows: int, *, ignored: float = 0.2, dtype: torch.dtype = torch.float64) -> Problem:
    """Student hidden states and head, the teacher's, labels."""
    generator = torch.Generator().manual_seed(rows)
    hidden, wanted = (torch.randn(rows, 12, generator=generator, dtype=dtype) for _ in range(2))
    head, teacher_head = (torch.randn(31, 12, generator=generator, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, 31, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return hidden.requires_grad_(), head.requires_grad_(), wanted, teacher_head, labels


def direct(
    hidden: Tensor, head: Tensor, wanted: Tensor, teacher_head: Tensor, labels: Tensor, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    logs, target = (hidden @ head.T).log_softmax(-1), (wanted @ teacher_head.T).log_softmax(-1)
    kl = F.kl_div(logs, target, log_target=True, reduction="batchmean")
    next_token = F.nll_loss(logs, labels, ignore_index=-100)
    return (1 - weight) * kl + weight * next_token, kl, next_token


@pytest.mark.parametrize("rows", [1, 511, 512, 513, 1100])
@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_value_and_gradients(rows: int, weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.LOGITS_AT_A_TIME, "cpu", 512 * 31)  # chunks of 512 rows
    inputs = problem(rows, ignored=0.2 if rows > 1 else 0)
    got, wanted = distillation_loss(*inputs, weight), direct(*inputs, weight)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(3 * got[0], inputs[:2]), torch.autograd.grad(3 * wanted[0], inputs[:2]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_without_a_single_label_only_the_kl_is_left() -> None:
    *inputs, labels = problem(20)
    loss, kl, next_token = distillation_loss(*inputs, torch.full_like(labels, -100), 0.25)
    assert float(next_token) == 0
    assert float(loss.detach()) == pytest.approx(0.75 * float(kl))
    loss.backward()
    assert torch.isfinite(inputs[0].grad).all()


def test_nothing_to_learn_from_oneself() -> None:
    hidden, head, _, _, labels = problem(600)
    loss, kl, _ = distillation_loss(hidden, head, hidden.detach(), head.detach(), labels)
    loss.backward()
    assert abs(float(kl)) < 1e-6
    assert float(hidden.grad.abs().max()) < 1e-9


def test_how_far_vectors_are_off() -> None:
    generator = torch.Generator().manual_seed(0)
    got, wanted = (torch.randn(3, 7, 12, generator=generator) for _ in range(2))
    wanted[0, 0] *= 1e3  # as a document's first token
    got[1, 2] *= 1e3  # and where the student takes another one for it
    got.requires_grad_()
    ratio = ((got - wanted).double().square().sum(-1)) / wanted.double().square().sum(-1)
    direct = (1 + ratio).log().mean()
    error = hidden_state_loss(got, wanted)
    torch.testing.assert_close(error.double(), direct, rtol=1e-6, atol=0)
    mine, autograd = (torch.autograd.grad(3 * each, got)[0] for each in (error, direct))
    torch.testing.assert_close(mine, autograd, rtol=1e-5, atol=1e-7)
    assert mine[1, 2].norm() < mine.norm(dim=-1).median()
    narrow = got.detach().bfloat16().requires_grad_()
    hidden_state_loss(narrow, wanted.bfloat16()).backward()
    torch.testing.assert_close(3 * narrow.grad.float(), autograd, rtol=5e-2, atol=1e-3)


def test_the_records_carry_no_gradient() -> None:
    loss, kl, next_token = distillation_loss(*problem(8), 0.5)
    assert (loss.requires_grad, kl.requires_grad, next_token.requires_grad) == (True, False, False)


def test_bfloat16_hidden_states_with_a_float32_head() -> None:
    hidden, head, wanted, teacher_head, labels = problem(600, dtype=torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    loss, *_ = distillation_loss(low, head, wanted.bfloat16(), teacher_head.bfloat16(), labels, 0.2)
    exact, *_ = direct(hidden, head, wanted, teacher_head, labels, 0.2)
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-2)
    for got, target in zip(
        torch.autograd.grad(loss, (low, head)), torch.autograd.grad(exact, (hidden, head)), strict=True
    ):
        assert float((got.float() - target).norm() / target.norm()) < 2e-2


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # the compiler's own import
@pytest.mark.parametrize("compiled", [False, True])
def test_the_next_tokens_loss_in_blocks(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(next_token._LOGITS, "cpu", 16 * 31)
    hidden, head, *_, labels = problem(40, ignored=0)
    linear = nn.Linear(12, 31, bias=False, dtype=torch.float64)
    linear.weight = nn.Parameter(head.detach())
    got = next_token.next_token_loss_of_rows(hidden, linear, labels, 7.0, compiled=compiled)
    wanted = F.cross_entropy(hidden @ head.T, labels, reduction="sum") / 7
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    ours, theirs = (
        torch.autograd.grad(2 * got, (hidden, linear.weight)),
        torch.autograd.grad(2 * wanted, (hidden, head)),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

"""Attention of some rows in float64 equals the reference forms, and its gradients those of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from power_retention.evaluation import exact
from power_retention.evaluation.exact import exact_attention, relative_error
from power_retention.ops.reference import attention_form

TOKENS = 23


def inputs() -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, h, w, dtype=torch.float64) for h, w in ((4, 6), (2, 6), (2, 5)))
    return [x.requires_grad_() for x in (q, k, v, -torch.rand(1, TOKENS, 2, dtype=torch.float64))]


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("rows", [[0], [3, 4, 22], list(range(TOKENS))])
@pytest.mark.parametrize("block", [30, 1 << 20])
def test_rows_and_their_gradients(monkeypatch: pytest.MonkeyPatch, p: int, rows: list[int], block: int) -> None:
    monkeypatch.setattr(exact, "_WEIGHTS", block)
    q, k, v, log_g = inputs()
    y = attention_form(q, k, v, log_g, p=p)
    dy = torch.zeros_like(y)
    dy[:, rows] = torch.randn(1, len(rows), *y.shape[2:], dtype=torch.float64)
    wanted = dict(zip(("dq", "dk", "dv", "dlog_g"), torch.autograd.grad(y, (q, k, v, log_g), dy), strict=True))
    details = [x.detach() for x in (q, k, v, log_g)]
    got = exact_attention(*details, torch.tensor(rows), dy[:, rows], p=p)
    assert torch.allclose(got.pop("y"), y[:, rows])
    assert got.keys() == wanted.keys()
    for name, grad in got.items():
        assert torch.allclose(grad, wanted[name], atol=1e-12), name


def test_softmax_rows() -> None:
    q, k, v, _ = inputs()
    heads = (x.transpose(1, 2) for x in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    rows = torch.tensor([0, 7, 22])
    got = exact_attention(q.detach(), k.detach(), v.detach(), None, rows, p=None)
    assert torch.allclose(got["y"], y[:, rows])


def test_what_is_not_finite_is_infinitely_wrong() -> None:
    x = torch.ones(3)
    assert relative_error(torch.tensor([1.0, 1.0, torch.nan]), x) == float("inf")
    assert relative_error(x, x) == 0
    assert relative_error(2 * x, x) == pytest.approx(1)
    assert relative_error(x, 0 * x) == pytest.approx(3**0.5)

"""What layers put out while they are trained can be listened to."""

from __future__ import annotations

import torch

from power_retention.training.layers import outputs_kept
from tiny_models import tiny_model, tokens


def test_outputs_are_kept_in_order_and_not_for_longer() -> None:
    model = tiny_model()
    ids = tokens(2, 9)
    with outputs_kept(model.model.layers) as outputs:
        read = model.model(ids, use_cache=False, output_hidden_states=True)
    assert len(outputs) == len(model.model.layers)
    for got, wanted in zip(outputs, read.hidden_states[1:-1], strict=False):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    torch.testing.assert_close(model.model.norm(outputs[-1]), read.last_hidden_state, rtol=0, atol=0)
    model.model(ids, use_cache=False)
    assert len(outputs) == len(model.model.layers)
    with outputs_kept([]) as none:
        model.model(ids, use_cache=False)
    assert none == []

"""An out-of-memory says what was asked for; it stays PyTorch's own kind of error."""

from __future__ import annotations

import pytest
import torch

from power_retention.errors import PowerRetentionError
from power_retention.ops import Call, backends, power_retention
from power_retention.ops.backends import TorchBackend
from power_retention.ops.triton.sizes import workspace


class Full(TorchBackend):
    """A backend whose device is full in one of the passes."""

    def __init__(self, full_in: str) -> None:
        self.full_in = full_in

    def workspace(self, call: Call, *, backward: bool) -> dict[str, int]:
        return workspace(call, backward)

    def forward(self, call: Call):  # type: ignore[no-untyped-def]
        if self.full_in == "forward":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.00 GiB.")
        return super().forward(call)

    def backward(self, call: Call, *gradients):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 17.00 GiB.")


def run(chunk_size: int) -> None:
    x = torch.randn(1, 64, 2, 16, requires_grad=True)
    power_retention(x, x, x, chunk_size=chunk_size).sum().backward()


@pytest.mark.parametrize("full_in", ["forward", "backward"])
def test_sizes_and_remedy_are_named(monkeypatch: pytest.MonkeyPatch, full_in: str) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", [Full(full_in)])
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        run(chunk_size=4)
    message = str(caught.value)
    assert isinstance(caught.value, PowerRetentionError)
    assert f"The {full_in} pass of power_retention ran out of memory in chunks of 4 tokens" in message
    assert "q [1, 64, 2, 16]" in message
    assert "states at chunk borders" in message
    assert "Use a larger chunk_size than 4" in message
    assert "17.00 GiB" in str(caught.value.__cause__)


def test_attention_form_is_not_told_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_BACKENDS", [Full("forward")])
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"in the attention form.*fewer tokens a call"):
        run(chunk_size=0)
